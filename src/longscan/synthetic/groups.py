"""State tracking: word problems of finite groups, parity and its relatives.

A group is its multiplication table [G, G], table[a, b] = a * b, with element 0 the identity.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from longscan.synthetic import IGNORED, uniform


def cyclic(n: int) -> Tensor:
    """Z_n: numbers added modulo n."""
    a = torch.arange(n)
    return (a[:, None] + a) % n


def permutations(n: int, *, even: bool = False) -> Tensor:
    """The permutations of n things [G, n] in lexicographic order, the identity first.

    even: only the even ones (the alternating group).
    """
    found = [p for p in itertools.permutations(range(n)) if not even or _sign(p) == 1]
    return torch.tensor(found)


def _sign(p: tuple[int, ...]) -> int:
    inversions = sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p)))
    return -1 if inversions % 2 else 1


def _table(p: Tensor) -> Tensor:
    """p * q is p first, then q: (p * q)[i] = q[p[i]]."""
    n = p.shape[1]
    code = n ** torch.arange(n)
    order = torch.argsort(p @ code)
    products = torch.stack([p[:, row] for row in p])  # [p, q, i] = q[p[i]]
    return order[torch.searchsorted((p @ code)[order], products @ code)]


def symmetric(n: int) -> Tensor:
    """S_n, of n! elements in the order of `permutations`; (p * q)[i] = q[p[i]]."""
    return _table(permutations(n))


def alternating(n: int) -> Tensor:
    """A_n, the even permutations, in the order of `permutations(n, even=True)`."""
    return _table(permutations(n, even=True))


def product(a: Tensor, b: Tensor) -> Tensor:
    """The direct product of two groups; element (x, y) has number x |b| + y."""
    n = len(b)
    both = a[:, None, :, None] * n + b[None, :, None, :]
    return both.reshape(len(a) * n, len(a) * n)


def moving(n: int, most: int) -> Tensor:
    """The elements of S_n that move at most so many things, the identity among them.

    most: 2 for swaps, 3 for swaps and 3-cycles.
    """
    moved = (permutations(n) != torch.arange(n)).sum(1)
    return (moved <= most).nonzero().flatten()


def word_problem(
    batch: int,
    length: int,
    *,
    table: Tensor,
    elements: Tensor | None = None,
    bos: bool = False,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Multiply up: y_t = x_1 * x_2 * ... * x_t, each new element on the right.

    x_t are uniform numbers of elements, and every position is labelled.
    elements: draw only these (see `moving`). bos: put the token |G| in front, labelled with
    itself; the length counts it.

    Shapes: table [G, G]; inputs, labels [batch, length].
    Source: arXiv 2404.08819; DeltaProduct, arXiv 2502.10297, section 5.
    """
    table = table.to(generator.device)
    inputs = uniform(
        batch, length - bos, 0, len(table if elements is None else elements), generator
    )
    if elements is not None:
        inputs = elements.to(generator.device)[inputs]
    labels, reach = inputs, 1
    while reach < labels.shape[1]:  # products of 1, 2, 4, ... neighbours
        labels = torch.cat([labels[:, :reach], table[labels[:, :-reach], labels[:, reach:]]], 1)
        reach *= 2
    if bos:
        front = inputs.new_full((batch, 1), len(table))
        inputs, labels = torch.cat([front, inputs], 1), torch.cat([front, labels], 1)
    return inputs, labels


def _last_only(labels: Tensor, every: bool) -> Tensor:
    if every:
        return labels
    out = torch.full_like(labels, IGNORED)
    out[:, -1] = labels[:, -1]
    return out


def parity(
    batch: int, length: int, *, every: bool = True, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random bits; the label is whether the number of ones so far is odd.

    every: label every position, or only the last, which is much harder to learn.
    Source: arXiv 2207.02098 (last position), 2411.12537.
    """
    inputs = uniform(batch, length, 0, 2, generator)
    return inputs, _last_only(inputs.cumsum(1) % 2, every)


def even_pairs(
    batch: int, length: int, *, every: bool = False, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random bits; the label is whether 01 and 10 together occurred an odd number of times, which
    is whether the first and the last bit differ.

    Source: arXiv 2207.02098.
    """
    inputs = uniform(batch, length, 0, 2, generator)
    return inputs, _last_only((inputs != inputs[:, :1]).long(), every)


def cycle_navigation(
    batch: int, length: int, *, every: bool = False, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Steps -1, 0, +1 (tokens 0, 1, 2) on a cycle of five; the label is the place.

    Source: arXiv 2207.02098.
    """
    inputs = uniform(batch, length, 0, 3, generator)
    return inputs, _last_only((inputs - 1).cumsum(1) % 5, every)
