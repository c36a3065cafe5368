"""One case of one kernel against the float64 form of its op: outputs, states, all gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longscan.proof.case import Case
from longscan.proof.guard import Guard
from longscan.proof.kernels import KERNELS, Kernel, Run, direct, public
from longscan.proof.launches import Launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 2e-5}
"""Largest difference from float64 over the largest entry; for any length."""


def prove(
    kernel: str,
    case: Case,
    dtype: str,
    device: str = "cuda",
    run: Run | None = None,
) -> dict[str, float]:
    """Errors of a kernel on a case, by the names of what was compared.

    Both sides read the same numbers, rounded to the dtype. The kernel runs twice, in memory that
    held NaN before and then in memory that held a number, with watched memory around everything.
    run: what is called instead of the op with backend="triton", with the arguments of the op.
    Returns: for outputs, states ("state") and gradients ("dq" of q) the largest difference over
    the largest entry; infinite for NaN, another shape or dtype. And 0 or infinite: "repeat",
    whether both runs agreed bit by bit; "bounds", whether nothing was written beside the tensors;
    "kernel", whether kernels ran forward and backward at all (without `run` only).
    """
    how = KERNELS[kernel]
    inputs = _rounded(how, case, DTYPES[dtype], device)
    wanted = _both_ways(how, inputs, public(kernel, "torch"), case, None)
    if run is None:
        direct(kernel)  # imports the launcher, whose tables are watched
    launches = Launches()
    found, intact = [], True
    for value in (math.nan, 12345.0):
        guard = Guard(value, bands=case.copies == 1)
        with launches.watched():
            got = _both_ways(how, inputs, run or public(kernel, "triton"), case, guard)
        found.append(got)
        intact &= guard.intact()
    errors = {
        name: error(found[0].get(name), want, _dtype(how, case, name, DTYPES[dtype]), case.floor)
        for name, want in wanted.items()
    }
    same = all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    errors["repeat"] = 0.0 if same else math.inf
    errors["bounds"] = 0.0 if intact else math.inf
    if run is None:
        ran = launches.count >= 4 or case.optional  # a forward and a backward, twice
        errors["kernel"] = 0.0 if ran else math.inf
    return errors


def run_once(kernel: str, case: Case, dtype: str, device: str, run: Run) -> None:
    """Forward and backward of a case, compared with nothing."""
    how = KERNELS[kernel]
    _both_ways(how, _rounded(how, case, DTYPES[dtype], device), run, case, Guard())


def limit(kernel: str, case: Case, dtype: str, device: str = "cuda", error: float = 0.0) -> float:
    """The largest error allowed on a case, where one of size `error` was found.

    In float32 a kernel may be as far from float64 as the op's own float32 form, twice that at
    most: some cases lose digits whoever computes them, as cumulative sums over erasing gates do.
    """
    if dtype != "fp32" or not LIMITS[dtype] < error < 1e-2:
        return LIMITS[dtype]
    own = prove(kernel, case, dtype, device, public(kernel, "torch"))
    return max(LIMITS[dtype], 2 * worst(own)[1])


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """What is most wrong."""
    return max(errors.items(), key=lambda item: item[1])


def error(got: Tensor | None, want: Tensor, dtype: torch.dtype | None, floor: float = 0.0) -> float:
    """Largest difference over the largest entry, at least `floor`; infinite for what is no number,
    not there, or of another shape or dtype."""
    if got is None or got.shape != want.shape or (dtype is not None and got.dtype != dtype):
        return math.inf
    if not bool(got.isfinite().all()):
        return math.inf
    gap = (got.double() - want).abs().amax().item()
    return gap / max(want.abs().amax().item(), floor, 1e-30)


def flat(x: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, those of a tuple numbered; nothing for None."""
    out: dict[str, Tensor] = {}
    for name, value in x.items():
        if isinstance(value, tuple):
            out |= {f"{name}.{i}": t for i, t in enumerate(value)}
        elif isinstance(value, Tensor):
            out[name] = value
    return out


def _kind(how: Kernel, case: Case, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an argument."""
    name = name.split(".")[0]
    return torch.float32 if name in how.wide or (name in how.gates and not case.low) else dtype


def _dtype(how: Kernel, case: Case, name: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a result or gradient; None where the op leaves it open."""
    if name.startswith("d "):
        return _kind(how, case, name[2:], dtype)
    if name == "o":
        return torch.float32 if "o" in how.wide else dtype
    return torch.float32 if "state" in how.wide else None


def _rounded(how: Kernel, case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The arguments of a case on the device, in the dtypes that the kernel gets."""

    def place(name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(place(name, t) for t in x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x.to(device) if isinstance(x, Tensor) else x
        return x.to(_kind(how, case, name, dtype)).to(device)

    return {name: place(name, x) for name, x in case.arguments().items()}


def _both_ways(
    how: Kernel, inputs: Mapping[str, Any], run: Run, case: Case, guard: Guard | None
) -> dict[str, Tensor]:
    """Results and gradients of a call, those in float64 if there is no guard.

    Of a repeated batch the last copy is kept: numbers beyond 2^31 lie there.
    """

    def leaf(name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(leaf(name, t) for t in x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if guard is None:
            return x.double().requires_grad_()
        if case.copies > 1 and name not in how.shared:
            x = x.repeat(case.copies, *[1] * (x.ndim - 1))
        if case.strided and x.ndim > 1:
            wide = guard.like(torch.empty(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype,
                                          device=x.device))  # fmt: skip
            return wide[..., : x.shape[-1]].copy_(x).detach().requires_grad_()
        return guard.hold(x).detach().requires_grad_()

    arguments = {name: leaf(name, x) for name, x in inputs.items()}
    leaves = {n: x for n, x in flat(arguments).items() if x.requires_grad}

    def call() -> dict[str, Tensor]:
        o, state = how.run(arguments, run)
        results = flat({"o": o, "state": state})
        generator = torch.Generator().manual_seed(1)
        read, weights = [], []
        for name, x in results.items():
            shape = (x.shape[0] // (case.copies if guard else 1), *x.shape[1:])
            # The same numbers in both precisions: those of the narrowest.
            w = torch.randn(shape, generator=generator).bfloat16().to(x)
            if guard and case.copies > 1:
                w = w.repeat(case.copies, *[1] * (x.ndim - 1))
            if name == "o" or case.final:
                read.append(x)
                weights.append(w)
        grads = torch.autograd.grad(
            read, list(leaves.values()), weights, allow_unused=True, materialize_grads=True
        )
        return {n: x.detach() for n, x in results.items()} | {
            f"d {n}": g for n, g in zip(leaves, grads, strict=True)
        }

    if guard is None:
        return call()
    with guard.allocations():
        found = call()
    if case.copies > 1:
        for name, x in found.items():
            if name.removeprefix("d ").split(".")[0] in how.shared:
                found[name] = x / case.copies
            else:
                found[name] = x[-(x.shape[0] // case.copies) :].clone()
    return found
