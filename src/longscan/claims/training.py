"""Training the small models of the claims: fresh data every step, AdamW, clip, progress."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longscan.claims.results import Measurement, Row, Store, code, key_of, thinned
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.progress import ProgressLine, duration

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")
LOOK = 10  # losses are read from the device every so many steps


@dataclass
class Job:
    """One run of an experiment: what it may use, and what it has measured so far.

    An experiment calls `measure` for every case and seed and yields the rows; inside, it builds
    and trains models with `model` and `train`.

    device: where to compute. seeds: which seeds. quick: tiny sizes that only show that it runs.
    data: the folder given by --data, or None. folder: where results are kept, None for nowhere.
    plan: True to run nothing and only count what would be measured.
    """

    device: torch.device
    seeds: tuple[int, ...] = (0,)
    quick: bool = False
    data: Path | None = None
    folder: Path | None = None
    plan: bool = False
    progress: ProgressLine | None = None
    total: int = 0  # measurements of the whole run, for the progress line
    planned: list[str] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._store = None if self.folder is None else Store(self.folder)
        self._losses: list[float] = []
        self._doing = ""

    def choose(self, *, quick: T, cpu: T, gpu: T | None = None) -> T:
        """The sizes to use: `quick`, or those for the device."""
        if self.quick:
            return quick
        return cpu if self.device.type == "cpu" or gpu is None else gpu

    def known(self, key: str) -> bool:
        """Whether an earlier run has finished this measurement."""
        return self._store is not None and self._store.get(key) is not None

    def measure(
        self,
        case: str,
        mixer: str,
        seed: int,
        settings: Mapping[str, Any],
        run: Callable[[], Mapping[str, float]],
        published: Mapping[str, str] | None = None,
    ) -> Iterator[Row]:
        """The rows of one case and seed: those kept from an earlier run, else what `run` returns.

        settings: everything the numbers depend on, as plain data; a change measures anew.
        run: returns metric -> value. published: metric -> what the paper says of it.
        """
        key = key_of(case, seed, dict(settings), self.device.type)
        if self.plan:
            self.planned.append(key)
            return
        found = None if self._store is None else self._store.get(key)
        if found is None:
            found = self._measured(key, case, mixer, seed, run)
            if self._store is not None:
                self._store.add(found)
        # The published side is words, which may be corrected without measuring again.
        said = published or {}
        rows = tuple(replace(r, published=said.get(r.metric, "")) for r in found.rows)
        self.measurements.append(replace(found, rows=rows))
        yield from rows

    def _measured(
        self, key: str, case: str, mixer: str, seed: int, run: Callable[[], Mapping[str, float]]
    ) -> Measurement:
        self._losses = []
        number = len(self.measurements) + 1
        of = f"/{self.total}" if self.total else ""
        self._doing = f"{number}{of} {case}, seed {seed}"
        began = time.perf_counter()
        numbers = run()
        seconds = time.perf_counter() - began
        if self.progress is not None:
            said = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            self.progress.note(f"{self._doing}: {said} ({duration(seconds)})")
        now = datetime.datetime.now(datetime.UTC)
        return Measurement(
            key,
            tuple(Row(case, mixer, k, float(v), "", seed) for k, v in numbers.items()),
            steps=len(self._losses),
            seconds=seconds,
            commit=code(),
            date=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            curve=thinned(self._losses),
        )

    def generator(self, purpose: str, seed: int) -> torch.Generator:
        """Random numbers on the device, other ones for every purpose ("train", "test")."""
        digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest[:7], "big"))
        return generator

    def build(self, make: Callable[[], nn.Module], seed: int) -> Any:
        """The module that `make` returns, initialised by `seed`, on the device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make().to(self.device)

    def model(self, config: LanguageModelConfig, seed: int) -> LanguageModel:
        """A fresh language model on the device."""
        return self.build(lambda: LanguageModel(config), seed)

    def train(
        self,
        model: nn.Module,
        loss: Callable[[torch.Generator], Tensor],
        *,
        steps: int,
        lr: float,
        seed: int,
        weight_decay: float = 0.01,
        warmup: int = 0,
        decay: bool = False,
        clip: float = 1.0,
        until: float | None = None,
        autocast: bool = False,
    ) -> int:
        """Train in place with AdamW; returns the number of steps taken.

        loss: draws a fresh batch with the generator and returns its loss. warmup: steps in which
        the learning rate rises from 0. decay: whether it then falls to 0 along a cosine. until:
        stop when the mean loss of the last LOOK steps is below this. autocast: bfloat16 on a GPU.
        Raises: ValueError when the loss is not finite.
        """
        make = getattr(model, "parameter_groups", None)
        if make is not None:
            groups = make(weight_decay=weight_decay, lr=lr)
        else:
            groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": weight_decay}]
        cuda = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        parameters = [p for p in model.parameters() if p.requires_grad]
        generator = self.generator("train", seed)
        narrow = torch.autocast("cuda", torch.bfloat16) if autocast and cuda else None
        pending: list[Tensor] = []
        began = time.perf_counter()
        model.train()
        for step in range(1, steps + 1):
            factor = rate(step, steps, warmup, decay)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            with narrow or contextlib.nullcontext():
                value = loss(generator)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pending.append(value.detach())
            if len(pending) == LOOK or step == steps:
                recent = torch.stack(pending).tolist()
                pending.clear()
                self._losses += recent
                if not all(map(math.isfinite, recent)):
                    raise ValueError(f"{self._doing}: the loss is {recent[-1]} at step {step}")
                self._show(step, steps, recent[-1], began)
                if until is not None and sum(recent) / len(recent) < until:
                    return step
        return steps

    def _show(self, step: int, steps: int, loss: float, began: float) -> None:
        if self.progress is None or not self.progress.due():
            return
        left = (time.perf_counter() - began) / step * (steps - step)
        text = f"{self._doing}: step {step}/{steps}, loss {loss:.4f}, {duration(left)} left"
        done = len(self.measurements)
        self.progress.show((done + step / steps) / max(self.total, done + 1), text)


