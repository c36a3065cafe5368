"""What every registered mixer must do. A new mixer inherits all of these by its registry line."""

import copy

import pytest
import torch
from helpers import assert_close, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longscan.mixers._blockdiag import HeadwiseLinear
from longscan.registry import entry, mixer_class, names
from longscan.state import State

D = 32
F64 = torch.float64
every_mixer = pytest.mark.parametrize("name", names())
few = settings(max_examples=8, deadline=None, database=None, derandomize=True)


def build(name, seed=0):
    """A float64 mixer whose parameters are moved off their initial values, so none is special."""
    torch.manual_seed(seed)
    m = mixer_class(name)(D).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


def tokens(batch, length, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D, dtype=F64, generator=g).requires_grad_(grad)


def same_state(a: State, b: State, kind="float64"):
    flat_a, flat_b = a.flatten(), b.flatten()
    assert flat_a.keys() == flat_b.keys()
    for k in flat_a:
        if flat_a[k].is_floating_point():
            assert_close(flat_a[k], flat_b[k], kind, f"state {k}")
        else:
            assert torch.equal(flat_a[k], flat_b[k]), k


def floating(state):
    return [t for t in state.flatten().values() if t.is_floating_point()]


def warm_state(m, batch, seed=9):
    """A state in the middle of a sequence, as a leaf of the graph."""
    with torch.no_grad():
        _, s = m(tokens(batch, 5, seed))
    return s.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)


