"""Induction heads and one-shot associative recall."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.synthetic import IGNORED, uniform


def induction(
    batch: int, length: int = 256, *, vocab: int = 16, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Say what stood behind the trigger when it was seen before.

    The trigger (vocab - 1) stands at one random place and at the end, every other token is
    uniform in 0 .. vocab - 2. The only label, at the end, is the token behind the first trigger.

    Raises: ValueError if length < 3.
    Source: Mamba, arXiv 2312.00752, section 4.1.2.
    """
    if length < 3:
        raise ValueError(f"trigger, token, trigger need a length of 3, not {length}")
    inputs = uniform(batch, length, 0, vocab - 1, generator)
    place = uniform(batch, 1, 0, length - 2, generator)
    inputs.scatter_(1, place, vocab - 1)
    inputs[:, -1] = vocab - 1
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -1:] = inputs.gather(1, place + 1)
    return inputs, labels


def induction_head(
    batch: int,
    length: int = 40,
    *,
    vocab: int = 20,
    triggers: int = 1,
    every: bool = False,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The induction task of H3: random tokens with a copy prefix inside and at the end.

    `length` ordinary tokens (0 .. vocab - 3) and the prefix `=>` (vocab - 2); a random place in
    0 .. length - 3 is overwritten by `=>`, and the label at the final `=>` is the token behind
    that place. T = length + 1; the token vocab - 1 is never drawn.
    triggers: with probability 1/2 one place, else up to so many, all followed by the token behind
    the first; a place right behind an earlier one is left out. every: label every position with
    the token that follows (for training), not only the last.

    Source: arXiv 2212.14052; generator of the authors' code, with token ids in our own order.
    """
    if length < 3 or triggers < 1:
        raise ValueError(f"needs length >= 3 and triggers >= 1: {length=}, {triggers=}")
    prefix, device = vocab - 2, generator.device
    inputs = uniform(batch, length + 1, 0, vocab - 2, generator)
    inputs[:, -1] = prefix
    places = uniform(batch, triggers, 0, length - 2, generator)
    many = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    places = torch.where(many, places, places[:, :1]).sort(-1).values
    answer = inputs.gather(1, places[:, :1] + 1)
    last = places[:, :1] - 2
    for i in range(triggers):
        at = places[:, i : i + 1]
        used = at - last > 1
        inputs.scatter_(1, at, torch.where(used, prefix, inputs.gather(1, at)))
        inputs.scatter_(1, at + 1, torch.where(used, answer, inputs.gather(1, at + 1)))
        last = torch.where(used, at, last)
    labels = torch.full_like(inputs, IGNORED)
    if every:
        labels[:, :-1] = inputs[:, 1:]
    labels[:, -1:] = answer
    return inputs, labels


def associative_recall(
    batch: int,
    length: int = 40,
    *,
    vocab: int = 20,
    every: bool = False,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One-shot associative recall of H3: pairs from a random map, then `=>` and a key to look up.

    Of the vocab - 2 ordinary tokens the first half are keys and the second half values; a fresh
    map for every example; length // 2 pairs k, map(k) with keys drawn with repetition, then
    `=>` (vocab - 2) and a key among those present, whose value is the label there.
    T = 2 (length // 2) + 2. every: as in `induction_head`.

    Source: arXiv 2212.14052; generator of the authors' code, with token ids in our own order.
    """
    if length < 2 or vocab < 4:
        raise ValueError(f"needs length >= 2 and vocab >= 4: {length=}, {vocab=}")
    half, pairs = (vocab - 2) // 2, length // 2
    keys = uniform(batch, pairs, 0, half, generator)
    mapping = uniform(batch, half, half, vocab - 2, generator)
    values = mapping.gather(1, keys)
    asked = keys.gather(1, uniform(batch, 1, 0, pairs, generator))
    prefix = torch.full_like(asked, vocab - 2)
    inputs = torch.cat([torch.stack([keys, values], -1).flatten(1), prefix, asked], 1)
    labels = torch.full_like(inputs, IGNORED)
    if every:
        labels[:, :-1] = inputs[:, 1:]
    labels[:, -1:] = mapping.gather(1, asked)
    return inputs, labels
