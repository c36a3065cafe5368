"""Launches that Triton does not make: for the same keys as its own, and with the same arguments."""

import inspect
import random
import threading
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from triton.runtime import jit  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

import longscan.kernels  # noqa: E402
from longscan.kernels import _launch  # noqa: E402
from longscan.kernels._launch import entry  # noqa: E402
from longscan.ops._kernel_op import kernel_op  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="other versions launch by themselves"
)
HOPPER = GPUTarget("cuda", 90, 32)
MODULES = sorted(
    p.stem for p in Path(longscan.kernels.__file__).parent.glob("*.py") if p.stem[0] != "_"
)


def kernels(module):
    """The kernels of a file that Python launches: helpers have names with an underscore."""
    found = vars(import_module(f"longscan.kernels.{module}"))
    return {n: k for n, k in found.items() if isinstance(k, jit.JITFunction) and n[0] != "_"}


class Driver:
    """Of a machine with several GPUs."""

    def __init__(self):
        self.device, self.stream, self.by_triton = 0, 70, 0
        self.compiled: list = []
        self.launched = Compiled.launched

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream + device

    def get_current_target(self):
        return HOPPER


class Compiled:
    """A kernel as Triton's compiler returns it; it takes note of what reaches the C launcher."""

    launched: ClassVar[list] = []
    scratch: ClassVar[int] = 0

    def __init__(self, name):
        self.name, self.function, self.packed_metadata = name, hash(name), (4, 1, 0)
        self.run = CudaLauncher.__new__(CudaLauncher)
        for what in ("global_scratch", "profile_scratch"):
            setattr(self.run, f"{what}_size", self.scratch)
            setattr(self.run, f"{what}_align", 1)
        self.run.num_ctas, self.run.launch_cooperative_grid, self.run.launch_pdl = 1, True, False
        self.run.launch = lambda *args: Compiled.launched.append(args)

    def launch_metadata(self, grid, stream, *args):
        return None


@pytest.fixture
def gpu(monkeypatch):
    """Tensors seem to be on a GPU, and nothing is launched."""
    monkeypatch.setattr(Compiled, "launched", [])
    fake = Driver()
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", fake.get_current_device, raising=False)
    stream = fake.get_current_stream
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())

    def compile_(kernel, key, signature, device, *more):
        done = Compiled(f"{kernel.fn.__name__} {device} {key}")
        fake.compiled.append((kernel.fn.__name__, device))
        kernel.device_caches[device][0][key] = done
        return done

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_)
    run = jit.JITFunction.run

    def counted(kernel, *args, warmup, **more):
        fake.by_triton += not warmup
        return run(kernel, *args, warmup=warmup, **more)

    monkeypatch.setattr(jit.JITFunction, "run", counted)
    return fake


def pair():
    """A kernel launched by Triton, and the same as an entry."""

    def kernel(x, y, n, m, D: tl.constexpr, FLAG: tl.constexpr = False):  # type: ignore
        pass

    names = {"do_not_specialize": ["n"], "do_not_specialize_on_alignment": ["m"]}
    return triton.jit(kernel, **names), entry(triton.jit(kernel, **names))


# --- keys -----------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
WHOLE = (
    0,
    1,
    5,
    16,
    17,
    48,
    2**31 - 1,
    2**31,
    2**31 + 1,
    -(2**31),
    -(2**31) - 1,
    2**63,
    2**64 - 16,
)
BASE = {d: torch.zeros(64, dtype=d) for d in DTYPES}


def argument(r):
    what = r.choice(("tensor", "tensor", "tensor", "int", "int", "none", "bool", "float"))
    if what == "tensor":
        return BASE[r.choice(DTYPES)][r.choice((0, 0, 1, 16, 32)) :]
    return {"int": r.choice(WHOLE), "none": None, "bool": r.random() < 0.5, "float": r.random()}[
        what
    ]


def constant(r):
    return r.choice((1, True, 1.0, 2, 16, 0, False, None, "tf32", "ieee", tl.bfloat16))