@every_mixer
def test_paths_agree_with_all_gradients(name, monkeypatch):
    """T1: the fast form equals the definition: outputs, final state, gradients of everything."""
    m = build(name)
    results = {}
    for backend in ("reference", "torch"):
        monkeypatch.setenv("LONGSCAN_BACKEND", backend)
        x, state = tokens(2, 37, grad=True), warm_state(m, 2)
        y, out = m(x, state)
        g = torch.Generator().manual_seed(3)
        loss = sum(
            (t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum()
            for t in (y, *floating(out))
        )
        leaves = [x, *floating(state), *m.parameters()]
        results[backend] = [y, *floating(out), *torch.autograd.grad(loss, leaves)]
    for i, (a, b) in enumerate(zip(results["torch"], results["reference"], strict=True)):
        assert_close(a, b, "float64", f"tensor {i}")


@every_mixer
@few
@given(length=st.integers(1, 150), cut=st.integers(0, 149))
def test_split_equals_whole(name, length, cut):
    """T3: any cut gives the same outputs and the same final state."""
    m, x = build(name), tokens(2, length)
    cut = cut % length
    whole, final = m(x)
    if cut == 0:
        y, state = m(x, m.init_state(2))
        assert_close(y, whole, "float64", "an explicit first state")
    else:
        y1, state = m(x[:, :cut])
        y2, state = m(x[:, cut:], state)
        assert_close(torch.cat([y1, y2], 1), whole, "float64", "outputs")
    same_state(state, final)


@every_mixer
def test_steps_equal_whole(name):
    m, x = build(name), tokens(2, 19)
    whole, final = m(x)
    state, ys = None, []
    for t in range(19):
        y, state = m(x[:, t : t + 1], state)
        ys.append(y)
    assert_close(torch.cat(ys, 1), whole, "float64", "outputs")
    same_state(state, final)


@every_mixer
@few
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), warm=st.booleans())
def test_packed_equals_separate(name, lengths, warm):
    """T3: packed sequences, with their own states, are as if each were alone."""
    m = build(name)
    parts = [tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    before = [m(tokens(1, 3 + i, seed=50 + i))[1] for i in range(len(lengths))] if warm else None
    joined = None if before is None else State.cat(before)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    y, state = m(torch.cat(parts, 1), joined, cu_seqlens=cu)
    for i, part in enumerate(parts):
        want, _ = m(part, None if before is None else before[i])
        assert_close(y[:, cu[i] : cu[i + 1]], want, "float64", f"sequence {i}")
    probe = tokens(len(lengths), 2, seed=77)
    after, _ = m(probe, state)
    for i, part in enumerate(parts):
        _, s = m(part, None if before is None else before[i])
        assert_close(after[i : i + 1], m(probe[i : i + 1], s)[0], "float64", f"state {i}")


@every_mixer
def test_no_gradient_across_documents_or_time(name):
    """T3: exactly zero, not merely small."""
    m = build(name)
    x = tokens(1, 40, grad=True)
    y, _ = m(x, cu_seqlens=torch.tensor([0, 13, 40]))
    (gradient,) = torch.autograd.grad(y[:, 13:].sum(), x)
    assert gradient[:, :13].abs().max() == 0
    assert gradient[:, 13:].abs().min() > 0
    y, _ = m(x)
    (gradient,) = torch.autograd.grad(y[:, 20].sum(), x)
    assert gradient[:, 21:].abs().max() == 0
    assert gradient[:, 20].abs().max() > 0


@every_mixer
def test_states_carry_gradients(name):
    """Backpropagation through two carried stretches equals that through the whole."""
    m = build(name)
    x = tokens(2, 30, grad=True)
    (whole,) = torch.autograd.grad(m(x)[0][:, 20:].sum(), x)
    _, state = m(x[:, :20])
    (parts,) = torch.autograd.grad(m(x[:, 20:], state)[0].sum(), x)
    assert_close(parts, whole, "float64", "dx")


@every_mixer
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_inputs_stay_finite(name, scale):
    """T4: zeros, tiny and huge inputs, repeated tokens, in float32."""
    m = build(name).float()
    x = (tokens(2, 80).float() * scale)[:, [0] * 40 + list(range(40))].requires_grad_()
    y, state = m(x)
    y.sum().backward()
    assert x.grad is not None
    for t in (y, x.grad, *floating(state), *(p.grad for p in m.parameters() if p.grad is not None)):
        assert torch.isfinite(t).all()


@every_mixer
def test_every_parameter_learns(name):
    m = build(name)
    y, _ = m(tokens(2, 24))
    y.square().sum().backward()
    for key, p in m.named_parameters():
        assert p.grad is not None, key
        assert p.grad.abs().max() > 0, key


@every_mixer
def test_deterministic_with_poisoned_memory(name):
    """T5: fresh memory holds NaN; two runs are bitwise equal, gradients too."""
    m, x = build(name).float(), tokens(2, 70).float()
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            m.zero_grad()
            y, state = m(x)
            y.square().sum().backward()
            grads = [p.grad for p in m.parameters() if p.grad is not None]
            runs.append([y, *state.flatten().values(), *grads])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*runs, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@every_mixer
def test_float32_is_close_to_float64(name):
    m, x = build(name), tokens(2, 150)
    want, _ = m(x)
    got, state = m.float()(x.float())
    assert got.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in floating(state))
    assert_close(got, want, "float32", "y")


@every_mixer
def test_low_precision_keeps_what_must_be_float32(name):
    """bfloat16 weights: parameters named by the mixer and recurrent states stay float32."""
    m = build(name).float()
    kept = {
        k: getattr(m, k).clone() for k in m.keep_float32 if isinstance(getattr(m, k, None), Tensor)
    }
    m = m.to(torch.bfloat16)
    for k, p in kept.items():
        assert getattr(m, k).dtype == torch.float32
        assert torch.equal(getattr(m, k), p), "and keep their exact values"
    x = tokens(1, 6).to(torch.bfloat16)
    y, state = m(x)
    assert y.dtype == torch.bfloat16
    if entry(name).decode == "O(1)":
        windows = ("conv", "shift")  # of inputs, as narrow as these
        recurrent = [t for k, t in state.flatten().items() if k not in windows]
        assert all(t.dtype == torch.float32 for t in recurrent if t.is_floating_point())
    want, _ = copy.deepcopy(m).double()(x.double())
    assert error(y.double(), want) < 0.1


