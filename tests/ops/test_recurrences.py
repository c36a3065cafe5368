"""The decay and delta ops by themselves: all shapes, extremes, known identities, bad input."""

import math

import pytest
import torch
from helpers import TOLERANCE, assert_close, error, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.ops.decay import decay, decay_chunked, decay_reference
from longscan.ops.delta import delta, delta_chunked, delta_reference

F64 = torch.float64
many = settings(max_examples=60, deadline=None, database=None, derandomize=True)
GATES = ("none", "head", "key")


def draw(op, seed, *, rows, length, groups, repeat, d_key, d_value, gate, steps=0, strength=3.0):
    """Random inputs (as a dict) and a random state of one op."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    heads = groups * repeat
    inner = (steps,) if steps else ()
    x = {
        "q": normal(rows, length, groups, d_key),
        "k": unit(normal(rows, length, *inner, groups, d_key)),
        "v": normal(rows, length, *inner, heads, d_value),
    }
    if op == "delta":
        x["beta"] = 2 * torch.rand(rows, length, *inner, heads, dtype=F64, generator=g)
    if gate != "none":
        shape = (rows, length, heads) + ((d_key,) if gate == "key" else ())
        x["log_a"] = -strength * torch.rand(shape, dtype=F64, generator=g)
    return x, normal(rows, heads, d_key, d_value)


def run(op, x, **more):
    return {"decay": decay, "delta": delta}[op](**x, **more)


def compare(op, x, state, **more):
    """Outputs, final states and all gradients of the two backends."""
    results = []
    for backend in ("reference", "torch"):
        leaves = {k: t.clone().requires_grad_() for k, t in x.items()}
        s = state.clone().requires_grad_()
        size = {} if backend == "reference" else more
        cu = more.get("cu_seqlens")
        o, out = run(op, leaves, state=s, backend=backend, **{**size, "cu_seqlens": cu})
        g = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum() for t in (o, out))
        results.append([o, out, *torch.autograd.grad(loss, [*leaves.values(), s])])
    for name, a, b in zip(["o", "state", *x, "dstate"], *results, strict=True):
        if name == "log_a" and a.abs().max() < 1:
            # Behind closed gates the true gradient is the vanishing difference of terms of
            # order one; what can be asked for is their rounding.
            assert (a - b).abs().max() < TOLERANCE["float64"]
        else:
            assert_close(b, a, "float64", name)


@many
@given(
    op=st.sampled_from(["decay", "delta"]),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    groups=st.integers(1, 2),
    repeat=st.integers(1, 3),
    d_key=st.integers(1, 9),
    d_value=st.integers(1, 9),
    gate=st.sampled_from(GATES),
    steps=st.integers(0, 3),
    chunk=st.sampled_from([1, 2, 8, 16, 64]),
)
def test_any_shape(op, seed, chunk, steps, **shape):
    x, state = draw(op, seed, steps=steps if op == "delta" else 0, **shape)
    compare(op, x, state, chunk=chunk)


@many
@given(
    op=st.sampled_from(["decay", "delta"]),
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    gate=st.sampled_from(GATES),
    chunk=st.sampled_from([4, 16]),
)
def test_any_packing(op, seed, lengths, gate, chunk):
    x, _ = draw(
        op, seed, rows=1, length=sum(lengths), groups=2, repeat=1, d_key=3, d_value=4, gate=gate
    )
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(len(lengths), 2, 3, 4, dtype=F64, generator=g)
    compare(op, x, state, chunk=chunk, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_factors_of_writes_and_the_way_around_are_products(backend, gate, length):
    """Of `decay`: scale and skip are what one could multiply outside; their gradients too."""
    x, state = draw(
        "decay", 5, rows=2, length=length, groups=1, repeat=2, d_key=3, d_value=4, gate=gate
    )
    g = torch.Generator().manual_seed(6)
    x["scale"] = torch.randn(2, length, 2, dtype=F64, generator=g)
    x["skip"] = torch.randn(2, dtype=F64, generator=g)
    results = []
    for inside in (True, False):
        leaves = {k: t.clone().requires_grad_() for k, t in x.items()}
        rest = dict(leaves)
        if not inside:
            scale, skip = rest.pop("scale"), rest.pop("skip")
            rest["v"] = scale.unsqueeze(-1) * rest["v"]
        o, s = run("decay", rest, state=state, backend=backend)
        if not inside:
            o = o + skip.unsqueeze(-1) * leaves["v"]
        loss = o.square().sum() + s.square().sum()
        results.append([o, s, *torch.autograd.grad(loss, list(leaves.values()))])
    for name, a, b in zip(["o", "state", *x], *results, strict=True):
        assert_close(a, b, "float64", name)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("op", ["decay", "delta"])
def test_gradcheck_of_the_definition(op, gate):
    """T2."""
    x, state = draw(
        op, 0, rows=1, length=3, groups=1, repeat=2, d_key=2, d_value=2, gate=gate, strength=1.0
    )
    names = list(x)
    reference = {"decay": decay_reference, "delta": delta_reference}[op]

    def f(state, *tensors):
        return reference(**dict(zip(names, tensors, strict=True)), state=state)

    args = [state, *x.values()]
    assert torch.autograd.gradcheck(f, [a.clone().requires_grad_() for a in args])


@pytest.mark.parametrize("gate", ["head", "key"])
@pytest.mark.parametrize("op", ["decay", "delta"])
@pytest.mark.parametrize("strength", [0.0, 1e-6, 30.0, 1000.0])
def test_gates_near_zero_and_one(op, gate, strength):
    """T4: no overflow however strong the gate, and no loss however weak (float64 and float32)."""
    x, state = draw(
        op, 4, rows=1, length=100, groups=1, repeat=1, d_key=4, d_value=4, gate=gate,
        strength=strength,
    )  # fmt: skip
    compare(op, x, state, chunk=64)
    leaves = {k: t.float().requires_grad_() for k, t in x.items()}
    o, s = run(op, leaves, state=state.float())
    want, _ = run(op, x, state=state, backend="reference")
    assert error(o, want) < TOLERANCE["float32"]
    for grad in torch.autograd.grad(o.sum() + s.sum(), list(leaves.values())):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("gate", ["head", "key"])
@pytest.mark.parametrize("op", ["decay", "delta"])
def test_closed_gates_among_weak_ones(op, gate):
    """log_a = -inf is a gate of 0; the weak gates around it keep their precision in float32."""
    x, state = draw(
        op, 4, rows=1, length=90, groups=1, repeat=1, d_key=4, d_value=4, gate=gate, strength=0.02
    )
    x["log_a"][:, 3::7] = -math.inf
    compare(op, x, state, chunk=64)
    want, s_want = run(op, x, state=state, backend="reference")
    o, s = run(op, {k: t.float() for k, t in x.items()}, state=state.float())
    assert error(o, want) < TOLERANCE["float32"]
    assert error(s, s_want) < TOLERANCE["float32"]


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_repeated_keys_and_edges_of_beta(beta):
    """T4: the same unit key 200 times; beta 2 reflects for ever without growing."""
    x, state = draw(
        "delta", 4, rows=1, length=200, groups=1, repeat=1, d_key=4, d_value=4, gate="none"
    )
    x["k"] = x["k"][:, :1].expand(-1, 200, -1, -1)
    x["beta"].fill_(beta)
    compare("delta", x, state, chunk=64)
    x["v"].zero_()
    _, s = delta(**{k: t.float() for k, t in x.items()}, state=state.float())
    norms = (s.norm(), state.norm())
    assert norms[0] <= norms[1] * (1 + 1e-4)
    if beta != 1.0:
        assert norms[0] >= norms[1] * (1 - 1e-4), "beta 0 and 2 are isometries"


def test_delta_rule_overwrites_and_recalls():
    """What the delta rule is for: beta = 1 replaces what a key held; n <= K keys are exact."""
    k = torch.eye(4, dtype=F64)[None, [0, 1, 2, 3, 1]].unsqueeze(2)
    v = torch.randn(1, 5, 1, 3, dtype=F64)
    o, s = delta(k, k, v, torch.ones(1, 5, 1, dtype=F64))
    assert_close(o, v, "float64", "each write is read back")
    assert_close(s[0, 0], v[0, [0, 4, 2, 3], 0], "float64", "the later value replaced the earlier")
    added, _ = decay(k, k, v)
    assert_close(added[:, 4], v[:, 1] + v[:, 4], "float64", "linear attention adds instead")


def test_two_reflections_rotate():
    """Two steps with beta = 2 along unit keys at angle theta / 2 rotate the state by theta."""
    theta = 0.7
    k = torch.tensor([[1, 0], [math.cos(theta / 2), math.sin(theta / 2)]], dtype=F64)
    state = torch.tensor([[0.3], [0.8]], dtype=F64)[None, None]
    _, s = delta(
        torch.zeros(1, 1, 1, 2, dtype=F64),
        k[None, None, :, None],
        torch.zeros(1, 1, 2, 1, 1, dtype=F64),
        torch.full((1, 1, 2, 1), 2.0, dtype=F64),
        state=state,
    )
    turn = [[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]]
    assert_close(s[0, 0], torch.tensor(turn, dtype=F64) @ state[0, 0], "float64", "rotation")


def test_one_step_is_the_plain_delta_rule():
    x, state = draw(
        "delta", 3, rows=2, length=33, groups=1, repeat=2, d_key=4, d_value=3, gate="head", steps=1
    )
    o, s = delta_chunked(**x, state=state)
    x = {k: t.squeeze(2) if k in ("k", "v", "beta") else t for k, t in x.items()}
    o1, s1 = delta_chunked(**x, state=state)
    assert torch.equal(o, o1)
    assert torch.equal(s, s1)


def test_steps_equal_a_stretched_sequence():
    """n steps per token = a sequence n times as long, the gate before a token's first step."""
    n, t = 3, 11
    x, state = draw(
        "delta", 3, rows=2, length=t, groups=1, repeat=1, d_key=4, d_value=3, gate="head", steps=n
    )
    long = {k: x[k].flatten(1, 2) for k in ("k", "v", "beta")}
    long["q"] = torch.zeros(2, t * n, 1, 4, dtype=F64)
    long["q"][:, n - 1 :: n] = x["q"]
    long["log_a"] = torch.zeros(2, t * n, 1, dtype=F64)
    long["log_a"][:, ::n] = x["log_a"]
    o, s = delta(**x, state=state)
    o_long, s_long = delta(**long, state=state)
    assert_close(o, o_long[:, n - 1 :: n], "float64", "o")
    assert_close(s, s_long, "float64", "state")


