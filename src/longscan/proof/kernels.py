"""The kernels that are proved: what each is called with, and what it must compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._check import widen
from longscan.ops._conv_fused import conv_parts
from longscan.ops._projection_fused import projection_fused
from longscan.ops.conv import conv
from longscan.ops.loss import linear_cross_entropy
from longscan.ops.selective import selective
from longscan.proof import elementwise

Run = Callable[..., tuple]


@dataclass(frozen=True)
class Kernel:
    """How a kernel is called: the op, in which order, and what its arguments are.

    gates: of float32, or of the dtype of the values where a case says so; wide: float32 always;
    shared: without a batch axis. module: of the launcher; options: of the launcher alone;
    plain: what the launcher with these options computes, where that is no op; launch: what runs
    the kernel, where no launcher has these arguments.
    """

    op: str
    positional: tuple[str, ...]
    gates: tuple[str, ...] = ()
    wide: tuple[str, ...] = ("state",)
    shared: tuple[str, ...] = ()
    module: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    plain: Run | None = None
    launch: Run | None = None

    def run(self, arguments: Mapping[str, Any], function: Run) -> tuple:
        """Call an op, or what has its arguments."""
        first = [arguments[n] for n in self.positional]
        more = {n: x for n, x in arguments.items() if n not in self.positional}
        return function(*first, **more)


def _mamba(
    u: Tensor, dt: Tensor, *args: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, **more: Any
):
    y, end = selective(u, F.softplus(dt + dt_bias), *args, **more, backend="torch")
    return ((y + D * u) * F.silu(z)).to(u.dtype), end


def _conv_silu(*args: Any, **more: Any) -> tuple:
    y, end = conv(*args, **more, backend="torch")
    return F.silu(y), end


def _conv_parts(*args: Any, sizes: list[int], unit: int, **more: Any) -> tuple:
    y, end = _conv_silu(*args, **more)
    return _unit(y, sizes, unit), end


def _unit(y: Tensor, sizes: list[int], unit: int) -> Tensor:
    """Heads of `unit` channels in the first two parts scaled to length."""
    if not unit:
        return y
    q, k, *rest = y.split(sizes, -1)
    q, k = (
        (x * length / (x.square().sum(-1, True) + 1e-6).sqrt()).flatten(-2)
        for x, length in (
            (q.unflatten(-1, (-1, unit)), unit**-0.5),
            (k.unflatten(-1, (-1, unit)), 1),
        )
    )
    return torch.cat([q, k, *rest], -1)


def _conv_parts_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, sizes: list[int], **more: Any
) -> tuple:
    ys, end = conv_parts(x, weight, bias, sizes, **more, silu=True)
    return torch.cat(ys, -1), end


def _projection(
    x: Tensor, weight: Tensor, taps: Tensor, bias: Tensor | None, *, sizes: list[int], at: int,
    inner: list[int], unit: int, **more: Any,
) -> tuple:  # fmt: skip
    parts = list((x @ weight.mT).split(sizes, -1))
    y, end = _conv_silu(parts.pop(at), taps, bias, **more)
    return torch.cat([_unit(y, inner, unit), *parts], -1), end


def _projection_launch(*args: Any, **more: Any) -> tuple:
    ys, end, parts = projection_fused(*args, **more)
    return torch.cat([*ys, *parts], -1), end


def _gates(b: Tensor | None, a: Tensor, a_log: Tensor, dt_bias: Tensor, *, scale: float) -> tuple:
    dt = F.softplus(widen(a) + dt_bias)
    return dt if b is None else widen(b).sigmoid() * scale, -a_log.exp() * dt


def _norm(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    n_groups: int = 1,
    activation: str | None = None,
    gate_first: bool = False,
) -> tuple:
    dtype, x = x.dtype, widen(x)
    act = {None: lambda t: t, "sigmoid": torch.sigmoid, "silu": F.silu}[activation]
    y = x * act(gate) if gate is not None and gate_first else x
    parts = y.unflatten(-1, (n_groups, -1))
    parts = parts * (parts.square().mean(-1, True) + eps).rsqrt() * scale
    y = parts.flatten(-2)
    y = y if weight is None else y * weight
    y = y if gate is None or gate_first else y * act(gate)
    return y.to(dtype), None


def _loss(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    n_classes: int | None = None,
    logit_cap: float | None = None,
    chunk: int | None = None,
) -> tuple:
    z = widen(h) @ widen(weight).T[:, :n_classes]
    z = z if logit_cap is None else logit_cap * (z / logit_cap).tanh()
    losses = F.cross_entropy(z, targets, reduction="none")
    if reduction == "none":
        return losses, None
    count = (targets >= 0).sum().clamp(min=1) if reduction == "mean" else 1
    return (losses.sum() / count).reshape(1), None


def _loss_launch(*args: Any, **more: Any) -> tuple:
    return linear_cross_entropy(*args, **more).reshape(-1), None


KERNELS = {
    "decay": Kernel(
        "decay", ("q", "k", "v", "log_a"), ("log_a",), wide=("state", "scale", "skip"),
        shared=("skip",),
    ),
    "decay_keys": Kernel("decay", ("q", "k", "v", "log_a"), ("log_a",)),
    "delta": Kernel("delta", ("q", "k", "v", "beta", "log_a"), ("beta", "log_a")),
    "delta_keys": Kernel("delta", ("q", "k", "v", "beta", "log_a"), ("beta", "log_a")),
    "selective": Kernel(
        "selective", ("u", "dt", "A", "B", "C"), ("dt",), wide=("state", "A"), shared=("A",)
    ),
    "selective_mamba": Kernel(
        "selective", ("u", "dt", "A", "B", "C"), ("dt",), wide=("state", "A", "D", "dt_bias"),
        shared=("A", "D", "dt_bias"), module="selective", options={"softplus": True}, plain=_mamba,
    ),
    "mlstm": Kernel("mlstm", ("q", "k", "v", "i", "f"), ("i", "f")),
    "slstm": Kernel(
        "slstm", ("gates", "r", "bias"), wide=("state", "r", "bias"), shared=("r", "bias")
    ),
    "conv": Kernel(
        "conv", ("x", "weight", "bias"), ("weight", "bias"), wide=(), shared=("weight", "bias")
    ),
    "conv_silu": Kernel(
        "conv", ("x", "weight", "bias"), ("weight", "bias"), wide=(), shared=("weight", "bias"),
        module="conv", options={"silu": True}, plain=_conv_silu,
    ),
    "conv_parts": Kernel(
        "conv", ("x", "weight", "bias"), ("weight", "bias"), wide=(),
        shared=("weight", "bias"), module="conv", plain=_conv_parts, launch=_conv_parts_launch,
    ),
    "projection": Kernel(
        "conv", ("x", "weight", "taps", "bias"), ("taps", "bias"), wide=(),
        shared=("weight", "taps", "bias"), module="conv", plain=_projection,
        launch=_projection_launch,
    ),
    "gates": Kernel(
        "delta", ("b", "a", "a_log", "dt_bias"), wide=("o", "state", "a_log", "dt_bias"),
        shared=("a_log", "dt_bias"), module="gates", plain=_gates,
    ),
    "norm": Kernel(
        "norm", ("x", "weight", "gate"), ("weight",), wide=(), shared=("weight",), module="norm",
        plain=_norm,
    ),
    "add_norm": Kernel(
        "norm", ("x", "branch", "weight"), ("x", "weight"), wide=(), shared=("weight",),
        plain=elementwise.plain_add_norm, module="add_norm",
    ),
    "glu": Kernel(
        "glu", ("x",), wide=(), plain=elementwise.plain_glu, launch=elementwise.launch_glu,
    ),
    "rotary": Kernel(
        "rotary", ("x", "q_weight", "k_weight"), ("q_weight", "k_weight"), wide=(),
        shared=("q_weight", "k_weight"), plain=elementwise.plain_rotary,
        launch=elementwise.launch_rotary,
    ),
    "loss": Kernel(
        "loss", ("h", "weight", "targets"), wide=("o",), shared=("weight",), plain=_loss,
        launch=_loss_launch,
    ),
}  # fmt: skip


def public(kernel: str, backend: str) -> Run:
    """The op itself, by one of its backends."""
    how = KERNELS[kernel]
    if how.plain is not None:
        return direct(kernel) if backend == "triton" else how.plain
    function = getattr(import_module(f"longscan.ops.{how.op}"), how.op)

    def run(*args: Any, **more: Any) -> tuple:
        try:
            return function(*args, **more, backend=backend)
        except ValueError as problem:
            if "does not compute" in str(problem):
                raise UnfitError(str(problem)) from None
            raise

    return run


class UnfitError(ValueError):
    """A kernel does not compute this case; its op then does without it."""


def direct(kernel: str) -> Run:
    """The kernel's launcher, which the op calls where it fits; else an UnfitError is raised."""
    how = KERNELS[kernel]
    launcher = how.module or kernel
    module = import_module(f"longscan.ops._{launcher}_fused")
    if how.launch is not None:
        return how.launch
    fused, fits = (getattr(module, f"{launcher}_{name}") for name in ("fused", "fits"))

    def run(*args: Any, **more: Any) -> tuple:
        given = dict(zip(how.positional, args, strict=True)) | more
        read = inspect.signature(fits).parameters
        if not fits(**{n: x for n, x in given.items() if n in read}):
            raise UnfitError(f"{kernel}_fits says no")
        found = fused(*args, **more, **how.options)
        return found if isinstance(found, tuple) else (found, None)

    return run
