"""Retentions: how the accumulator A of a memory that learns at test time gives its weights W.

Every rule keeps a linear accumulator, A' = alpha A - eta G, and evaluates its memory at W = map(A)
(dual averaging, mirror descent). A and W are [..., out, in], one matrix of one head each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longscan.ops._memory_rule import Rule


@dataclass(frozen=True)
class Retention:
    """How weights come from accumulators.

    map: A -> W; None: W = A. shrink: what is done to A after its update, given the step eta
    (broadcasting against A); None: nothing. scale: A -> s if W = s A; None where that is not so.
    """

    map: Callable[[Tensor, Rule], Tensor] | None = None
    shrink: Callable[[Tensor, Tensor, Rule], Tensor] | None = None
    scale: Callable[[Tensor, Rule], Tensor] | None = None

    @property
    def linear(self) -> bool:
        """Whether the weights themselves are linear in the gradients."""
        return self.map is None and self.shrink is None

    def weights(self, a: list[Tensor], rule: Rule) -> list[Tensor]:
        """The weights at which the memory is evaluated."""
        return a if self.map is None else [self.map(x, rule) for x in a]


def _power(x: Tensor, p: float) -> Tensor:
    """x^p of x >= 0."""
    if p == 4:
        return x.square().square()
    return x if p == 1 else x.pow(p)


def _norm(a: Tensor, q: float) -> Tensor:
    """|A|_q over one matrix [..., 1, 1]; 1 where A = 0, so that one can divide by it."""
    largest = a.detach().abs().amax((-2, -1), True)
    some = largest > 0
    x = a.abs() / torch.where(some, largest, 1)
    total = _power(x, q).sum((-2, -1), True)
    return torch.where(some, torch.where(some, total, 1).pow(1 / q) * largest, 1)


FLOOR = 1e-3
"""The least |A|_q that the printed map divides by: it has a pole at A = 0, which training meets."""


def _lq_scale(a: Tensor, rule: Rule) -> Tensor:
    return _norm(a, rule.q).clamp(min=FLOOR).pow(2 - rule.q)


def _lq_paper(a: Tensor, rule: Rule) -> Tensor:
    """A |A|_q^(2-q), as printed."""
    if rule.q == 2:
        return a
    norm = _norm(a, rule.q).clamp(min=FLOOR)
    return (a / norm) * norm.pow(3 - rule.q)


def _lq_mirror(a: Tensor, rule: Rule) -> Tensor:
    """sign(A) |A|^(q-1) |A|_q^(2-q), the gradient of |A|_q^2 / 2."""
    if rule.q == 2:
        return a
    norm = _norm(a, rule.q)
    x = a / norm
    return x * _power(x.abs(), rule.q - 2) * norm


def _kl(a: Tensor, rule: Rule) -> Tensor:
    """total softmax(A) of every row."""
    w = torch.softmax(a, -1)
    return w if rule.total == 1 else rule.total * w


def _soft_threshold(a: Tensor, rule: Rule) -> Tensor:
    return a - a.clamp(-rule.threshold, rule.threshold)


def _soft_threshold_smooth(a: Tensor, rule: Rule) -> Tensor:
    return a.abs() * torch.atan(a / rule.threshold) * (2 / math.pi)


def _proximal(a: Tensor, eta: Tensor, rule: Rule) -> Tensor:
    bound = rule.threshold * eta
    return a.sign() * (a.abs() - bound).clamp(min=0)


def _sigmoid(a: Tensor, rule: Rule) -> Tensor:
    return torch.sigmoid(a)


# f-divergences from the uniform distribution: W = u total / n, with u = (f')^-1(A - zeta) and
# zeta such that the mean of u over a row is 1. A is taken relative to its largest entry, z <= 0.


def _chi2(a: Tensor, rule: Rule) -> Tensor:
    """f(u) = (u - 1)^2 / 2: u = max(0, z - zeta), a projection onto the simplex."""
    n = a.shape[-1]
    z = a - a.amax(-1, True)
    ordered = z.detach().sort(-1, descending=True).values
    count = torch.arange(1, n + 1, dtype=a.dtype, device=a.device)
    zeta = (ordered.cumsum(-1) - n) / count
    size = (ordered > zeta).sum(-1, True)
    kept = z >= ordered.gather(-1, size - 1)
    # Ties at the border are all kept: their u is the same, and 0 only where n of them are.
    zeta = (torch.where(kept, z, 0).sum(-1, True) - n) / kept.sum(-1, True)
    return torch.where(kept, z - zeta, 0).clamp(min=0) * (rule.total / n)


def _inverse_power(a: Tensor, rule: Rule, r: int) -> Tensor:
    """u = (s - z)^-r, s > 0 such that mean(u) = 1.

    The power mean m(s) = mean((s - z)^-r)^(-1/r) is concave and grows, so that Newton's method
    for m(s) = 1 climbs to the root from n^(-1/r), where the largest entry alone gives m <= 1. Its
    last two steps are differentiable: from a root they make first and second derivatives exact.
    """
    n = a.shape[-1]
    z = a - a.detach().amax(-1, True)
    s = torch.full_like(z[..., :1], n ** (-1 / r)).detach()

    def newton(s: Tensor, z: Tensor) -> Tensor:
        x = 1 / (s - z)
        u = x if r == 1 else x.square()
        mean = u.mean(-1, True)
        slope = (u * x).mean(-1, True)  # m = mean^(-1/r), m' = mean^(-1/r - 1) slope
        m = 1 / mean if r == 1 else mean.rsqrt()
        return s + (1 - m) * mean / (m * slope)

    with torch.no_grad():
        for _ in range(10):
            s = newton(s, z)
    s = newton(newton(s, z), z)
    x = 1 / (s - z)
    return (x if r == 1 else x.square()) * (rule.total / n)


def _reverse_kl(a: Tensor, rule: Rule) -> Tensor:
    """f(u) = -log u."""
    return _inverse_power(a, rule, 1)


def _hellinger(a: Tensor, rule: Rule) -> Tensor:
    """f(u) = (sqrt(u) - 1)^2."""
    return _inverse_power(a, rule, 2)


RETENTIONS: dict[str, Retention] = {
    "none": Retention(),
    "l2": Retention(),
    "lq_paper": Retention(_lq_paper, scale=_lq_scale),
    "lq_mirror": Retention(_lq_mirror),
    "kl": Retention(_kl),
    "elastic_net": Retention(_soft_threshold),
    "elastic_net_smooth": Retention(_soft_threshold_smooth),
    "elastic_net_proximal": Retention(shrink=_proximal),
    "bregman": Retention(_sigmoid),
    "f_chi2": Retention(_chi2),
    "f_reverse_kl": Retention(_reverse_kl),
    "f_hellinger": Retention(_hellinger),
}
