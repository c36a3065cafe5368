"""Seeded generators of synthetic tasks: (batch, length, options, generator) -> inputs, labels.

inputs and labels are int64 [batch, T] on the generator's device; a label stands at the position
whose output is asked for (nothing is shifted), and is -100 where nothing is asked. Every call
draws fresh examples; give training and testing generators of different seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def distinct(batch: int, count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers of range(low, high) for each row, every order equally likely."""
    score = torch.rand(batch, high - low, generator=generator, device=generator.device)
    return score.topk(count, -1).indices + low


def uniform(batch: int, length: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Independent numbers of range(low, high), int64 [batch, length]."""
    return torch.randint(low, high, (batch, length), generator=generator, device=generator.device)
