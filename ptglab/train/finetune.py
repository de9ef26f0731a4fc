"""Supervised training on noisy labels: THE loop for scratch, linear, light and full."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ptglab.errors import InputError, one_of
from ptglab.train import augment, checkpoints, engine, losses, optim


@dataclass(frozen=True)
class Mode:
    """A row of MODES: how much of the network is trained, and by what."""

    head: float  # learning rates for a batch of `batch_size`, scaled linearly with the batch
    backbone: float
    batch_size: int = 128
    optimizer: Callable[..., torch.optim.Optimizer] = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    rate: Callable[[int, int, int], float] = optim.warmup_cosine
    weight_decay: float = 5e-4
    decay_all: bool = False  # biases and norms, too
    views: str = "weak"  # the preset of augment.PRESETS that suits it
    epochs: int = 0  # as published, and then batch and loss are, too; 0: ours


# "paper" is the supervised step of the authors of Pre-train to Gain (arXiv 2511.20844), by their public code.
MODES = {
    "linear": Mode(0.01, 0.0),
    "light": Mode(0.01, 0.005),
    "full": Mode(0.05, 0.05),
    "paper": Mode(1e-3, 1e-3, 256, torch.optim.Adam, optim.constant, 1e-4, True, "weak_shift", 10),
}


@dataclass(frozen=True)
class Options:
    """What `train` can be given beside the plain case: other experiments and other measurements."""

    augmentation: str | None = None  # a name of augment.PRESETS
    loss: str = "cross_entropy"  # a name of losses.SUPERVISED
    validation: float = 0.1  # stratified share of the rows that is held out, its labels as noisy as the rest
    test: tuple[Tensor, np.ndarray] | None = None  # (inputs, clean labels), which are scored
    average: AveragedModel | None = None  # of the weights, by `ema`: scored, and what the modules hold at the end
    rows: Callable[[int, np.ndarray], np.ndarray] | None = None  # (epoch from 0, all but the held out) -> int64 rows
    history: np.ndarray | None = None  # float32 [epochs, N], filled with each epoch's margins; see `train`


def train(
    backbone: nn.Module,
    head: nn.Module,
    inputs: Tensor,
    labels_given: np.ndarray,
    mode: str,
    epochs: int,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    place: engine.Place | None = None,
    checkpoint: str | Path | None = None,
    **options,
) -> Iterator[dict]:
    """Train `head`, and `backbone` unless `mode` is linear, in place on `labels_given`; yield one record an epoch.

    inputs: uint8 images [N, C, H, W], or float32 features [N, D] with `nn.Identity()` as backbone (linear on cached
    features). options: see Options. A record holds `epoch` (from 1), `loss`, `learning_rate`, `seconds`,
    `accuracy_train` (given labels, as trained), `accuracy_validation` (given labels) and, with `test`, `accuracy_test`.
    A margin is the logit of the given label less the largest other one, as the row was trained on (Pleiss et al. 2020,
    arXiv 2001.10528, equation 1). With `checkpoint`, an unfinished run goes on from it.

    Raises InputError for what cannot be trained, or not in the device's memory (the batch of a frozen backbone is split
    instead, to the same result up to rounding), and FloatingPointError when the loss is no longer finite.
    """
    plan = MODES[one_of("mode", mode, MODES)]
    more = Options(**{one_of("option of training", name, vars(Options())): value for name, value in options.items()})
    criterion = losses.SUPERVISED[one_of("loss", more.loss, losses.SUPERVISED)]
    batch_size = plan.batch_size if batch_size is None else batch_size
    for name, own, given in (("batch_size", plan.batch_size, batch_size), ("loss", "cross_entropy", more.loss)):
        if plan.epochs and given != own:
            raise InputError(f"mode '{mode}' has {name} {own}, but {name} is {given}: leave one out")
    if augmentation := more.augmentation:
        augment.preset(augmentation)
    place, average = place or engine.place(), more.average
    shard, frozen = place.shard, not plan.backbone
    if batch_size < shard.least or epochs < 1:
        raise InputError(f"batch_size is {batch_size}, epochs {epochs}: they must be at least {shard.least} and 1")
    held_out, taken = _split(labels_given, more.validation, seed, more.rows, epochs, shard.least)
    network = place.put(nn.Sequential(backbone, head))
    scale, decay = batch_size / plan.batch_size, (plan.weight_decay, plan.decay_all)
    groups = optim.parameter_groups([head], plan.head * scale, *decay)
    if not frozen:
        groups += optim.parameter_groups([backbone], plan.backbone * scale, *decay)
    optimizer = plan.optimizer(groups)
    modules = {"head": head, "backbone": backbone} | ({"averaged": place.put(average)} if average else {})
    first, scored = checkpoints.load(checkpoint, optimizer, **modules), average.module if average else network
    inputs, labels = place.resident(inputs), torch.as_tensor(np.array(labels_given), device=place.device)
    test = more.test and (place.resident(more.test[0]), more.test[1])
    steps = [len(engine.batch_sizes(len(chosen), batch_size, least=shard.least)) for chosen in taken]
    warmup = steps[0] * min(5, max(1, epochs // 10))
    plain = engine.forward, augment.apply  # for the last batch of another size, too
    compiled = [place.compiled(function, 0 if frozen else sum(steps)) for function in plain]
    trained = shard.parallel(head if frozen else network)

    def learn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on the shard x of a batch with labels y [B], and return the whole batch's loss and logits."""
        forward, _ = compiled if len(y) == batch_size else plain
        with place.autocast():
            x = place.batch(x)
            if frozen:  # its rows do not see each other: memory need not hold all at once
                with torch.no_grad():
                    x = engine.in_parts(backbone, x)
            logits = shard.all_gather(forward(trained, x), len(y))
        value = criterion(logits.float(), y)
        optimizer.zero_grad()
        (value * shard.world).backward()
        optimizer.step()
        return value.detach(), logits.detach().float()

    for epoch in range(first, epochs):
        start, total = time.perf_counter(), torch.zeros((), device=place.device)
        head.train(), backbone.train(not frozen)
        margins, chosen = torch.empty(len(labels), device=place.device), taken[epoch].to(inputs.device)
        order, rng = engine.generator("cpu", seed, epoch, "order"), engine.generator(place.device, seed, epoch, "weak")
        batches = list(engine.shuffled_batches(chosen, batch_size, order, least=shard.least))
        shards = engine.prefetch(inputs, (batch[shard.rows(len(batch))] for batch in batches), place.device)
        for step, (batch, (_, x)) in enumerate(zip(batches, shards, strict=True), sum(steps[:epoch])):
            optim.set_learning_rate(optimizer, plan.rate(step, sum(steps), warmup))
            batch, part = batch.to(place.device, non_blocking=True), (shard.rows(len(batch)), len(batch))
            _, change = compiled if len(batch) == batch_size else plain
            if augmentation:
                (x,) = augment.two_views(x, augmentation, rng, None, change, part, number=1)
            x = engine.to_float(x)
            value, logits = engine.within_memory(learn, x, labels[batch], world=shard.world)
            if average:
                average.update_parameters(network)
            total += value * len(batch)
            margins[batch] = _margins(logits, labels[batch])
        record = {"epoch": epoch + 1, "loss": total.item() / len(chosen),
                  "learning_rate": optimizer.param_groups[0]["lr"]}  # fmt: skip
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(checkpoints.diverged(epoch + 1, checkpoint))
        record |= _accuracies(margins, taken[epoch], held_out, scored, inputs, labels, test, place)
        if more.history is not None:
            more.history[epoch] = margins.cpu().numpy()
        yield record | {"seconds": time.perf_counter() - start}
        if shard.rank == 0:
            if isinstance(more.history, np.memmap):
                more.history.flush()  # no later than the checkpoint that counts on it
            checkpoints.save(checkpoint, epoch + 1, optimizer, **modules)
    network.load_state_dict(scored.state_dict())


