"""From logits to the next token: filters as pure functions, and the draw itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens marked in `seen` less likely (more likely for a penalty below 1).

    Shapes: logits, seen (bool) [..., V].
    Source: CTRL (Keskar et al., arXiv 1909.05858), section 4.1: their logits are divided.
    Differs: negative logits are multiplied, as dividing would make those tokens likelier.
    """
    scaled = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, scaled, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exactly the k most likely tokens; the others get -inf."""
    if k >= logits.shape[-1]:
        return logits
    best = logits.topk(k, -1)
    return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest most likely tokens whose probabilities sum to p or more; the others get -inf.

    Source: nucleus sampling (Holtzman et al., arXiv 1904.09751).
    """
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1, dtype=torch.float64)
    # A token stays while those before it have not reached p; the first always does.
    before = probability.cumsum(-1) - probability
    ordered = ordered.masked_fill(before >= p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest; the others get -inf.

    Source: min-p sampling (Nguyen et al., arXiv 2407.01082).
    """
    log_p = torch.tensor(p, dtype=torch.float64).log().to(logits)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + log_p, -torch.inf)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in this order.

    repetition_penalty: divides the logits of tokens that occurred (1: off).
    temperature: divides all logits; 0 takes the most likely token.
    top_k: keep the k most likely (None or 0: all).
    top_p: keep the most likely up to this probability (None or 1: all).
    min_p: drop what is less than this share as likely as the likeliest (None or 0: nothing).

    Raises: ValueError saying which is out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 0, "1 or more (0: off)"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1: off)"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {want}, not {getattr(self, name)}")

    def choose(self, logits: Tensor, u: Tensor, seen: Tensor | None = None) -> Tensor:
        """Tokens [B] for logits [B, V] and numbers u [B]; see `draw` and `penalise_repetition`."""
        if seen is not None and self.repetition_penalty != 1:
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        return logits.argmax(-1) if self.temperature == 0 else draw(self.filtered(logits), u)

    def filtered(self, logits: Tensor) -> Tensor:
        """The logits [..., V] that are drawn from at a temperature above 0."""
        logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p:
            logits = keep_min_p(logits, self.min_p)
        return logits


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """The tokens that numbers u, uniform on [0, 1), pick: the inverse of the distribution function.

    One number decides one row, so a row's tokens do not depend on which rows are beside it, nor
    on the device.
    Shapes: logits [B, V], u [B] float64; returns [B] int64. Precision: float64 sums.
    """
    total = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    end = total[:, -1:]
    pick = (total <= u.to(total)[:, None] * end).sum(-1)
    # Should rounding carry u * end up to end: the last token with any probability.
    return pick.minimum((total < end).sum(-1))


__all__ = [
    "Sampling",
    "draw",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_repetition",
]
