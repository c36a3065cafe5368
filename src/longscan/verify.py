"""Self-tests of mixers on the machine at hand: causality, cuts, steps, gradients, precision."""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longscan import registry
from longscan.mixers.base import Mixer
from longscan.state import State

# Largest error allowed, relative to the largest entry: two float64 computations of one function,
# and float32 against float64.
SAME, NARROW = 1e-9, 3e-4


class CausalityError(ValueError):
    """An output depends on an input that it must not see.

    t, s: the output and the input; size: of the gradient that should be exactly 0.
    """

    def __init__(self, t: int, s: int, size: float, why: str) -> None:
        super().__init__(
            f"output {t} depends on input {s}, {why}: its gradient is {size:.3g}, not exactly 0"
        )
        self.t, self.s, self.size = t, s, size


@dataclass(frozen=True)
class Causality:
    """What `check_causal` looked at: pairs of an output and an input.

    forbidden: pairs whose gradient had to be 0 and was; seen: of the other pairs, the share whose
    gradient is not 0, which says how far back the outputs look.
    """

    forbidden: int
    seen: float


def check_causal(
    mixer: nn.Module, *, length: int = 80, seed: int = 0, d_model: int | None = None
) -> Causality:
    """Check that no output depends on a later input, nor on another packed sequence.

    For every t and s, the gradient of (a random projection of) output t to input s must be exactly
    zero where s > t, first for one sequence, then for some packed on a row, where it must be zero
    for every s of another sequence too. The mixer is copied, in its own dtype and on its own
    device, and the copy's parameters are moved by noise, so that no path is hidden behind a weight
    that starts at 0.

    mixer: `(x, cu_seqlens=...) -> (y, state)`, with an attribute d_model or the argument.
    length: of the sequences; beyond the chunk of an op (64 at most), so that a cut is crossed.
    Raises: CausalityError with the first pair that fails, by t and then s; ValueError if no output
    depends on any input, so that there is nothing to test.
    """
    d = mixer.d_model if d_model is None else d_model
    mixer = perturbed(mixer, seed)
    weight = next(mixer.parameters())
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    steps = torch.arange(length)
    row, projection = noise(1, length, d), noise(length, d)  # type: ignore[arg-type]
    # One pass for all pairs: row t of a batch of equal rows asks for output t.
    x = row.expand(length, -1, -1).clone().requires_grad_()
    y, _ = mixer(x)
    (g,) = torch.autograd.grad((y[steps, steps] * projection).sum(), x)
    later = steps > steps[:, None]
    alone = _look(g, later, lambda t, s: "which comes later")

    bounds = torch.tensor([0, 1, length // 4, length // 2, length]).unique()
    document = torch.bucketize(steps, bounds[1:], right=True)
    x = row.requires_grad_()
    y, _ = mixer(x, cu_seqlens=bounds.to(weight.device))
    rows = []
    for t in range(length):
        rows += torch.autograd.grad((y[0, t] * projection[t]).sum(), x, retain_graph=True)
    other = document != document[:, None]

    def why(t: int, s: int) -> str:
        return "which is of another packed sequence" if other[t, s] else "which comes later"

    packed = _look(torch.cat(rows), later | other, why)
    forbidden, allowed, seen = (a + b for a, b in zip(alone, packed, strict=True))
    if not seen:
        raise ValueError("no output depends on any input: nothing was tested")
    return Causality(forbidden, seen / allowed)


def _look(g: Tensor, forbidden: Tensor, why: Callable[[int, int], str]) -> tuple[int, int, int]:
    """How many pairs are forbidden, how many allowed, and how many of these have a gradient."""
    size = g.abs().amax(-1).cpu()
    # A NaN is not 0 either.
    wrong = forbidden & (size != 0)
    if wrong.any():
        t, s = (int(i) for i in wrong.nonzero()[0])
        raise CausalityError(t, s, size[t, s].item(), why(t, s))
    n = int(forbidden.sum())
    return n, forbidden.numel() - n, int((size != 0).sum())


def perturbed(module: nn.Module, seed: int = 0, scale: float = 0.1) -> Any:
    """A copy whose parameters are moved off their values by noise, so that none is special.

    It is in evaluation mode: what learns or draws in training is no function of its input alone.
    """
    module = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p))
    return module