def draws(kernel, r, count):
    """Calls of which many are alike: each differs from the first in one thing or two."""
    params = [p for p in kernel.params if not p.is_constexpr]
    names = [p.name for p in kernel.params if p.is_constexpr]
    for _ in range(count // 20):
        args = [argument(r) for _ in params]
        options = {n: constant(r) for n in names} | {"num_warps": 4, "num_stages": 2}
        for _ in range(20):
            now, more = list(args), dict(options)
            for _ in range(r.choice((1, 1, 2))):
                if r.random() < 0.75:
                    at = r.randrange(len(now))
                    old = now[at]
                    if isinstance(old, int) and not isinstance(old, bool) and r.random() < 0.7:
                        now[at] = r.choice(WHOLE)
                    elif isinstance(old, torch.Tensor) and r.random() < 0.7:
                        now[at] = BASE[old.dtype][r.choice((0, 1, 16)) :]
                    else:
                        now[at] = argument(r)
                elif r.random() < 0.5 and names:
                    more[r.choice(names)] = constant(r)
                else:
                    more[r.choice(("num_warps", "num_stages"))] = r.choice((1, True, 2, 4))
            yield now, more


def compare(kernel, r, monkeypatch, count=400):
    """Calls that had a key, keys of Triton's, those of ours that stand for several, all of ours."""
    got, other = [], partial(_launch._other, kernel, None)
    monkeypatch.setattr(_launch, "_first", lambda kernel, known, key, *more: got.append(key))
    monkeypatch.setattr(kernel, "_forms", {})
    monkeypatch.setattr(kernel, "_go", other)
    binder = jit.create_function_from_signature(
        kernel.signature, kernel.params, triton.compiler.make_backend(HOPPER)
    )
    ours, theirs = {}, set()
    for args, options in draws(kernel, r, count):
        kernel[(1,)](*args, **options)
        _, special, more = binder(*args, **options)
        key = str(special), str(more)
        theirs.add(key)
        kinds = tuple(map(type, args))
        ours.setdefault((kinds, got[-1]), set()).add(key)
    return len(got), len(theirs), {k: v for k, v in ours.items() if len(v) > 1}, len(ours)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_the_same_here_is_the_same_to_triton(module, gpu, monkeypatch):
    r = random.Random(0)
    for name, kernel in kernels(module).items():
        if not isinstance(kernel, _launch._Entry):
            continue
        calls, theirs, wrong, ours = compare(kernel, r, monkeypatch)
        assert not wrong, (name, wrong)
        assert calls == 400
        assert 10 < theirs <= ours < calls  # launches that differ, and some that are alike


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        ("apart and (", "0 and ("),
        ("or (_width(a2), ", "or (0, "),
        ("a0.dtype, ", ""),
        ("a3 == 1", "1"),
        ("*map(type, values),", ""),
    ],
)
def test_a_key_that_says_too_little_is_seen(part, instead, gpu, monkeypatch):
    """The test above can fail."""
    _, kernel = pair()
    hit = []

    def broken(source, space):
        hit.append(part in source)
        exec(source.replace(part, instead), space)

    monkeypatch.setattr(_launch, "exec", broken, raising=False)
    *_, wrong, _ = compare(kernel, random.Random(0), monkeypatch, 4000)
    assert any(hit)
    assert wrong


@pytest.mark.parametrize("module", MODULES)
def test_all_kernels_that_python_launches_are_entries(module):
    """A rehearsal would launch others, on numbers that nobody has written yet."""
    missing = [n for n, k in kernels(module).items() if not isinstance(k, _launch._Entry)]
    assert not missing, f"@entry is missing above {missing}"


# --- launches -------------------------------------------------------------------------------

X, Y = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)


def numbers(launched):
    """What reaches the kernel: tensors as addresses; constexprs are not looked at."""
    head, args = launched[:13], launched[13:17]
    hooks = slice(10, 13)
    assert len(launched) == 13 + 6
    return (*head[: hooks.start], *(getattr(a, "data_ptr", lambda a=a: a)() for a in args))


@pytest.mark.parametrize("grid", [(5,), (5, 6), (5, 6, 7)])
@pytest.mark.parametrize("args", [(X, Y, 3, 1), (X[1:], None, 2**40, 16), (X, Y, True, 0.5)])
def test_the_launcher_gets_what_triton_gives_it(args, grid, gpu):
    plain, fast = pair()
    for _ in range(3):
        plain[grid](*args, D=16, num_warps=4)
    by_triton = gpu.by_triton
    for _ in range(3):
        done = fast[grid](*args, D=16, num_warps=4)
    assert isinstance(done, Compiled)
    assert gpu.by_triton == by_triton + 1
    want, *got = [numbers(x) for x in gpu.launched[2:]]
    assert len(got) == 3
    assert want[4] == got[0][4]
    assert all(x == want for x in got)


def test_another_kind_is_compiled(gpu):
    _, kernel = pair()
    calls = [((X, Y, 3, 5), {}), ((X[1:], Y, 3, 5), {}), ((X, X, 3, 5), {}), ((X, Y, 2**40, 5), {}),
             ((X, Y, 3, 1), {}), ((X, None, 3, 5), {}), ((X, Y, 3, 5), {"FLAG": True})]  # fmt: skip
    for _ in range(2):
        for args, more in calls:
            kernel[(1,)](*args, D=16, **more)
    assert len(gpu.compiled) == gpu.by_triton == len(calls)
    functions = [launched[4] for launched in gpu.launched]
    assert functions[: len(calls)] == functions[len(calls) :]
    assert len(set(functions)) == len(calls)