def test_autocast_does_not_touch_the_recurrence():
    x, state = draw(
        "delta", 3, rows=1, length=20, groups=1, repeat=1, d_key=4, d_value=3, gate="head"
    )
    x, state = {k: t.float() for k, t in x.items()}, state.float()
    want = delta(**x, state=state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = delta(**x, state=state)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_chunk_size_does_not_matter():
    x, state = draw(
        "decay", 3, rows=1, length=100, groups=1, repeat=1, d_key=4, d_value=3, gate="key"
    )
    want, _ = decay_chunked(**x, state=state, chunk=64)
    for chunk in (1, 4, 32):
        assert_close(decay_chunked(**x, state=state, chunk=chunk)[0], want, "float64", str(chunk))


def _good():
    x, state = draw(
        "delta", 3, rows=2, length=5, groups=1, repeat=2, d_key=4, d_value=3, gate="head"
    )
    return {**x, "state": state}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 1, 3)}, "k must have shape"),
        ({"q": torch.zeros(2, 4, 1, 4)}, "q must have shape"),
        ({"v": torch.zeros(2, 5, 3)}, "v must have shape"),
        ({"v": torch.zeros(2, 5, 2, 0, 3)}, "step axis"),
        ({"beta": torch.zeros(2, 5, 3)}, "beta must have shape"),
        ({"log_a": torch.zeros(2, 5, 1)}, "log_a must have shape"),
        ({"log_a": torch.full((2, 5, 2), 0.5)}, "log decays <= 0"),
        ({"log_a": torch.full((2, 5, 2), math.nan)}, "log decays <= 0"),
        ({"state": torch.zeros(1, 2, 4, 3)}, "state must have shape"),
        ({"q": torch.zeros(2, 5, 1, 4, dtype=torch.long)}, "floating point"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch must be 1"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "integer tensor"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        delta(**{**_good(), **({"state": None} if "cu_seqlens" in change else {}), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.zeros(2, 5, 1)}, "scale must have shape"),
        ({"skip": torch.zeros(2, 3)}, "skip must have shape"),
        ({"skip": torch.zeros(2, dtype=torch.long)}, "floating point"),
    ],
)
def test_bad_factors_of_writes(change, message):
    x = _good()
    with pytest.raises((ValueError, TypeError), match=message):
        decay(x["k"], x["k"], torch.zeros(2, 5, 2, 3, dtype=F64), **change)


def test_heads_must_divide():
    x = _good()
    x["q"] = x["k"] = torch.zeros(2, 5, 3, 4, dtype=F64)
    with pytest.raises(ValueError, match="multiple"):
        delta(**x)
