"""From stored bytes to a training batch and the start of its attack, in one pass.

clean[b] = flip(crop(pad(images[row]))) / 255 and start[b] = clean[b] + noise[b], where the crop,
the flip and the noise of a sample depend only on (seed, epoch, sample index): see `philox`. The
start is not clamped, as in the official REAT code.

Both backends draw the same crops, flips and words and give the same clean pixels, to the bit. The
start may differ in the last place, where the GPU fuses multiplication and addition; normal noise
also by the rounding of logarithm, sine and cosine.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reat_fast.kernels import philox
from reat_fast.kernels.maps import empty_channels_last
from reat_fast.kernels.philox import normal_words, philox_words, signed_word
from reat_fast.kernels.triton_support import (
    Backend,
    cdiv,
    device_number,
    jit,
    kernel_runs_on,
    tl,
    use_triton,
    wrap_triton,
)

Noise = Literal["uniform", "normal", "none"]


def prepare_torch(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    epoch: Tensor,
    eps: Tensor,
    gather: bool,
    padding: int,
    flip: bool,
    noise: str,
) -> tuple[Tensor, Tensor]:
    """Prepare in PyTorch: what the kernel is held against, and the CPU path."""
    height, width, channels = images.shape[1:]
    words = philox.random_bits(seed, epoch, indices, philox.AUGMENT, 3)
    corner = philox.integers(words[:, :2], 2 * padding + 1)  # [B, 2], down and right
    flipped = philox.bernoulli(words[:, 2], 0.5) & flip  # [B]
    batch = torch.arange(len(indices), device=images.device)

    pixels = images.index_select(0, indices) if gather else images
    padded = torch.nn.functional.pad(pixels, (0, 0, padding, padding, padding, padding))
    # A line of a crop is a run of bytes of the padded batch, and index_select copies runs whole.
    line, stride = width * channels, padded.shape[2] * channels
    runs = padded.as_strided((max(padded.numel() - line + 1, 0), line), (1, 1))
    rows = corner[:, :1] + torch.arange(height, device=images.device)  # [B, H], of the padded image
    first = (batch[:, None] * padded.shape[1] + rows) * stride + corner[:, 1:] * channels
    crops = runs.index_select(0, first.flatten()).view_as(pixels)
    either = torch.cat((crops, crops.flip(2)))
    clean = either.index_select(0, batch + len(batch) * flipped).to(torch.float32).div_(255)
    if noise == "none":
        start = clean.clone()
    else:
        start = clean + _noise_torch(seed, epoch, indices, eps, noise, clean)
    return clean.permute(0, 3, 1, 2), start.permute(0, 3, 1, 2)


def _noise_torch(
    seed: Tensor, epoch: Tensor, indices: Tensor, eps: Tensor, noise: str, clean: Tensor
) -> Tensor:
    # Element e of a sample, in the order of memory, takes word e of its purpose.
    size = clean.shape[1:].numel()
    words = philox.random_bits(seed, epoch, indices, philox.START, size + size % 2)
    unit = philox.normal(words) if noise == "normal" else philox.uniform(words) * 2 - 1
    return (unit[:, :size] * eps.reshape(-1, 1)).view_as(clean)


@jit
def byte_number(byte):  # type: ignore[no-untyped-def]
    """Turn bytes into float32, as the last bits of 2**23, which is sooner than a conversion."""
    return (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@jit
def _prepare_kernel(  # type: ignore[no-untyped-def]
    images_ptr,
    indices_ptr,
    seed_ptr,
    epoch_ptr,
    eps_ptr,
    clean_ptr,
    start_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    EPS_STRIDE: tl.constexpr,
    GATHER: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,
    NOISY: tl.constexpr,
    NORMAL: tl.constexpr,
    AUGMENT: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LINE: tl.constexpr = WIDTH * CHANNELS
    SIZE: tl.constexpr = HEIGHT * LINE
    batch = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.load(indices_ptr + batch)
    seed = tl.load(seed_ptr)
    epoch = tl.load(epoch_ptr)

    # Where its byte is, a row and a place in it: what is outside the image is 0.
    row = element // LINE
    place = element - row * LINE
    word0, word1, word2, _ = philox_words(seed, epoch, sample, tl.full([], 0, tl.int32), AUGMENT)
    if FLIP:
        mirrored = LINE - CHANNELS - place + 2 * (place % CHANNELS)
        place = tl.where(word2 < 0x80000000, mirrored, place)
    if PADDING > 0:
        row += tl.umulhi(word0, 2 * PADDING + 1).to(tl.int32) - PADDING
        place += (tl.umulhi(word1, 2 * PADDING + 1).to(tl.int32) - PADDING) * CHANNELS
    # As unsigned numbers, below zero is above all.
    visible = (row.to(tl.uint32) < HEIGHT) & (place.to(tl.uint32) < LINE)
    source = (sample if GATHER else batch) * SIZE
    pixel = tl.load(images_ptr + source + (row * LINE + place), mask=visible, other=0)
    pixel = byte_number(pixel)
    # pixel / 255 to the bit, however the compiler fuses it: the product by 257 / 65536 is exact.
    clean = pixel * 5.983839201917363e-08 + pixel * 0.0039215087890625
    start = clean
    if NOISY:
        # Four words a counter, side by side in memory: each thread keeps the four it drew.
        quarter = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        word0, word1, word2, word3 = philox_words(seed, epoch, sample, quarter, START)
        if NORMAL:
            unit0, unit1 = normal_words(word0, word1)
            unit2, unit3 = normal_words(word2, word3)
        else:
            unit0, unit1 = signed_word(word0), signed_word(word1)
            unit2, unit3 = signed_word(word2), signed_word(word3)
        unit = tl.interleave(tl.interleave(unit0, unit2), tl.interleave(unit1, unit3))
        start = clean + unit * tl.load(eps_ptr + batch * EPS_STRIDE)
    inside = element < SIZE
    tl.store(clean_ptr + batch * SIZE + element, clean, mask=inside)
    tl.store(start_ptr + batch * SIZE + element, start, mask=inside)


@torch.library.triton_op("reat_fast::prepare", mutates_args=())
def _prepare(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    epoch: Tensor,
    eps: Tensor,
    gather: bool,
    padding: int,
    flip: bool,
    noise: str,
    block: int,
) -> tuple[Tensor, Tensor]:
    if not kernel_runs_on(images) or not len(indices):
        return prepare_torch(images, indices, seed, epoch, eps, gather, padding, flip, noise)
    batch, (height, width, channels) = len(indices), images.shape[1:]
    clean = empty_channels_last((batch, channels, height, width), images, torch.float32)
    start = torch.empty_like(clean)
    wrap_triton(_prepare_kernel)[(batch, cdiv(height * width * channels, block))](
        images,
        indices,
        seed,
        epoch,
        eps,
        clean,
        start,
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=channels,
        EPS_STRIDE=eps.ndim,
        GATHER=gather,
        PADDING=padding,
        FLIP=flip,
        NOISY=noise != "none",
        NORMAL=noise == "normal",
        AUGMENT=philox.AUGMENT,
        START=philox.START,
        BLOCK=block,
        num_warps=2,  # 16 elements a thread share what is drawn for their crop
    )
    return clean, start


def prepare(
    images: Tensor,
    indices: Tensor,
    seed: int | Tensor,
    epoch: int | Tensor,
    eps: float | Tensor,
    *,
    gather: bool = True,
    padding: int = 4,
    flip: bool = True,
    noise: Noise = "uniform",
    backend: Backend = "auto",
    block: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Gather, crop, flip and scale a batch, and add the random start of the attack; never syncs.

    images: uint8, contiguous: the whole set [N, H, W, C], of which row indices[b] is sample b, or
    with gather=False the batch [B, H, W, C] itself. indices: int64 [B] on the same device, the
    samples' identity for the random numbers; not checked against N on a GPU. seed, epoch: int or
    0-dim int64 tensor. eps: number, 0-dim tensor or [B]: half-width of the uniform noise, standard
    deviation of the normal noise. padding: zeros round the image, the crop moves by up to so many
    pixels; flip: mirror half of the images; padding=0, flip=False is the evaluation transform.
    block: elements per Triton program, a power of two.
    Returns (clean, start), float32 [B, C, H, W] in channels_last memory, never the same memory.
    Raises ValueError for a wrong dtype, shape, device or noise. Source: official REAT data.py and
    PGD start.
    """
    _check(images, indices, gather, padding, noise)
    indices = indices.contiguous()
    arguments = (
        images,
        indices,
        device_counter(seed, indices, "seed"),
        device_counter(epoch, indices, "epoch"),
        device_number(eps, indices, "eps", torch.float32),
        gather,
        padding,
        flip,
        noise,
    )
    if use_triton(backend, images):
        clean, start = _prepare(*arguments, block)
        return clean, start
    return prepare_torch(*arguments)