def test_devices_and_streams(gpu):
    _, kernel = pair()
    for gpu.device in (0, 1, 0, 1):
        for gpu.stream in (70, 80):
            kernel[(1,)](X, Y, 3, 5, D=16)
    assert [device for _, device in gpu.compiled] == [0, 1]
    assert [x[3] for x in gpu.launched] == [70, 80, 71, 81] * 2
    assert gpu.by_triton == 2


@pytest.mark.parametrize("what", ["enter", "exit", "debug", "instrumentation", "before", "watched"])
def test_triton_launches_where_someone_watches(what, gpu, monkeypatch):
    _, kernel = pair()
    seen = []
    for _ in range(2):
        kernel[(1,)](X, Y, 3, 5, D=16)
    assert gpu.by_triton == 1
    if what == "debug":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    elif what == "instrumentation":
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "consan")
    elif what == "before":
        kernel.add_pre_run_hook(lambda *args, **more: seen.append("before"))
    elif what == "watched":
        plain = jit.KernelInterface.__getitem__

        def item(kernel, grid):
            seen.append("watched")
            return plain(kernel, grid)

        monkeypatch.setattr(jit.KernelInterface, "__getitem__", item)
    else:
        hook = getattr(knobs.runtime, f"launch_{what}_hook")
        monkeypatch.setattr(hook, "calls", [lambda metadata: None])
    kernel[(1,)](X, Y, 3, 5, D=16)
    assert gpu.by_triton == (1 if what == "watched" else 2)
    assert seen == ([what] if what in ("before", "watched") else [])
    assert len(gpu.launched) == 3


def test_what_is_not_plain_is_left_to_triton(gpu, monkeypatch):
    _, kernel = pair()

    def by_triton(times=3, **more):
        before = gpu.by_triton
        for _ in range(times):
            kernel[more.pop("grid", (1,))](*more.pop("args", (X, Y, 3, 5)), D=16, **more)
            more = {**more}
        return gpu.by_triton - before

    assert by_triton() == 1
    assert by_triton() == 0
    kernel[lambda meta: (meta["n"],)](X, Y, 3, 5, D=16)
    assert gpu.by_triton == 2
    assert gpu.launched[-1][0] == 3
    for _ in range(2):
        kernel[(1,)](X, Y, 3, m=5, D=16)
    assert gpu.by_triton == 4
    with pytest.raises(TypeError):
        kernel[(1,)](X, Y, D=16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False, raising=False)
    assert by_triton(2) == 2  # which says that the tensor is on a CPU


def test_scratch_memory_is_left_to_triton(gpu, monkeypatch):
    monkeypatch.setattr(Compiled, "scratch", 64)
    monkeypatch.setattr(CudaLauncher, "__call__", lambda self, *args: None)
    _, kernel = pair()
    for _ in range(3):
        kernel[(1,)](X, Y, 3, 5, D=16)
    assert gpu.by_triton == 3


def test_an_entry_is_still_the_jit_function(gpu):
    plain, kernel = pair()
    assert isinstance(kernel, jit.JITFunction)
    assert inspect.signature(kernel.fn) == inspect.signature(plain.fn)
    kernel.warmup(X, Y, 3, 5, D=16, grid=(1,))
    assert (len(gpu.compiled), gpu.launched) == (1, [])
    other = object()  # as of Triton's interpreter
    assert entry(other) is other


# --- rehearsals -----------------------------------------------------------------------------


