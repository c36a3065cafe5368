"""Processes that measure together: started, watched, ended, and begun anew behind what failed.

A row is named before it runs. A rank that fails, dies or takes too long costs that row only: the
group is ended, the row is written down with the reason, and a fresh group goes on behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessException, spawn

Row = dict[str, Any]
"""One result, as plain data: name, part, ranks, device, and either numbers or `why` there are none.
"""
Part = Callable[["Here", str], None]
"""(here, what of it): measures rows on all ranks of a group."""
START = 90.0
"""Seconds that a group may need before its first row."""


@dataclass(frozen=True)
class Job:
    """What one group does: parts as "module:function" of a Part, each with what of it."""

    steps: tuple[tuple[str, str], ...]
    title: str


@dataclass(frozen=True)
class Settings:
    """Of a run. path: of results; run: when it began; end: when no row is begun any more, in
    time.time(); budget: seconds for a row."""

    path: Path
    ranks: int
    gpu: bool
    size: str
    run: str
    end: float
    budget: float

    def row(self, name: str, part: str, **numbers: Any) -> Row:
        """A result with what holds for all of a run."""
        about = {"run": self.run, "ranks": self.ranks, "size": self.size}
        return {"name": name, "part": part, **about, **numbers}


@dataclass
class Here:
    """A rank of a group that measures.

    done: rows that exist, by name, with the reason where they failed; group: for the messages of
    sequences alone; folder: where rank 0 tells how far it is.
    """

    rank: int
    device: torch.device
    settings: Settings
    folder: Path
    done: dict[str, str] = field(default_factory=dict)
    group: dist.ProcessGroup | None = None
    name: str = ""

    @property
    def ranks(self) -> int:
        return self.settings.ranks

    @property
    def size(self) -> str:
        return self.settings.size

    @property
    def late(self) -> bool:
        return time.time() > self.settings.end

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def todo(self, name: str) -> bool:
        """Whether to measure this row now; asked by all ranks in one order."""
        if self.agreed(name in self.done or self.late):
            return False
        self.tell("row", name)
        self.name = name
        return True

    def tell(self, what: str, value: str) -> None:
        """How far this group is, for the process that watches it."""
        if self.rank == 0:
            (self.folder / what).write_text(value, encoding="utf-8")

    def agreed(self, value: float) -> float:
        """What rank 0 says."""
        x = torch.tensor([float(value)], dtype=torch.float64, device=self.device)
        dist.broadcast(x, 0)
        return x.item()

    def worst(self, *values: float) -> list[float]:
        """The largest over ranks of each; what is not a number counts as largest."""
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        x = torch.where(x.isnan(), torch.inf, x)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    def wait(self) -> None:
        """Until all ranks are here, and what they launched is done."""
        if self.gpu:
            torch.cuda.synchronize()
        self.worst(0.0)
        if self.gpu:
            torch.cuda.synchronize()

    def write(self, part: str, **numbers: Any) -> None:
        """Append the row named last, from rank 0."""
        self.done[self.name] = str(numbers.get("why", ""))
        if self.rank == 0:
            numbers["device"] = torch.cuda.get_device_name() if self.gpu else "cpu"
            append(self.settings.path, self.settings.row(self.name, part, **numbers))
        self.tell("row", "")
        self.name = ""


def append(path: Path, row: Row) -> None:
    """Add a line to a file of results."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def read(path: Path) -> dict[str, Row]:
    """Results by name, later ones in place of earlier, but a failure in place of nothing."""
    found: dict[str, Row] = {}
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.split("\n")[:-1]:
        row = json.loads(line)
        if not (row.get("why") and row["name"] in found):
            found[row["name"]] = row
    return found


def of(rows: Sequence[Row], part: str) -> list[Row]:
    """Rows of a part, with numbers."""
    return [r for r in rows if r["part"] == part and not r.get("why")]


def trained(rows: Sequence[Row]) -> list[Row]:
    """Training steps."""
    return of(rows, "training")


def told(row: Row) -> str:
    """A row in a line."""
    words = [f"{row[k]:,.4g} {k}" for k in ("error", "tokens_s", "mib") if k in row]
    if isinstance(row.get("seconds"), float):
        words.append(f"{1e3 * row['seconds']:.4g} ms")
    if row.get("met") is False:
        words.append("NOT met")
    return f"{row['name']}: {row.get('why') or ', '.join(words)}"


