"""LARS against a slow loop and lightly's, the schedule against PyTorch's, the groups by hand."""

import math

import pytest
import torch
from lightly.utils.lars import LARS as PeerLARS
from torch import nn

from ptglab.train import optim

SHAPES = [(4, 3), (2, 3, 3, 3), (5,), (4,)]


def problem(seed: int, steps: int = 6):
    """Starting weights, and a gradient for each at every step; magnitudes differ by orders, so that `clip` matters."""
    draws = torch.Generator().manual_seed(seed)
    weights = [torch.randn(s, generator=draws) for s in SHAPES]
    gradients = [
        [torch.randn(s, generator=draws) * 10.0 ** (i - 2) for i, s in enumerate(SHAPES)] for _ in range(steps)
    ]
    return weights, gradients


def slow_lars(weights, gradients, rates, decay, adapt, momentum, eta, clip):
    """Numbers one at a time: decay, adapt, momentum, step (You et al. 2017; the norm is of the decayed gradient)."""
    weights = [w.flatten().tolist() for w in weights]
    velocity = [[0.0] * len(w) for w in weights]
    for step, rate in zip(gradients, rates, strict=True):
        for i, (w, v, g) in enumerate(zip(weights, velocity, step, strict=True)):
            d = [g + decay[i] * w for g, w in zip(g.flatten().tolist(), w, strict=True)]
            norm_w, norm_d = math.hypot(*w), math.hypot(*d)
            trust = 1.0
            if adapt[i] and norm_w > 0 and norm_d > 0:
                trust = eta * norm_w / norm_d
                if clip:
                    trust = min(trust / rate, 1.0)
            for k in range(len(w)):
                v[k] = momentum * v[k] + trust * d[k]
                w[k] -= rate * v[k]
    return weights


def run(optimizer, params, gradients, rates=None) -> None:
    for i, step in enumerate(gradients):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        for group in optimizer.param_groups if rates else ():
            group["lr"] = rates[i]
        optimizer.step()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("momentum, eta, decay", [(0.9, 0.02, 0.0), (0.9, 0.02, 0.1), (0.0, 0.5, 1e-2)])
def test_lars_is_the_slow_loop(seed, clip, momentum, eta, decay):
    """Two adapted tensors with decay, two excluded ones without; the rate changes every step."""
    weights, gradients = problem(seed)
    params = [nn.Parameter(w.clone()) for w in weights]
    groups = [dict(params=params[:2], weight_decay=decay), dict(params=params[2:], adapt=False)]
    rates = [0.3, 0.2, 0.1, 0.4, 0.05, 0.01]
    run(optim.LARS(groups, lr=0.3, momentum=momentum, eta=eta, clip=clip), params, gradients, rates)
    expected = slow_lars(
        weights, gradients, rates, [decay] * 2 + [0.0] * 2, [True] * 2 + [False] * 2, momentum, eta, clip
    )
    for p, start, e in zip(params, weights, expected, strict=True):
        assert not torch.allclose(p, start, rtol=1e-3)
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(e), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_lars_without_clip_is_lightlys(seed):
    """lightly adapts only where there is decay; one this small moves nothing in float32."""
    weights, gradients = problem(seed)
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    run(optim.LARS([dict(params=ours, weight_decay=1e-12)], lr=0.2, eta=0.05, clip=False), ours, gradients)
    peer = PeerLARS(theirs, lr=0.2, momentum=0.9, weight_decay=1e-12, trust_coefficient=0.05)
    run(peer, theirs, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_stay():
    """One of a group, and a whole group."""
    moved, one, alone = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    moved.grad = torch.ones(2, 2)
    optim.LARS([dict(params=[moved, one]), dict(params=[alone])], lr=0.1).step()
    assert torch.equal(one, torch.ones(2, 2)) and torch.equal(alone, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))


@pytest.mark.parametrize("steps, warmup", [(100, 10), (37, 5), (10, 1), (20, 0)])
def test_warmup_cosine(steps, warmup):
    """Linear to 1 at the end of warm-up, then PyTorch's annealing over what is left."""
    factors = [optim.warmup_cosine(i, steps, warmup) for i in range(steps)]
    assert factors[:warmup] == [(i + 1) / warmup for i in range(warmup)]
    assert factors[warmup] == 1.0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup)
    for factor in factors[warmup:]:
        assert factor == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step(), schedule.step()


def test_parameter_groups_split_by_dimensions():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    linear, frozen = nn.Linear(4, 3), nn.Linear(2, 2).requires_grad_(False)
    heavy, light = optim.parameter_groups([network, linear, frozen], 0.3, 0.01)
    assert {id(p) for p in heavy["params"]} == {id(network[0].weight), id(linear.weight)}
    assert {id(p) for p in light["params"]} == {
        id(p) for p in (network[0].bias, network[1].weight, network[1].bias, linear.bias)
    }
    assert (heavy["weight_decay"], heavy["adapt"], light["weight_decay"], light["adapt"]) == (0.01, True, 0.0, False)
    assert all(group["lr"] == group["base_lr"] == 0.3 for group in (heavy, light))
    assert len(optim.parameter_groups([nn.Linear(2, 2, bias=False)], 0.1, 0.0)) == 1  # no empty group
