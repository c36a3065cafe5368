"""Needles in a haystack of noise: a key, its value, and a question at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.synthetic import IGNORED, distinct, uniform

KEYS, VALUES, NOISE = 1, 65, (129, 254)
MARKER, QUERY, VOCAB = 254, 255, 256


def needle(
    batch: int,
    length: int,
    *,
    needles: int = 1,
    queries: int = 1,
    alphabet: int = 64,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Noise with `needles` triples (marker, key, value) at uniform depths, then pairs (query, key).

    The label of an asked key is its value, at the place of the key. Keys are different numbers of
    1 .. alphabet, values of 65 .. 64 + alphabet, noise of 129 .. 253; the marker is 254, the
    query 255. The asked needles are any of them, each once; the others are distractors.

    Shapes: inputs, labels [batch, length].
    Raises: ValueError if the needles do not fit.
    Source: S-NIAH and its multi-key form of RULER (arXiv 2404.06654), with tokens for sentences.
    """
    room = length - 2 * queries - 3 * needles  # tokens of noise
    if not 1 <= alphabet <= 64:
        raise ValueError(f"there are 64 keys and values, so not {alphabet=}")
    if needles < 1 or needles > alphabet or room < 0:
        raise ValueError(
            f"1 to {alphabet} needles of 3 tokens and their questions must fit: {length=}"
        )
    if not 1 <= queries <= needles:
        raise ValueError(f"there are {needles} needles to ask for, so not {queries=}")
    device = generator.device
    keys = distinct(batch, needles, KEYS, KEYS + alphabet, generator)
    values = uniform(batch, needles, VALUES, VALUES + alphabet, generator)
    inputs = uniform(batch, length, *NOISE, generator)
    # The places of the needles among needles and tokens of noise, each needle counted once.
    score = torch.rand(batch, room + needles, generator=generator, device=device)
    slots = score.topk(needles, -1).indices.sort(-1).values
    starts = slots + 2 * torch.arange(needles, device=device)
    inputs.scatter_(1, starts, MARKER)
    inputs.scatter_(1, starts + 1, keys)
    inputs.scatter_(1, starts + 2, values)
    asked = distinct(batch, queries, 0, needles, generator)
    end = length - 2 * queries
    inputs[:, end::2] = QUERY
    inputs[:, end + 1 :: 2] = keys.gather(1, asked)
    labels = torch.full_like(inputs, IGNORED)
    labels[:, end + 1 :: 2] = values.gather(1, asked)
    return inputs, labels
