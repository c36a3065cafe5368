"""The sLSTM cell: golden vectors, the fast form against the definition, identities, bad input."""

import pytest
import torch
from helpers import assert_close, error, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.ops import _slstm as module
from longscan.ops.slstm import slstm, slstm_fast, slstm_reference, slstm_step

F64 = torch.float64
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
NAMES = ("y", "state", "dgates", "dr", "dbias", "dstate")


def draw(batch, length, heads, d, rows=None, seed=0, scale=2.0):
    """gates, r, bias and a state in the middle of a sequence, but for row 0, which begins."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    state = normal(rows or batch, 4, heads, d)
    state[:, 2] = state[:, 2].abs() + 0.1
    state[0] = 0
    gates = scale * normal(batch, length, heads, 4, d)
    return [gates, normal(heads, d, 4, d), normal(heads, 4, d), state]


def results(run, inputs, of_state=True, **more):
    """Outputs and gradients of everything, for random cotangents of y and perhaps the state."""
    gates, r, bias, state = leaves = [x.clone().requires_grad_() for x in inputs]
    y, end = run(gates, r, bias, state=state, **more)
    g = torch.Generator().manual_seed(1)
    parts = (y, end) if of_state else (y,)
    loss = sum((t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum() for t in parts)
    return [y, end, *torch.autograd.grad(loss, leaves)]


def same(got, want, kind="float64"):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_close(a, b, kind, name)


@BACKENDS
@pytest.mark.parametrize("name", ["slstm_cell", "slstm_cell_init"])
def test_golden(name, backend):
    file = golden(f"xlstm/{name}")
    kernel = file["param._recurrent_kernel_"].requires_grad_()  # [N, 4 D (to), D (from)]
    bias = file["param._bias_"].requires_grad_()  # [4 N D]
    heads, _, d = kernel.shape
    gates = file["in.gates_ifzo"].requires_grad_()  # [B, T, 4 N D]
    state = None
    if "in.state_ycnm" in file:
        state = file["in.state_ycnm"].unflatten(-1, (heads, d)).transpose(0, 1)
    y, end = slstm(
        gates.unflatten(-1, (4, heads, d)).transpose(2, 3),
        kernel.unflatten(1, (4, d)).permute(0, 3, 1, 2),
        bias.view(4, heads, d).transpose(0, 1),
        state=state,
        backend=backend,
    )
    (y.transpose(1, 2) * file["in.dy"]).sum().backward()
    for got, key in (
        (y.transpose(1, 2), "out.y_BNSH"),
        (end.transpose(0, 1).flatten(2), "out.state_ycnm"),
        (gates.grad, "grad.gates_ifzo"),
        (kernel.grad, "grad._recurrent_kernel_"),
        (bias.grad, "grad._bias_"),
    ):
        assert error(got, file[key]) < 1e-10, key


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    packed=st.booleans(),
    heads=st.integers(1, 3),
    d=st.integers(1, 6),
    block=st.sampled_from([1, 40, 100, 1 << 16]),
    of_state=st.booleans(),
)
def test_any_shape(seed, lengths, packed, heads, d, block, of_state):
    """T1, T3: blocks of any size, rows that end inside one, gradients with and without dstate."""
    old, module._BLOCK["cpu"] = module._BLOCK["cpu"], block
    try:
        rows = len(lengths)
        shape = (1, sum(lengths)) if packed else (rows, lengths[0])
        inputs = draw(*shape, heads, d, rows=rows, seed=seed)
        more = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)} if packed else {}
        want = results(slstm_reference, inputs, of_state, **more)
        same(results(slstm, inputs, of_state, **more), want)
        with torch.no_grad():  # nothing is kept for a backward
            gates, r, bias, state = inputs
            for got, ref in zip(slstm(gates, r, bias, state=state, **more), want, strict=False):
                assert_close(got, ref, "float64", "without gradients")
    finally:
        module._BLOCK["cpu"] = old


def test_gradcheck_of_the_definition():
    """T2."""
    inputs = [x.requires_grad_() for x in draw(2, 3, 2, 2)]
    assert torch.autograd.gradcheck(lambda g, r, b, s: slstm_reference(g, r, b, state=s), inputs)


@BACKENDS
def test_a_row_begins_anew_beside_others(backend):
    """Whether n = 0 is each row's own matter (the authors' cell asks for all rows at once)."""
    gates, r, bias, state = draw(3, 7, 2, 3)
    assert state[0].abs().max() == 0
    assert state[1:, 2].min() > 0
    y, end = slstm(gates, r, bias, state=state, backend=backend)
    for i in range(3):
        own = slstm(gates[i : i + 1], r, bias, state=state[i : i + 1], backend=backend)
        assert_close(y[i : i + 1], own[0], "float64", "y")
        assert_close(end[i : i + 1], own[1], "float64", "state")
    fresh, _ = slstm(gates[:1], r, bias, backend=backend)
    assert_close(y[:1], fresh, "float64", "no state is a state of zeros")


@BACKENDS
def test_what_m_is_does_not_matter(backend):
    """(c, n, m) and (c e^-a, n e^-a, m + a) are the same memory; so no gradient comes from a."""
    gates, r, bias, state = draw(2, 9, 2, 3)
    state = state[1:].repeat(2, 1, 1, 1)
    a = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y0, c, n, m = state.unbind(1)
    moved = torch.stack([y0, c * (-a).exp(), n * (-a).exp(), m + a], 1)
    y, end = slstm(gates, r, bias, state=moved, backend=backend)
    want, other = slstm(gates, r, bias, state=state, backend=backend)
    assert_close(y, want, "float64", "y")

    def memory(state):
        return state[:, 1:3] * state[:, 3:].exp()

    assert_close(memory(end), memory(other), "float64", "memory")
    (slope,) = torch.autograd.grad((y * torch.arange(1, 10)[:, None, None]).sum(), a)
    assert slope.abs() < 1e-12


def test_without_mixing_it_is_a_mean():
    """R = 0, f gates open, equal i gates: y is sigmoid(o) times the mean of what was written."""
    gates = draw(2, 8, 2, 3)[0]
    gates[:, :, :, 0], gates[:, :, :, 1], gates[:, :, :, 3] = 1.5, 40.0, 0.0
    zero = torch.zeros(2, 3, 4, 3, dtype=F64), torch.zeros(2, 4, 3, dtype=F64)
    y, end = slstm(gates, *zero)
    written = gates[:, :, :, 2].tanh().cumsum(1)
    count = torch.arange(1, 9, dtype=F64)[:, None, None]
    assert_close(y, 0.5 * written / count, "float64", "y")
    assert_close(end[:, 2], torch.full_like(end[:, 2], 8), "float64", "n counts")
    assert_close(end[:, 3], torch.full_like(end[:, 3], 1.5), "float64", "m")


@BACKENDS
@pytest.mark.parametrize(("i", "f"), [(80, 80), (80, -80), (-80, 80), (-80, -80), (300, -300)])
def test_saturated_gates(i, f, backend):
    """T4: nothing overflows in float32, and the result is float64's."""
    gates, r, bias, state = draw(2, 40, 2, 4, scale=1.0)
    gates[..., 0, :] += i * torch.randn(2, 40, 2, 4, dtype=F64).sign()
    gates[..., 1, :] += f
    r = 0.1 * r
    want, _ = slstm(gates, r, bias, state=state)
    inputs = [x.float() for x in (gates, r, bias, state)]
    got = results(slstm, inputs, backend=backend)
    assert all(torch.isfinite(x).all() for x in got)
    assert_close(got[0], want, "float32", "y")