# --- the command ----------------------------------------------------------------------------


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest entry of `want`; infinite for NaN or another shape."""
    if got.shape != want.shape or not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    gap = (got.double() - want.double()).abs().max().item()
    return gap / max(want.double().abs().max().item(), 1e-30)


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest `error` of the pairs."""
    return max(error(a, b) for a, b in zip(got, want, strict=True))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run all ops by one backend."""
    before = os.environ.get("LONGSCAN_BACKEND")
    os.environ["LONGSCAN_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["LONGSCAN_BACKEND"]
        if before is not None:
            os.environ["LONGSCAN_BACKEND"] = before


def _leaves(y: Tensor, state: State) -> list[Tensor]:
    return [y, *(t for t in state.flatten().values() if t.is_floating_point())]


def check_split(mixer: Mixer, x: Tensor) -> float:
    """Outputs and state of a sequence in three parts against those of the whole."""
    whole = _leaves(*mixer(x))
    state, ys = None, []
    for part in x.split([1, x.shape[1] // 2, x.shape[1] - 1 - x.shape[1] // 2], 1):
        y, state = mixer(part, state)
        ys.append(y)
    assert state is not None
    return worst(_leaves(torch.cat(ys, 1), state), whole)


def check_steps(mixer: Mixer, x: Tensor) -> float:
    """Outputs and state of a sequence token by token against those of the whole."""
    whole = _leaves(*mixer(x))
    state, ys = None, []
    for token in x.split(1, 1):
        y, state = mixer(token, state)
        ys.append(y)
    assert state is not None
    return worst(_leaves(torch.cat(ys, 1), state), whole)


def check_gradients(mixer: Mixer, x: Tensor) -> float:
    """Outputs, state and all gradients of the backend in use against the definition's."""
    found = []
    with torch.no_grad():
        _, warm = mixer(x)
    for way in (backend("reference"), nullcontext()):
        u = x.clone().requires_grad_()
        state = warm.map(lambda t: t.clone().requires_grad_(t.is_floating_point()))
        with way:
            outs = _leaves(*mixer(u, state))
        generator = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outs)
        inputs = [*_leaves(u, state), *mixer.parameters()]
        grads = torch.autograd.grad(loss, inputs, materialize_grads=True)  # type: ignore[arg-type]
        found.append([*outs, *grads])
    return worst(found[1], found[0])


def check_float32(mixer: Mixer, x: Tensor) -> float:
    """float32 outputs against float64 ones."""
    narrow = copy.deepcopy(mixer).float()
    return error(narrow(x.float())[0], mixer(x)[0])


CHECKS: dict[str, tuple[Callable[[Mixer, Tensor], float], float]] = {
    "split": (check_split, SAME),
    "steps": (check_steps, SAME),
    "gradients": (check_gradients, SAME),
    "float32": (check_float32, NARROW),
}


def verify(
    name: str, *, device: str = "cpu", d_model: int = 32, length: int = 80, seed: int = 0
) -> tuple[dict[str, str], bool]:
    """All checks of a mixer: what each found, in words, and whether all passed."""
    torch.manual_seed(seed)
    mixer = registry.mixer_class(name)(d_model).to(device)
    found, passed = {}, True
    try:
        check_causal(mixer, length=length, seed=seed)
        found["causal"] = "yes"
    except CausalityError as problem:
        found["causal"], passed = str(problem), False
    mixer = perturbed(mixer, seed).double()
    x = torch.randn(2, length, d_model, generator=torch.Generator().manual_seed(seed)).to(
        device, torch.float64
    )
    for check, (run, limit) in CHECKS.items():
        size = run(mixer, x)
        found[check] = f"{size:.0e}" + ("" if size <= limit else f" > {limit:.0e}")
        passed &= size <= limit
    return found, passed


def main(argv: list[str]) -> int:
    """longscan verify"""
    if any(a in ("--op", "--ops") or a.startswith("--op=") for a in argv):
        return importlib.import_module("longscan.proof.command").main(argv)
    parser = argparse.ArgumentParser(
        prog="longscan verify",
        description="Check mixers on this machine: no output sees a later input or another "
        "packed sequence (gradients exactly 0); parts and single steps with a carried state "
        "equal the whole; outputs and all gradients equal those of the definition, in float64; "
        "float32 is near float64. Numbers are largest errors relative to the largest entry. "
        "With --ops, or --op and names, the GPU kernels are checked instead (--ops --help).",
    )
    add = parser.add_argument
    add("mixers", nargs="*", help="names (default: all)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--d-model", type=int, default=32, help="width of the mixers (default: 32)")
    add("--length", type=int, default=80, help="tokens (default: 80)")
    add("--seed", type=int, default=0, help="of parameters and inputs")
    args = parser.parse_args(argv)
    if args.length < 8:
        raise ValueError(f"--length must be at least 8, not {args.length}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; longscan doctor says more")
    names = args.mixers or registry.names()
    width = max(map(len, names))
    columns = ["causal", *CHECKS]
    print(f"{'':{width}}  {'':4}  " + "  ".join(f"{c:>9}" for c in columns) + "  seconds")
    failed = []
    for name in names:
        registry.entry(name)
        began = time.perf_counter()
        found, passed = verify(
            name, device=args.device, d_model=args.d_model, length=args.length, seed=args.seed
        )
        row = "  ".join(f"{found[c]:>9}" for c in columns)
        seconds = time.perf_counter() - began
        print(f"{name:{width}}  {'ok' if passed else 'FAIL':4}  {row}  {seconds:7.1f}", flush=True)
        if not passed:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


__all__ = ["Causality", "CausalityError", "check_causal", "perturbed", "verify"]
