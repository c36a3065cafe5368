"""The proof itself: it passes what is right, and finds every planted miscompilation."""

import math
import time

import pytest
import torch

from longscan import cli
from longscan.proof import CASES, LIMITS, cases, limit, prove, public, worst
from longscan.proof import command as command_module
from longscan.proof.command import Task, perform
from longscan.proof.compare import error
from longscan.proof.guard import Guard


def named(kernel, name):
    return next(c for c in cases(kernel) if c.name == name)


def right(kernel):
    """A stand-in for a kernel: the op's torch form, in the precision it is given."""
    op = public(kernel, "torch")
    return lambda *args, **more: op(*args, **more)


def failed(kernel, name, run, dtype="bf16"):
    """What is beyond the limit."""
    case = named(kernel, name)
    errors = prove(kernel, case, dtype, "cpu", run)
    return {n for n, e in errors.items() if e > limit(kernel, case, dtype, "cpu", e)}


@pytest.mark.parametrize("kernel", CASES)
def test_what_is_right_passes(kernel):
    for case in cases(kernel):
        if case.quick or case.name in ("packed borders", "beta 2, one key, open", "gate closed"):
            for dtype in LIMITS:
                assert failed(kernel, case.name, right(kernel), dtype) == set()


def test_cases_are_the_same_every_time():
    for kernel in CASES:
        one, two = (cases(kernel)[0].arguments() for _ in range(2))
        assert list(one) == list(two)
        same = [torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True)
                if isinstance(a, torch.Tensor)]  # fmt: skip
        assert all(same)
        assert same
    with pytest.raises(ValueError, match="no proof of a kernel 'decoy'"):
        cases("decoy")


# --- planted miscompilations: what a compiler or a launcher gets wrong in practice ----------


def changed(x, change):
    """x, whose gradient goes through `change`."""
    x = x.view_as(x)
    x.register_hook(change)
    return x


def wrong_tile(q, k, v, log_a, **more):
    """The gradient of keys is wrong where the tile of 64 columns is the second one."""

    def change(g):
        g = g.clone()
        g[..., 64:128] *= 1.1
        return g

    return right("decay")(q, changed(k, change), v, log_a, **more)


def no_last_chunk(q, k, v, log_a, **more):
    """The last chunk of a sequence is not computed unless it is whole."""
    o, s = right("decay")(q, k, v, log_a, **more)
    whole = o.shape[1] // 64 * 64
    return torch.cat([o[:, :whole], 0 * o[:, whole:]], 1), s


def no_last_gradient(q, k, v, log_a, **more):
    """Gradients of the tokens in a partial chunk are dropped."""
    whole = v.shape[1] // 64 * 64

    def change(g):
        return torch.cat([g[:, :whole], 0 * g[:, whole:]], 1)

    return right("decay")(q, k, changed(v, change), log_a, **more)


def leak(q, k, v, log_a, *, state, cu_seqlens, **more):
    """The state of a packed sequence enters the next one, a little."""
    _o, s = right("decay")(q, k, v, log_a, state=state, cu_seqlens=cu_seqlens, **more)
    into = state.clone()
    into[1:] = into[1:] + 0.05 * s[:-1]
    return right("decay")(q, k, v, log_a, state=into, cu_seqlens=cu_seqlens, **more)


def overflow(q, k, v, log_a, **more):
    """Offsets beyond a number of elements wrap around: other values are read there."""
    o, s = right("decay")(q, k, v, log_a, **more)
    far = torch.arange(o.numel()).view(o.shape) >= o.numel() - 64
    return torch.where(far, o.roll(64, -1) + 1e3, o), s


def wrong_beta(q, k, v, beta, log_a, **more):
    """The gradient of the write strength is half too large."""
    return right("delta")(q, k, v, changed(beta, lambda g: 1.5 * g), log_a, **more)


def unwritten(q, k, v, log_a, **more):
    """The last token's output is left as the memory was."""
    o, s = right("decay")(q, k, v, log_a, **more)

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = torch.empty_like(x)
            out[:, :-1] = x[:, :-1]
            return out

        @staticmethod
        def backward(ctx, g):
            return g

    return Copy.apply(o), s


