"""Multi-query associative recall."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.synthetic import IGNORED, distinct, uniform


def mqar(
    batch: int,
    length: int,
    *,
    pairs: int,
    vocab: int = 8192,
    power: float = 0.01,
    random_non_queries: bool = True,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Key-value pairs, then every key once more, in random order and at random places.

    k1 v1 k2 v2 ... ; query i stands 2 g_i behind the pairs, the g_i distinct slots drawn one
    after the other with probability proportional to (g + 1)^(power - 1)

    The label of a query is its value, at the place of the query itself; the value is not written.
    Keys are distinct numbers of 1 .. vocab/2 - 1, values distinct ones of vocab/2 .. vocab - 1.
    power: 0.01 puts most queries right behind the pairs, with a heavy tail; 1 is uniform.
    random_non_queries: fill the places between the queries with random tokens, which can equal
    keys and values, instead of 0.

    Raises: ValueError if the pairs and queries do not fit.
    Source: Zoology, arXiv 2312.04927, appendix; random_non_queries=False in its figure 2.
    """
    if length % 2 or not 1 <= pairs <= length // 4:
        raise ValueError(f"an even length of at least 4 pairs is needed: {length=}, {pairs=}")
    if pairs > vocab // 2 - 1:
        raise ValueError(f"a vocabulary of {vocab} has fewer than {pairs} keys")
    device = generator.device
    keys = distinct(batch, pairs, 1, vocab // 2, generator)
    values = distinct(batch, pairs, vocab // 2, vocab, generator)
    slots = (length - 2 * pairs) // 2
    # The slots in the order of exponential races with these rates are draws without replacement.
    weight = torch.arange(1, slots + 1, device=device, dtype=torch.float64) ** (power - 1)
    race = torch.empty(batch, slots, device=device, dtype=torch.float64)
    race = race.exponential_(generator=generator) / weight
    places = 2 * pairs + 2 * race.topk(pairs, -1, largest=False).indices
    inputs = torch.zeros(batch, length, dtype=torch.int64, device=device)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    inputs.scatter_(1, places, keys)
    labels = torch.full_like(inputs, IGNORED).scatter_(1, places, values)
    if random_non_queries:
        inputs = torch.where(inputs == 0, uniform(batch, length, 0, vocab, generator), inputs)
    return inputs, labels
