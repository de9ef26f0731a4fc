"""Features and out-of-fold probabilities of every row, in dataset order; linear heads in bulk."""

import math
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ptglab.errors import InputError
from ptglab.train import engine

BATCH = 1 << 12  # images that are described at a time
BLOCK_ROWS = 1 << 16  # images whose features are in memory at a time
BLOCK_ELEMENTS = 1 << 20  # logits worked on at a time
HELD = 1 << 28  # features that are held in memory, 1 GB; more are read again, block by block, for each step
L2 = 100.0  # weight of half the squared norm of a head
MEMORY = 8  # steps that L-BFGS remembers
MAX_STEPS, MAX_HALVINGS = 200, 20
TOLERANCE = 1e-9  # of the squared gradient, relative to the loss at the start
ROUNDING = 1e-6  # of the loss at the start: what float32 may add to a loss


def features(
    backbone: nn.Module, images: Tensor | Iterable[Tensor], place: engine.Place | None = None,
    into: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Return the backbone's features, float32 [N, D], of uint8 `images` [N, C, H, W], unaugmented, in order.

    Images may also come as batches, one after the other. The array `into` [N, D] is filled, which batches need; it may
    be mapped to a file, for more features than memory holds. A progress bar shows after three seconds.
    """
    place, row = place or engine.place(), 0
    backbone = place.put(backbone)
    batches = images.split(BATCH) if isinstance(images, Tensor) else images
    number = len(images if into is None else into)
    with tqdm(total=number, desc="features", unit=" images", delay=3, leave=False) as bar:
        for batch in batches:
            part = engine.evaluate(backbone, batch, place).cpu().numpy()
            if into is None:
                into = np.empty((number, part.shape[1]), np.float32)
            into[row : row + len(part)] = part
            row += len(part)
            bar.update(len(part))
    return into


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def principal(features: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean float32 [D], directions float32 [D, M]) of `features`, float32 [N, D], which may be mapped.

    (features - mean) @ directions are the M first principal components, at most `most` and fewer than N, scaled to a
    variance of 1 in all; they are not whitened, so that distances stay what they are. Sums are float64, over blocks.
    """
    n, d = features.shape
    blocks = _blocks(n, BLOCK_ROWS)
    mean = (sum(features[rows].sum(0, dtype=np.float64) for rows in blocks) / n).astype(np.float32)
    centred = (features[rows] - mean for rows in blocks)
    values, vectors = np.linalg.eigh(sum((x.T @ x).astype(np.float64) for x in centred) / n)
    number = max(1, min(most, n - 1, d))
    total = values[-number:].clip(min=0).sum()
    return mean, (vectors[:, : -number - 1 : -1] / np.sqrt(max(total, 1e-12))).astype(np.float32)


def projected(features: np.ndarray, mean: np.ndarray, directions: np.ndarray, into: np.ndarray) -> None:
    """Write (features - mean) @ directions, see `principal`, into the array `into`, float32 [N, M], block by block."""
    for rows in _blocks(len(features), BLOCK_ROWS):
        into[rows] = (features[rows] - mean) @ directions


def probabilities(backbone: nn.Module, head: nn.Module, inputs: Tensor, place: engine.Place | None = None):
    """Return softmax probabilities float32 [N, K] of images, or of features with `nn.Identity()` as backbone.

    Not for detectors if the network has seen the labels of these rows: it would confirm what it has learned.
    """
    place = place or engine.place()
    logits = engine.evaluate(place.put(nn.Sequential(backbone, head)), inputs, place)
    return logits.softmax(1).cpu().numpy()


def out_of_fold(
    features: np.ndarray,
    labels_given: np.ndarray,
    num_classes: int,
    *,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    l2: float | None = None,
    trusted: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return `probs` float32 [N, K]: each row predicted by a linear head that never saw its label.

    features: float32 [N, D] of a backbone that saw no label either. `labels_given` is [N], or [R, N] for R versions
    of the labels (noise rates, seeds), which give [R, N, K]. Every fold of every split of every version is one of
    `linear_heads`; over `repeats` splits, drawn from `seed` and every 1000 further on, probabilities are averaged.
    l2: of the heads; by default L2, or the number of rows if that is smaller.
    trusted: bool [N], the rows that heads learn from, by default all; the others are predicted all the same. Raises
    InputError with fewer than two classes or than `folds` rows. Northcutt et al. 2021 (arXiv 1911.00068), section 3.1,
    on why the probabilities must be out of fold.
    """
    versions = np.atleast_2d(labels_given)
    n = versions.shape[1]
    if features.shape[0] != n:
        raise InputError(f"features have {features.shape[0]} rows for {n} labels")
    if not 2 <= folds <= n:
        raise InputError(f"{n} rows cannot be split into {folds} folds: use 2 to {n}")
    fold = np.stack([engine.folds(labels, folds, seed + 1000 * i) for labels in versions for i in range(repeats)])
    seen = (fold[:, None] != np.arange(folds)[:, None]).reshape(-1, n)  # [R repeats folds, N]
    every = versions.repeat(repeats * folds, 0)
    learned = seen if trusted is None else seen & trusted
    l2 = min(L2, n) if l2 is None else l2
    weight, bias = linear_heads(features, every, num_classes, seen=learned, l2=l2, device=device)
    weight, bias = (torch.as_tensor(a, device=device) for a in (weight, bias))
    probs = np.zeros((*versions.shape, num_classes), np.float32)
    for block in _blocks(n, BLOCK_ROWS):
        x = torch.as_tensor(np.array(features[block], np.float32), device=device)
        for head, out in enumerate(~seen[:, block]):
            logits = torch.addmm(bias[head], x[torch.from_numpy(out).to(x.device)], weight[head])
            rows = block.start + np.flatnonzero(out)
            probs[head // (repeats * folds), rows] += logits.softmax(1).cpu().numpy() / repeats
    return probs.reshape(*np.shape(labels_given), num_classes)


def linear_heads(
    features: np.ndarray,
    labels_given: np.ndarray,
    num_classes: int,
    *,
    seen: np.ndarray | None = None,
    l2: float = L2,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Fit H multinomial logistic regressions on the same features in one problem; return (weight, bias).

    features: float32 [N, D], which may be mapped to a file: more than HELD are read in blocks, again for each step of
    the search, some sixty times. labels_given: int64 [H, N], a row a head; seen: bool [H, N], the rows each head is
    fitted on, by default all. Each head minimises its summed cross entropy plus l2/2 ||W||^2, bias free, on features
    that are centred and divided by one scale: the mean variance of those that vary becomes 1. Standardised one by one,
    the smallest principal component would count as much as the first. weight [H, D, K] and bias [H, K], float32,
    are for the features as they are. Raises InputError for labels of a single class or beyond `num_classes`.

    Features are turned so that the bound of Boehning 1992 (Annals of the Institute of Statistical Mathematics 44) on
    every head's Hessian is the identity. L-BFGS (Nocedal & Wright 2006, algorithm 7.4) starts from that bound, with a
    memory and a step for each head.
    """
    labels_given = np.atleast_2d(labels_given)
    if any(len(np.unique(labels)) < 2 for labels in labels_given):
        raise InputError("there is only one class among the given labels: nothing to tell apart")
    if labels_given.min() < 0 or labels_given.max() >= num_classes:
        found = f"{labels_given.min()} to {labels_given.max()}"
        raise InputError(f"labels run from {found}; they must lie between 0 and {num_classes - 1}")
    rows_at, mean, scale, gram = _scaled(features, device)
    penalty = torch.full((len(gram),), l2, device=gram.device)
    penalty[-1] = 0
    values, vectors = torch.linalg.eigh(gram / 2 + penalty.double().diag())
    turn = (vectors / values.clamp(min=1e-6 * values[-1]).sqrt()).float()  # [D + 1, D + 1]
    y = torch.as_tensor(labels_given, device=turn.device).mT  # [N, H]
    seen = torch.ones_like(y, dtype=torch.bool) if seen is None else torch.as_tensor(seen, device=turn.device).mT
    seen, decay = seen.float(), turn.mT @ (penalty[:, None] * turn)
    shape = (len(turn), num_classes, y.shape[1])  # [D + 1, K, H]; heads lie last, so that each sum below is over rows
    blocks = _blocks(len(y), max(1, BLOCK_ELEMENTS // (num_classes * y.shape[1])))
    held = [rows_at(rows) @ turn for rows in blocks] if math.prod(features.shape) <= HELD else None

    def turned() -> Iterable[tuple[slice, Tensor]]:
        return zip(blocks, held or (rows_at(rows) @ turn for rows in blocks), strict=True)

    target = torch.zeros(shape, device=turn.device)  # sum of the features of each class's rows
    for rows, z in turned():
        given = torch.zeros(len(z), *shape[1:], device=y.device).scatter_(1, y[rows, None], seen[rows, None])
        target += (z.mT @ given.flatten(1)).view(shape)

    def objective(v: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss [H] and gradient at v, both [D + 1, K, H]."""
        shrink = (decay @ v.flatten(1)).view(shape)
        loss, gradient = (v * (shrink / 2 - target)).sum((0, 1)), shrink - target
        for rows, z in turned():
            logits = (z @ v.flatten(1)).view(-1, *shape[1:])  # [B, K, H]
            largest = logits.amax(1, keepdim=True)
            p = logits.sub_(largest).exp_()
            total = p.sum(1, keepdim=True)
            loss += ((total.log() + largest)[:, 0] * seen[rows]).sum(0)
            gradient += (z.mT @ p.mul_(seen[rows, None] / total).flatten(1)).view(shape)
        return loss, gradient

    v = _lbfgs(objective, torch.zeros_like(target))
    weight = (turn @ v.flatten(1)).view(shape).permute(2, 0, 1).contiguous()  # [H, D + 1, K]
    weight, bias = weight[:, :-1] / scale, weight[:, -1]
    return weight.cpu().numpy(), (bias - mean @ weight).cpu().numpy()


def _scaled(features: np.ndarray, device: torch.device | str) -> tuple[Callable, Tensor, Tensor, Tensor]:
    """Return (function of rows to float32 [B, D + 1], mean [D], scale [], the products of all columns [D + 1, D + 1]).

    The function centres features and divides by the scale; the last one is 1 and carries the bias. Sums are float64,
    over blocks.
    """
    n, d = features.shape
    mean, scale = torch.zeros(d, device=device), torch.ones((), device=device)

    def rows_at(rows: slice) -> Tensor:
        x = torch.as_tensor(np.array(features[rows], np.float32), device=device)
        return torch.cat([(x - mean) / scale, torch.ones_like(x[:, :1])], 1)

    blocks = _blocks(n, BLOCK_ROWS)
    mean += sum(rows_at(rows)[:, :-1].sum(0, dtype=torch.float64) for rows in blocks).float() / n
    variance = sum(rows_at(rows)[:, :-1].double().square().sum(0) for rows in blocks) / max(1, n - 1)
    scale *= variance[variance > 0].mean().nan_to_num(1.0).sqrt().float().clamp(min=1e-6)  # none varies: any scale
    gram = sum((x.mT @ x).double() for x in map(rows_at, blocks))
    return rows_at, mean, scale, gram


def _lbfgs(objective: Callable[[Tensor], tuple[Tensor, Tensor]], v: Tensor) -> Tensor:
    """Minimise H problems side by side from v [D, K, H], where no curvature is above 1, and return the minima.

    `objective` returns their losses [H] and gradients [D, K, H]. A head whose step did not lower its loss halves it;
    one that no step lowers stays. Its memory is its own, so that no head depends on another.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((0, 1))  # [H]

    start, gradient = objective(v)
    memory: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    best, scale = start, torch.ones_like(start)
    for _ in range(MAX_STEPS):
        direction, alphas = -gradient, []
        for s, y, rho in reversed(memory):
            alphas.append(rho * dot(s, direction))
            direction = direction - alphas[-1] * y
        direction = direction * scale
        for (s, y, rho), alpha in zip(memory, reversed(alphas), strict=True):
            direction = direction + s * (alpha - rho * dot(y, direction))
        step = torch.ones_like(start)
        for _ in range(MAX_HALVINGS):
            moved = v + step * direction
            loss, after = objective(moved)
            worse = ~(loss <= best + ROUNDING * start)
            if not worse.any():
                break
            step = torch.where(worse, step / 2, step)
        moved, after = torch.where(worse, v, moved), torch.where(worse, gradient, after)  # no way down: stay
        s, y = moved - v, after - gradient
        curvature = dot(s, y)
        known = curvature > 1e-6 * dot(y, y)
        memory.append((s, y, torch.where(known, 1 / curvature, 0)))
        scale = torch.where(known, curvature / dot(y, y), 1.0)
        v, gradient, best = moved, after, torch.where(worse, best, loss)
        if (worse | (dot(gradient, gradient) <= TOLERANCE * start)).all():
            break
    return v
