"""Features and out-of-fold probabilities of every row, in dataset order."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptglab import engine
from ptglab.errors import InputError


def features(backbone: nn.Module, images: Tensor, place: engine.Place | None = None) -> np.ndarray:
    """Return the backbone's features, float32 [N, D], of uint8 `images` [N, C, H, W], unaugmented, in order."""
    place = place or engine.place()
    return engine.evaluate(place.put(backbone), images, place).cpu().numpy()


def probabilities(
    backbone: nn.Module, head: nn.Module, inputs: Tensor, place: engine.Place | None = None
) -> np.ndarray:
    """Return softmax probabilities float32 [N, K] of images, or of features with `nn.Identity()` as backbone."""
    place = place or engine.place()
    return engine.evaluate(place.put(nn.Sequential(backbone, head)), inputs, place).softmax(1).cpu().numpy()


def out_of_fold(
    features: np.ndarray,
    labels_given: np.ndarray,
    num_classes: int,
    *,
    folds: int = 5,
    seed: int = 0,
    l2: float = 100.0,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return `probs` float32 [N, K]: each row predicted by a linear head that never saw its label.

    features: float32 [N, D] of a backbone that saw no label either. One multinomial logistic regression a fold, all
    in one problem, solved by L-BFGS: the summed cross entropy plus l2/2 ||W||^2 on standardised features.
    Raises InputError with fewer than two classes or than `folds` rows. Northcutt et al. 2021 (arXiv 1911.00068),
    section 3.1, on why the probabilities must be out of fold.
    """
    if len(np.unique(labels_given)) < 2:
        raise InputError("there is only one class among the given labels: nothing to tell apart")
    if not 2 <= folds <= len(labels_given):
        raise InputError(f"{len(labels_given)} rows cannot be split into {folds} folds: use 2 to {len(labels_given)}")
    x = torch.as_tensor(np.array(features), device=device)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    y = torch.as_tensor(np.array(labels_given), device=device)
    fold = torch.as_tensor(engine.folds(labels_given, folds, seed), device=device)
    weight, bias = _linear_heads(x, y, fold, folds, num_classes, l2)
    probs = np.empty((len(x), num_classes), np.float32)
    for k in range(folds):
        out = fold == k
        probs[out.cpu().numpy()] = (x[out] @ weight[k] + bias[k]).softmax(1).cpu().numpy()
    return probs


def _linear_heads(x: Tensor, y: Tensor, fold: Tensor, folds: int, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Solve the `folds` ridge-penalised logistic regressions together; head k is fitted on the rows of other folds.

    Returns (weight [F, D, K], bias [F, K]).
    """
    weight = x.new_zeros(folds, x.shape[1], num_classes, requires_grad=True)
    bias = x.new_zeros(folds, num_classes, requires_grad=True)
    seen = (fold[None] != torch.arange(folds, device=x.device)[:, None]).float()  # [F, N]
    target = y.expand(folds, -1)  # [F, N]
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=100, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits = torch.matmul(x, weight) + bias[:, None]  # [F, N, K]
        loss = F.cross_entropy(logits.mT, target, reduction="none")
        total = ((loss * seen).sum() + l2 / 2 * weight.square().sum()) / len(x)
        total.backward()
        return total

    solver.step(objective)
    return weight.detach(), bias.detach()
