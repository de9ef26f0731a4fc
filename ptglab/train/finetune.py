"""Supervised training on noisy labels: THE loop for scratch, linear, light and full."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ptglab.errors import InputError, one_of
from ptglab.train import augment, checkpoints, collectives, engine, losses, optim

# mode -> learning rates of (head, backbone) for a batch of 128
MODES = {"linear": (0.01, 0.0), "light": (0.01, 0.005), "full": (0.05, 0.05)}


def train(
    backbone: nn.Module,
    head: nn.Module,
    inputs: Tensor,
    labels_given: np.ndarray,
    *,
    mode: str,
    epochs: int,
    batch_size: int = 128,
    seed: int = 0,
    place: engine.Place | None = None,
    augmentation: str | None = None,
    weight_decay: float = 5e-4,
    loss: str = "cross_entropy",
    averaging: float = 0.0,
    score: np.ndarray | None = None,
    admitted: tuple[float, float] = (0.3, 1.0),
    validation: float = 0.1,
    test: tuple[Tensor, np.ndarray] | None = None,
    history: np.ndarray | None = None,
    checkpoint: str | Path | None = None,
) -> Iterator[dict]:
    """Train `head`, and `backbone` unless `mode` is linear, in place on `labels_given`; yield one record an epoch.

    inputs: uint8 images [N, C, H, W], or float32 features [N, D] with `nn.Identity()` as backbone (linear on cached
    features). A stratified share `validation` of the rows is held out, its labels as noisy as the rest. A record
    holds `epoch` (from 1), `loss`, `learning_rate`, `seconds`, `accuracy_train` (given labels, as trained),
    `accuracy_validation` (given labels) and, with `test` = (inputs, clean labels), `accuracy_test`.
    `history`, float32 [epochs, N], is filled with each epoch's margins: the logit of the given label less the
    largest other one, as the row was trained on (Pleiss et al. 2020, arXiv 2001.10528, equation 1).

    loss: a name of losses.SUPERVISED. averaging: if not 0, what is scored, and left in the modules at the end, is the
    exponential moving average of the weights with this decay a step, lower for the first ones (Tarvainen & Valpola
    2017, arXiv 1703.01780, section 2). score: float [N] of a detector, low = suspicious; then each epoch trains
    only on the rows of the highest score in each given class, a share that grows from the first to the second of
    `admitted` (self-paced learning, Kumar, Packer & Koller 2010, at one pace for every class).
    With `checkpoint`, an unfinished run goes on from it. Raises InputError for what cannot be trained, or
    not in the device's memory (the batch of a frozen backbone is split instead, to the same result up to rounding),
    and FloatingPointError when the loss is no longer finite.
    """
    head_rate, backbone_rate = MODES[one_of("mode", mode, MODES)]
    criterion = losses.SUPERVISED[one_of("loss", loss, losses.SUPERVISED)]
    if augmentation:
        augment.preset(augmentation)
    if batch_size < 2 or epochs < 1:
        raise InputError(f"batch_size is {batch_size}, epochs {epochs}: they must be at least 2 and 1")
    if score is not None and not (len(score) == len(labels_given) and np.isfinite(score).all()):
        raise InputError(f"score has {len(score)} values for {len(labels_given)} rows, or some are not finite")
    if not 0 < min(admitted) <= max(admitted) <= 1:
        raise InputError(f"admitted is {admitted}; both shares must be above 0 and at most 1")
    if not 0 <= averaging < 1:
        raise InputError(f"averaging is {averaging}; it must be at least 0 and below 1")
    rows, held_out = _held_out(labels_given, validation, seed)
    place = place or engine.place()
    network = place.put(nn.Sequential(backbone, head))
    groups = optim.parameter_groups([head], head_rate * batch_size / 128, weight_decay)
    if backbone_rate:
        groups += optim.parameter_groups([backbone], backbone_rate * batch_size / 128, weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    modules = {"head": head, "backbone": backbone}
    if averaging:
        modules["averaged"] = AveragedModel(network, avg_fn=partial(_averaged, averaging), use_buffers=True)
    scored = modules["averaged"].module if averaging else network
    first = checkpoints.load(checkpoint, optimizer, **modules)
    inputs, labels = place.resident(inputs), torch.as_tensor(np.array(labels_given), device=place.device)
    if test is not None:
        test = place.resident(test[0]), test[1]
    while len(rows) % batch_size == 1:  # the head's batch norm cannot train on a batch of one
        batch_size += 1
    shares = np.linspace(*admitted, epochs) if score is not None else np.ones(epochs)
    taken = [_admitted(rows, labels_given, score, share, batch_size) for share in shares]
    steps = [engine.steps_per_epoch(len(t), batch_size, drop_last=False) for t in taken]
    before, all_steps = [0, *accumulate(steps)], sum(steps)
    warmup = steps[0] * min(5, max(1, epochs // 10))
    plain = engine.forward, augment.apply  # for the smaller last batch, too
    compiled = [place.compiled(f, all_steps * bool(backbone_rate)) for f in plain]

    def learn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on a batch, or this process's share of its inputs, and return its loss and logits [B, K]."""
        forward = (compiled if len(y) == batch_size else plain)[0]
        with place.autocast(), torch.set_grad_enabled(bool(backbone_rate)):
            x = place.batch(x)  # rows of a frozen backbone do not see each other: memory need not hold all at once
            features = forward(backbone, x) if backbone_rate else engine.in_parts(backbone, x)
        with place.autocast():
            logits = collectives.gathered(head(features), len(y))
        value = criterion(logits.float(), y)
        optimizer.zero_grad()
        value.backward()
        collectives.sum_gradients(network.parameters())
        optimizer.step()
        return value.detach(), logits.detach().float()

    for epoch in range(first, epochs):
        start, (total, right) = time.perf_counter(), torch.zeros(2, device=place.device)
        head.train(), backbone.train(bool(backbone_rate))
        margins = torch.empty(len(labels), device=place.device)
        order = engine.generator("cpu", seed, epoch, "order")
        draws = engine.generator(place.device, seed, epoch, "weak")
        batches = list(engine.shuffled_batches(taken[epoch].to(inputs.device), batch_size, order, drop_last=False))
        fetched = engine.prefetch(inputs, map(collectives.share, batches), place.device)
        for i, (index, (_, x)) in enumerate(zip(batches, fetched, strict=True), before[epoch]):
            optim.set_learning_rate(optimizer, optim.warmup_cosine(i, all_steps, warmup))
            index = index.to(place.device, non_blocking=True)
            change, y = (compiled if len(index) == batch_size else plain)[1], labels[index]
            whole = len(index)
            x = augment.weak(x, augmentation, draws, change, whole) if augmentation else engine.to_float(x)
            value, logits = engine.within_memory(learn, x, y)
            if averaging:
                modules["averaged"].update_parameters(network)
            total += value * len(index)
            margins[index] = margin = _margins(logits, y)
            right += (margin > 0).sum()
        record = {
            "epoch": epoch + 1,
            "loss": total.item() / len(taken[epoch]),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "accuracy_train": right.item() / len(taken[epoch]),
        }
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(checkpoints.diverged(epoch + 1, checkpoint))
        rest = torch.as_tensor(np.setdiff1d(np.arange(len(labels)), taken[epoch]))
        if len(rest):
            there, x = rest.to(place.device), inputs[rest.to(inputs.device)]
            margins[there] = _margins(engine.evaluate(scored, x, place), labels[there])
        if len(held_out):
            record["accuracy_validation"] = (margins[held_out.to(place.device)] > 0).float().mean().item()
        if test is not None:
            predicted = engine.evaluate(scored, test[0], place).argmax(1).cpu().numpy()
            record["accuracy_test"] = float((predicted == test[1]).mean())
        if history is not None:
            history[epoch] = margins.cpu().numpy()
        record["seconds"] = time.perf_counter() - start
        yield record
        if checkpoint and isinstance(history, np.memmap):
            history.flush()  # no later than the checkpoint that counts on it
        checkpoints.save(checkpoint, epoch + 1, optimizer, **modules)
    network.load_state_dict(scored.state_dict())


