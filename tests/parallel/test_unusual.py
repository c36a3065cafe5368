"""Gradients of some inputs only, of second order, and inputs of mixed precision."""

import pytest
import torch
from torch.nn import functional as F

from longscan.ops.attention import attention
from longscan.ops.decay import decay
from longscan.ops.delta import delta
from longscan.parallel import SequenceParallel
from longscan.state import State

B, T, H, D = 2, 12, 2, 4


def _inputs(*more):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, H, D, generator=g, dtype=torch.float64) for _ in range(3)] + [
        torch.randn(*n, generator=g, dtype=torch.float64) for n in more
    ]


def _cache(k, v):
    return State(k=k, v=v, length=torch.full((B,), k.shape[1]))


def _only(group, which):
    """A task: the gradient of one input of attention, of the local tokens and of whole ones."""
    shards = SequenceParallel(group).shards(T)
    q, k, v, *cache = _inputs((B, 3, H, D), (B, 3, H, D))
    found = []
    for spread in (True, False):
        x = dict(zip("qkv", (shards.shard(t) if spread else t for t in (q, k, v)), strict=True))
        x |= dict(zip(("state k", "state v"), cache, strict=True))
        x = {n: t.clone().requires_grad_(n == which) for n, t in x.items()}
        state = _cache(x["state k"], x["state v"])
        if spread:
            with shards.active():
                length = state.tensor("length") + shards.before
                o, _ = attention(x["q"], x["k"], x["v"], state=State({**state, "length": length}))
        else:
            o, _ = attention(x["q"], x["k"], x["v"], state=state)
        o.square().sum().backward()
        found.append(x[which].grad)
    want = found[1] if which.startswith("state") else shards.shard(found[1])
    return found[0], want


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("which", ["q", "k", "v", "state k", "state v"])
def test_gradients_of_one_input_alone(ranks, which, size):
    """Lent queries come back whatever is asked for."""
    found = ranks.run(_only, which, size=size)
    if which.startswith("state"):  # the same on all ranks: its gradient is a sum over them
        got = sum(x for x, _ in found)
        torch.testing.assert_close(got, found[0][1], rtol=1e-10, atol=1e-12)
    else:
        for got, want in found:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def _twice(group):
    shards = SequenceParallel(group).shards(T)
    q, k, v = (shards.shard(x).clone().requires_grad_() for x in _inputs())
    with shards.active():
        o, _ = decay(q, k, v)
    try:
        torch.autograd.grad(o.square().sum(), v, create_graph=True)
    except RuntimeError as problem:
        return str(problem)
    return ""


def test_second_derivatives_are_refused(ranks):
    assert all("no second derivatives" in words for words in ranks.run(_twice, size=2))


def _mixed(group, op):
    """A task: the largest difference to whole sequences, relative to the largest number."""
    shards = SequenceParallel(group).shards(T)
    q, k, v, state, beta = _inputs((B, H, D, D), (B, T, H))
    k, beta = F.normalize(k, dim=-1), beta.sigmoid()
    wide = op == "decay"  # a state wider than the tokens
    q, k, v, beta = (x.float() for x in (q, k, v, beta))
    state = state if wide else state.float()

    def run(cut):
        parts = [cut(x) for x in (q, k, v)]
        if op == "decay":
            return decay(*parts, state=state)[0]
        return delta(*parts, cut(beta), state=state)[0]

    with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
        whole = run(lambda x: x)
        with shards.active():
            part = run(shards.shard)
    return ((part - shards.shard(whole)).abs().max() / whole.abs().max()).item()


@pytest.mark.parametrize("op", ["delta", "decay"])
def test_states_keep_their_precision(ranks, op):
    """Under autocast, and where a state is wider than the tokens."""
    assert max(ranks.run(_mixed, op, size=3)) < 2e-6
