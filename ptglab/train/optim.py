"""Parameter groups, LARS, and how the learning rate goes over the steps."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def parameter_groups(
    modules: Iterable[nn.Module], learning_rate: float, weight_decay: float, decay_all: bool = False
) -> list[dict]:
    """Return two groups: matrices and filters with weight decay, biases and norms (ndim < 2) without.

    With `decay_all` all are in the first. Each group carries `base_lr`, which `set_learning_rate` scales, and `adapt`,
    whether LARS adapts it.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    heavy = [p for p in parameters if p.ndim > 1 or decay_all]
    light = [p for p in parameters if p.ndim <= 1 and not decay_all]
    groups = {"params": heavy, "weight_decay": weight_decay, "adapt": True}, {"params": light, "adapt": False}
    rates = {"lr": learning_rate, "base_lr": learning_rate, "weight_decay": 0.0}
    return [rates | group for group in groups if group["params"]]


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor of `step` (from 0): linear up over `warmup` steps, then half a cosine.

    SGDR without restarts, Loshchilov & Hutter 2017 (arXiv 1608.03983), equation 5.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def constant(step: int, steps: int, warmup: int) -> float:
    """Return 1, the factor of a learning rate that stays as it is; the arguments are those of `warmup_cosine`."""
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, per parameter, by ||w|| / ||gradient||.

    After You et al. 2017 (arXiv 1708.03888), with the weight decay inside the gradient's norm, as Barlow Twins'
    authors have it. `eta` is the trust coefficient; `clip` bounds the adapted rate by the group's own, which small
    data sets need. Groups with `adapt=False` take plain SGD steps.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, eta: float = 0.02, clip: bool = True):
        defaults = dict(lr=lr, momentum=momentum, eta=eta, clip=clip, weight_decay=0.0, adapt=True)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            if group["weight_decay"]:
                updates = torch._foreach_add(updates, params, alpha=group["weight_decay"])
            if group["adapt"]:
                updates = torch._foreach_mul(updates, self._trust(group, params, updates))
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])

    @staticmethod
    def _trust(group: dict, params: list, updates: list) -> list:
        """Return ||w|| / ||g|| x eta, one 0-d tensor a parameter; 1 where either norm is 0."""
        weight_norms = torch.stack(torch._foreach_norm(params))
        update_norms = torch.stack(torch._foreach_norm(updates))
        trust = group["eta"] * weight_norms / (update_norms + 1e-8)
        if group["clip"]:
            trust = (trust / group["lr"]).clamp(max=1.0)
        return list(torch.where((weight_norms > 0) & (update_norms > 0), trust, 1.0).unbind())
