"""All kernels of an op compiled beside each other, at the first call that needs one.

Triton compiles a kernel when it is first launched, one after the other: 20 s for an op of ten. It
holds Python's lock for an eighth of that only, so threads help. When a launch finds no kernel, the
op's call is gone through once more, and its backward if there will be one, in which launches are
noted but not made; then all that were noted compile at once, and the call goes on.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

THREADS = 16


class _Here(threading.local):
    """Of this thread: how to rehearse the op's call under way, and the launches of a rehearsal."""

    call: Callable[[], Any] | None = None
    noted: dict[Any, Callable[[], None]] | None = None


here = _Here()
under_way = 0
"""Whether any thread rehearses; launches then look whether it is theirs."""
one = threading.RLock()
"""Held by the thread that rehearses, or launches a kernel for the first time."""


def rehearse() -> None:
    """Before a launch for which there is no kernel: compile all that the op's call launches.

    Nothing is raised: what fails here fails again where it is needed, and says so there. Whether
    or not it does, it is told, as then kernels compile one after the other.
    """
    global under_way
    call, here.call = here.call, None
    if call is None or torch.cuda.is_current_stream_capturing():
        return
    with one:
        here.noted = noted = {}
        under_way, failed = 1, None
        try:
            call()
        except Exception as error:  # out of memory, mostly
            failed = f"{type(error).__name__}: {error}"
        finally:
            here.noted, under_way = None, 0
        if len(noted) > 1:
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
                for prepare in noted.values():
                    pool.submit(prepare)
    if failed is not None:
        warnings.warn(f"some kernels compile one after the other: {failed}", stacklevel=2)


class Stage:
    """Stands for the context of an autograd function in a rehearsal."""

    saved_tensors: tuple = ()
    materialize = True

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def gradients(self, output: Any) -> list:
        """Of the first output, as in training; of the others none, or zeros where asked for."""
        outputs = output if isinstance(output, tuple) else (output,)
        return [
            torch.empty_like(x) if i == 0 or self.materialize else None
            for i, x in enumerate(outputs)
        ]
