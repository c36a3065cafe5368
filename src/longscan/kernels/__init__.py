"""GPU kernels in Triton: one file per op, imported only where they run.

Triton 3.6 assembles for Hopper with the ptxas of CUDA 12.8, which breaks several of these kernels
(wrong numbers, illegal addresses), found on an H100: the same kernels are right with the ptxas of
CUDA 13.0, without its optimisations, or with the instructions of sm_80. Triton's wheel brings that
of 12.9 as well, for Blackwell; it is used here unless TRITON_PTXAS_PATH names another.
"""

from __future__ import annotations

import os

OLDEST = (12, 9)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _choose_assembler() -> None:
    """Raises: RuntimeError if there is only one that is too old."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    from triton import knobs

    tools = knobs.nvidia
    if _release(tools.ptxas.version) >= OLDEST:
        return
    newer = getattr(tools, "ptxas_blackwell", None)
    chosen = os.environ.get("TRITON_PTXAS_PATH")
    if chosen or newer is None or _release(newer.version) < OLDEST:
        raise RuntimeError(
            f"{tools.ptxas.path} is of CUDA {tools.ptxas.version}, which breaks kernels; "
            + ("unset TRITON_PTXAS_PATH" if chosen else "set TRITON_PTXAS_PATH to a ptxas of 12.9")
            + " or newer, or set LONGSCAN_BACKEND=torch"
        )
    tools.ptxas = newer.path


_choose_assembler()
