"""longscan doctor: what is installed here, which precision to use, and what would run."""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import time
from importlib import metadata
from pathlib import Path

import torch

from longscan import __version__


def devices() -> list[torch.device]:
    """The CPU and every accelerator that torch can use here."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def cpu_name() -> str:
    """The processor's model in words: Linux's, or else the platform's own."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
    if device.type == "mps":
        return f"Apple GPU ({platform.processor()})"
    vector = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads used, {vector}"


def matmul_seconds(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Median time of the three n x n products of a linear layer's training step."""
    x = torch.ones(n, n, device=device, dtype=dtype)
    w = torch.ones(n, n, device=device, dtype=dtype)

    def once() -> float:
        began = time.perf_counter()
        y = x @ w.T
        # Reading a number back waits for the device.
        ((y @ w)[0, 0] + (y.T @ x)[0, 0]).item()
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(5))


def dtype_advice(device: torch.device) -> str:
    """Which precision to train with on a device, by a measurement of both."""
    n = 256 if device.type == "cpu" else 4096
    ratio = matmul_seconds(device, torch.float32, n) / matmul_seconds(device, torch.bfloat16, n)
    how = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
    best = "bf16-mixed" if ratio > 1.5 else "32-true"
    default = "bf16-mixed" if device.type == "cuda" else "32-true"
    advice = f"train in {best}, the default here"
    if best != default:
        advice = f"--trainer.precision {best} may be faster than the default {default}"
    return f"{advice}: {n} x {n} matrix products are {how} in bfloat16 than in float32"


def extras() -> dict[str, dict[str, str | None]]:
    """The packages of every extra of longscan, with the version installed or None."""
    found: dict[str, dict[str, str | None]] = {}
    try:
        requirements = metadata.requires("longscan") or []
    except metadata.PackageNotFoundError:  # run from its source, without an installation
        requirements = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if match:
            package, extra = match.groups()
            try:
                version = metadata.version(package)
            except metadata.PackageNotFoundError:
                version = None
            found.setdefault(extra, {})[package] = version
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(argv: list[str] | None = None) -> int:
    """Print the report."""
    argparse.ArgumentParser(
        prog="longscan doctor",
        description="Print versions, devices, advice on precision, installed extras, and for "
        "every op the backend that would run on each device and why.",
    ).parse_args(argv)
    from longscan.ops.dispatch import OPS, backend_of

    print(f"longscan {__version__}, Python {platform.python_version()}, {platform.platform()}")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    print(f"torch {torch.__version__} ({cuda}), triton {_version('triton')}")
    for package in ("numpy", "safetensors"):
        print(f"{package} {_version(package)}")

    print("\nextras")
    found = extras()
    if not found:
        print("  unknown: longscan is not installed as a package here")
    for extra, packages in found.items():
        missing = [p for p, v in packages.items() if v is None]
        state = "complete" if not missing else f"missing {', '.join(missing)}"
        hint = "" if not missing else f" -> pip install 'longscan[{extra}]'"
        print(f"  {extra:6} {state}{hint}")

    for device in devices():
        print(f"\n{device}: {describe(device)}")
        print(f"  {dtype_advice(device)}")
        x = torch.zeros(1, 1, 1, 1, device=device)
        for op in OPS:
            backend = backend_of(op, x)
            print(f"  {op:10} {backend.name:10} {backend.reason}")
    if len(devices()) == 1:
        print("\nno accelerator found: everything runs on the CPU")
    return 0
