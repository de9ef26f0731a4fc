"""What processes of the tests do together; they import it by this name."""

import hashlib
import os
import signal
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ptglab.train import backbones, engine, finetune, optim, pretrain


class Sum(torch.autograd.Function):
    """The sum over all processes, and over their gradients on the way back."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient := gradient.clone())
        return gradient


class WholeBatch(nn.BatchNorm1d):
    """What nn.SyncBatchNorm does on GPUs, on CPUs: batch norm of the rows of all processes."""

    def forward(self, x):
        if not self.training:
            means, variances = self.running_mean, self.running_var
            return F.batch_norm(x, means, variances, self.weight, self.bias, False, 0.0, self.eps)
        over, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        n = Sum.apply(x.new_tensor(x.numel() / x.shape[1]))
        mean = Sum.apply(x.sum(over)) / n
        centred = x - mean.view(shape)
        var = Sum.apply(centred.square().sum(over)) / n
        y = centred / (var + self.eps).sqrt().view(shape)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y


def whole_batch(network):
    """Make the batch norms of `network` see the rows of all processes, as convert_sync_batchnorm does."""
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                other = WholeBatch(norm.num_features, norm.eps, norm.momentum, norm.affine).to(norm.running_mean.dtype)
                for key in norm.state_dict():  # the same tensors, which the optimizer knows
                    setattr(other, key, getattr(norm, key))
                setattr(parent, name, other)


@dataclass(frozen=True)
class Exact(engine.Place):
    """A place that computes in float64, where what is left of a difference is no rounding."""

    def put(self, module):
        return super().put(module).double()

    def batch(self, x):
        return super().batch(x).double()


def exact(place, stack):
    """Return such a place, for whose block losses leave float64 as it is, and batch norm sees the whole batch."""
    single = torch.Tensor.float
    double = mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
    stack.enter_context(double)
    stack.enter_context(mock.patch.object(nn.SyncBatchNorm, "convert_sync_batchnorm", whole_batch))
    return Exact(place.device, place.precision, place.compile_from, replace(place.shard, synchronised=True))


def pretrained(images, options, width, place):
    """Yield of every method the losses and gradients of every step, and the weights after all of them, in float64."""
    for method, spec in pretrain.METHODS.items():
        values, network = [], backbones.build("resnet18", width, images, 0)

        def noted(*z, spec=spec, values=values, **kwargs):
            values.append(spec.loss(*z, **kwargs))
            return values[-1]

        with ExitStack() as stack:
            where = exact(place, stack)
            stack.enter_context(mock.patch.dict(pretrain.METHODS, {method: replace(spec, loss=noted)}))
            yield watched(optim.LARS, network, pretrain.train(network, images, method, place=where, **options), values)


def finetuned(images, labels, options, width, place):
    """Yield the same of a fine-tuning, with the margins and the records; linear, too, of a frozen backbone."""
    for mode in ("full", "linear"):
        network, margins = backbones.build("resnet18", width, images, 0), finetune._margins
        head, history = backbones.head(network.num_features, 10), np.zeros((options["epochs"], len(labels)), np.float32)
        with ExitStack() as stack:
            where = exact(place, stack)
            single = mock.patch.object(finetune, "_margins", lambda *of: margins(*of).to(torch.float32))  # noqa: B023
            stack.enter_context(single)  # into an array of float32
            average = finetune.ema(network, head, 0.5)
            steps = finetune.train(network, head, images, labels, mode, place=where, history=history, average=average,
                                   **options)  # fmt: skip
            yield watched(torch.optim.SGD, nn.Sequential(network, head), steps, []) | {"history": history}


def trained(images, labels, pretraining, finetuning, width, place):
    """Yield what `pretrained` does, then what `finetuned` does."""
    yield from pretrained(images, pretraining, width, place)
    yield from finetuned(images, labels, finetuning, width, place)


def watched(optimizer, network, steps, values):
    """Run `steps` to their end; return what came of it, as arrays, and whether all processes hold the same weights."""
    gradients, step = [], optimizer.step

    def noted(self, *args):
        gradients.append([p.grad.numpy(force=True).copy() for group in self.param_groups for p in group["params"]])
        return step(self, *args)

    with mock.patch.object(optimizer, "step", noted):
        records = list(steps)
    state = {k: v.numpy(force=True).copy() for k, v in network.state_dict().items()}
    digests = [hashlib.sha256(b"".join(v.tobytes() for v in state.values())).hexdigest()]
    if dist.is_initialized():
        dist.all_gather_object(digests := [None] * dist.get_world_size(), digests)
    return {"losses": [v.item() for v in values], "gradients": gradients, "weights": state, "records": records,
            "same": all(each == digests[0] for each in digests)}  # fmt: skip


def gathered(place):
    """Yield, of batches of 5 rows and 1: all rows, and each process's own with the gradient of their weighted sum."""
    shard = place.shard
    for total in (5, 1):
        whole = torch.arange(2.0 * total).view(total, 2)
        mine = whole[shard.rows(total)].clone().requires_grad_()
        back = shard.all_gather(mine, total)
        (back * (1 + whole)).sum().backward()
        parts = [None] * shard.world
        dist.all_gather_object(parts, (len(mine), mine.grad.tolist()))
        yield {"total": total, "back": back.tolist(), "parts": parts}


def unlucky(place):
    """Yield a record once all processes have met; then process 1 fails, and the others wait for it."""
    dist.barrier()
    yield {"epoch": 1}
    if place.shard.rank == 1:
        raise RuntimeError("no luck here")
    dist.barrier()
    yield {"epoch": 2}


def killed(place):
    """The same, but process 1 is killed."""
    dist.barrier()
    yield {"epoch": 1}
    if place.shard.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def endless(place):
    """Yield the ids of all processes, and go on for ever."""
    ids = [None] * place.shard.world
    dist.all_gather_object(ids, os.getpid())
    while True:
        yield {"ids": ids}
        dist.barrier()


CPU = engine.place("cpu")
