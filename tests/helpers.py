"""Comparing tensors, loading golden vectors; the one table of tolerances."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

# Largest error relative to the largest entry of the reference.
TOLERANCE = {
    "float64": 1e-9,  # two float64 computations of the same function
    "golden64": 1e-9,  # golden vectors computed and stored in float64
    "stored32": 1e-6,  # computed in float64, stored as float32
    "golden32": 1e-4,  # golden vectors computed in float32
    "float32": 3e-4,  # our float32 against a float64 result
    "bfloat16": 2e-2,  # results rounded to bfloat16
}


def golden(name: str) -> dict[str, Tensor]:
    """The tensors of tests/golden/NAME.safetensors."""
    return load_file(str(GOLDEN / f"{name}.safetensors"))


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest entry of `want`."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    scale = want.abs().max().item() if want.numel() else 0.0
    gap = (got.detach().double() - want.double()).abs().max().item() if want.numel() else 0.0
    return gap / max(scale, 1e-30)


def assert_close(got: Tensor, want: Tensor, kind: str, what: str = "") -> None:
    """Fail unless `got` equals `want` within TOLERANCE[kind]."""
    e = error(got, want)
    assert e <= TOLERANCE[kind], f"{what}: relative error {e:.2e} > {TOLERANCE[kind]:.0e} ({kind})"


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last axis."""
    return x / x.norm(dim=-1, keepdim=True)