def unwritten_but_hidden(q, k, v, log_a, **more):
    """Fresh memory takes part in a maximum, which passes over NaN."""
    o, s = right("decay")(q, k, v, log_a, **more)
    fresh = torch.empty(o.shape)
    return torch.fmax(o, torch.full_like(fresh, -math.inf).fmax(fresh).to(o)), s


def race(q, k, v, log_a, **more):
    """A sum whose order changes from run to run."""
    o, s = right("decay")(q, k, v, log_a, **more)
    race.runs += 1
    return o, s * (1 + 1e-6 * race.runs)


race.runs = 0


def beyond(q, k, v, log_a, **more):
    """A store without its mask goes on behind the tensor."""
    o, s = right("decay")(q, k, v, log_a, **more)
    out = torch.empty(o.shape, dtype=o.dtype)
    with torch.no_grad():
        torch.as_strided(out, (8,), (1,), out.storage_offset() + out.numel()).fill_(1)
    return o, s


def beside(q, k, v, log_a, **more):
    """A load without its mask takes in what lies behind the tensor."""
    o, s = right("decay")(q, k, v, log_a, **more)
    behind = torch.as_strided(v.detach(), (1,), (1,), v.storage_offset() + v.numel())
    return o + 1e-9 * behind, s


def no_end(q, k, v, log_a, **more):
    """The gradient of the final state is forgotten in that of the gates."""
    o, s = right("decay")(q, k, v, log_a, **more)
    _, other = right("decay")(q, k, v, log_a.detach(), **more)
    return o, other + 0 * s


def no_head(q, k, v, log_a, **more):
    """Gradients of a shared key are those of its first value head."""
    r = v.shape[2] // k.shape[2]

    def change(g):
        g = g.clone()
        g[..., 1::r, :] = 0
        return g

    k = changed(k.repeat_interleave(r, 2), change)
    return right("decay")(q.repeat_interleave(r, 2), k, v, log_a, **more)


def narrow_state(q, k, v, log_a, **more):
    """The final state comes back in half precision."""
    o, s = right("decay")(q, k, v, log_a, **more)
    return o, s.bfloat16()


@pytest.mark.parametrize(
    ("kernel", "name", "run", "finds"),
    [
        ("decay", "K=128 V=128", wrong_tile, {"d k"}),
        ("decay", "T=65", no_last_chunk, {"o", "d q", "d k", "d v"}),
        ("decay", "T=129", no_last_gradient, {"d v"}),
        ("decay", "packed borders", leak, {"o", "state"}),
        ("decay", "T=150", overflow, {"o"}),
        ("delta", "T=150", wrong_beta, {"d beta"}),
        ("decay", "T=33", unwritten, {"o"}),
        ("decay", "T=33", unwritten_but_hidden, {"repeat"}),
        ("decay", "T=33", race, {"repeat"}),
        ("decay", "T=33", beyond, {"bounds"}),
        ("decay", "T=33", beside, {"o"}),
        ("decay", "T=33", no_end, {"d log_a"}),
        ("decay", "4 heads, 1 key", no_head, {"d k"}),
        ("decay", "T=33", narrow_state, {"state"}),
    ],
)
def test_what_is_wrong_is_found(kernel, name, run, finds):
    assert finds <= failed(kernel, name, run)


def test_a_wrap_around_beyond_many_copies_is_found():
    """What a large case looks at: the last copy of a batch, and sums over copies."""
    import dataclasses

    case = dataclasses.replace(named("conv", "T=17"), copies=5)

    def wrapped(x, weight, bias, **more):
        y, s = right("conv")(x, weight, bias, **more)
        far = torch.arange(y.numel()).view(y.shape) >= y.numel() - 9
        return torch.where(far, y + 100, y), s

    good = prove("conv", case, "fp32", "cpu", right("conv"))
    assert worst(good)[1] <= LIMITS["fp32"]
    assert prove("conv", case, "fp32", "cpu", wrapped)["o"] > LIMITS["fp32"]