def ema(backbone: nn.Module, head: nn.Module, decay: float) -> AveragedModel:
    """Return exponential moving averages of both modules' weights and statistics, for `train` to update at each step.

    The decay of the first steps is lower, so that they are soon forgotten. Tarvainen & Valpola 2017 (arXiv 1703.01780),
    section 2. Raises InputError for a decay that is not above 0 and below 1.
    """
    if not 0 < decay < 1:
        raise InputError(f"ema_decay is {decay}; it must be above 0 and below 1")
    return AveragedModel(nn.Sequential(backbone, head), avg_fn=partial(_moving, decay), use_buffers=True)


def _moving(decay: float, average: Tensor, new: Tensor, number: Tensor) -> Tensor:
    """Return the average over `number` values so far, moved towards a `new` one."""
    return average + (new - average) * (1 - torch.clamp((1 + number) / (10 + number), max=decay))


def curriculum(
    labels_given: np.ndarray, score: np.ndarray, epochs: int, keep_fraction: tuple[float, float] = (0.3, 1.0)
) -> Callable[[int, np.ndarray], np.ndarray]:
    """Return the `rows` of `train` that admit the most trusted rows first: self-paced learning.

    score: float [N] of a detector, low = suspicious. An epoch trains on the rows of the highest score in each given
    class, a share that grows evenly from the first to the second of `keep_fraction` (Kumar, Packer & Koller 2010, at
    one pace for every class). Raises InputError for a score or a share that does not fit.
    """
    if not (len(score) == len(labels_given) and np.isfinite(score).all()):
        raise InputError(f"score has {len(score)} values for {len(labels_given)} rows, or some are not finite")
    if not 0 < min(keep_fraction) <= max(keep_fraction) <= 1:
        raise InputError(f"keep_fraction is {keep_fraction}; both shares must be above 0 and at most 1")
    return partial(_most_trusted, np.asarray(labels_given), np.asarray(score), np.linspace(*keep_fraction, epochs))


