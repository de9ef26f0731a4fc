"""Self-supervised pre-training: THE loop over views, and the METHODS and SCHEDULES it can run."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptglab.errors import InputError, one_of
from ptglab.train import augment, backbones, checkpoints, engine, losses, optim

KNN_ROWS = 2048  # images the online kNN accuracy is taken on


@dataclass(frozen=True)
class Recipe:
    """A row of the tables: all there is to a pre-training but the images, its length and its seed."""

    loss: Callable[..., Tensor]
    views: str | tuple[augment.Recipe, ...]
    hidden: int  # the projector's sizes
    out: int
    layers: int
    learning_rate: float  # for a batch of 256, scaled linearly with the batch
    options: dict = field(default_factory=dict)  # of the loss
    crops: int = 2  # views of an image
    norm: bool = True  # whether the projector has batch norms
    batch_size: int = 256
    optimizer: Callable[..., torch.optim.Optimizer] = optim.LARS
    rate: Callable[[int, int, int], float] = optim.warmup_cosine
    warmup: int = 10  # epochs at most, of a tenth of all, on which the rate rises
    weight_decay: float = 1e-4
    decay_all: bool = False  # biases and norms, too
    small: float = 0.0  # share of the epochs, the first ones, on views of `size`
    size: float = 1.0  # of a small view's side, relative to the images
    epochs: int = 0  # as published, and then nothing but the length may be changed; 0: ours


# Loss constants are the papers'; learning rates, heads and temperature are solo-learn's for CIFAR (JMLR 2022). EMP-SSL
# (arXiv 2304.03977) is as in its authors' code: a rate of .3 for batches of 100, but without Nesterov's momentum.
METHODS = {
    "simclr": Recipe(losses.nt_xent, "simclr", 2048, 256, 2, 0.4, {"temperature": 0.2}),
    "barlow_twins": Recipe(losses.barlow_twins, "barlow_twins", 2048, 2048, 3, 0.3),
    "vicreg": Recipe(losses.vicreg, "vicreg", 2048, 2048, 3, 0.3),
    "emp_ssl": Recipe(losses.emp_ssl, "emp_ssl", 4096, 1024, 2, 0.3 * 2.56, crops=20, batch_size=100,
                      optimizer=partial(optim.LARS, eta=0.005), warmup=0),
}  # fmt: skip
_SHORT = {name: replace(row, learning_rate=3.75 * row.learning_rate) for name, row in METHODS.items()}
_PAPER = Recipe(losses.nt_xent, "paper", 512, 128, 3, 1e-3, {"temperature": 0.5}, optimizer=torch.optim.Adam,
                rate=optim.constant, decay_all=True, epochs=100)  # fmt: skip
_BARLOW = replace(_PAPER, loss=losses.barlow_twins, learning_rate=3e-4, options={"lambd": 5e-3})
_DKOBAK = Recipe(losses.nt_xent, "dkobak", 1024, 128, 2, 0.06, {"temperature": 0.5}, norm=False, batch_size=512,
                 optimizer=partial(torch.optim.SGD, momentum=0.9), warmup=0, weight_decay=5e-4, decay_all=True,
                 epochs=100)  # fmt: skip
# "short" is for tens of epochs: a large rate, and SimCLR's first epochs on views of half the pixels, which cost half
# (Barlow Twins does not recover from them); EMP-SSL has fewer crops, no larger than what they show. "paper" is the
# protocol of the authors of Pre-train to Gain (arXiv 2511.20844), by their public code; "dkobak" that of
# github.com/dkobak/simclr-cifar10, at its 100 epochs.
SCHEDULES = {
    "full": METHODS,
    "short": _SHORT | {"simclr": replace(_SHORT["simclr"], small=0.6, size=0.75),
                       "emp_ssl": replace(METHODS["emp_ssl"], crops=8, small=1.0, size=0.5)},
    "paper": {"simclr": _PAPER, "barlow_twins": _BARLOW},
    "dkobak": {"simclr": _DKOBAK},
}  # fmt: skip
CHANGES = ("learning_rate", "batch_size", "projection", "temperature", "jitter", "crop")  # see `recipe`


def recipe(method: str, schedule: str = "full", augmentation=None, **changes: float | None) -> Recipe:
    """Return the row of SCHEDULES for `method`, with other views, `augmentation`, and other `changes`.

    changes: `learning_rate`, `batch_size`, `projection` (the projector's width), `temperature`, and the `jitter` and
    `crop` of `augment.adjusted`; 0 or None is no change. Raises InputError for an unknown name, a method that has no
    temperature, and a change of a published row.
    """
    rows = SCHEDULES[one_of("schedule", schedule, SCHEDULES)]
    row = rows[one_of("method" if rows is METHODS else f"method of schedule {schedule}", method, rows)]
    view = augment.preset(row.views)[0]
    own = dict(zip(CHANGES, (row.learning_rate, row.batch_size, row.hidden, row.options.get("temperature", 0),
                             view.brightness, view.crop_scale[0]), strict=True))  # fmt: skip
    given = {one_of("change of a schedule", name, CHANGES): value for name, value in changes.items() if value}
    for name, value in given.items():
        if not own[name] or row.epochs and value != own[name]:
            has = f"{name} {own[name]}" if own[name] else f"no {name}"
            raise InputError(f"schedule '{schedule}' of {method} has {has}, but {name} is {value}: leave one out")
    use, out, views = own | given, min(row.out, given.get("projection", row.out)), augmentation or row.views
    if given.keys() & {"jitter", "crop"}:
        views = augment.adjusted(views, given.get("jitter", 0), given.get("crop", 0))
    options = {name: use.get(name, value) for name, value in row.options.items()}
    return replace(row, views=views, hidden=use["projection"], out=out, options=options,
                   learning_rate=use["learning_rate"], batch_size=use["batch_size"])  # fmt: skip


def views(method: str, dataset: str, schedule: str = "full", **changes: float) -> str | tuple[augment.Recipe, ...]:
    """Return the views of a row that suit `dataset`, with `changes` of `jitter` and `crop`; see `recipe`."""
    name = augment.for_dataset(recipe(method, schedule).views, dataset)
    return recipe(method, schedule, name, **changes).views


def train(
    backbone: backbones.ResNet,
    images: Tensor,
    method: str,
    *,
    epochs: int,
    batch_size: int | None = None,
    seed: int = 0,
    place: engine.Place | None = None,
    augmentation: str | tuple[augment.Recipe, ...] | None = None,
    schedule: str = "full",
    labels_given: np.ndarray | None = None,
    checkpoint: str | Path | None = None,
    **changes: float | None,
) -> Iterator[dict]:
    """Pre-train `backbone` in place on `images` (uint8 [N, C, H, W]) alone; yield one record an epoch.

    A record holds `epoch` (from 1), `loss`, `learning_rate`, `images_per_second`, `seconds` and, if `labels_given`
    [N] is passed, `knn_accuracy` against it: the labels are looked at, never learned from. `recipe` explains what
    `schedule`, `augmentation`, `batch_size` and `changes` stand for. Many processes train as one if `place` has a
    shard; see `ddp.run`.
    With `checkpoint`, an unfinished run goes on from it, drawing what it would have drawn: an epoch may be recorded
    twice, but never lost. Raises InputError for an unknown name, a size that cannot be trained or a batch that the
    device's memory cannot hold, and FloatingPointError when the loss is no longer finite.
    """
    spec = recipe(method, schedule, augmentation, batch_size=batch_size, **changes)
    augment.preset(spec.views)
    place = place or engine.place()
    shard, batch_size = place.shard, min(spec.batch_size, len(images))
    if batch_size < shard.least or epochs < 1:
        raise InputError(f"nothing to train: {len(images)} images, batch_size {batch_size}, epochs {epochs}")
    projector = backbones.projector(backbone.num_features, spec.hidden, spec.out, spec.layers, seed, spec.norm)
    modules = {"backbone": place.put(backbone), "projector": place.put(projector)}
    rate = spec.learning_rate * batch_size / 256
    groups = optim.parameter_groups(modules.values(), rate, spec.weight_decay, spec.decay_all)
    optimizer = spec.optimizer(groups, lr=rate)
    first = checkpoints.load(checkpoint, optimizer, **modules)
    network, images = shard.parallel(nn.Sequential(backbone, projector)), place.resident(images)
    rows, own = torch.arange(len(images), device=images.device), shard.rows(batch_size)
    part = None if shard.world == 1 else (own, batch_size)
    steps = len(images) // batch_size  # in an epoch: a smaller rest is left out
    warmup = steps * min(spec.warmup, max(1, epochs // 10))
    forward, change = (place.compiled(f, epochs * steps) for f in (engine.forward, augment.apply))

    def learn(rng: torch.Generator, size: int | None, x: Tensor) -> Tensor:
        """Take one step on the shard x [B, C, H, W] of a batch, and return the loss of the whole batch."""
        views = torch.cat(augment.two_views(x, spec.views, rng, size, change, part, spec.crops))
        with place.autocast():
            z = forward(network, place.batch(views)).chunk(spec.crops)
        loss = spec.loss(*(shard.all_gather(view, batch_size) for view in z), **spec.options)
        optimizer.zero_grad()
        (loss * shard.world).backward()
        optimizer.step()
        return loss.detach()

    for epoch in range(first, epochs):
        start, total = time.perf_counter(), torch.zeros((), device=place.device)
        network.train()
        size = round(spec.size * max(images.shape[2:])) if epoch < spec.small * epochs else None
        order = engine.generator("cpu", seed, epoch, "order")
        rng = engine.generator(place.device, seed, epoch, "views")
        batches = (batch[own] for batch in engine.shuffled_batches(rows, batch_size, order, drop_last=True))
        for i, (_, x) in enumerate(engine.prefetch(images, batches, place.device)):
            optim.set_learning_rate(optimizer, spec.rate(epoch * steps + i, epochs * steps, warmup))
            total += engine.within_memory(partial(learn, rng, size), x, world=shard.world)
        total = total.item()  # the one wait for the device in an epoch
        seconds = time.perf_counter() - start
        record = {"epoch": epoch + 1, "loss": total / steps, "learning_rate": optimizer.param_groups[0]["lr"],
                  "images_per_second": steps * batch_size / seconds, "seconds": seconds}  # fmt: skip
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(checkpoints.diverged(epoch + 1, checkpoint))
        if labels_given is not None:
            record["knn_accuracy"] = _knn_accuracy(backbone, images, labels_given, place)
        yield record
        if shard.rank == 0:
            checkpoints.save(checkpoint, epoch + 1, optimizer, **modules)


def _knn_accuracy(backbone: nn.Module, images: Tensor, labels: np.ndarray, place: engine.Place) -> float:
    """Return the share of up to KNN_ROWS images, evenly spread, whose 20 nearest others vote for the given label.

    Votes weigh exp(cosine / 0.1): Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    rows = torch.arange(0, len(images), -(-len(images) // KNN_ROWS))
    z = F.normalize(engine.evaluate(backbone, images[rows], place), dim=1)
    similarity, index = (z @ z.T).fill_diagonal_(-torch.inf).topk(min(20, len(z) - 1), dim=1)
    given = torch.as_tensor(np.asarray(labels), device=z.device)[rows.to(z.device)]
    votes = z.new_zeros(len(z), int(given.max()) + 1).scatter_add_(1, given[index], (similarity / 0.1).exp())
    return (votes.argmax(1) == given).float().mean().item()
