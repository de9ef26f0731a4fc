"""The two-view and the supervised losses against explicit loops, lightly, closed forms and their invariances."""

import math

import numpy as np
import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss

from ptglab.train import losses

ALL = [losses.nt_xent, losses.barlow_twins, losses.vicreg, losses.emp_ssl]


def views(seed: int, b: int = 12, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Two correlated random views [b, d], neither centred nor of unit scale."""
    draws = torch.Generator().manual_seed(seed)
    common, own1, own2 = torch.randn(3, b, d, generator=draws)
    return 2 * common + 0.5 * own1 + 0.3, 2 * common + 0.5 * own2 - 0.2


def slow_nt_xent(z1, z2, temperature: float = 0.5) -> float:
    """Equation 1 of arXiv 2002.05709, then the mean over all (i, j) and (j, i)."""
    b, z = len(z1), [*z1.tolist(), *z2.tolist()]

    def sim(u: list[float], v: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))

    total = 0.0
    for i in range(2 * b):
        j = i + b if i < b else i - b
        denominator = math.fsum(math.exp(sim(z[i], z[k]) / temperature) for k in range(2 * b) if k != i)
        total -= math.log(math.exp(sim(z[i], z[j]) / temperature) / denominator)
    return total / (2 * b)


def _column(z, d: int) -> list[float]:
    return [row[d] for row in z.tolist()]


def _centred(values: list[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [v - mean for v in values]


def slow_barlow_twins(z1, z2, lambd: float = 5e-3, eps: float = 1e-5) -> float:
    """Equations 1 and 2 of arXiv 2103.03230; `eps` is added to the variances, as the authors' batch norm does."""
    b, dims = z1.shape
    total = 0.0
    for i in range(dims):
        for j in range(dims):
            u, v = _centred(_column(z1, i)), _centred(_column(z2, j))
            norm_u = math.sqrt(math.fsum(a * a for a in u) + b * eps)
            norm_v = math.sqrt(math.fsum(a * a for a in v) + b * eps)
            c = math.fsum(a * b for a, b in zip(u, v, strict=True)) / (norm_u * norm_v)
            total += (1 - c) ** 2 if i == j else lambd * c**2
    return total


def slow_vicreg(
    z1, z2, invariance: float = 25, variance: float = 25, covariance: float = 1, eps: float = 1e-4
) -> float:
    """Equations 1 to 6 of arXiv 2105.04906, with the authors' code's scale of each term."""
    b, dims = z1.shape
    s = math.fsum(
        (a - b) ** 2 for x, y in zip(z1.tolist(), z2.tolist(), strict=True) for a, b in zip(x, y, strict=True)
    )
    v, c = 0.0, 0.0
    for z in (z1, z2):
        columns = [_centred(_column(z, d)) for d in range(dims)]
        for i, u in enumerate(columns):
            v += max(0.0, 1 - math.sqrt(math.fsum(a * a for a in u) / (b - 1) + eps)) / dims
            for j, w in enumerate(columns):
                if i != j:
                    c += (math.fsum(a * b for a, b in zip(u, w, strict=True)) / (b - 1)) ** 2 / dims
    return invariance * s / (b * dims) + variance * v / 2 + covariance * c


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "fast, slow, options",
    [
        (losses.nt_xent, slow_nt_xent, {}),
        (losses.nt_xent, slow_nt_xent, {"temperature": 0.1}),
        (losses.barlow_twins, slow_barlow_twins, {}),
        (losses.barlow_twins, slow_barlow_twins, {"lambd": 0.3}),
        (losses.vicreg, slow_vicreg, {}),
        (losses.vicreg, slow_vicreg, {"invariance": 3.0, "variance": 7.0, "covariance": 2.0, "eps": 0.01}),
    ],
)
def test_slow_reference(fast, slow, options, seed):
    z1, z2 = views(seed)
    z1[:, 0] *= 0.1  # a dimension that VICReg's hinge and Barlow Twins' eps see
    assert fast(z1, z2, **options).item() == pytest.approx(slow(z1, z2, **options), rel=1e-5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "ours, peer",
    [
        (losses.nt_xent, NTXentLoss()),
        (lambda a, b: losses.nt_xent(a, b, temperature=0.07), NTXentLoss(temperature=0.07)),
        (losses.barlow_twins, BarlowTwinsLoss()),
        (lambda a, b: losses.barlow_twins(a, b, lambd=0.1), BarlowTwinsLoss(lambda_param=0.1)),
        (losses.vicreg, VICRegLoss()),
        (lambda a, b: losses.vicreg(a, b, 1.0, 2.0, 3.0), VICRegLoss(lambda_param=1.0, mu_param=2.0, nu_param=3.0)),
    ],
    ids=["nt_xent", "nt_xent_cold", "barlow_twins", "barlow_twins_lambd", "vicreg", "vicreg_weights"],
)
def test_value_and_gradient_of_lightly(ours, peer, seed):
    """A batch of its own size for every seed; gradients with respect to both views."""
    z = [view.mul_(0.3 + 0.1 * seed).requires_grad_() for view in views(seed, b=4 + 7 * seed, d=3 + 5 * seed)]
    theirs = peer(*z)
    mine = ours(*z)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(mine, z), torch.autograd.grad(theirs, z), strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("b", [2, 7, 64])
def test_nt_xent_of_equal_vectors(b):
    """Nothing to tell the twin by: the entropy of 2B - 1 equal chances."""
    z = torch.tensor([0.3, -0.4, 2.0]).expand(b, 3)
    assert losses.nt_xent(z, 5 * z).item() == pytest.approx(math.log(2 * b - 1), rel=1e-6)


