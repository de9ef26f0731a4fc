"""Self-supervised pre-training: THE two-view loop, and the METHODS it can run."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptglab.errors import InputError, one_of
from ptglab.train import augment, backbones, checkpoints, engine, losses, optim

KNN_ROWS = 2048  # images the online kNN accuracy is taken on
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Method:
    """A row of the table: the loss with its options, the two views, the projector, the optimizer's numbers."""

    loss: Callable[..., Tensor]
    views: str
    hidden: int
    out: int
    layers: int
    learning_rate: float  # for a batch of 256, scaled linearly with the batch
    options: dict = field(default_factory=dict)
    small_views: bool = False  # whether a schedule may begin on smaller views; Barlow Twins does not recover from them


# Loss constants are the papers'; learning rates, heads and temperature are solo-learn's for CIFAR (JMLR 2022).
METHODS = {
    "simclr": Method(losses.nt_xent, "simclr", 2048, 256, 2, 0.4, {"temperature": 0.2}, True),
    "barlow_twins": Method(losses.barlow_twins, "barlow_twins", 2048, 2048, 3, 0.3),
    "vicreg": Method(losses.vicreg, "vicreg", 2048, 2048, 3, 0.3),
}


@dataclass(frozen=True)
class Schedule:
    """How a given number of epochs is spent; see SCHEDULES."""

    rate: float = 1.0  # times the method's learning rate
    small: float = 0.0  # share of the epochs, the first ones, on views of `size` where the method has `small_views`
    size: float = 1.0  # of a small view's side, relative to the images


# "short" is for tens of epochs: a large rate, and first epochs on views of half the pixels, which cost half.
SCHEDULES = {"full": Schedule(), "short": Schedule(rate=3.75, small=0.6, size=0.75)}


def views(method: str, dataset: str) -> str:
    """Return the augmentation preset of `method` that suits `dataset`. Raises InputError for an unknown method."""
    return augment.for_dataset(METHODS[one_of("method", method, METHODS)].views, dataset)


def train(
    backbone: backbones.ResNet,
    images: Tensor,
    method: str,
    *,
    epochs: int,
    batch_size: int = 256,
    seed: int = 0,
    place: engine.Place | None = None,
    augmentation: str | None = None,
    learning_rate: float | None = None,
    schedule: str = "full",
    projection: int | None = None,
    labels_given: np.ndarray | None = None,
    checkpoint: str | Path | None = None,
) -> Iterator[dict]:
    """Pre-train `backbone` in place on `images` (uint8 [N, C, H, W]) alone; yield one record an epoch.

    A record holds `epoch` (from 1), `loss`, `learning_rate`, `images_per_second`, `seconds` and, if `labels_given`
    [N] is passed, `knn_accuracy` against it: the labels are looked at, never learned from. `augmentation` names
    a preset, `projection` the width of the projector; both default to the method's own. `schedule` names a row of
    SCHEDULES, whose rate `learning_rate` overrides. Many processes train as one if `place` has a shard; see `ddp.run`.
    With `checkpoint`, an unfinished run goes on from it, drawing what it would have drawn: an epoch may be recorded
    twice, but never lost. Raises InputError for an unknown name, a size that cannot be trained or a batch that the
    device's memory cannot hold, and FloatingPointError when the loss is no longer finite.
    """
    spec, plan = METHODS[one_of("method", method, METHODS)], SCHEDULES[one_of("schedule", schedule, SCHEDULES)]
    augment.preset(augmentation := augmentation or spec.views)
    place = place or engine.place()
    shard, batch_size = place.shard, min(batch_size, len(images))
    if batch_size < shard.least or epochs < 1:
        raise InputError(f"nothing to train: {len(images)} images, batch_size {batch_size}, epochs {epochs}")
    hidden, out = (projection or spec.hidden), min(spec.out, projection or spec.out)
    projector = backbones.projector(backbone.num_features, hidden, out, spec.layers, seed)
    modules = {"backbone": place.put(backbone), "projector": place.put(projector)}
    rate = (learning_rate or plan.rate * spec.learning_rate) * batch_size / 256
    optimizer = optim.LARS(optim.parameter_groups(modules.values(), rate, WEIGHT_DECAY), lr=rate)
    first = checkpoints.load(checkpoint, optimizer, **modules)
    network, images = shard.parallel(nn.Sequential(backbone, projector)), place.resident(images)
    rows, own = torch.arange(len(images), device=images.device), shard.rows(batch_size)
    part = None if shard.world == 1 else (own, batch_size)
    steps = len(images) // batch_size  # in an epoch: a smaller rest is left out
    warmup = steps * min(10, max(1, epochs // 10))
    forward, change = (place.compiled(f, epochs * steps) for f in (engine.forward, augment.apply))

    def learn(rng: torch.Generator, size: int | None, x: Tensor) -> Tensor:
        """Take one step on the shard x [B, C, H, W] of a batch, and return the loss of the whole batch."""
        both = torch.cat(augment.two_views(x, augmentation, rng, size, change, part))
        with place.autocast():
            z = forward(network, place.batch(both)).chunk(2)
        z1, z2 = (shard.all_gather(view, batch_size) for view in z)
        loss = spec.loss(z1, z2, **spec.options)
        optimizer.zero_grad()
        (loss * shard.world).backward()
        optimizer.step()
        return loss.detach()

    for epoch in range(first, epochs):
        start, total = time.perf_counter(), torch.zeros((), device=place.device)
        network.train()
        size = round(plan.size * max(images.shape[2:])) if spec.small_views and epoch < plan.small * epochs else None
        order = engine.generator("cpu", seed, epoch, "order")
        rng = engine.generator(place.device, seed, epoch, "views")
        batches = (batch[own] for batch in engine.shuffled_batches(rows, batch_size, order, drop_last=True))
        for i, (_, x) in enumerate(engine.prefetch(images, batches, place.device)):
            optim.set_learning_rate(optimizer, optim.warmup_cosine(epoch * steps + i, epochs * steps, warmup))
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