@every_mixer
def test_state_is_a_value(name, tmp_path):
    """Using a state does not change it; it can be selected, joined, saved and loaded."""
    m = build(name)
    _, state = m(tokens(3, 11))
    copy_ = state.clone()
    y1, _ = m(tokens(3, 4, 5), state)
    y2, _ = m(tokens(3, 4, 5), state)
    assert torch.equal(y1, y2)
    same_state(state, copy_)
    parts = [state.select(i) for i in range(3)]
    same_state(State.cat(parts), state)
    y3, _ = m(tokens(3, 4, 5)[1:2], parts[1])
    assert_close(y3, y1[1:2], "float64", "one row")
    state.save(tmp_path / "state.safetensors")
    same_state(State.load(tmp_path / "state.safetensors"), state)
    assert state.nbytes == sum(t.numel() * t.element_size() for t in state.flatten().values())


@every_mixer
def test_state_size_does_not_grow_unless_registered_so(name):
    m = build(name)
    _, short = m(tokens(1, 8))
    _, long = m(tokens(1, 600))
    if entry(name).decode == "O(1)":
        assert long.nbytes == short.nbytes
    elif entry(name).decode == "O(T)":
        assert long.nbytes > 10 * short.nbytes


@every_mixer
def test_parameters_round_trip(name):
    a, b = build(name, 0), build(name, 1)
    x = tokens(1, 9)
    assert error(a(x)[0], b(x)[0]) > 1e-3
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x)[0], b(x)[0])
    torch.manual_seed(5)
    b.reset_parameters()
    torch.manual_seed(5)
    a.reset_parameters()
    assert torch.equal(a(x)[0], b(x)[0]), "reset_parameters reaches every parameter"


@every_mixer
def test_compiled_agrees(name):
    """T8: one graph, no breaks; the graph computes the same outputs and gradients."""
    torch._dynamo.reset()
    m, x = build(name), tokens(2, 65)
    compiled = torch.compile(lambda x: m(x)[0], fullgraph=True, backend="aot_eager")
    y = compiled(x)
    want, _ = m(x)
    assert_close(y, want, "float64", "y")
    params = list(m.parameters())
    got = torch.autograd.grad(y.square().sum(), params)
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), params), strict=True):
        assert_close(a, b, "float64", "gradient")


@every_mixer
def test_lora_on_every_projection(name):
    """T8: wrapping any linear map in a low-rank adapter works, and at first changes nothing."""

    class LoRA(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = torch.nn.Parameter(0.1 * torch.randn(4, base.in_features, dtype=F64))
            self.up = torch.nn.Parameter(torch.zeros(base.out_features, 4, dtype=F64))

        def forward(self, x):
            return self.base(x) + x @ self.down.mT @ self.up.mT

    m, x = build(name), tokens(2, 20)
    want, _ = m(x)
    kinds = torch.nn.Linear | HeadwiseLinear
    linears = [k for k, sub in m.named_modules() if isinstance(sub, kinds)]
    assert linears
    for key in linears:
        parent, _, leaf = key.rpartition(".")
        owner = m.get_submodule(parent)
        setattr(owner, leaf, LoRA(getattr(owner, leaf)))
    y, _ = m(x)
    assert_close(y, want, "float64", "adapters that add nothing")
    y.square().sum().backward()
    for key in linears:
        up = m.get_parameter(f"{key}.up")
        assert up.grad is not None, key
        assert up.grad.abs().max() > 0, key


@every_mixer
def test_bad_input_is_refused(name):
    m = build(name)
    with pytest.raises(ValueError, match="shape"):
        m(torch.zeros(2, 5, D + 1, dtype=F64))
    with pytest.raises(ValueError, match="shape"):
        m(torch.zeros(2, 0, D, dtype=F64))
    with pytest.raises(ValueError, match="rise strictly"):
        m(tokens(1, 9), cu_seqlens=torch.tensor([0, 5, 3, 9]))
    with pytest.raises(ValueError, match="ends at"):
        m(tokens(1, 9), cu_seqlens=torch.tensor([0, 5, 8]))
    with pytest.raises(ValueError, match="batch must be 1"):
        m(tokens(2, 9), cu_seqlens=torch.tensor([0, 5, 9]))
    with pytest.raises((ValueError, RuntimeError)):
        m(tokens(2, 5), m.init_state(3))