def rate(step: int, steps: int, warmup: int, decay: bool) -> float:
    """The factor of the learning rate at a step, counted from 1: up over `warmup`, then constant
    or a cosine that would reach 0 one step after the last."""
    if step <= warmup:
        return step / (warmup + 1)
    if not decay:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


def labelled_loss(
    model: LanguageModel, batch: Callable[[torch.Generator], Batch]
) -> Callable[[torch.Generator], Tensor]:
    """The loss of (inputs, labels) batches, for `Job.train`."""

    def loss(generator: torch.Generator) -> Tensor:
        inputs, labels = batch(generator)
        return model.loss(inputs, labels)[0]

    return loss


@dataclass(frozen=True)
class Accuracy:
    """Shares of labels, and of sequences without any wrong label, that were predicted."""

    token: float
    sequence: float


@torch.no_grad()
def accuracy(model: LanguageModel, batches: Iterable[Batch], piece: int | None = None) -> Accuracy:
    """How often the largest logit is the label, over labels other than -100.

    piece: feed sequences in stretches of so many tokens, each going on from the state of the one
    before; None for whole sequences.
    """
    model.eval()
    tokens = sequences = right = whole = 0
    for inputs, labels in batches:
        state, wrong = None, torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        for start in range(0, inputs.shape[1], piece or inputs.shape[1]):
            stretch = slice(start, start + (piece or inputs.shape[1]))
            hidden, state = model.hidden(inputs[:, stretch], state)
            want = labels[:, stretch]
            asked = want != -100
            good = torch.zeros_like(asked)
            # Only labelled places get logits: most tokens of the long tasks have no label.
            good[asked] = model.logits(hidden[asked]).argmax(-1) == want[asked]
            right += int(good.sum())
            tokens += int(asked.sum())
            wrong |= (asked & ~good).any(1)
        whole += int((~wrong).sum())
        sequences += len(inputs)
    return Accuracy(right / max(1, tokens), whole / max(1, sequences))


def fit(
    job: Job,
    model: dict[str, Any],
    batch: Callable[[torch.Generator], Batch],
    *,
    seed: int,
    **training: Any,
) -> LanguageModel:
    """A language model of these settings (LanguageModelConfig's), trained on these batches."""
    lm = job.model(LanguageModelConfig(**model), seed)
    job.train(lm, labelled_loss(lm, batch), seed=seed, **training)
    return lm


def examples(
    job: Job, batch: Callable[[torch.Generator], Batch], seed: int, count: int = 4
) -> Iterator[Batch]:
    """`count` batches for testing: other random numbers than training's, the same for all cases."""
    generator = job.generator("test", seed)
    return (batch(generator) for _ in range(count))
