"""What processes of the tests do together; the others of them import it by this name."""

import os
import time
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from ptglab.train import backbones, collectives, engine, finetune, optim, pretrain


class Exact(engine.Place):
    """A place that computes in float64, where what is left of a difference is no rounding."""

    def put(self, module):
        return super().put(module).double()

    def batch(self, x):
        return super().batch(x).double()


def exact(place):
    """Return such a place, and the context in which losses leave float64 as it is."""
    single = torch.Tensor.float
    plain = mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
    return Exact(place.device, place.precision, place.compile_from), plain


def pretrained(images, place, options, width):
    """Yield of every method the losses and gradients of every step, and the weights after all of them, in float64."""
    place, plain = exact(place)
    for method, spec in pretrain.METHODS.items():
        values, network = [], backbones.build("resnet18", width, images, 0)

        def noted(z1, z2, spec=spec, values=values, **kwargs):
            values.append(spec.loss(z1, z2, **kwargs))
            return values[-1]

        with plain, mock.patch.dict(pretrain.METHODS, {method: replace(spec, loss=noted)}):
            yield watched(optim.LARS, network, pretrain.train(network, images, method, place=place, **options), values)


def finetuned(images, labels, place, options, width, history):
    """The same of a fine-tuning, with the margins and the records."""
    place, plain = exact(place)
    network = backbones.build("resnet18", width, images, 0)
    head = backbones.head(network.num_features, 10)
    margins = finetune._margins  # into an array of float32
    with plain, mock.patch.object(finetune, "_margins", lambda *of: margins(*of).to(torch.float32)):
        steps = finetune.train(network, head, images, labels, place=place, history=history, **options)
        yield watched(torch.optim.SGD, torch.nn.Sequential(network, head), steps, [])


def trained(images, labels, place, pretraining, finetuning, width, history):
    """Yield what `pretrained` does, then what `finetuned` does."""
    yield from pretrained(images, place, pretraining, width)
    yield from finetuned(images, labels, place, finetuning, width, history)


def watched(optimizer, network, steps, values):
    """Run `steps` to their end; return what came of it, and whether all processes hold the same weights."""
    gradients, step = [], optimizer.step

    def noted(self, *args):
        gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *args)

    with mock.patch.object(optimizer, "step", noted):
        records = list(steps)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    return {"losses": [v.item() for v in values], "gradients": gradients, "weights": state, "records": records,
            "same": _same(state)}  # fmt: skip


def _same(state):
    first = collectives.told(lambda: state)
    mine = torch.tensor([float(all(torch.equal(first[k], state[k]) for k in state))])
    return bool(collectives.gathered(mine, collectives.world()).all())


def primitives():
    """Yield what the parts do with numbers that can be reckoned by hand."""
    rank, world = collectives.rank(), collectives.world()
    for total in (5, 1):
        whole = torch.arange(2.0 * total).view(total, 2)
        mine = collectives.share(whole).clone().requires_grad_()
        back = collectives.gathered(mine, total)
        (back * (1 + whole)).sum().backward()
        sizes = [None] * world
        dist.all_gather_object(sizes, (len(mine), mine.grad.tolist()))
        yield {"total": total, "back": back.tolist(), "parts": sizes}
    p, q = torch.nn.Parameter(torch.zeros(2, 1)), torch.nn.Parameter(torch.zeros(3))
    p.grad, q.grad = torch.full((2, 1), 1.0 + rank), torch.arange(3.0) * rank
    collectives.sum_gradients([p, torch.nn.Parameter(torch.zeros(1)), q])
    yield {"told": collectives.told(lambda: rank), "p": p.grad.tolist(), "q": q.grad.tolist()}


def problem(shape, rows):
    """Return inputs of batch norm, what their outputs are weighed by, and its weight."""
    x, g = (torch.randn(rows, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    return 3 * x + 1, g, 1 + torch.arange(shape[0], dtype=torch.float64)


def normalised(shape, rows):
    """Yield what batch norm makes of `rows` rows: outputs, the gradients, and the running statistics."""
    x, g, weight = problem(shape, rows)
    kind = collectives.BatchNorm2d if len(shape) == 3 else collectives.BatchNorm1d
    norm = kind(shape[0]).double()
    norm.weight.data = weight
    mine = collectives.share(x).clone().requires_grad_()
    y = collectives.gathered(norm(mine), rows)
    (y * g).sum().backward()
    collectives.sum_gradients(norm.parameters())
    yield {"y": y.detach(), "dx": collectives.gathered(mine.grad, rows), "dw": norm.weight.grad, "db": norm.bias.grad,
           "mean": norm.running_mean, "var": norm.running_var, "steps": norm.num_batches_tracked}  # fmt: skip


def all_parts(place):
    """Yield the above, one after the other."""
    yield from primitives()
    _, plain = exact(place)
    with plain:
        for shape, rows in SHAPES:
            yield from normalised(shape, rows)


CPU = engine.place("cpu")
SHAPES = (((3, 4, 4), 5), ((3, 2, 2), 1), ((4,), 7), ((4,), 2))


def unlucky(place):
    """Fail in every process but the first, which waits."""
    if collectives.rank():
        raise RuntimeError("no luck here")
    yield collectives.gathered(torch.zeros(1, 1), collectives.world()).tolist()


def endless(place):
    """Yield the ids of all processes, and go on for ever."""
    ids = [None] * collectives.world()
    dist.all_gather_object(ids, os.getpid())
    yield ids
    while True:
        collectives.gathered(torch.zeros(1, 1), collectives.world())


def waiting(place):
    """The same, but where waiting does not end by an error."""
    yield from (next(endless(place)),)
    time.sleep(1000)
