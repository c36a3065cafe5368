"""The kernels on a CUDA device: every case, torch.compile, training of a part.

Run by `make test-gpu`; `longscan verify --ops --jobs 8` runs the cases faster.
"""

import pytest
import torch
from helpers import TOLERANCE, error

from longscan.proof import CASES, cases
from longscan.proof.command import Task, perform
from longscan.proof.launches import unused
from longscan.registry import mixer_class

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EVERY = [(k, c.name, d) for k in CASES for c in cases(k) for d in c.dtypes]
USED: dict[str, set] = {}


@pytest.mark.parametrize(("kernel", "name", "dtype"), EVERY)
def test_every_case(kernel, name, dtype):
    done = perform(Task(kernel, name, dtype, "cuda"))
    if done.status == "skip":
        pytest.skip(done.what)
    for table, keys in done.used.items():
        USED.setdefault(table, set()).update(keys)
    assert done.status == "ok", f"{done.what}: {done.error:.1e}"


@pytest.mark.parametrize("kernel", CASES)
def test_no_launch_is_left_out(kernel):
    if not USED:
        pytest.skip("runs behind test_every_case")
    assert unused(kernel, USED) == {}


# --- mixers ---------------------------------------------------------------------------------

MIXERS = ("linear_attention", "retention", "gla", "mamba", "mamba2", "deltanet",
          "gated_deltanet", "kda", "mlstm")  # fmt: skip
every_mixer = pytest.mark.parametrize("name", MIXERS)


def build(name):
    torch.manual_seed(0)
    return mixer_class(name)(128).cuda()


@every_mixer
def test_compiled_mixers_equal_eager_ones(name, monkeypatch):
    """One graph without breaks, for any length; outputs and gradients of the input."""
    monkeypatch.setenv("LONGSCAN_BACKEND", "triton")
    torch._dynamo.reset()
    m = build(name)
    fast = torch.compile(lambda x: m(x)[0], fullgraph=True, dynamic=True)
    for batch, length in ((2, 64), (3, 150), (2, 333), (1, 1000)):
        x = torch.randn(batch, length, 128, device="cuda")
        results = []
        for run in (fast, lambda x: m(x)[0]):
            u = x.clone().requires_grad_()
            y = run(u)
            (g,) = torch.autograd.grad(y.square().sum(), u)
            results.append((y.detach(), g))
        for got, want in zip(*results, strict=True):
            assert error(got, want) < TOLERANCE["float32"]


@every_mixer
def test_a_low_rank_change_of_one_projection_learns(name, monkeypatch):
    """As LoRA does: all is frozen but two thin factors beside one projection."""
    monkeypatch.setenv("LONGSCAN_BACKEND", "triton")
    m = build(name).requires_grad_(False)
    layer = next(x for x in m.modules() if isinstance(x, torch.nn.Linear))
    down = torch.randn(4, layer.in_features, device="cuda").mul_(0.1).requires_grad_()
    up = torch.zeros(layer.out_features, 4, device="cuda", requires_grad=True)
    layer.register_forward_hook(lambda _, args, y: y + args[0] @ down.T @ up.T)
    x = torch.randn(2, 200, 128, device="cuda")
    target = m(x)[0].detach() + 0.1 * torch.randn(2, 200, 128, device="cuda")
    optimizer = torch.optim.Adam([down, up], lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (m(x)[0].float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(p.grad is None for p in m.parameters())
    assert losses[-1] < losses[0]


@every_mixer
def test_kernels_are_near_float64(name, monkeypatch):
    """A mixer in float32 by its kernels against float64 by the torch form: all gradients."""
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        monkeypatch.setenv("LONGSCAN_BACKEND", backend)
        m = build(name).to(dtype)
        x = torch.randn(2, 150, 128, generator=torch.Generator().manual_seed(0))
        u = x.to("cuda", dtype).requires_grad_()
        y, state = m(u)
        outs = [y, *(t for t in state.flatten().values() if t.is_floating_point())]
        leaves = [u, *m.parameters()]
        loss = sum(t.square().sum() for t in outs)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found.append([*outs, *grads])
    for got, want in zip(*found, strict=True):
        assert error(got, want.detach()) < TOLERANCE["float32"]