def operation(name, gpu, broken=False):
    """An op of two kernels, and two others in its backward; (the op, kernels that were run)."""

    def first(x, y, D: tl.constexpr):
        pass

    def second(x, y, D: tl.constexpr):
        pass

    def third(x, y, D: tl.constexpr):
        pass

    def fourth(x, y, D: tl.constexpr):
        pass

    made = [entry(triton.jit(f)) for f in (first, second, third, fourth)]

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        made[0][(1,)](x, y, D=1)
        made[1][(1,)](x, y, D=1)
        return y

    def backward(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        dx = torch.empty_like(x)
        if broken:
            raise ValueError("a broken backward")
        made[2][(1,)](dy, dx, D=1)
        made[3][(1,)](dy, dx, D=1)
        return dx

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    return kernel_op(
        name, forward, torch.empty_like, keep, backward, lambda x, dy: torch.empty_like(x),
        lambda ctx, run, dy: run(*ctx.saved_tensors, dy),
    )  # fmt: skip


@pytest.fixture
def together(gpu, monkeypatch):
    """Compiles wait for each other, until as many are under way as the test says."""
    plain, meet = jit.JITFunction._do_compile, {}

    def compile_(*args):
        if "barrier" in meet:
            meet["barrier"].wait(20)
        return plain(*args)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return meet


def test_the_kernels_of_an_op_compile_together(gpu, together):
    op = operation("rehearsed", gpu)
    together["barrier"] = threading.Barrier(4)
    x = X.clone().requires_grad_()
    y = op(x)
    assert {name for name, _ in gpu.compiled} == {"first", "second", "third", "fourth"}
    assert len(gpu.compiled) == 4
    assert len(gpu.launched) == 2  # a rehearsal launches nothing
    y.sum().backward()
    assert (len(gpu.compiled), len(gpu.launched)) == (4, 4)
    by_triton = gpu.by_triton
    op(x).sum().backward()
    assert (len(gpu.launched), gpu.by_triton) == (8, by_triton)


def test_without_gradients_no_backward_is_compiled(gpu, together):
    op = operation("rehearsed_forward", gpu)
    together["barrier"] = threading.Barrier(2)
    op(X)
    assert {name for name, _ in gpu.compiled} == {"first", "second"}


def test_a_capture_is_not_rehearsed(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    op = operation("captured", gpu)
    op(X.clone().requires_grad_())
    assert [name for name, _ in gpu.compiled] == ["first", "second"]


def test_what_fails_in_a_rehearsal_fails_where_it_is_called(gpu, monkeypatch):
    op = operation("broken", gpu, broken=True)
    with pytest.warns(UserWarning, match="one after the other: ValueError: a broken backward"):
        y = op(X.clone().requires_grad_())
    with pytest.raises(ValueError, match="a broken backward"):
        y.sum().backward()
    plain = jit.JITFunction._do_compile

    def compile_(kernel, *more):
        if kernel.fn.__name__ == "second":
            raise ValueError("does not compile")
        return plain(kernel, *more)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_)
    op = operation("uncompilable", gpu)
    with pytest.raises(ValueError, match="does not compile"):
        op(X.clone().requires_grad_())
    assert [name for name, _ in gpu.compiled].count("first") == 2  # of both ops


def test_others_launch_while_a_thread_rehearses(gpu, together):
    """The same kernel: one thread rehearses it, another launches it."""
    op = operation("two_threads", gpu)
    op(X)  # known
    gpu.launched.clear()
    here, go_on = threading.Event(), threading.Event()
    from longscan.ops import _rehearsal

    def wait():
        here.set()
        assert go_on.wait(20)
        op(X)  # of the rehearsal: nothing is launched

    def rehearse():
        _rehearsal.here.call = wait
        _rehearsal.rehearse()

    thread = threading.Thread(target=rehearse)
    thread.start()
    assert here.wait(20)
    op(X)
    assert len(gpu.launched) == 2
    go_on.set()
    thread.join()
    assert len(gpu.launched) == 2
    op(X)
    assert len(gpu.launched) == 4


# slstm's backward has a product that only a GPU can do; norm is of one kernel each way.
@pytest.mark.parametrize(
    "kernel", ["conv", "decay", "decay_keys", "delta", "delta_keys", "mlstm", "selective"]
)
def test_a_rehearsal_compiles_what_training_launches(kernel, gpu, monkeypatch):
    """All kernels of the op's forward and backward, once each, before the first of them runs."""
    from longscan.proof import cases, direct
    from longscan.proof.kernels import KERNELS

    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    plain, launches = jit.JITFunction._do_compile, []

    def compile_(*args):
        launches.append(len(gpu.launched))  # before this kernel was there
        return plain(*args)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_)
    module = KERNELS[kernel].module or kernel
    for k in kernels(module).values():  # as in a new process
        monkeypatch.setattr(k, "device_caches", type(k.device_caches)(k.create_binder))
        monkeypatch.setattr(k, "_forms", {})
        monkeypatch.setattr(k, "_go", partial(_launch._other, k, None))
    how, arguments = KERNELS[kernel], {}
    make = next(c for c in cases(kernel) if c.name == "T=150").make
    for name, x in make(torch.Generator().manual_seed(0)).items():
        wide = name.split(".")[0] in (*how.wide, *how.gates)
        parts = tuple(
            t.to(torch.float32 if wide else torch.bfloat16).requires_grad_()
            if isinstance(t, torch.Tensor) and t.is_floating_point()
            else t
            for t in (x if isinstance(x, tuple) else (x,))
        )
        arguments[name] = parts if isinstance(x, tuple) else parts[0]
    for first in (True, False):
        o, _ = how.run(arguments, direct(kernel))
        o.float().sum().backward()
        if first:
            assert len(gpu.launched) > len(launches) - 1 > 0
            assert set(launches) == {0}
            by_triton = gpu.by_triton
    assert gpu.by_triton == by_triton  # all are remembered
