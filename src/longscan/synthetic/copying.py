"""Copying what was seen earlier."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.synthetic import IGNORED, uniform


def copying(
    batch: int,
    length: int = 100,
    *,
    tokens: int = 10,
    alphabet: int = 10,
    selective: bool = False,
    reverse: bool = False,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Tokens in a stretch of blanks, to be said again, in their order, at the markers behind it.

    length + tokens places with the tokens among blanks (0), then `tokens` markers (alphabet - 1),
    whose labels are the tokens; T = length + 2 tokens. Tokens are uniform in 1 .. alphabet - 2.
    selective: the tokens stand at random places instead of the first ones, so that a model must
    choose what to keep by its content. reverse: the labels come last token first.

    Raises: ValueError for an alphabet without ordinary tokens.
    Source: the copying task of state-spaces/s4 (its `variable`); selective copying of Mamba,
    arXiv 2312.00752, section 4.1.1.
    """
    if alphabet < 3:
        raise ValueError(f"an alphabet has a blank, a marker and at least one token: {alphabet=}")
    device, room = generator.device, length + tokens
    said = uniform(batch, tokens, 1, alphabet - 1, generator)
    if selective:
        score = torch.rand(batch, room, generator=generator, device=device)
        places = score.topk(tokens, -1).indices.sort(-1).values
    else:
        places = torch.arange(tokens, device=device).expand(batch, -1)
    inputs = torch.zeros(batch, room + tokens, dtype=torch.int64, device=device)
    inputs.scatter_(1, places, said)
    inputs[:, room:] = alphabet - 1
    labels = torch.full_like(inputs, IGNORED)
    labels[:, room:] = said.flip(1) if reverse else said
    return inputs, labels


def lagged(
    batch: int,
    length: int = 100,
    *,
    lag: int = 10,
    alphabet: int = 10,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """y_t = x_{t - lag}, 0 before there is one; x uniform in 1 .. alphabet - 2.

    Raises: ValueError for a lag that is negative or beyond the sequence.
    Source: the lag variant of copying in state-spaces/s4.
    """
    if not 0 <= lag <= length:
        raise ValueError(f"the lag must lie in 0 .. length: {lag=}, {length=}")
    inputs = uniform(batch, length, 1, alphabet - 1, generator)
    labels = torch.zeros_like(inputs)
    labels[:, lag:] = inputs[:, : length - lag]
    return inputs, labels
