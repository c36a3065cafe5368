"""Time two calls side by side, and the memory that one call needs."""

from __future__ import annotations

import ctypes
import importlib
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Times of repeated calls, in milliseconds."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def __str__(self) -> str:
        if len(self.ms) == 1:
            return f"{digits(self.median)} x1"
        spread = f"{digits(min(self.ms))}-{digits(max(self.ms))}"
        return f"{digits(self.median)} ({spread}) x{len(self.ms)}"


def digits(x: float) -> str:
    """Three significant digits, without an exponent."""
    if x == 0:
        return "0"
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"


Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def elapsed_ms(call: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """How long one call takes."""
    began = clock()
    call()
    return 1e3 * (clock() - began)


def interleave(
    calls: Sequence[Callable[[], Any]],
    *,
    seconds: float,
    least: int = 3,
    most: int = 50,
    clock: Clock = time.perf_counter,
) -> list[Timing]:
    """Call each in turn, round after round, so that a busy machine slows all of them alike.

    Rounds stop after `seconds`, but there are at least `least` and at most `most`; every second
    round runs in the opposite order. Warm the calls up first.
    """
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for i in range(most):
        if i >= least and time.perf_counter() - began > seconds:
            break
        order = list(zip(calls, times, strict=True))
        for call, kept in order if i % 2 == 0 else reversed(order):
            kept.append(elapsed_ms(call, clock))
    return [Timing(tuple(kept)) for kept in times]


# ---------------------------------------------------------------------------------------------
# Memory: how far the resident memory of a fresh process rises during one call.

_RESET = "/proc/self/clear_refs"


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith(field + ":"):
                return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def method() -> str:
    """How peaks are read here: exactly on Linux, elsewhere from the whole life of the process."""
    return "VmHWM" if os.access(_RESET, os.W_OK) else "ru_maxrss"


def _resident() -> int:
    if method() == "VmHWM":
        return _status("VmRSS")
    return _psutil().Process().memory_info().rss


def _psutil() -> Any:
    return importlib.import_module("psutil")  # of the extra "bench"; not needed on Linux


def _peak() -> int:
    if method() == "VmHWM":
        return _status("VmHWM")
    if sys.platform == "win32":
        return _psutil().Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _settle() -> None:
    """Give freed memory back and start the peak anew, where the system can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
    if method() == "VmHWM":
        with open(_RESET, "w", encoding="ascii") as f:
            f.write("5")


def peak_growth(setup: Callable[[], Any], call: Callable[[Any], Any]) -> float:
    """MiB by which the process at its peak in `call(held)` exceeds what it was before `setup`.

    What `setup` returns stays alive and counts; what it uses in passing does not.
    """
    _settle()
    before = _resident()
    held = setup()
    _settle()
    call(held)
    return max(0, _peak() - before) / 2**20


Job = Callable[..., tuple[Callable[[], Any], Callable[[Any], Any]]]


def _run(job: Job, args: tuple) -> float:
    return peak_growth(*job(*args))


class Children:
    """Fresh processes to measure memory in.

    A job is an importable function that prepares and returns `(setup, call)` for `peak_growth`.
    Modules named in `preload` are imported once in a server that every child is forked from.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: BaseContext = multiprocessing.get_context(kind)
        if kind == "forkserver":
            from multiprocessing import forkserver

            self._context.set_forkserver_preload(list(preload))
            # Blocks above 64 KiB go back to the system as soon as they are freed, so that
            # resident memory is what is alive, not what the allocator keeps for later.
            with _environment("MALLOC_MMAP_THRESHOLD_", "65536"):
                forkserver.ensure_running()

    def peak_growth(self, job: Job, *args: Any, repetitions: int = 1) -> float:
        """Median over fresh processes of `peak_growth` of what job(*args) returns, in MiB."""
        found = []
        for _ in range(repetitions):
            with ProcessPoolExecutor(1, mp_context=self._context) as pool:
                found.append(pool.submit(_run, job, args).result())
        return statistics.median(found)


class _environment:
    """An environment variable that is set for a while, unless the user has set it."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def __enter__(self) -> None:
        self.mine = self.name not in os.environ
        os.environ.setdefault(self.name, self.value)

    def __exit__(self, *_: Any) -> None:
        if self.mine:
            del os.environ[self.name]
