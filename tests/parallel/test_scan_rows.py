"""Every method hands every rank the state that a serial fold gives, wherever sequences begin."""

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from helpers import error

from longscan.algebra import SegmentMap
from longscan.parallel import SequenceParallel, scan

METHODS = {
    "allgather": (scan.allgather, 1),
    "allscan, 1 block": (scan.allscan(1), 1),
    "allscan, 3 blocks": (scan.allscan(3), 1),
    "allscan, 5 blocks": (scan.allscan(5), 1),
    "doubling": (scan.doubling, 1),
    "hosts of 1": (scan.hierarchical, 1),
    "hosts of 2": (scan.hierarchical, 2),
    "hosts of 3 and 1": (scan.hierarchical, 3),
    "one host": (scan.hierarchical, 4),
}
KINDS = ("identity", "diagonal", "scalar", "complex", "matrix", "scaled")
HEADS, KEYS, VALUES = 2, 3, 4
LENGTHS = (3, 3, 3, 3)

# Sequences may begin with a shard (3, 6, 9) or inside one.
STARTS = (1, 3, 4, 6, 7, 9, 10)
LAYOUTS = list(chain.from_iterable(combinations(STARTS, n) for n in range(len(STARTS) + 1)))
FEW = [(), (3,), (4,), (6, 7), (1, 9), (3, 6, 9), (4, 10)]


def _map(kind, seed):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(HEADS, *shape, dtype=torch.float64, generator=g)

    u = random(KEYS, VALUES)
    if kind == "identity":
        return SegmentMap(kind, None, u)
    if kind == "matrix":
        return SegmentMap(kind, random(KEYS, KEYS), u)
    if kind == "complex":
        a = torch.complex(-random(KEYS).abs(), random(KEYS))
        return SegmentMap("diagonal", a, torch.complex(u, random(KEYS, VALUES)))
    if kind == "scaled":
        return SegmentMap("diagonal", -random(1).abs(), u, random(1))
    return SegmentMap("diagonal", -0.3 * random(1 if kind == "scalar" else KEYS).abs(), u)


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def _serial(kind, row, i):
    """What enters place i of a row."""
    if not row.receives[i]:
        return None
    state = None
    for j in range(i):
        of = _map(kind, row.ranks[j])
        state = of(state) if row.passes[j] else of.offset
    return state


def _worst(group, methods, kinds, layouts):
    """A task: the largest error by method and kind, over layouts and both directions."""
    sequence, out = SequenceParallel(group), {}
    for name in methods:
        method, per_host = METHODS[name]
        for kind in kinds:
            worst = 0.0
            for starts in layouts:
                bounds = torch.tensor([0, *starts, 12])
                shards = sequence.shards(12, cu_seqlens=bounds, lengths=LENGTHS)
                for row in (shards.forward, shards.backward):
                    row = replace(row, per_host=per_host)
                    of = _map(kind, sequence.rank)
                    got = method(of, row, sequence.wire, "test")
                    want = _serial(kind, row, row.ranks.index(sequence.rank))
                    assert (got is None) == (want is None), (name, kind, starts)
                    if want is not None:
                        pairs = zip(_parts(got), _parts(want), strict=True)
                        gap = max(error(*map(_real, pair)) for pair in pairs)
                        worst = max(worst, gap)
            out[name, kind] = worst
    return out


def _real(x):
    return torch.view_as_real(x) if x.is_complex() else x


def _check(ranks, *task):
    for found in ranks.run(_worst, *task):
        wrong = {k: e for k, e in found.items() if not e <= 1e-12}
        assert not wrong, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(ranks, kind):
    _check(ranks, list(METHODS), [kind], FEW)


@pytest.mark.parametrize("method", ["allgather", "allscan, 3 blocks", "doubling", "hosts of 2"])
def test_layouts(ranks, method):
    _check(ranks, [method], ["matrix"], LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all(ranks, method):
    _check(ranks, [method], KINDS, LAYOUTS)
