"""The kernel of resident_conv, in Gluon: copies, barriers and products by name.

Of a tile it fetches one box for each of the three shifts along a row, with the rows above and
below; the three shifts across rows are the same box, read from its first, second or third row on.
The next tile's boxes are on their way while this one's are multiplied; what is added at the end,
and the mask, come in beside.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

gl: Any
gluon: Any
try:
    from triton.experimental import gluon  # type: ignore[import-untyped, import-not-found, unused-ignore, no-redef]
    from triton.experimental.gluon import language as gl  # type: ignore[import-untyped, import-not-found, unused-ignore, no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        TensorDescriptor as TensorDescriptor,
    )

    GLUON_INSTALLED = True
except ImportError:
    gl = SimpleNamespace(constexpr=Any)
    GLUON_INSTALLED = False


def _jit(kernel: Callable[..., Any]) -> Any:
    return gluon.jit(kernel) if GLUON_INSTALLED else kernel


@_jit
def _fetch(  # type: ignore[no-untyped-def]
    box_desc,
    edge_desc,
    rows,
    ready,
    shift: gl.constexpr,
    tile,
    tiles,
    bands,
    GRADIENT: gl.constexpr,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    CHANNELS: gl.constexpr,
):
    """Send for the box of a shift along the row, if there is such a tile: its rows and two more."""
    first = shift * (ROWS + 2)
    box = rows.index(first)._reinterpret(
        box_desc.dtype, [1, ROWS, WIDTH, CHANNELS], box_desc.layout
    )
    edge = rows.index(first + ROWS)._reinterpret(
        box_desc.dtype, [1, 2, WIDTH, CHANNELS], edge_desc.layout
    )
    inside = tile < tiles
    row = tile % bands * ROWS - 1
    across = 1 - shift if GRADIENT else shift - 1
    arrived = ready.index(shift)
    mbarrier.expect(arrived, (ROWS + 2) * WIDTH * CHANNELS * 2, pred=inside)
    place = [tile // bands, row, across, 0]
    tma.async_copy_global_to_shared(box_desc, place, arrived, box, pred=inside)
    below = [tile // bands, row + ROWS, across, 0]
    tma.async_copy_global_to_shared(edge_desc, below, arrived, edge, pred=inside)


@_jit
def _products(  # type: ignore[no-untyped-def]
    sums,
    rows,
    weights,
    ready,
    shift: gl.constexpr,
    phase,
    flat: gl.constexpr,
    GRADIENT: gl.constexpr,
    ROWS: gl.constexpr,
    PIXELS: gl.constexpr,
    CHANNELS: gl.constexpr,
):
    """Send for the products of a shift along the row, once its box is there: one for each row."""
    mbarrier.wait(ready.index(shift), phase)
    for down in gl.static_range(3):
        pixels = rows.index(shift * (ROWS + 2) + down)
        pixels = pixels._reinterpret(weights.dtype, [PIXELS, CHANNELS], flat).permute((1, 0))
        # In a gradient the weight of a tap meets the pixel on its other side.
        weight = weights.index(3 * (2 - down if GRADIENT else down) + shift)
        if GRADIENT:
            weight = weight.permute((1, 0))
        sums = warpgroup_mma(weight, pixels, sums, is_async=True)
    return sums


@_jit
def _send_beside(  # type: ignore[no-untyped-def]
    added_desc,
    relu_desc,
    added_box,
    relu_box,
    arrived,
    place,
    BESIDE: gl.constexpr,
    BYTES: gl.constexpr,
):
    """Send for what is added to a tile and what masks it."""
    if BESIDE > 0:
        mbarrier.expect(arrived, BESIDE * BYTES)
    if added_desc is not None:
        tma.async_copy_global_to_shared(added_desc, place, arrived, added_box)
    if relu_desc is not None:
        tma.async_copy_global_to_shared(relu_desc, place, arrived, relu_box)


@_jit
def _finish(  # type: ignore[no-untyped-def]
    sums,
    bias_ptr,
    added_desc,
    relu_desc,
    added_box,
    relu_box,
    output_desc,
    made,
    arrived,
    phase,
    place,
    layout: gl.constexpr,
    BESIDE: gl.constexpr,
    GRADIENT: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PIXELS: gl.constexpr,
    CHANNELS: gl.constexpr,
):
    """Make a tile of the output of its sums, and send it off."""
    if bias_ptr is not None:
        channel = gl.arange(0, CHANNELS, gl.SliceLayout(1, layout))
        bias = gl.load(bias_ptr + channel, mask=channel < OUTPUTS, other=0.0)
        sums += gl.expand_dims(bias.to(gl.float32), 1)
    if BESIDE > 0:
        mbarrier.wait(arrived, phase)
    if added_desc is not None:
        added = added_box.reshape([PIXELS, CHANNELS]).permute((1, 0)).load(layout)
        sums += added.to(gl.float32)
    if relu_desc is not None:
        relu = relu_box.reshape([PIXELS, CHANNELS]).permute((1, 0)).load(layout)
        sums = gl.where(relu.to(gl.float32) <= 0, 0.0, sums)
    if not GRADIENT:
        sums = gl.where(sums < 0, 0.0, sums)
    tma.store_wait(0)  # of the tile before
    made.reshape([PIXELS, CHANNELS]).permute((1, 0)).store(sums.to(made.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(output_desc, place, made)


@_jit
def _resident_conv_kernel(  # type: ignore[no-untyped-def]
    box_desc,
    edge_desc,
    weight_desc,
    bias_ptr,
    added_desc,
    relu_desc,
    output_desc,
    tiles,
    bands,
    GRADIENT: gl.constexpr,
    INPUTS: gl.constexpr,  # channels that the layer reads, and those it writes
    OUTPUTS: gl.constexpr,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    CHANNELS: gl.constexpr,
):
    PIXELS: gl.constexpr = ROWS * WIDTH
    dtype: gl.constexpr = box_desc.dtype
    flat: gl.constexpr = weight_desc.layout
    # Rows of the three boxes, one after another, so that a box can be read from any row on.
    rows = gl.allocate_shared_memory(dtype, [3 * (ROWS + 2), WIDTH, CHANNELS], flat)
    weights = gl.allocate_shared_memory(dtype, [9, CHANNELS, CHANNELS], flat)
    made = gl.allocate_shared_memory(dtype, [1, ROWS, WIDTH, CHANNELS], output_desc.layout)
    BESIDE: gl.constexpr = (added_desc is not None) + (relu_desc is not None)
    added_box = made
    relu_box = made
    if added_desc is not None:
        added_box = gl.allocate_shared_memory(dtype, [1, ROWS, WIDTH, CHANNELS], added_desc.layout)
    if relu_desc is not None:
        relu_box = gl.allocate_shared_memory(dtype, [1, ROWS, WIDTH, CHANNELS], relu_desc.layout)
    # One for each box, one for the weights, one for what comes in beside.
    ready = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(5):
        mbarrier.init(ready.index(k), count=1)
    fence_async_shared()  # so that copies see the barriers

    mbarrier.expect(ready.index(3), 9 * CHANNELS * CHANNELS * 2)
    # With fewer inputs than CHANNELS the next taps follow, for outputs that are not stored.
    for k in gl.static_range(9):
        tma.async_copy_global_to_shared(
            weight_desc, [0, k * INPUTS], ready.index(3), weights.index(k)
        )
    first = gl.program_id(0)
    for k in gl.static_range(3):
        _fetch(
            *(box_desc, edge_desc, rows, ready, k, first, tiles, bands),
            *(GRADIENT, ROWS, WIDTH, CHANNELS),
        )
    mbarrier.wait(ready.index(3), 0)

    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIXELS, 16]
    )
    phase = 0
    for tile in range(first, tiles, gl.num_programs(0)):
        later = tile + gl.num_programs(0)
        place = [tile // bands, tile % bands * ROWS, 0, 0]
        _send_beside(
            *(added_desc, relu_desc, added_box, relu_box, ready.index(4), place),
            *(BESIDE, PIXELS * CHANNELS * 2),
        )
        sums = gl.zeros((CHANNELS, PIXELS), dtype=gl.float32, layout=layout)
        for shift in gl.static_range(3):
            sums = _products(
                *(sums, rows, weights, ready, shift, phase, flat),
                *(GRADIENT, ROWS, PIXELS, CHANNELS),
            )
            if shift > 0:  # the products with the box before are done once three are left
                sums = warpgroup_mma_wait(num_outstanding=3, deps=(sums,))
                _fetch(
                    *(box_desc, edge_desc, rows, ready, shift - 1, later, tiles, bands),
                    *(GRADIENT, ROWS, WIDTH, CHANNELS),
                )
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        _fetch(
            *(box_desc, edge_desc, rows, ready, 2, later, tiles, bands),
            *(GRADIENT, ROWS, WIDTH, CHANNELS),
        )
        _finish(
            *(sums, bias_ptr, added_desc, relu_desc, added_box, relu_box, output_desc, made),
            *(ready.index(4), phase, place, layout),
            *(BESIDE, GRADIENT, OUTPUTS, PIXELS, CHANNELS),
        )
        phase ^= 1
    tma.store_wait(0)