def _averaged(decay: float, average: Tensor, new: Tensor, number: Tensor) -> Tensor:
    """Return the moving average with `new`: over `number` values so far, so that the first ones are soon forgotten."""
    return average + (new - average) * (1 - torch.clamp((1 + number) / (10 + number), max=decay))


def _admitted(rows: Tensor, labels: np.ndarray, score: np.ndarray | None, share: float, batch_size: int) -> Tensor:
    """Return the `share` of `rows` with the highest score of each label; no batch of them is a single row."""
    if score is None:
        return rows
    rows = rows.numpy()
    order = rows[np.lexsort((-np.asarray(score)[rows], labels[rows]))]  # by label, the most trusted first
    sizes = np.bincount(labels[rows])
    place = np.arange(len(order)) - np.repeat(sizes.cumsum() - sizes, sizes)
    taken = np.sort(order[place < np.ceil(share * sizes[labels[order]] - 1e-9)])
    return torch.from_numpy(taken[1:] if len(taken) % batch_size == 1 else taken)


def _held_out(labels_given: np.ndarray, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and a stratified share `validation` of the rows to hold out, int64 each."""
    if len(np.unique(labels_given)) < 2:
        raise InputError("there is only one class among the given labels: nothing to tell apart")
    if not 0 <= validation <= 0.5:
        raise InputError(f"validation is {validation}; it must lie between 0 and 0.5")
    out = np.zeros(len(labels_given), bool)
    if validation:
        out = engine.folds(labels_given, round(1 / validation), seed) == 0
    rows, held_out = (
        torch.as_tensor(np.flatnonzero(~out)),
        torch.as_tensor(np.flatnonzero(out)),
    )
    if len(rows) < 2:
        raise InputError(f"nothing to train: {len(rows)} rows beside {len(held_out)} held out")
    return rows, held_out


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
    """Train a network a fold on the rows of the other folds, and fill `probs`; yield one record an epoch.

    start: returns a new (backbone, head) for every fold. probs: float32 [N, K], filled with probabilities no row's
    label had a part in. trusted: bool [N], the rows that are trained on, by default all. loop: `train`, or what has
    many processes run it. options: those of `train`, without history, score and validation, which belong to one network
    and are refused with an InputError. With `checkpoint`, every fold keeps its state beside it, and an unfinished run
    goes on from there.
    Records are `train`'s, with the fold; `epoch` counts through.
    """
    if refused := sorted({"history", "score", "validation"} & options.keys()):
        raise InputError(f"cross_fit trains a network a fold: it takes no {', '.join(refused)}")
    place = place or engine.place()
    fold = engine.folds(labels_given, folds, seed)
    for k in range(folds):
        backbone, head = start()
        rest = np.flatnonzero((fold != k) & (True if trusted is None else trusted))
        out = torch.as_tensor(np.flatnonzero(fold == k))
        steps = (loop or train)(
            backbone,
            head,
            inputs[rest],
            labels_given[rest],
            epochs=epochs,
            seed=seed,
            place=place,
            validation=0,
            checkpoint=checkpoint and Path(checkpoint).with_name(f"fold{k}-{Path(checkpoint).name}"),
            **options,
        )
        for record in steps:
            yield record | {"epoch": k * epochs + record["epoch"], "fold": k}
        logits = engine.evaluate(nn.Sequential(backbone, head), inputs[out], place)
        probs[out.numpy()] = logits.softmax(1).cpu().numpy()