def test_one_step_is_the_step():
    gates, r, bias, state = draw(3, 1, 2, 4)
    y, end = slstm(gates, r, bias, state=state)
    one, after = slstm_step(gates[:, 0], r, bias, state)
    loop, last = slstm_fast(gates, r, bias, state=state)
    for a, b in ((y[:, 0], one), (end, after), (loop[:, 0], one), (last, after)):
        assert_close(a, b, "float64")


def test_low_precision_inputs_are_computed_in_float32():
    inputs = draw(2, 20, 2, 4)
    gates, r, bias, state = (x.to(torch.bfloat16) for x in inputs)
    y, end = slstm(gates, r, bias, state=state)
    assert y.dtype == torch.bfloat16
    assert end.dtype == torch.float32
    wide = [x.float() for x in (gates, r, bias)]
    want, after = slstm(*wide, state=state.float())
    assert torch.equal(end, after)
    assert torch.equal(y, want.to(torch.bfloat16))
    for length in (20, 1):
        part = wide[0][:, :length]
        expected = slstm(part, *wide[1:])
        with torch.autocast("cpu", torch.bfloat16):
            got = slstm(part, *wide[1:])
        assert torch.equal(got[0], expected[0]), "autocast changes nothing inside"
        assert torch.equal(got[1], expected[1])


def test_bad_input_is_refused():
    gates, r, bias, state = draw(2, 5, 2, 3)
    for wrong, message in [
        ((gates.transpose(2, 3), r, bias), "gates must have shape"),
        ((gates[:, :0], r, bias), "gates must have shape"),
        ((gates, r.flatten(2), bias), "r must have shape"),
        ((gates, r, bias.transpose(0, 1)), "bias must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            slstm(*wrong)
    with pytest.raises(ValueError, match="state must have shape"):
        slstm(gates, r, bias, state=state[:1])
    with pytest.raises(TypeError, match="floating"):
        slstm(gates.long(), r, bias)
    with pytest.raises(ValueError, match="batch must be 1"):
        slstm(gates, r, bias, cu_seqlens=torch.tensor([0, 5]))
