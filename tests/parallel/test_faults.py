"""Mistakes that are easily made, made on purpose: comparisons must notice each by a wide margin.

Gates near one and short shards, as elsewhere what crosses fades before it is read.
"""

from contextlib import contextmanager

import pytest
import torch
from cases import EXACT, Case, differences, joined, sharded, whole
from helpers import error

from longscan.algebra import SegmentMap
from longscan.ops.decay import decay
from longscan.ops.delta import delta
from longscan.ops.dplr import dplr
from longscan.ops.mlstm import mlstm
from longscan.ops.selective import selective
from longscan.parallel import SequenceParallel, exchange, halo, scan
from longscan.parallel.wire import Wire

B, H, K, V, T = 2, 2, 4, 5, 12


def no_gate_tail():
    """The gates' gradients lack what tokens on later ranks cause."""
    right = exchange.Adjoint.gradients

    def gradients(self, g):
        du, _, dm = right(self, g)
        return du, None, dm

    return exchange.Adjoint, "gradients", gradients


def not_transposed():
    """Gradients pass a rank by M, not by its transpose."""
    right = exchange.adjoint

    def adjoint(of, u, m=None):
        back = right(of, u, m)
        return SegmentMap(of.kind, of.a, u) if of.kind == "matrix" else back

    return exchange, "adjoint", adjoint


def halo_gradient_lost():
    """What a convolution sends back to the tokens before a shard is not added to them."""
    right = Wire.trade

    def trade(self, sends, receives, kind):
        found = right(self, sends, receives, kind)
        if kind == "halo gradient":
            for x in found.values():
                x.zero_()
        return found

    return Wire, "trade", trade


def composed_the_wrong_way_round():
    right = scan.compose
    return scan, "compose", lambda second, first: right(first, second)


def folded_from_the_right():
    right = scan._fold

    def fold(maps, passes):
        return right([maps[0], *maps[:0:-1]], passes)

    return scan, "_fold", fold


def kept_at_the_first_rank():
    """A rank hands on only what it wrote itself."""
    right = scan.Row.__init__

    def init(self, ranks, passes, receives, per_host):
        right(self, ranks, tuple(False for _ in passes), receives, per_host)

    return scan.Row, "__init__", init


def one_token_early():
    """Windows of a convolution end one token too early."""
    right = halo.window

    def window(shards, tail, n, state):
        return right(shards, tail.roll(1, 1), n, state)

    from longscan.parallel import shards

    return shards, "window", window


@contextmanager
def made(fault):
    """With the fault; the task undoes it for those that follow."""
    if fault is None:
        yield
        return
    where, name, wrong = fault()
    right = getattr(where, name)
    setattr(where, name, wrong)
    try:
        yield
    finally:
        setattr(where, name, right)


def _inputs(family):
    g = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(B, T, *shape, dtype=torch.float64, generator=g)

    def near_one(*shape):
        return -0.05 * random(*shape).abs()

    q, k, v = random(H, K), random(H, K), random(H, V)
    k = k / k.norm(dim=-1, keepdim=True)
    beta = random(H).sigmoid()
    return {
        "scalar gate": lambda: [q, k, v, near_one(H)],
        "gate per key": lambda: [q, k, v, near_one(H, K)],
        "delta rule": lambda: [q, k, v, beta, near_one(H)],
        "low rank": lambda: [q, k, v, near_one(H, K), -k * beta.unsqueeze(-1), k],
        "scaled": lambda: [q, k, v, random(H), 3 + random(H)],
        "selective": lambda: [random(6), 0.05 * random(6).abs(), random(K), random(K)],
    }[family]()


def _op(family, x):
    if family == "selective":
        u, dt, b, c = x
        a = -torch.arange(1.0, K + 1, dtype=u.dtype).expand(6, K)
        return selective(u, dt, a, b, c)[0]
    if family == "low rank":
        q, k, v, log_a, erase, write = x
        return dplr(q, k, v, log_a, erase, write)[0]
    return {"delta rule": delta, "scaled": mlstm}.get(family, decay)(*x)[0]


def _gradients(family, sequence=None):
    """Outputs and gradients of all inputs, of local tokens if there are shards."""
    shards = None if sequence is None else sequence.shards(T)
    cut = (lambda x: x) if shards is None else shards.shard
    x = [cut(t).clone().requires_grad_() for t in _inputs(family)]
    if shards is None:
        o = _op(family, x)
    else:
        with shards.active():
            o = _op(family, x)
    g = torch.Generator().manual_seed(4)
    o.backward(cut(torch.randn(B, T, *o.shape[2:], dtype=o.dtype, generator=g)))
    return [o.detach(), *(t.grad for t in x)]


def _of_an_op(group, family, parallel, fault):
    with made(fault):
        return _gradients(family, SequenceParallel(group, **parallel))


def _worst(ranks, family, method, fault):
    """The largest error of outputs and gradients of an op over four ranks."""
    found = ranks.run(_of_an_op, family, method, fault)
    got = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
    return [error(a, b) for a, b in zip(got, _gradients(family), strict=True)]


OPS = [
    ("scalar gate", "allgather", no_gate_tail),
    ("gate per key", "allscan", no_gate_tail),
    ("delta rule", "allgather", no_gate_tail),
    ("low rank", "doubling", no_gate_tail),
    ("scaled", "allgather", no_gate_tail),
    ("selective", "hierarchical", no_gate_tail),
    ("delta rule", "allgather", not_transposed),
    ("low rank", "allscan", not_transposed),
    ("delta rule", "doubling", not_transposed),
    ("delta rule", "doubling", composed_the_wrong_way_round),
    ("gate per key", "doubling", composed_the_wrong_way_round),
    ("delta rule", "allgather", folded_from_the_right),
    ("scalar gate", "allgather", kept_at_the_first_rank),
    ("scaled", "allscan", kept_at_the_first_rank),
]


@pytest.mark.parametrize(("family", "method", "fault"), OPS)
def test_a_mistake_in_an_exchange_shows(ranks, family, method, fault):
    parallel = {"method": method, "per_host": 2}
    assert max(_worst(ranks, family, parallel, None)) <= EXACT["float64"]
    errors = _worst(ranks, family, parallel, fault)
    assert max(errors) > 1e-3, errors
    if fault in (no_gate_tail, not_transposed):
        assert errors[0] <= EXACT["float64"]  # a mistake of the backward alone


def _of_a_model(group, case, fault):
    with made(fault):
        return sharded(group, case)


MODELS = [
    ("gated_deltanet,gated_deltanet", halo_gradient_lost),
    ("mamba,mamba2", halo_gradient_lost),
    ("rwkv7,rwkv7", halo_gradient_lost),
    ("mamba,mamba2", one_token_early),
    ("gla,gla", no_gate_tail),
    ("gated_deltanet,gated_deltanet", not_transposed),
]


@pytest.mark.parametrize(("pattern", "fault"), MODELS)
def test_a_mistake_in_a_model_shows(ranks, pattern, fault):
    """By the comparison that `cases.agree` makes."""
    case = Case(pattern, (3, 2, 4, 3))
    want = whole(case)
    right = differences(joined(ranks.run(_of_a_model, case, None)), want)
    wrong = differences(joined(ranks.run(_of_a_model, case, fault)), want)
    assert max(right.values()) <= EXACT["float64"]
    assert max(wrong.values()) > 1e-4, wrong