def measure(
    jobs: Sequence[Job], settings: Settings, together: int = 1, again: bool = False
) -> Iterator[str]:
    """Run jobs, each in a group of its own, `together` of them at once; what happens, in words.

    again: measure rows too that the file has already.
    """
    path, seen = settings.path, None
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < together and time.time() < settings.end:
                rows = read(path)
                seen = len(rows) if seen is None else seen
                known = {
                    n: r.get("why", "")
                    for n, r in rows.items()
                    if not again or r.get("run") == settings.run
                }
                running.append(_Running(waiting.pop(0), settings, known))
            rows = list(read(path).values())
            yield from map(told, rows[seen:])
            seen = len(rows)
            for group in list(running):
                said = group.poll()
                if said is None:
                    continue
                running.remove(group)
                group.stop()
                yield said
                if group.left is not None and group.left.steps:
                    waiting.insert(0, group.left)
            if waiting and not running and time.time() >= settings.end:
                yield from (f"no time was left for {job.title}" for job in waiting)
                return
            time.sleep(0.1)
    finally:
        for group in running:
            group.stop()


class _Running:
    """A group at work. left: what another has to do behind it, if it failed."""

    def __init__(self, job: Job, settings: Settings, known: dict[str, str]) -> None:
        self.job, self.settings, self.left = job, settings, None
        self.folder = tempfile.TemporaryDirectory()
        self.began = time.time()
        args = (job, settings, self.folder.name, known)
        context = spawn(_rank, args, nprocs=settings.ranks, join=False)
        assert isinstance(context, ProcessContext)
        self.context = context

    def poll(self) -> str | None:
        """None while it runs, else what to say."""
        try:
            if self.context.join(timeout=0.05):
                return f"{self.job.title}: {time.time() - self.began:.0f} s"
        except ProcessException as problem:
            return self._failed(" ".join(str(problem).split()))
        since, name = self._told("row")
        budget = self.settings.budget + (0 if name else START)
        now = time.time()
        if now - since < budget and now < self.settings.end + budget:
            return None
        return self._failed(f"no result within {now - since:.0f} s")

    def stop(self) -> None:
        """End its processes, as far as they live."""
        for process in self.context.processes:
            if process is not None:
                process.kill()
                process.join()
        self.folder.cleanup()

    def _told(self, what: str) -> tuple[float, str]:
        """When, and what, rank 0 said."""
        path = Path(self.folder.name) / what
        try:
            return path.stat().st_mtime, path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return self.began, ""

    def _failed(self, why: str) -> str:
        """Another group goes on behind the row that was lost, or behind a step between rows."""
        name, at = self._told("row")[1], int(self._told("step")[1] or 0)
        self.left = replace(self.job, steps=self.job.steps[at if name else at + 1 :])
        if not name:
            return f"{self.job.title}: lost {' '.join(self.job.steps[at])}: {why[:300]}"
        if name not in read(self.settings.path):
            row = self.settings.row(name, name.split("/")[0], why=why[:300])
            append(self.settings.path, row)
        return f"{self.job.title}: a group ended at {name}, another goes on"


def _rank(rank: int, job: Job, settings: Settings, folder: str, done: dict[str, str]) -> None:
    """A process of a group."""
    # Multicast over NVLink needs rights that shared machines do not give; read when NCCL begins.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if settings.gpu else torch.device("cpu")
    if settings.gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if settings.gpu else "gloo", init_method=f"file://{folder}/meet", rank=rank,
        world_size=settings.ranks, timeout=timedelta(seconds=settings.budget),
    )  # fmt: skip
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    here = Here(rank, device, settings, Path(folder), done, group)
    try:
        for i, (at, what) in enumerate(job.steps):
            here.tell("step", str(i))
            module, _, name = at.partition(":")
            part: Part = getattr(importlib.import_module(module), name)
            part(here, what)
        here.wait()
    except Exception as problem:
        why = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        if here.name:
            append(settings.path, settings.row(here.name, here.name.split("/")[0], why=why))
        if not isinstance(problem, torch.OutOfMemoryError):
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)  # others wait for messages that do not come: they are ended
    dist.destroy_process_group()
