"""Features without a deep network: learned patches, pooled over the image. Pre-training in a minute, without labels.

Coates, Ng & Lee 2011, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning" (AISTATS), section 3.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptglab.errors import InputError
from ptglab.train import checkpoints, engine

SAMPLES, ROUNDS = 50_000, 15  # patches that filters are learned from, and rounds of k-means
FLAT = 10.0  # added to the variance of a patch's grey levels, 0 to 255, as in the paper
SMOOTH = 0.1  # added to the variance of each direction before whitening, as in the paper
MOST, BLOCK = 4000, 64  # images for the principal directions; images at a time, since responses are many
POOLED = 2  # regions a side that responses are averaged over


class Patches(nn.Module):
    """Images [B, C, H, W] in [0, 1] to features [B, D]; made by `learn`.

    A patch is brought to mean 0 and variance 1, whitened, and compared with K centroids; what responds is how much
    nearer than the average it lies to each ("triangle", section 3.2.1), averaged over POOLED x POOLED regions. The
    responses are projected on their D principal directions.
    """

    def __init__(self, channels: int, side: int, number: int, out: int = 0):
        super().__init__()
        self.sizes = {"channels": channels, "side": side, "number": number, "out": out}
        size, pooled = channels * side**2, POOLED**2 * number
        self.register_buffer("filters", torch.zeros(size + number, channels, side, side))
        self.register_buffer("offset", torch.zeros(size + number))
        self.register_buffer("centroids", torch.zeros(number, size))
        self.register_buffer("means", torch.zeros(pooled))
        self.register_buffer("directions", torch.zeros(pooled, out))

    @property
    def num_features(self) -> int:
        return self.sizes["out"] or len(self.means)

    def compare(self, whitening: Tensor, mean: Tensor, centroids: Tensor) -> None:
        """Set the filters: patches less their `mean` [P], times `whitening` [P, P], beside `centroids` [K, P]."""
        filters = torch.cat([whitening.T, centroids @ whitening.T])  # [P + K, P] on patches of mean 0 and variance 1
        self.filters, self.offset = filters.view(-1, *self.filters.shape[1:]), filters @ mean
        self.centroids = centroids

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([self.responses(block) for block in x.split(BLOCK)]) - self.means
        return pooled @ self.directions if self.sizes["out"] else pooled

    def responses(self, x: Tensor) -> Tensor:
        """Return [B, POOLED^2 K] of images [B, C, H, W]: how near each region is to each centroid."""
        x, side, size = 255 * x, self.filters.shape[-1], self.centroids.shape[1]
        mean = F.avg_pool2d(x.mean(1, keepdim=True), side, 1)
        variance = F.avg_pool2d(x.square().mean(1, keepdim=True), side, 1) - mean.square()
        deviation = variance.clamp_(min=0).add_(FLAT).sqrt_()
        y = F.conv2d(x.contiguous(), self.filters.contiguous())  # [B, P + K, H', W']; channels-last is slower here
        y = y.sub_(mean * self.filters.sum((1, 2, 3))[:, None, None]).div_(deviation).sub_(self.offset[:, None, None])
        square = y[:, :size].square().sum(1, keepdim=True)
        distance = y[:, size:].mul_(-2).add_(square).add_(self.centroids.square().sum(1)[:, None, None])
        distance = distance.clamp_(min=0).sqrt_()
        closeness = distance.neg_().sub_(distance.mean(1, keepdim=True)).clamp_(min=0)
        return F.adaptive_avg_pool2d(closeness, POOLED).flatten(1)


def learn(
    images: Tensor, seed: int, place: engine.Place | None = None, number: int = 400, side: int = 6, out: int = 256,
    share: float = 1.0,
) -> Patches:  # fmt: skip
    """Return features learned from uint8 `images` [N, C, H, W] alone.

    number: K, how many centroids; side: of a patch, in pixels; out: D, how many features, fewer for few images, or if
    fewer hold the `share` of the variance.
    """
    place, (n, channels, height, width) = place or engine.place(), images.shape
    side = min(side, height, width)
    rng = engine.generator("cpu", seed, "patches")
    ends = n, height - side + 1, width - side + 1
    rows, top, left = (torch.randint(0, end, (SAMPLES, 1, 1), generator=rng) for end in ends)
    steps = torch.arange(side)
    x = images[rows, :, top + steps[:, None], left + steps]
    x = x.permute(0, 3, 1, 2).flatten(1).float().to(place.device)  # [SAMPLES, C side side]
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + FLAT).sqrt()
    mean = x.mean(0)
    x -= mean
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    whitening = vectors * (values.clamp(min=0) + SMOOTH).rsqrt() @ vectors.T
    network = Patches(channels, side, number)
    network.compare(whitening, mean, _k_means(x @ whitening, number))
    sample = engine.evaluate(network.to(place.device), images[:: -(-n // MOST)], place)  # [M, R]
    means, deviation = sample.mean(0), sample.std(0, correction=0).clamp(min=1e-6)
    sample = (sample - means) / deviation
    values, vectors = torch.linalg.eigh(sample.T @ sample)
    out = min(out, 1 + int((values.flip(0).cumsum(0) < share * values.sum()).sum()))
    network.means, network.directions = means, vectors.flip(1)[:, : min(out, len(sample) - 1)] / deviation[:, None]
    network.sizes["out"] = network.directions.shape[1]
    return network


def save(path: str | Path, network: Patches) -> None:
    """Write the network to `path` (safetensors), with its sizes in the metadata."""
    checkpoints.write_tensors(path, network.state_dict(), {"patches": json.dumps(network.sizes)})


def load(path: str | Path) -> Patches:
    """Return the network that `save` wrote, to the bit. Raises InputError if the file is missing or holds another."""
    try:
        tensors, about = checkpoints.read_tensors(path)
        network = Patches(**json.loads(about["patches"]))
        network.load_state_dict(tensors, strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} holds no learned patches: {' '.join(str(error).split())[:200]}") from None
    return network


def _k_means(x: Tensor, number: int) -> Tensor:
    """Return centroids [K, P] of x [M, P], whose rows lie in random order."""
    centroids = x[:number].clone()
    for _ in range(ROUNDS):
        halves = centroids.square().sum(1) / 2
        nearest = torch.cat([(halves - block @ centroids.T).argmin(1) for block in x.split(10_000)])
        counts = torch.bincount(nearest, minlength=number)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids
