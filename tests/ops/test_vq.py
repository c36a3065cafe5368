"""Attention over quantised keys: a softmax over all pairs, however it is computed and cut."""

from itertools import pairwise, product

import pytest
import torch
from helpers import assert_close, error
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.ops.vq import init_vq_state, quantise, straight_through, vq_attention
from longscan.state import State

F64 = torch.float64
H, K, V, S, L = 2, 3, 4, 5, 4
few = settings(max_examples=10, deadline=None, database=None, derandomize=True)


def book(seed=0, size=S):
    return torch.randn(H, size, K, dtype=F64, generator=torch.Generator().manual_seed(seed))


def leaves(batch, n, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=F64, generator=g).requires_grad_(grad)

    return {
        "q": draw(batch, n, H, K),
        "k": draw(batch, n, H, K),
        "v": draw(batch, n, H, V),
        "q_bias": draw(batch, n, H, 2),
    }


def biases(kind, causal, seed=7):
    """None, a table by distance, or vectors by distance that q_bias reads."""
    wide = {"table": 2 * L + 1, "short": L - 1, "vectors": L + 1, "one": 1}.get(kind)
    if wide is None:
        return None
    wide = wide if causal or wide % 2 else wide + 1
    shape = {"vectors": (H, wide, 2), "one": (1, 1), "short": (H, wide)}.get(kind, (1, wide))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=g).requires_grad_()


def run(x, c, bias, kind="table", **more):
    codes = quantise(x["k"], c)
    k_hat = straight_through(x["k"], c, codes)
    q_bias = x["q_bias"] if kind == "vectors" else None
    return vq_attention(x["q"], k_hat, codes, x["v"], c, block=L, bias=bias, q_bias=q_bias, **more)


def part(x, a, b):
    return {k: t[:, a:b] for k, t in x.items()}


def floating(state):
    return [t for t in state.values() if t.is_floating_point()]


def same_state(a, b):
    assert list(a) == list(b)
    for k in a:
        assert a.tensor(k).shape == b.tensor(k).shape, k
        assert_close(a.tensor(k).double(), b.tensor(k).double(), "float64", k)


def probe(*tensors):
    g = torch.Generator().manual_seed(5)
    return sum((t * torch.randn(t.shape, dtype=F64, generator=g)).sum() for t in tensors)


def both_ways(x, c, bias, kind, warm=None, **more):
    """Outputs, states and all gradients of the definition and of the fast form."""
    out = []
    for backend in ("reference", "torch"):
        state = None
        if warm is not None:
            state = warm.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
        o, after = run(x, c, bias, kind, state=state, backend=backend, **more)
        wrt = [x["q"], x["k"], x["v"]] + ([x["q_bias"]] if kind == "vectors" else [])
        wrt += [] if bias is None else [bias]
        wrt += [] if state is None else floating(state)
        grads = torch.autograd.grad(
            probe(o, *floating(after)), wrt, allow_unused=True, materialize_grads=True
        )
        if state is not None:  # slots before a row's first token, and codes of no token, are empty
            wide, length = state.tensor("k").shape[1], state.tensor("length")
            there = torch.arange(wide) >= wide - length[:, None]
            used = state.tensor("counts") > 0
            masks = {"k": there[..., None, None], "v": there[..., None, None],
                     "drift_k": used[..., None], "drift_kv": used[..., None, None]}  # fmt: skip
            names = [name for name, t in state.items() if t.is_floating_point()]
            grads = [*grads[: -len(names)],
                     *(g * masks.get(n, 1) for n, g in zip(names, grads[-len(names) :],
                                                           strict=True))]  # fmt: skip
        out.append(([o, *grads], after))
    return out


def agree(pair):
    (want, state), (got, after) = pair
    same_state(after, state)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, "float64", f"tensor {i}")


# --- codes ----------------------------------------------------------------------------------


def test_the_nearest_codeword_and_of_equals_the_first():
    k, c = leaves(2, 9)["k"], book()
    c[:, 3] = c[:, 1]
    want = (k.unsqueeze(3) - c).square().sum(-1)
    codes = quantise(k, c)
    assert codes.dtype == torch.int64
    assert (codes != 3).all()
    at = want.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    assert_close(at, want.amin(-1), "float64", "distance")
    tied = torch.zeros(1, 2, H, K)
    assert (quantise(tied, torch.ones(H, S, K)) == 0).all()


def test_codes_of_half_precision_keys_are_those_of_their_exact_values():
    k, c = leaves(2, 40)["k"].detach().bfloat16(), book(size=64).float()
    assert torch.equal(quantise(k, c), quantise(k.float(), c))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantise(k, c), quantise(k.float(), c))


def test_straight_through_is_the_codeword_with_the_gradient_of_the_key():
    k, c = leaves(2, 9)["k"], book()
    codes = quantise(k, c)
    k_hat = straight_through(k, c.requires_grad_(), codes)
    for h in range(H):
        assert torch.equal(k_hat[:, :, h], c[h][codes[:, :, h]])
    (gradient,) = torch.autograd.grad(probe(k_hat), k)
    g = torch.Generator().manual_seed(5)
    assert torch.equal(gradient, torch.randn(k.shape, dtype=F64, generator=g))


def test_enough_codes_make_it_plain_attention():
    """A codeword for every key: quantised attention is softmax attention."""
    n = 19
    x = leaves(1, n)
    c = x["k"].detach()[0].transpose(0, 1)[:, torch.randperm(n)]
    bias = biases("table", True)
    o, _ = run(x, c, None)
    scores = torch.einsum("bihk,bjhk->bhij", x["q"], x["k"])
    p = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    assert_close(o, torch.einsum("bhij,bjhv->bihv", p, x["v"]), "float64", "causal")
    o, _ = run(x, c, None, causal=False)
    want = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), x["v"])
    assert_close(o, want, "float64", "both directions")
    assert error(run(x, c, bias)[0], want) > 1e-3


# --- the fast form --------------------------------------------------------------------------


@few
@given(n=st.integers(1, 40), kind=st.sampled_from(["none", "table", "short", "vectors", "one"]),
       causal=st.booleans(), straight=st.booleans(), carry=st.booleans())  # fmt: skip
def test_linear_equals_dense(n, kind, causal, straight, carry):
    more = {"causal": causal, "cache_straight_through": straight, "carry_gradient": carry}
    agree(both_ways(leaves(2, n), book(), biases(kind, causal), kind, **more))


@pytest.mark.parametrize("n", [1, L, 2 * L, 2 * L + 1, 3 * L, 27])
@pytest.mark.parametrize("straight", [False, True])
def test_the_straight_through_gradient_is_that_of_the_softmax(n, straight):
    """With keys k_hat in every pair: exactly so with the flag, and not without it."""
    x, c = leaves(1, n), book()
    for causal in (True, False):
        codes = quantise(x["k"], c)
        k_hat = straight_through(x["k"], c, codes)
        scores = torch.einsum("bihk,bjhk->bhij", x["q"], k_hat)
        if causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        want = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), x["v"])
        o, _ = run(x, c, None, causal=causal, cache_straight_through=straight)
        assert_close(o, want, "float64", "o")
        wrt = [x["q"], x["v"], x["k"]]
        got = torch.autograd.grad(probe(o), wrt)
        want = torch.autograd.grad(probe(want), wrt)
        if straight or n <= 2 * L:
            assert_close(got[2], want[2], "float64", "dk")
        else:
            assert error(got[2], want[2]) > 1e-3
        for a, b in zip(got[:2], want[:2], strict=True):
            assert_close(a, b, "float64", "dq, dv")


@few
@given(n=st.integers(1, 20), ages=st.lists(st.integers(0, 21), min_size=2, max_size=3),
       kind=st.sampled_from(["none", "table", "vectors"]), straight=st.booleans())  # fmt: skip
def test_rows_of_different_ages(n, ages, kind, straight):
    """Each row of a batch continues where it was, on a grid of blocks of its own."""
    c, bias = book(), biases(kind, True)
    before = []
    for i, age in enumerate(ages):
        state = init_vq_state(1, c, V, cache_straight_through=straight)
        if age:
            old = leaves(1, age, seed=20 + i)
            _, state = run(old, c, bias, kind, cache_straight_through=straight)
        before.append(state.detach())
    x, joined = leaves(len(ages), n), State.cat(before)
    agree(both_ways(x, c, bias, kind, joined, cache_straight_through=straight))
    o, after = run(x, c, bias, kind, state=joined, cache_straight_through=straight)
    for i, state in enumerate(before):
        row = {k: t[i : i + 1] for k, t in x.items()}
        want, end = run(row, c, bias, kind, state=state, cache_straight_through=straight)
        assert_close(o[i : i + 1], want, "float64", f"row {i}")
        assert_close(after.select(i).tensor("means"), end.tensor("means"), "float64", "means")
        assert torch.equal(after.select(i).tensor("counts"), end.tensor("counts"))


@few
@given(sizes=st.lists(st.integers(1, 23), min_size=1, max_size=4), warm=st.booleans(),
       equal=st.booleans(), causal=st.booleans())  # fmt: skip
def test_packed_equals_separate(sizes, warm, equal, causal):
    sizes = sizes[:1] * len(sizes) if equal else sizes
    warm = warm and causal
    c, bias = book(), biases("vectors", causal)
    cu = torch.tensor([0, *sizes]).cumsum(0)
    x, state = leaves(1, sum(sizes)), None
    if warm:
        parts = [run(leaves(1, 1 + 5 * i, 30 + i), c, bias, "vectors")[1].detach()
                 for i in range(len(sizes))]  # fmt: skip
        state = State.cat(parts)
    agree(both_ways(x, c, bias, "vectors", state, cu_seqlens=cu, causal=causal))
    o, after = run(x, c, bias, "vectors", state=state, cu_seqlens=cu, causal=causal)
    for i, (a, b) in enumerate(pairwise(cu.tolist())):
        before = None if state is None else state.select(i)
        want, end = run(part(x, a, b), c, bias, "vectors", state=before, causal=causal)
        assert_close(o[:, a:b], want, "float64", f"sequence {i}")
        if causal:
            assert_close(after.select(i).tensor("means"), end.tensor("means"), "float64", "means")


@pytest.mark.parametrize(("kind", "straight"), [("table", False), ("vectors", True)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_any_cut_gives_the_same(kind, straight, backend):
    n = 2 * L + 3 if backend == "reference" else 3 * L + 2
    x, c, bias = leaves(2, n), book(), biases(kind, True)
    more = {"cache_straight_through": straight, "backend": backend}
    whole, final = run(x, c, bias, kind, **more)
    wrt = [*(x[k] for k in ("q", "k", "v")), bias]
    want = torch.autograd.grad(probe(whole, *floating(final)), wrt)
    for cut in range(1, n):
        a, state = run(part(x, 0, cut), c, bias, kind, **more)
        b, state = run(part(x, cut, n), c, bias, kind, state=state, **more)
        o = torch.cat([a, b], 1)
        assert_close(o, whole, "float64", f"cut at {cut}")
        same_state(state, final)
        got = torch.autograd.grad(probe(o, *floating(state)), wrt)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_close(g, w, "float64", f"gradient {i}, cut at {cut}")


@pytest.mark.parametrize("carry", [True, False])
def test_steps_equal_the_whole(carry):
    n = 4 * L + 1
    x, c, bias = leaves(2, n), book(), biases("vectors", True)
    whole, final = run(x, c, bias, "vectors", carry_gradient=carry)
    state, out = init_vq_state(2, c, V), []
    for t in range(n):
        o, state = run(part(x, t, t + 1), c, bias, "vectors", state=state, carry_gradient=carry)
        out.append(o)
        assert state.tensor("k").shape[1] <= 2 * L - 1
    o = torch.cat(out, 1)
    assert_close(o, whole, "float64", "o")
    same_state(state, final)
    wrt = [x["q"], x["k"], x["v"], bias]
    pairs = zip(torch.autograd.grad(probe(o), wrt), torch.autograd.grad(probe(whole), wrt),
                strict=True)  # fmt: skip
    for a, b in pairs:
        assert_close(a, b, "float64", "gradient")


def test_states_stay_values_while_decoding():
    """Caches grow in shared memory: a branch does not write into its sibling."""
    x, c = leaves(2, 40, grad=False), book()
    with torch.no_grad():
        _, state = run(part(x, 0, 5), c, None)
        kept = state.clone()
        first, one = run(part(x, 5, 6), c, None, state=state)
        other, two = run(part(x, 20, 21), c, None, state=state)
        again, _ = run(part(x, 5, 6), c, None, state=state)
    assert torch.equal(first, again)
    assert error(other, first) > 1e-3
    same_state(state, kept)
    assert torch.equal(
        one.tensor("k")[:, -1], straight_through(x["k"], c, quantise(x["k"], c))[:, 5]
    )
    assert error(two.tensor("v"), one.tensor("v")) > 1e-3


def test_carried_gradients_can_be_cut():
    """Without them a loss on one block reaches that block's keys and values only."""
    x, c, bias = leaves(1, 4 * L), book(), biases("table", True)
    o, _ = run(x, c, bias, carry_gradient=False)
    for block in range(4):
        own = slice(block * L, block * L + L)
        dk, dv = torch.autograd.grad(o[:, own].sum(), [x["k"], x["v"]], retain_graph=True)
        for g in (dk, dv):
            assert g[:, own].abs().max() > 0
            g[:, own] = 0
            assert g.abs().max() == 0


def test_nothing_flows_from_the_future_or_other_documents():
    x, c, bias = leaves(1, 30), book(), biases("vectors", True)
    o, _ = run(x, c, bias, "vectors", cache_straight_through=True)
    for g in torch.autograd.grad(o[:, 17].sum(), [x["k"], x["v"], x["q_bias"]], retain_graph=True):
        assert g[:, 18:].abs().max() == 0
    for causal in (True, False):
        cu = torch.tensor([0, 11, 30])
        bias = biases("vectors", causal)
        o, _ = run(x, c, bias, "vectors", cu_seqlens=cu, causal=causal)
        dv, dk = torch.autograd.grad(o[:, 11:].sum(), [x["v"], x["k"]])
        assert dv[:, :11].abs().max() == 0
        assert dk[:, :11].abs().max() == 0
        assert dv[:, 11:].abs().min() > 0


def test_one_code_for_a_very_long_past():
    """Counts and means of 20,000 equal tokens: nothing overflows and nothing is lost."""
    n = 20_000
    x = {k: t.float()[:, :1].expand(-1, n, -1, -1) for k, t in leaves(1, 1, grad=False).items()}
    c = book().float()
    for causal in (True, False):
        o, state = run(x, c, None, causal=causal)
        assert_close(o, x["v"], "float32", "o")
    _, state = run(x, c, None)
    assert state.tensor("counts").sum(-1).unique().tolist() == [float(n - L)]


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_extreme_scores(scale):
    x = {k: (t.detach().float() * scale).requires_grad_() for k, t in leaves(2, 25).items()}
    for causal, straight in product((True, False), (True, False)):
        o, _ = run(x, book().float(), None, causal=causal, cache_straight_through=straight)
        grads = torch.autograd.grad(o.sum(), [x["q"], x["k"], x["v"]])
        assert all(torch.isfinite(t).all() for t in (o, *grads))


def test_half_precision_and_autocast():
    x = {k: t.detach().bfloat16() for k, t in leaves(2, 21).items()}
    c, exact = book().float(), {k: t.double() for k, t in x.items()}
    want, _ = run(exact, c, None)
    got, state = run(x, c, None)
    assert got.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in floating(state))
    assert_close(got, want, "bfloat16", "o")
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = run({k: t.float() for k, t in x.items()}, c, None)
    assert_close(inside, want, "float32", "autocast changes nothing inside")


def test_compiled_agrees():
    """In both directions; the layers' tests compile the causal form."""
    x, c, bias = leaves(1, 9), book(), biases("table", False)
    torch._dynamo.reset()
    fast = torch.compile(
        lambda x, bias: run(x, c, bias, causal=False)[0], fullgraph=True, backend="aot_eager"
    )
    o, want = fast(x, bias), run(x, c, bias, causal=False)[0]
    assert_close(o, want, "float64", "o")
    wrt = [x["q"], x["k"], x["v"], bias]
    grads = zip(*(torch.autograd.grad(probe(t), wrt) for t in (o, want)), strict=True)
    for a, b in grads:
        assert_close(a, b, "float64", "gradient")


@pytest.mark.parametrize(
    ("change", "raises", "says"),
    [
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"bias": torch.zeros(3, 5)}, ValueError, "bias must be for 1 or 2 heads"),
        ({"bias": torch.zeros(1, 4), "causal": False}, ValueError, "odd number"),
        ({"q_bias": torch.zeros(2, 6, H, 2)}, ValueError, "q_bias reads bias"),
        ({"codes": torch.zeros(2, 6, H)}, TypeError, "codes must be int64"),
        ({"codebook": torch.zeros(H, S, K + 1)}, ValueError, "codebook must have shape"),
        ({"k_hat": torch.zeros(2, 5, H, K)}, ValueError, "k_hat must have shape"),
        ({"state": init_vq_state(3, book(), V)}, ValueError, "state.k must have shape"),
        ({"state": init_vq_state(2, book(), V), "causal": False}, ValueError, "cannot continue"),
        ({"state": init_vq_state(2, book(), V), "cache_straight_through": True}, ValueError,
         "cache_straight_through"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused(change, raises, says):
    given = {"k_hat": torch.zeros(2, 6, H, K), "codes": torch.zeros(2, 6, H, dtype=torch.int64),
             "codebook": book().float(), "block": L, **change}  # fmt: skip
    with pytest.raises(raises, match=says):
        vq_attention(torch.zeros(2, 6, H, K), v=torch.zeros(2, 6, H, V), **given)
