"""Attentional biases: what a memory that learns at test time minimises, as cotangents.

Each takes the error e = M(k) - v, the value v, the threshold delta (broadcasting against e, or
None) and the rule, and gives g = d loss / d M(k), in the shape of e [..., V].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longscan.ops._memory_rule import Rule

Bias = Callable[[Tensor, Tensor, Tensor | None, "Rule"], Tensor]


def length(e: Tensor) -> Tensor:
    """|e|_2 along the last axis, kept; where e = 0 it and its gradient are 0; none overflows."""
    scale = e.detach().abs().amax(-1, True)
    x = e / torch.where(scale > 0, scale, 1)
    square = x.square().sum(-1, True)
    return torch.where(scale > 0, torch.where(scale > 0, square, 1).sqrt() * scale, 0)


def _direction(e: Tensor, norm: Tensor) -> Tensor:
    return e / torch.where(norm > 0, norm, 1)


def _sign(e: Tensor, rule: Rule) -> Tensor:
    return torch.tanh(rule.sharpness * e)


def _dot(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """-<M(k), v>"""
    return -v


def _l1(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """|e|_1, its sign smoothed."""
    return _sign(e, rule)


def _l2(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """|e|^2 / 2"""
    return e


def _squared(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """|e|^2"""
    return 2 * e


def _lp(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """|e|_p^p, its sign and its absolute value smoothed."""
    size = e.square() + rule.eps
    half = (rule.p - 1) / 2
    return rule.p * _sign(e, rule) * (size if half == 1 else size.pow(half))


def _huber_coord(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """Huber's function of every coordinate."""
    assert delta is not None
    return torch.where(e.abs() <= delta, e, delta * e.sign())


def _huber_norm(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """Huber's function of |e|_2: the error, clipped to the length delta."""
    assert delta is not None
    norm = length(e)
    return torch.where(norm <= delta, e, delta * _direction(e, norm))


def _huber_mix(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """|e|^2 / 2 if |e|_2 <= delta, else delta |e|_1; not continuous where it changes."""
    assert delta is not None
    return torch.where(length(e.detach()) <= delta, e, delta * _sign(e, rule))


def _value_shift(e: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """The worst |e - s|^2 / 2 over shifts s of the value no longer than delta."""
    assert delta is not None
    return e + delta * _direction(e, length(e))


BIASES: dict[str, Bias] = {
    "dot": _dot,
    "l1": _l1,
    "l2": _l2,
    "squared": _squared,
    "lp": _lp,
    "huber_coord": _huber_coord,
    "huber_norm": _huber_norm,
    "huber_mix": _huber_mix,
    "value_shift": _value_shift,
}
WITH_THRESHOLD = ("huber_coord", "huber_norm", "huber_mix", "value_shift")
