"""BatchNorm over the batches of several processes, so that they normalise as one would.

One collective forward and one backward, of this engine's own so that they can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reat_fast.engine.distributed import World


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that in train mode normalises by the statistics of all processes' batches."""

    world: World

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        output: Tensor
        output, mean, variance, number = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.running_mean, self.eps, self.world
        )
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (number / (number - 1).clamp_min(1)), self.momentum)
        return output


def synchronise_batchnorm_(model: nn.Module, world: World) -> None:
    """Make every BatchNorm2d of a network use the whole batch; parameters and names stay.

    Errors: ValueError for other kinds of BatchNorm.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm
            setattr(module, "world", world)  # noqa: B010  # the checker still sees a BatchNorm2d
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"--sync-batchnorm: cannot take {type(module).__name__} ({name}); "
                "go on with --no-sync-batchnorm"
            )


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of every BatchNorm of a network."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    found = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in found if tensor is not None]


class _Normalise(torch.autograd.Function):
    """Normalise by statistics over all processes; the backward sums over them too."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        eps: float,
        world: World,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Sums of x and x^2 round the running mean, which all processes share: one collective, and
        # none of the cancellation that sums round zero would have.
        centred = x.to(weight.dtype) - _per_channel(shift)
        number = centred.new_full((1,), x.numel() // max(x.shape[1], 1))
        sums = [centred.sum((0, 2, 3)), centred.square().sum((0, 2, 3)), number]
        first, second, number = world.sum_(torch.cat(sums)).split([x.shape[1], x.shape[1], 1])
        mean = first / number
        variance = (second / number - mean.square()).clamp_min(0)
        inverse = (variance + eps).rsqrt()
        normal = (centred - _per_channel(mean)) * _per_channel(inverse)
        ctx.save_for_backward(normal, weight, inverse, number)
        ctx.world = world  # type: ignore[attr-defined]
        output = (normal * _per_channel(weight) + _per_channel(bias)).to(x.dtype)
        results = output, mean + shift, variance, number
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
        normal, weight, inverse, number = ctx.saved_tensors
        own = gradient.to(weight.dtype)
        of_bias, of_weight = own.sum((0, 2, 3)), (own * normal).sum((0, 2, 3))
        shared = ctx.world.sum_(torch.cat([of_bias, of_weight])) / number
        mean, projection = (_per_channel(t) for t in shared.chunk(2))
        of_x = (own - mean - normal * projection) * _per_channel(weight * inverse)
        return of_x.to(gradient.dtype), of_weight, of_bias, None, None, None


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
