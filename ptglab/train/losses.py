"""Losses of the projections of views and supervised losses of logits, all pure; symbols and constants: the papers'."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Normalised temperature-scaled cross entropy of SimCLR: each view must find its twin among 2B - 1.

    z1, z2: projections [B, D] of the two views, row i of one the twin of row i of the other; any scale.
    Returns a scalar. Chen et al. 2020 (arXiv 2002.05709), equation 1.
    """
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # [2B, D]
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)  # a view is no negative of itself
    b = len(z1)
    twin = torch.arange(2 * b, device=z.device).roll(b)
    return F.cross_entropy(similarity, twin)


def barlow_twins(z1: Tensor, z2: Tensor, lambd: float = 5e-3) -> Tensor:
    """Barlow Twins: the cross-correlation of the views should be the identity.

    z1, z2: projections [B, D], B > 1. Returns a scalar, summed over the D x D entries.
    Zbontar et al. 2021 (arXiv 2103.03230), equation 1; lambda from section 2.2.
    """
    c = standardise(z1).T @ standardise(z2) / len(z1)  # [D, D]
    on_diagonal = (torch.diagonal(c) - 1).square().sum()
    off_diagonal = c.square().sum() - torch.diagonal(c).square().sum()
    return on_diagonal + lambd * off_diagonal


def vicreg(
    z1: Tensor, z2: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """VICReg: twins close, every dimension with a standard deviation of at least 1, dimensions uncorrelated.

    z1, z2: projections [B, D], B > 1. Returns a scalar.
    Bardes et al. 2022 (arXiv 2105.04906), equation 6; as in the authors' implementation, the invariance is a mean
    over dimensions too, the variance term is the mean over the two views, the covariance term their sum.
    """
    z1, z2 = z1.float(), z2.float()
    hinge = sum(F.relu(1 - (z.var(dim=0) + eps).sqrt()).mean() for z in (z1, z2)) / 2
    decorrelation = 0.0
    for z in (z1, z2):
        centred = z - z.mean(0)
        c = centred.T @ centred / (len(z) - 1)  # [D, D]
        decorrelation = decorrelation + (c.square().sum() - torch.diagonal(c).square().sum()) / z.shape[1]
    return invariance * F.mse_loss(z1, z2) + variance * hinge + covariance * decorrelation


def emp_ssl(*z: Tensor, weight: float = 200.0, eps: float = 0.2) -> Tensor:
    """EMP-SSL: the crops of an image close to their mean, the images of each crop spread over all directions.

    z: projections [B, D] of each of the crops, any scale. Returns a scalar: minus `weight` times the mean cosine to the
    mean of the crops, minus the mean over crops of the coding rate log det(I + D / (B eps) Z^T Z) / 2, with rows of Z
    normalised. Tong et al. 2023 (arXiv 2304.03977), equations 2 to 4; the weight is that of the authors' code.
    """
    z = F.normalize(torch.stack(z).float(), dim=2)  # [crops, B, D]
    _, b, d = z.shape
    agreement = F.cosine_similarity(z, z.mean(0), dim=2).mean()
    gram = z @ z.mT if b < d else z.mT @ z  # the same determinant: the smaller one
    rate = torch.logdet(torch.eye(len(gram[0]), device=z.device) + d / (b * eps) * gram) / 2
    return -weight * agreement - rate.mean()


def standardise(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Return [B, D] float32 with mean 0 and (biased) variance 1 along the batch."""
    z = z.float()
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + eps).sqrt()


def gce(logits: Tensor, labels: Tensor, q: float = 0.7) -> Tensor:
    """Generalised cross entropy: (1 - p^q) / q, which a label that cannot be right pulls on less than on a likely one.

    logits: [B, K]; labels: int64 [B]; p is the probability of the label. Returns a scalar, the mean. Between cross
    entropy (q to 0) and the mean absolute error (q = 1). Zhang & Sabuncu 2018 (arXiv 1805.07836), equation 6.
    """
    log_p = F.log_softmax(logits.float(), dim=1).gather(1, labels[:, None])[:, 0]
    return ((1 - (q * log_p).exp()) / q).mean()


SUPERVISED = {"cross_entropy": F.cross_entropy, "gce": gce}
