"""The network as the attack sees it: constant weights, BatchNorm folded into the convolutions.

While an attack runs, weights and running statistics are constant, so a convolution followed by
BatchNorm in eval mode is one convolution with a bias. The copy has weights of its own that ask for
no gradient, hence no weight gradient can be computed by mistake, and they stay in the same memory,
hence a captured step may refresh them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reat_fast.kernels.image_gradient import use_col2im_
from reat_fast.kernels.own_conv import faster_on
from reat_fast.kernels.triton_support import Backend
from reat_fast.kernels.winograd import WinogradConv2d, use_winograd_, winograd_pays
from reat_fast.networks.borrowed import first_tensor
from reat_fast.networks.compiling import compile_whole
from reat_fast.networks.copies import copy_of
from reat_fast.networks.folding import Fold, fold_batchnorms_
from reat_fast.networks.fused_relus import JoinedBias, fuse_relus
from reat_fast.networks.preactivation import Affine, refresh_affines_

Form = Literal["eager", "compiled", "cudnn", "triton", "cpu"]
# Takes any network and dtype; fastest_form has a faster one.
DEFAULT_FORM: Form = "eager"

Loss = Callable[[Tensor, Tensor], Tensor]


def fastest_form(dtype: torch.dtype, device: torch.device) -> Form:
    """Return the form that starts without compiling and is the fastest for a dtype on a device.

    On an H100, bfloat16, ResNet-18, whole captured step: eager 18.1 ms, cudnn 14.3, triton 10.5
    (python -m bench.bench_step). docs/performance.md has those of now, of a CPU and of compiled
    forms.
    """
    low = dtype.itemsize < 4
    if device.type == "cuda" and low:
        return "triton" if faster_on(device) else "cudnn"
    return "eager" if low or device.type == "cuda" else "cpu"


class FrozenNetwork:
    """Compute a network's eval-mode logits with BatchNorm folded; refresh() takes up new weights.

    network: any module from images to logits; it is read, never written. Calling the frozen one on
    images [B, C, H, W] in [0, 1] returns logits [B, K] that equal those of the network in eval mode
    up to rounding. dtype: that of all but BatchNorm; weights are folded in their own precision and
    then rounded. form: how logits and gradient are computed:

    * eager: by PyTorch, layer by layer; compiled: by torch.compile, see input_gradient.
    * cudnn: relu(conv(x) + y), the sum optional, is one op with its own backward, and images are
      padded to 8 channels.
    * triton: as cudnn, but by a kernel of ours where one takes the shape (kernels.own_conv), and
      relu(bn(x + y)) is one op where BatchNorm comes before a convolution.
    * cpu: wide 3x3 convolutions take fewer multiplications, on CPUs where that is faster, and
      images find their gradient through a strided convolution faster.

    rewritten: False leaves the network as it is, in eager form.
    unfolded: names of the BatchNorms that stay: those that do not follow a convolution, and all of
    a network that cannot be traced. fused: number of convolutions rewritten. transformed: wide
    ones that "cpu" changed. images_dtype: what images are rounded to; images given in it have
    their gradient in it.
    input_gradient: with "compiled" forward and gradient in one region, a function of (images,
    labels, loss) that returns the gradient of the scalar loss(logits, labels) by the images; else
    None, as torch.autograd computes it.
    """

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype | None = None,
        form: Form = DEFAULT_FORM,
        rewritten: bool = True,
    ) -> None:
        form = form if rewritten else "eager"
        own = copy_of(network).eval().requires_grad_(False)
        precision = first_tensor(network).dtype
        self.images_dtype = precision if dtype is None else dtype
        self._folds = fold_batchnorms_(own, network) if rewritten else []
        batchnorms = {n: m for n, m in own.named_modules() if isinstance(m, _BatchNorm)}
        self.unfolded = list(batchnorms)
        own.to(self.images_dtype)
        for batchnorm in batchnorms.values():
            batchnorm.to(precision)
        self._kept_own, self._kept_source = _kept(own, network, self._folds)
        self._copy, self.fused = own, 0
        self._biases: list[JoinedBias] = []
        self._affines: list[Affine] = []
        if form in ("cudnn", "triton"):
            backend: Backend = "auto" if form == "cudnn" else form
            fused = fuse_relus(own, backend, preactivations=form != "cudnn")
            self._copy, self.fused, self._biases, self._affines = fused
        self.transformed: list[WinogradConv2d] = []
        if form == "cpu" and self.images_dtype.itemsize >= 4:  # the sums are too fine for bfloat16
            self.transformed = use_winograd_(own) if winograd_pays() else []
            use_col2im_(own)
        self.input_gradient: Callable[[Tensor, Tensor, Loss], Tensor] | None = None
        if form == "compiled":
            self.input_gradient = compile_whole(self._gradient, "--attack-form compiled")
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take up the weights and statistics that the network has now; may not sync."""
        torch._foreach_copy_(self._kept_own, self._kept_source)
        if self._folds:
            self._fold()
        if self._biases:
            sums = torch._foreach_add(
                [b.own for b in self._biases], [b.other for b in self._biases]
            )
            torch._foreach_copy_([b.total for b in self._biases], sums)
        refresh_affines_(self._affines)
        for conv in self.transformed:
            conv.refresh_()

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self._copy(images.to(self.images_dtype))
        return logits

    def _fold(self) -> None:
        convs, bns = [fold.conv for fold in self._folds], [fold.bn for fold in self._folds]
        scales = torch._foreach_add([bn.running_var for bn in bns], [bn.eps for bn in bns])
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(scales, [bn.weight for bn in bns])
        means: list[Tensor] = [
            bn.running_mean if conv.bias is None else bn.running_mean - conv.bias
            for conv, bn in zip(convs, bns, strict=True)
        ]
        biases = torch._foreach_addcmul([bn.bias for bn in bns], means, scales, value=-1)
        torch._foreach_copy_([fold.bias for fold in self._folds], biases)
        for fold, scale in zip(self._folds, scales, strict=True):
            # One pass: multiplied in the precision of the network, rounded as it is written.
            torch.mul(fold.conv.weight, scale.view(-1, 1, 1, 1), out=fold.weight)

    def _gradient(self, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        def total(at: Tensor) -> Tensor:
            return loss(self(at), labels)

        gradient: Tensor = torch.func.grad(total)(images)
        return gradient


def _kept(
    own: nn.Module, source: nn.Module, folds: list[Fold]
) -> tuple[list[Tensor], list[Tensor]]:
    """Pair the tensors that the copy takes up as they are with those of the network."""
    folded = {id(tensor) for fold in folds for tensor in (fold.weight, fold.bias)}
    sources = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    tensors = {**dict(own.named_parameters()), **dict(own.named_buffers())}
    kept = [name for name, tensor in tensors.items() if id(tensor) not in folded]
    return [tensors[name] for name in kept], [sources[name] for name in kept]