def test_barlow_twins_of_decorrelated_twins():
    """Columns of +-1 at right angles: c is the identity but for eps, so the loss is D (eps / (1 + eps))^2."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    z = torch.kron(torch.kron(two, two), two)[:, 1:]  # a Hadamard matrix without its constant column, [8, 7]
    assert losses.barlow_twins(z, z).item() == pytest.approx(0, abs=1e-8)
    assert losses.barlow_twins(z, -z).item() == pytest.approx(7 * 2**2, rel=1e-4)  # c = -identity


def test_vicreg_of_constant_vectors():
    """Collapse: no distance, no covariance; a standard deviation of sqrt(eps) in every dimension."""
    z = torch.ones(8, 5)
    assert losses.vicreg(z, z).item() == pytest.approx(25 * (1 - 0.01), rel=1e-6)
    assert losses.vicreg(z, z, variance=1.0, eps=0.25).item() == pytest.approx(0.5, rel=1e-6)
    assert losses.vicreg(z, z + 2).item() == pytest.approx(25 * (1 - 0.01) + 25 * 4, rel=1e-6)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_swap_and_permutation(loss, seed):
    z1, z2 = views(seed)
    order = torch.randperm(len(z1), generator=torch.Generator().manual_seed(seed))
    value = loss(z1, z2)
    torch.testing.assert_close(loss(z2, z1), value)
    torch.testing.assert_close(loss(z1[order], z2[order]), value)
    assert not torch.isclose(loss(z1, z2[order]), value, rtol=1e-2)  # the pairs matter


@pytest.mark.parametrize("loss", ALL)
def test_bfloat16_is_computed_in_float32(loss):
    z1, z2 = (z.bfloat16() for z in views(0))
    value = loss(z1, z2)
    assert value.dtype == torch.float32
    assert value.item() == loss(z1.float(), z2.float()).item()


def slow_emp_ssl(*z, weight: float = 200.0, eps: float = 0.2) -> float:
    """Equations 2 to 4 of arXiv 2304.03977 in float64, crop by crop, with the determinant of the D x D matrix."""
    z = [np.array([np.array(row) / math.hypot(*row) for row in crop.tolist()]) for crop in z]
    b, d = z[0].shape
    agreement, rate = [], []
    for crop in z:
        covariance = sum(np.outer(row, row) for row in crop)
        rate.append(np.linalg.slogdet(np.eye(d) + d / (b * eps) * covariance)[1] / 2)
        for i, row in enumerate(crop):
            mean = sum(each[i] for each in z) / len(z)
            agreement.append(row @ mean / math.hypot(*mean))
    return -weight * math.fsum(agreement) / len(agreement) - math.fsum(rate) / len(rate)


@pytest.mark.parametrize("crops", [1, 2, 5])
@pytest.mark.parametrize(("b", "d"), [(12, 5), (6, 6), (4, 9)])
@pytest.mark.parametrize("options", [{}, {"weight": 1.0, "eps": 0.5}], ids=str)
def test_emp_ssl_slow_reference(options, b, d, crops):
    """With more images than dimensions and with fewer, where the determinant is that of the smaller matrix."""
    z = [view for seed in range(3) for view in views(seed, b, d)][:crops]
    assert losses.emp_ssl(*z, **options).item() == pytest.approx(slow_emp_ssl(*z, **options), rel=1e-5)


def test_emp_ssl_of_axes_and_of_collapse():
    """Crops that agree on D orthogonal directions: D/2 log(1 + 1/eps); all images on one: log(1 + D/eps) / 2."""
    z = 3 * torch.eye(6)
    assert losses.emp_ssl(z, z, z).item() == pytest.approx(-200 - 3 * math.log(1 + 1 / 0.2), rel=1e-6)
    one = torch.eye(6)[[0] * 4]
    assert losses.emp_ssl(one, one).item() == pytest.approx(-200 - math.log(1 + 6 / 0.2) / 2, rel=1e-6)
    assert losses.emp_ssl(one, one).item() > losses.emp_ssl(z, z).item()  # collapse is worse


def test_emp_ssl_sees_neither_lengths_nor_a_rotation_nor_the_order_of_crops():
    z = [*views(0), *views(1)]
    value, draws = losses.emp_ssl(*z), torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=draws))
    torch.testing.assert_close(losses.emp_ssl(*(each @ q for each in z)), value)
    scaled = [each * (0.1 + torch.rand(12, 1, generator=draws)) for each in z]
    torch.testing.assert_close(losses.emp_ssl(*scaled), value)
    torch.testing.assert_close(losses.emp_ssl(*z[::-1]), value)


def logits_and_labels(seed: int, b: int = 30, k: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [b, k] with probabilities of the label from 1e-6 to almost 1, and labels."""
    draws = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(b, k, generator=draws), torch.randint(k, (b,), generator=draws)


def slow_gce(logits, labels, q: float = 0.7) -> float:
    """Equation 6 of arXiv 1805.07836, row by row; the mean over the batch."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = math.exp(row[label]) / math.fsum(math.exp(v) for v in row)
        total += (1 - p**q) / q
    return total / len(labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{}, {"q": 0.1}, {"q": 0.5}, {"q": 1.0}], ids=str)
def test_gce_slow_reference(options, seed):
    logits, labels = logits_and_labels(seed)
    assert losses.gce(logits, labels, **options).item() == pytest.approx(slow_gce(logits, labels, **options), rel=1e-5)


def test_gce_is_finite_where_the_label_cannot_be_right():
    """In bfloat16, too, which it computes in float32; its gradient vanishes, and that of the logarithm does not."""
    logits = torch.tensor([[200.0, 0.0, -200.0]], dtype=torch.bfloat16, requires_grad=True)
    value = losses.gce(logits, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(1 / 0.7)
    assert gradient.abs().max() < 1e-30
