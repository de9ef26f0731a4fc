"""What processes that train one network do together: each takes its share of a batch, and all hold what became of it.

Every process computes the loss of the whole batch from the outputs of all, and the gradient of that loss with respect
to its own rows; summed, these are the gradients of one process with the whole batch. A process alone, outside
`together`, does nothing of this: every function then returns what it is given.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
PATIENCE = timedelta(seconds=50)  # for another process, in the midst of training

_group: dist.ProcessGroup | None = None


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Have the processes that torch.distributed has brought together train as one in this block, on such devices."""
    global _group
    _group = dist.new_group(backend=BACKENDS[device.type], timeout=PATIENCE)
    try:
        yield
    finally:
        _group = None


def world() -> int:
    """Return how many processes train together."""
    return _group.size() if _group else 1


def rank() -> int:
    """Return which of them this one is; 0 is the one that writes."""
    return _group.rank() if _group else 0


def told(ask: Callable, *args) -> object:
    """Return what `ask(*args)` returns in process 0, which alone calls it, in all of them."""
    if world() == 1:
        return ask(*args)
    answer = [None if rank() else ask(*args)]
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    return answer[0]


def share(rows: Tensor) -> Tensor:
    """Return this process's part of the rows of a whole batch: sizes differ by at most one, and may be 0."""
    return rows.tensor_split(world())[rank()] if _group else rows


def gathered(mine: Tensor, total: int) -> Tensor:
    """Return the `total` rows of all shares, float32, in order. Gradients flow into this process's own."""
    if world() == 1:
        return mine
    mine, sizes = mine.float(), [len(part) for part in torch.arange(total).tensor_split(world())]
    padded = mine.new_zeros(max(sizes), *mine.shape[1:])
    padded[: len(mine)] = mine.detach()
    parts = [part[:size] for part, size in zip(_from_all(padded), sizes, strict=True)]
    parts[rank()] = mine
    return torch.cat(parts)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in each of them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world() == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=_group)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def _from_all(x: Tensor) -> Tensor:
    """Return [P, ...]: `x` of every process, which must be of the same shape."""
    parts = x.new_empty(world(), *x.shape)
    dist.all_gather(list(parts), x.contiguous(), group=_group)
    return parts


class _Normalise(torch.autograd.Function):
    """x [B, C, ...] to mean 0 and variance 1 in each channel over the rows of all processes, then scaled and moved.

    nn.SyncBatchNorm, which does the same, is for GPUs only. Variances are put together by equation 2.1 of Chan, Golub &
    LeVeque 1983; the gradient is that of Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3, its two sums over all.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        values, over, c = x.float(), _others(x), x.shape[1]
        mine = values.new_zeros(2, c)
        if len(x):
            mine = torch.stack(torch.var_mean(values, over, correction=0))
        mine = torch.cat([mine.flatten(), mine.new_full((1,), x.numel() // c)])
        variances, means, counts = _from_all(mine).split([c, c, 1], 1)  # [P, C], [P, C], [P, 1]
        n = counts.sum()
        mean = (counts * means).sum(0) / n
        var = (counts * (variances + (means - mean).square())).sum(0) / n
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, n)
        ctx.mark_non_differentiable(mean, var, n)
        y = (values - _wide(mean, x)).mul_(_wide(scale if weight is None else scale * weight, x))
        return (y if bias is None else y.add_(_wide(bias, x))).to(x.dtype), mean, var, n

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, weight, mean, scale, n = ctx.saved_tensors
        dy, normal = dy.float(), (x.float() - _wide(mean, x)).mul_(_wide(scale, x))
        mine = torch.stack([dy.sum(_others(x)), (dy * normal).sum(_others(x))])  # of this process, [2, C]
        sums = mine.clone()
        dist.all_reduce(sums, group=_group)
        dx = dy.sub(_wide(sums[0] / n, x)).sub_(normal.mul_(_wide(sums[1] / n, x)))
        dx = dx.mul_(_wide(scale if weight is None else scale * weight, x)).to(x.dtype)
        return dx, *((None, None) if weight is None else (mine[1], mine[0])), None


def _others(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (x.ndim - 2))


class _WholeBatch:
    """Batch norm whose batch, in training, is that of all processes; its running variance is the unbiased one."""

    def forward(self, x: Tensor) -> Tensor:
        if world() == 1 or not self.training:
            return super().forward(x)
        y, mean, var, n = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return y


class BatchNorm1d(_WholeBatch, nn.BatchNorm1d):
    """nn.BatchNorm1d of the whole batch."""


class BatchNorm2d(_WholeBatch, nn.BatchNorm2d):
    """nn.BatchNorm2d of the whole batch."""