def _check(images: Tensor, indices: Tensor, gather: bool, padding: int, noise: str) -> None:
    check_batch(images, indices, gather)
    if padding < 0:
        raise ValueError(f"padding={padding} is negative: give 0 to crop nothing")
    if noise not in ("uniform", "normal", "none"):
        raise ValueError(f"noise={noise!r} is unknown: give 'uniform', 'normal' or 'none'")


def check_batch(images: Tensor, indices: Tensor, gather: bool) -> None:
    """Raise ValueError unless stored images, whole set or batch, and indices belong together."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: give uint8 images "
            "[N, H, W, C]"
        )
    if not images.is_contiguous():
        raise ValueError("images are not contiguous: give them as [N, H, W, C] in memory")
    if indices.dtype != torch.int64 or indices.ndim != 1 or indices.device != images.device:
        raise ValueError(
            f"indices are {indices.dtype} of shape {tuple(indices.shape)} on {indices.device}: "
            f"give int64 [B] on {images.device}, where the images are"
        )
    if not gather and len(images) != len(indices):
        raise ValueError(
            f"gather=False takes one image per index, got {len(images)} images and "
            f"{len(indices)} indices: give the batch itself, or gather=True"
        )


def device_counter(value: int | Tensor, indices: Tensor, name: str) -> Tensor:
    """Put a seed or an epoch where kernels read it, int64; raises ValueError for more than one."""
    if isinstance(value, int):
        value = (value + 2**63) % 2**64 - 2**63  # the same 64 bits as a signed number
    number = device_number(value, indices, name, torch.int64)
    if number.ndim != 0:
        raise ValueError(f"{name} has shape {tuple(number.shape)}: give one number for the batch")
    return number
