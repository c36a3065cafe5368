"""What a training run keeps, and when it ends: checkpoints, validation, time, signals."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from longscan.io import write_atomically
from longscan.language.mesh import with_tensors
from longscan.language.metrics import MetricsFile, plot_losses
from longscan.language.task import LanguageTask
from longscan.parallel.mesh import save_gathered
from longscan.progress import ProgressLine, duration


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that replace the earlier one only when they are whole and on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options=None) -> None:
        def write(temporary: Path) -> None:
            try:
                with open(temporary, "wb") as f:
                    torch.save(checkpoint, f)
            except RuntimeError as error:
                # torch's zip writer hides what the file said (a full disk) behind its own error.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

        write_atomically(path, write)
        # Tensors of a sharded run, which only the file replaced just now pointed to.
        kept, path = checkpoint.get("shards", {}).get("folder"), Path(path)
        for folder in path.parent.glob(f"{path.name}.shards-*"):
            if folder.name != kept:
                shutil.rmtree(folder)

    def load_checkpoint(self, path: Any, map_location=None, weights_only=None) -> dict[str, Any]:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return with_tensors(checkpoint, Path(path)) if "shards" in checkpoint else checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


@dataclass
class RunOptions:
    """When a run saves, validates and stops.

    Args:
        save_every_steps: steps between checkpoints (0: by time only).
        save_every_minutes: minutes between checkpoints (0: by steps only).
        validate_every_steps: steps between validations (0: at the end only).
    """

    save_every_steps: int = 0
    save_every_minutes: float = 5.0
    validate_every_steps: int = 500


class RunKeeper(pl.Callback):
    """Keeps a run folder: metrics.csv, loss.png, last.ckpt, model.safetensors; ends the run.

    Everything happens between optimiser steps, never inside an accumulation, so that a resumed
    run continues exactly where the checkpoint stood.

    max_minutes counts from the first step and includes the last validation and save. When
    max_steps is given too, it limits each session and the schedule follows the steps. Alone, it
    is the budget of the whole run over all sessions, and the schedule follows the clock: such a
    run is not reproducible step for step, because its learning rates depend on speed.

    ended: "steps", "time" or the name of a signal.
    """

    def __init__(
        self, run: Path, options: RunOptions, *, max_steps: int, max_minutes: float | None
    ) -> None:
        self.run = run
        self.options = options
        self.max_steps = max_steps
        self.budget = math.inf if max_minutes is None else 60 * max_minutes
        self.by_time = max_steps < 0
        self.metrics = MetricsFile(run / "metrics.csv")
        self.progress_line = ProgressLine()
        self.ended: str | None = None
        self.valid: dict[str, float] = {}
        self.step = self.tokens = 0
        self._seconds_before = 0.0
        self._start = self._last_save = self._last_plot = self._step_began = time.monotonic()
        self._end: float | None = None
        self._resumed_at = 0
        self._spent = False  # a run limited by time alone has used it all
        self._signal: signal.Signals | None = None
        self._cost = {"save": 0.0, "validate": 0.0}
        self._recent: deque[tuple[float, int]] = deque(maxlen=30)

    # -- time ---------------------------------------------------------------------------------

    def _session(self) -> float:
        return (self._end or time.monotonic()) - self._start

    @property
    def seconds(self) -> float:
        """Time spent in training, over all sessions."""
        return self._seconds_before + self._session()

    def _time_left(self, reserve: bool = True) -> float:
        """Seconds until the budget is spent, less what the end of the run will take."""
        spent = self.seconds if self.by_time else self._session()
        # With room for a machine that is busier then.
        left = self.budget - spent - 1.5 * self._cost["save"]
        # A validation that would eat the run is left out at the end instead of reserved for.
        fits = self._cost["validate"] <= 0.2 * self.budget
        return left - 1.25 * self._cost["validate"] if reserve and fits else left

    def progress(self) -> float:
        """The share of the run that is over; what the learning rate follows."""
        if not self.by_time:
            return (self.step + 0.5) / self.max_steps  # the middle of the coming step
        left = self._time_left()
        return self.seconds / (self.seconds + left) if left > 0 else 1.0

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended this session."""
        return self.ended not in (None, "steps", "time")

    @property
    def exit_status(self) -> int:
        """0, or 128 and the number of the signal that ended the run, as shells report it."""
        return 128 + self._signal.value if self.interrupted and self._signal else 0

    # -- Lightning's hooks ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "spent": self.by_time and self.ended == "time",
            "max_minutes": self.budget / 60,
            # For mixers that draw random numbers (dropout) while training.
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.tokens = state_dict["step"], state_dict["tokens"]
        self._seconds_before = state_dict["seconds"]
        self._spent = state_dict["spent"] and self.budget / 60 <= state_dict["max_minutes"]
        torch.set_rng_state(state_dict["rng"].cpu())
        if state_dict["rng_cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict["rng_cuda"].cpu())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageTask)
        pl_module.progress = self.progress
        self._start = self._last_save = self._last_plot = self._step_began = time.monotonic()
        self._resumed_at = self.step
        if trainer.is_global_zero:
            self.metrics.start(self.step)
        if self._spent:
            trainer.should_stop = True
        self._take_signals()  # again: Lightning has just put its own in front

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            return  # inside an accumulation
        self.step = trainer.global_step
        row, loss = self._account(trainer, pl_module)
        self.ended = self._stop_reason(trainer)
        if self._validation_due(trainer):
            self._validate(trainer, pl_module, row)
        if trainer.is_global_zero:
            self.metrics.add(row, loss)
            if self.progress_line.due() or self.ended or "valid_loss" in row:
                self._show(row)
        if self.ended or self._save_due(trainer):
            self.save(trainer, pl_module)
        if self.ended:
            trainer.should_stop = True
            self._end = time.monotonic()
        self._step_began = time.monotonic()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        if trainer.is_global_zero and not isinstance(exception, OSError):
            self.metrics.flush()

    # -- one step -------------------------------------------------------------------------------

    def _account(self, trainer, task) -> tuple[dict[str, Any], Tensor]:
        # Ranks that share a batch have counted the same tokens.
        tokens, task.tokens = task.tokens * trainer.world_size // task.sharing, 0
        self.tokens += tokens
        self._recent.append((time.monotonic() - self._step_began, tokens))
        took, seen = (sum(x) for x in zip(*self._recent, strict=True))
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "lr": task.lr_now,
            "tokens_per_s": round(seen / max(took, 1e-9), 1),
        }
        return row, trainer.strategy.reduce(task.step_loss(), reduce_op="mean")

    def _stop_reason(self, trainer) -> str | None:
        reason = self._signal.name if self._signal else None
        if reason is None and math.isfinite(self.budget):
            if not self._cost["validate"]:
                self._cost["validate"] = self._guess_validation(trainer)
            # The slowest of the last steps is what the next one may take.
            if self._time_left() < 1.2 * max(took for took, _ in self._recent):
                reason = "time"
        if trainer.world_size > 1:  # all ranks stop at the same step
            stop = trainer.strategy.reduce_boolean_decision(reason is not None, all=False)
            reason = (reason or "another process") if stop else None
        if reason is None and 0 <= self.max_steps <= self.step:
            reason = "steps"
        return reason

    def _show(self, row: dict[str, Any]) -> None:
        loss = self.metrics.flush()
        took = sum(t for t, _ in self._recent) / len(self._recent)
        left = math.inf if self.by_time else (self.max_steps - self.step) * took
        left = min(left, self._time_left())
        of = "" if self.by_time else f"/{self.max_steps}"
        text = f"step {self.step}{of}  loss {loss:.4f}  {row['tokens_per_s']:,.0f} tok/s"
        text += f"  ETA {duration(left)}"
        if "valid_loss" in row:
            text += f"  valid {row['valid_loss']:.4f}"
            text += f" = {row['valid_bits_per_byte']:.4f} bits/byte"
        share = self.progress() if self.by_time else self.step / self.max_steps
        self.progress_line.show(share, text, keep=self.ended is not None or "valid_loss" in row)

    # -- validation -----------------------------------------------------------------------------

    def _guess_validation(self, trainer) -> float:
        # Before the first one is measured: a forward pass costs less than a training step
        # (under half of it).
        slowest = max(took for took, _ in self._recent) / trainer.accumulate_grad_batches
        return 0.5 * slowest * len(trainer.datamodule.val_dataloader())

    def _validation_due(self, trainer) -> bool:
        every = self.options.validate_every_steps
        if self.interrupted or not (self.ended or (every and self.step % every == 0)):
            return False
        # On the way there must be time for this one and the last one.
        late = self._cost["validate"] > self._time_left(reserve=not self.ended)
        if trainer.world_size > 1:
            late = trainer.strategy.reduce_boolean_decision(late, all=False)
        if late and self.ended:
            self.progress_line.note("no time left to validate")
        return not late

    @torch.no_grad()
    def _validate(self, trainer, task, row: dict[str, Any]) -> None:
        batches = trainer.datamodule.val_dataloader()  # this rank's share
        if not len(batches):
            return
        began = time.monotonic()
        task.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for i, batch in enumerate(batches):
            with trainer.precision_plugin.val_step_context():
                loss, n = task.validation_step(trainer.strategy.batch_to_device(batch), i)
            targets = batch["targets"]
            n_bytes = trainer.datamodule.tokenizer.n_bytes(targets[targets >= 0].numpy())
            n_bytes /= task.sharing  # of the whole batch, where the others are of a part
            sums += torch.tensor([loss.item(), n.item(), n_bytes], dtype=torch.float64)
        task.train()
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(task.device), reduce_op="sum")
        nats, n_tokens, n_bytes = sums.tolist()
        row["valid_loss"] = nats / max(n_tokens, 1)
        row["valid_bits_per_byte"] = nats / math.log(2) / max(n_bytes, 1)
        self.valid = {k: row[k] for k in ("valid_loss", "valid_bits_per_byte")}
        self._cost["validate"] = time.monotonic() - began

    # -- saving and stopping --------------------------------------------------------------------

    def _save_due(self, trainer) -> bool:
        steps, minutes = self.options.save_every_steps, self.options.save_every_minutes
        # The first step is saved to learn at once whether saving works and how long it takes.
        due = self.step == self._resumed_at + 1 or bool(steps and self.step % steps == 0)
        if not minutes:
            return due
        late = time.monotonic() - self._last_save > 60 * minutes
        if trainer.world_size > 1:
            late = trainer.strategy.reduce_boolean_decision(late, all=False)
        return due or late

    def save(self, trainer, task) -> None:
        """Write the checkpoint, the model and the loss curve; the log is complete up to here."""
        began = time.monotonic()
        if trainer.is_global_zero:
            self.metrics.flush()
        trainer.save_checkpoint(self.run / "last.ckpt")
        if isinstance(task.model, FSDPModule):
            save_gathered(task.model, self.run)  # pyright: ignore[reportArgumentType] (a Stack too)
        elif trainer.is_global_zero:
            task.model.save(self.run)
        # Now and then only; but where time is short, to know how long it takes.
        due = self.ended or math.isfinite(self.budget) or began - self._last_plot > 60
        if trainer.is_global_zero and due:
            plot_losses(self.run)
            self._last_plot = began
        self._last_save = time.monotonic()
        self._cost["save"] = max(self._cost["save"], self._last_save - began)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # asked twice: leave now, with the last periodic checkpoint
        self._signal = signal.Signals(number)
        self.progress_line.note(
            f"{self._signal.name}: saving after this step; again to leave without saving"
        )

    def _take_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM):
                signal.signal(which, self._on_signal)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within it Ctrl-C and SIGTERM save and stop the run between two steps."""
        before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
        self._take_signals()  # now already, for worker processes that read data inherit it
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for which, handler in before.items():
                    signal.signal(which, handler)