def _most_trusted(labels: np.ndarray, score: np.ndarray, fractions: np.ndarray, epoch: int, rows: np.ndarray):
    """Return those of `rows` that have the highest score of their label: the share of them that `epoch` takes."""
    order = rows[np.lexsort((-score[rows], labels[rows]))]  # by label, the most trusted first
    sizes = np.bincount(labels[rows])
    rank = np.arange(len(order)) - np.repeat(sizes.cumsum() - sizes, sizes)  # within the label
    return np.sort(order[rank < np.ceil(fractions[epoch] * sizes[labels[order]] - 1e-9)])


def _split(
    labels: np.ndarray, validation: float, seed: int, rows: Callable | None, epochs: int, least: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the rows that are held out, a stratified share, and those that each epoch trains on; see `train`."""
    if len(np.unique(labels)) < 2:
        raise InputError("there is only one class among the given labels: nothing to tell apart")
    if not 0 <= validation <= 0.5:
        raise InputError(f"validation is {validation}; it must lie between 0 and 0.5")
    out = engine.folds(labels, round(1 / validation), seed) == 0 if validation else np.zeros(len(labels), bool)
    others = np.flatnonzero(~out)
    taken = [torch.from_numpy(rows(epoch, others) if rows else others) for epoch in range(epochs)]
    if (fewest := min(map(len, taken))) < least:
        raise InputError(f"nothing to train: {fewest} rows beside {out.sum()} held out")
    return torch.from_numpy(np.flatnonzero(out)), taken


def _accuracies(
    margins: Tensor, taken: Tensor, held_out: Tensor, scored: nn.Module, inputs: Tensor, labels: Tensor,
    test: tuple[Tensor, np.ndarray] | None, place: engine.Place,
) -> dict[str, float]:  # fmt: skip
    """Return an epoch's accuracies, after filling the `margins` of the rows it did not train on; see `train`."""
    found = {"accuracy_train": (margins[taken.to(place.device)] > 0).sum().item() / len(taken)}
    rest = torch.as_tensor(np.setdiff1d(np.arange(len(labels)), taken))
    if len(rest):
        there, x = rest.to(place.device), inputs[rest.to(inputs.device)]
        margins[there] = _margins(engine.evaluate(scored, x, place), labels[there])
    if len(held_out):
        found["accuracy_validation"] = (margins[held_out.to(place.device)] > 0).float().mean().item()
    if test:
        predicted = engine.evaluate(scored, test[0], place).argmax(1).cpu().numpy()
        found["accuracy_test"] = float((predicted == test[1]).mean())
    return found


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return [B]: the logit of the label less the largest other; above 0 where the label is predicted."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def cross_fit(
    start: Callable[[], tuple[nn.Module, nn.Module]],
    inputs: Tensor,
    labels_given: np.ndarray,
    probs: np.ndarray,
    *,
    epochs: int,
    folds: int = 2,
    seed: int = 0,
    place: engine.Place | None = None,
    trusted: np.ndarray | None = None,
    checkpoint: str | Path | None = None,
    loop: Callable[..., Iterator[dict]] | None = None,
    **options,
) -> Iterator[dict]:
    """Train one network a fold on the rows of the other folds, and fill `probs`; yield one record an epoch.

    start: returns a new (backbone, head) for every fold. probs: float32 [N, K], filled with probabilities no row's
    label had a part in. trusted: bool [N], the rows that are trained on, by default all. loop: `train`, or
    `partial(ddp.run, devices, train)`. options: those of `train`; an InputError refuses history, rows, average and
    validation, which belong to one network. With `checkpoint`, every fold keeps its state beside it, and an unfinished
    run goes on from there. Records are `train`'s, with the fold; `epoch` counts through.
    """
    if refused := sorted({"history", "rows", "average", "validation"} & options.keys()):
        raise InputError(f"cross_fit trains one network a fold: it takes no {', '.join(refused)}")
    place = place or engine.place()
    fold = engine.folds(labels_given, folds, seed)
    options |= {"epochs": epochs, "seed": seed, "place": place, "validation": 0}
    for k in range(folds):
        backbone, head = start()
        rest = np.flatnonzero((fold != k) & (True if trusted is None else trusted))
        out = torch.as_tensor(np.flatnonzero(fold == k))
        kept = checkpoint and Path(checkpoint).with_name(f"fold{k}-{Path(checkpoint).name}")
        for record in (loop or train)(backbone, head, inputs[rest], labels_given[rest], checkpoint=kept, **options):
            yield record | {"epoch": k * epochs + record["epoch"], "fold": k}
        logits = engine.evaluate(nn.Sequential(backbone, head), inputs[out], place)
        probs[out.numpy()] = logits.softmax(1).cpu().numpy()
