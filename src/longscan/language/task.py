"""The language-model task for Lightning: loss, optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from longscan.parallel import SequenceParallel


@dataclass
class OptimOptions:
    """AdamW and the shape of the learning rate over a run.

    Args:
        lr: peak learning rate.
        weight_decay: for matrices; norms, biases and what a mixer exempts are never decayed.
        beta1: decay of the gradient's mean.
        beta2: decay of the gradient's second moment.
        eps: added to the root of the second moment.
        schedule: cosine | wsd (constant, then a linear fall) | constant; each after a warm-up.
        warmup: linear warm-up: below 1 a share of the run, from 1 on a number of steps.
        decay: the last share of the run in which wsd falls.
        final_lr: where the schedule ends, as a share of lr.
    """

    lr: float = 2e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.25
    final_lr: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule must be cosine, wsd or constant, not {self.schedule!r}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.warmup < 0 or not 0 <= self.final_lr <= 1 or not 0 < self.decay <= 1:
            raise ValueError("warmup must be >= 0, final_lr in [0, 1] and decay in (0, 1]")


def lr_factor(options: OptimOptions, step: int, progress: float) -> float:
    """The learning rate of a step, as a share of the peak.

    step counts optimiser steps from 0; progress in [0, 1] is the share of the run that is over
    (of its steps, or of its time where only time limits it).
    """
    progress = min(max(progress, 0.0), 1.0)
    warm, start = 1.0, 0.0
    if options.warmup >= 1:
        warm = (step + 1) / options.warmup
    elif options.warmup > 0:
        warm = progress / options.warmup
        start = options.warmup
    if warm < 1:
        return warm
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "wsd":
        left = min(1.0, (1 - progress) / options.decay)
        return options.final_lr + (1 - options.final_lr) * left
    along = (progress - start) / (1 - start) if start < 1 else 1.0
    return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * along))


class LanguageTask(pl.LightningModule):
    """Next-token training of a language model on packed batches.

    A batch is dict(ids [1, N], targets [1, N] with -100 for no loss, cu_seqlens [n + 1]).
    The loss of a step is the mean over its micro-batches of their mean loss per token.

    progress: called before each step; the share of the run that is over. Set by the run's keeper.
    sequence: the ranks that share this rank's batches, a part of each; None: none do.
    draws: (seed, rank), which with a batch's number pick what is drawn at random for it; None: the
    process's own generator goes on.
    """

    def __init__(self, model: nn.Module, optim: OptimOptions) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.progress: Callable[[], float] = lambda: 0.0
        self.lr_now = 0.0
        self.sequence: SequenceParallel | None = None
        self.draws: tuple[int, int] | None = None
        self._losses: list[Tensor] = []
        self.tokens = 0

    @property
    def sharing(self) -> int:
        """How many ranks share a batch."""
        return 1 if self.sequence is None else self.sequence.size

    def _loss(self, batch: dict[str, Tensor], reduction: str) -> tuple[Tensor, Tensor]:
        """The loss, and the targets that this rank has a part in it for."""
        model: Any = self.model
        ids, targets, bounds = batch["ids"], batch["targets"], batch["cu_seqlens"]
        if self.sequence is None:
            where: dict[str, Any] = {"cu_seqlens": bounds}
        else:
            shards = self.sequence.shards(ids.shape[1], cu_seqlens=bounds, final_states=False)
            ids, targets, where = shards.shard(ids), shards.shard(targets), {"shards": shards}
        loss, _ = model.loss(ids, targets, reduction=reduction, **where)
        return loss, targets

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.draws is not None:  # a function of the batch alone: resumed runs draw the same
            [seed] = np.random.SeedSequence((*self.draws, batch_idx)).generate_state(1, np.uint64)
            torch.manual_seed(int(seed))
        loss, _ = self._loss(batch, "mean")
        self._losses.append(loss.detach())
        self.tokens += batch["ids"].numel()
        # Ranks that share a batch have a part of its gradient each, and all ranks are averaged.
        return loss * self.sharing

    def step_loss(self) -> Tensor:
        """The loss of the step just taken, left on its device; starts the next step's account."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Summed loss in nats and number of predicted tokens of this rank's part of a batch."""
        loss, targets = self._loss(batch, "sum")
        return loss, (targets >= 0).sum()

    def on_train_end(self) -> None:
        if self.sequence is not None:
            self.sequence.finish()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        model: Any = self.model
        groups = model.parameter_groups(weight_decay=self.optim.weight_decay, lr=self.optim.lr)
        for group in groups:
            group["peak_lr"] = group.get("lr", self.optim.lr)
        # Fused: one kernel per step instead of a few per parameter. With float16 it would undo
        # the loss scale itself, too late for the clipping.
        fused = self.trainer.precision != "16-mixed"
        betas = (self.optim.beta1, self.optim.beta2)
        return torch.optim.AdamW(
            groups, self.optim.lr, betas=betas, eps=self.optim.eps, fused=fused
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for any fused optimiser under mixed precision, though only
        # float16 has a loss scale that matters here.
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        factor = lr_factor(self.optim, self.trainer.global_step, self.progress())
        self.lr_now = self.optim.lr * factor
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