def test_a_proof_without_a_kernel_is_none(monkeypatch):
    """Where the op falls back on its torch form nothing was proved."""
    import longscan.proof.compare as module

    plain = module.public
    monkeypatch.setattr(module, "public", lambda kernel, backend: plain(kernel, "torch"))
    assert worst(prove("decay", named("decay", "T=33"), "fp32", "cpu")) == ("kernel", math.inf)
    done = perform(Task("decay", "T=33", "fp32", "cpu"))
    assert (done.status, done.what) == ("FAIL", "kernel")


def test_an_exception_is_a_failure(monkeypatch):
    def broken(*args, **more):
        raise RuntimeError("no such launch\nand more")

    monkeypatch.setattr(command_module, "direct", lambda kernel: broken)
    done = perform(Task("decay", "T=33", "fp32", "cpu", direct=True))
    assert (done.status, done.what) == ("FAIL", "RuntimeError: no such launch")


def test_errors_that_are_no_numbers():
    one = torch.ones(3, dtype=torch.float64)
    assert error(None, one, None) == math.inf
    assert error(torch.ones(2), one, None) == math.inf
    assert error(torch.tensor([1.0, math.nan, 1.0]), one, None) == math.inf
    assert error(torch.ones(3), one, torch.bfloat16) == math.inf
    assert error(one + 0.5, one, torch.float64) == 0.5
    assert error(torch.full((3,), 1e-3), 0 * one, None, floor=1.0) == pytest.approx(1e-3)


def test_guarded_memory():
    guard = Guard(math.nan)
    held = guard.hold(torch.arange(5))
    with guard.allocations():
        fresh = [torch.empty(3), torch.empty_like(held), held.new_empty(2, 2, dtype=torch.float32)]
    assert torch.empty(3).storage_offset() == 0
    assert fresh[0].isnan().all()
    assert fresh[2].isnan().all()
    assert guard.intact()
    held.fill_(9)
    fresh[2].zero_()
    assert guard.intact()
    torch.as_strided(held, (1,), (1,), held.storage_offset() - 1).fill_(0)
    assert not guard.intact()


# --- the command ----------------------------------------------------------------------------


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(command_module, "find_spec", lambda name: True)
    monkeypatch.setattr(command_module, "direct", right)
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--direct", "--quick", "--dtypes", "fp32", "--out", str(out)]
    assert command_module.main(["--op", "conv", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 ok, 0 failed, 0 left out"
    assert "conv  small packed  fp32" in lines[1]
    assert "  ok  " in lines[1]
    assert len(out.read_text().splitlines()) == 3
    monkeypatch.setattr(command_module, "direct", lambda kernel: wrong_beta)
    assert command_module.main(["--op", "delta", "--case", "T=17", *options[:3]]) == 1
    assert "FAIL  d beta" in capsys.readouterr().out


def test_several_processes():
    """Without the interpreter no launch succeeds on a CPU: each is a failure, and none is lost."""
    tasks = [Task("conv", c.name, "fp32", "cpu", True) for c in cases("conv") if c.quick]
    found = list(command_module.perform_all(tasks, 2))
    assert {d.task for d in found} == set(tasks)
    assert {d.status for d in found} == {"FAIL"}


def slow(task):
    time.sleep(100)


def test_a_case_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(command_module, "perform", slow)
    tasks = [Task("conv", "small", "fp32", "cpu", True)]
    (done,) = command_module.perform_all(tasks, 1, limit=0.0)
    assert (done.status, done.what) == ("FAIL", "no result in time")


def test_bad_options(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="no proof of a kernel 'dekay'"):
        command_module.main(["--op", "dekay", "--device", "cpu"])
    with pytest.raises(ValueError, match="no case matches"):
        command_module.main(["--op", "decay", "--case", "xyz", "--device", "cpu"])
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        command_module.main(["--op", "decay", "--device", "cpu"])


def test_verify_leads_here(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["verify", "--op", "dekay", "--device", "cpu"]) == 1
    assert "no proof of a kernel 'dekay'" in capsys.readouterr().err
