"""Processes that stand for the ranks of a group: started once, given one task after another.

A task is a function of a module in this folder: `ranks.run(task, *args)` calls
`task(group, *args)` on every rank and returns what each gave. Groups are gloo's; tensors go
through pipes as bytes.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["longscan", "longscan.models.language_model", "longscan.parallel", "pytest"]


class RankFailed(AssertionError):
    """A task raised on some ranks."""


class Lost:
    """What `run` returns for a rank whose process ended."""


class Ranks:
    """`size` processes in one gloo group, and groups of the first of them.

    timeout: seconds that a rank waits for another, `patience` that `run` waits for all.
    """

    def __init__(self, size: int, timeout: float = 30.0) -> None:
        self.size, self.timeout, self.patience = size, timeout, 4 * timeout
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._busy: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def _open(self) -> None:
        # Forked from a server that has imported all modules, so that starting takes no time.
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{self._folder.name}/store"
        for rank in range(self.size):
            here, there = context.Pipe()
            args = (there, rank, self.size, store, self.timeout)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def start(self, task: Callable, *args: Any, size: int | None = None) -> None:
        """Begin task(group, *args) on the first `size` ranks."""
        if self._busy:  # nobody asked for the results of the task before
            self.close()
        if not self._processes:
            self._open()
        self._busy = self._pipes[: size or self.size]
        for pipe in self._busy:
            pipe.send_bytes(pickle.dumps((task, size or self.size, args)))

    def results(self, *, allow_lost: bool = False, without: Container[int] = ()) -> list[Any]:
        """What the task gave on each rank, but those that are not to be waited for.

        Raises: RankFailed with the first cause if it raised somewhere; then, or if a process
        ended, all processes are replaced at the next `start`.
        """
        out, problems = [], []
        busy, self._busy = self._busy, []
        for rank, pipe in enumerate(busy):
            if rank in without:
                continue
            try:
                if not pipe.poll(self.patience):
                    problems.append((False, f"rank {rank} did not come back"))
                    continue
                ok, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                ok, value = allow_lost, Lost() if allow_lost else (False, f"rank {rank} ended")
            if ok:
                out.append(value)
            else:
                problems.append(value)
        if problems:
            self.close()
            # A rank that only missed another says less than the one that failed first.
            problems.sort(key=lambda x: not x[0])
            raise RankFailed(problems[0][1])
        return out

    def run(self, task: Callable, *args: Any, size: int | None = None) -> list[Any]:
        """`start` and `results`."""
        self.start(task, *args, size=size)
        return self.results()

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._busy, self._folder = [], [], [], None


def _serve(pipe: connection.Connection, rank: int, size: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=wait)
    groups = {size: dist.group.WORLD}
    for n in range(1, size):
        groups[n] = dist.new_group(list(range(n)), timeout=wait)
    while True:
        try:
            task, n, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answer = True, task(groups[n], *args)
        except BaseException as problem:
            first = "an exchange with other ranks" not in str(problem)
            answer = False, (first, f"rank {rank} of {n}:\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(answer))


@contextmanager
def fresh(size: int, timeout: float) -> Iterator[Ranks]:
    """Ranks of one's own, for tasks that they do not survive."""
    ranks = Ranks(size, timeout)
    try:
        yield ranks
    finally:
        ranks.close()
