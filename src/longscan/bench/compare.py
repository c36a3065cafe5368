"""What is timed of a layer, and the proof that both sides compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longscan.bench.peers import ROWS
from longscan.bench.row import Inputs, Row, Side

TOLERANCE = 1e-3
MEMORY_BATCH = 256
"""Decoding needs so little memory for one sequence that it is measured for this many."""


class DisagreementError(RuntimeError):
    """The two sides do not compute the same function: timing them would mean nothing."""


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Euclidean."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@torch.no_grad()
def equal_weights(row: Row, ours: Side, peer: Side) -> None:
    """Disturb all parameters of the peer, then load them into our layer.

    Disturbed, because at their initial values (ones, zeros, equal rows) a mistake in the loading
    could pass unseen.
    """
    if peer.module is None or ours.module is None:
        return
    for p in peer.module.parameters():
        p.mul_(1 + 0.1 * torch.randn_like(p)).add_(0.02 * torch.randn_like(p))
    ours.module.load_state_dict(dict(row.translate(peer.module.state_dict())))


def training_step(side: Side, inputs: Inputs, cotangent: Tensor) -> Tensor:
    """Forward and backward; gradients of inputs and parameters are left in `.grad`."""
    for x in inputs:
        x.grad = None
    if side.module is not None:
        side.module.zero_grad(set_to_none=True)
    y = side.forward(*inputs)
    y.backward(cotangent)
    return y.detach()


@torch.inference_mode()
def prefill(side: Side, inputs: Inputs) -> Tensor:
    """Read a prompt."""
    return side.prefill(*inputs)[0]


class Decoder:
    """Tokens fed one at a time to a side that has read a prompt."""

    @torch.inference_mode()
    def __init__(self, side: Side, prompt: Inputs) -> None:
        self.side, self.cache = side, side.carry(*prompt)

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Tensor:
        ys = []
        for t in range(inputs[0].shape[1]):
            y, self.cache = self.side.step(self.cache, *(x[:, t : t + 1] for x in inputs))
            ys.append(y)
        return torch.cat(ys, 1)


Call = Callable[[], Tensor]


def calls(mode: str, side: Side, inputs: Inputs, more: Inputs, cotangent: Tensor) -> Call:
    """What is timed: a training step, reading `inputs`, or feeding `more` after `inputs`."""
    if side.module is not None:
        side.module.train(mode == "train")
    side.ready(inputs[0].shape[1])
    if mode == "train":
        leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
        return _Training(side, leaves, cotangent)
    if mode == "prefill":
        return lambda: prefill(side, inputs)
    decoder = Decoder(side, inputs)
    return lambda: decoder(more)


class _Training:
    def __init__(self, side: Side, leaves: Inputs, cotangent: Tensor) -> None:
        self.side, self.leaves, self.cotangent = side, leaves, cotangent

    def __call__(self) -> Tensor:
        return training_step(self.side, self.leaves, self.cotangent)

    def gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the inputs and of the parameters in the last step."""
        inputs = {f"input {i}": x.grad for i, x in enumerate(self.leaves) if x.grad is not None}
        if self.side.module is None:
            return inputs, {}
        named = self.side.module.named_parameters()
        return inputs, {name: p.grad for name, p in named if p.grad is not None}


def check(row: Row, ours: tuple[Call, Tensor], peer: tuple[Call, Tensor], what: str) -> float:
    """The largest relative difference of outputs, and after a training step of gradients.

    All gradients, but for those that the row calls unequal.

    Raises: DisagreementError above TOLERANCE.
    """
    pairs = {"output": (ours[1], peer[1])}
    if isinstance(ours[0], _Training) and isinstance(peer[0], _Training):
        (mine, own), (theirs, others) = ours[0].gradients(), peer[0].gradients()
        mine, theirs = mine | own, theirs | row.gradients(others)
        if set(mine) != set(theirs):
            names = sorted(set(mine) ^ set(theirs))
            raise DisagreementError(f"{row.name}, {what}: only one side has gradients of {names}")
        pairs |= {f"gradient of {n}": (mine[n], theirs[n]) for n in mine if n not in row.unequal}
    errors = {n: relative_error(a, b) for n, (a, b) in pairs.items()}
    wrong = {n: f"{e:.1e}" for n, e in errors.items() if not e < TOLERANCE}
    if wrong:
        raise DisagreementError(
            f"{row.name}, {what}: ours and {row.package} differ (relative error): {wrong}. "
            "Nothing was timed: the comparison would be wrong"
        )
    return max(errors.values())


def memory_job(
    name: str, mine: bool, mode: str, batch: int, length: int, d_model: int, threads: int
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """A job for `measure.Children`: one side of a row, warmed up on a short sequence.

    Decoding counts the states of MEMORY_BATCH sequences and what eight tokens need besides.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    row = next(r for r in ROWS if r.name == name)
    side = (row.ours if mine else row.peer)(d_model)
    short = min(length, 128)
    if mode == "decode":
        batch, length, short = MEMORY_BATCH, 4, 4
    inputs = row.inputs(batch, length, d_model)
    more = row.inputs(batch, 8, d_model)
    y = prefill(side, tuple(x[:, :2] for x in inputs))
    cotangent = torch.randn(batch, length, *y.shape[2:])
    brief = tuple(x[:, :short] for x in inputs)
    calls(mode, side, brief, more, cotangent[:, :short])()
    if side.module is not None:
        side.module.zero_grad(set_to_none=True)
    if mode == "decode":
        return lambda: calls(mode, side, inputs, more, cotangent), lambda call: call()
    call = calls(mode, side, inputs, more, cotangent)
    return lambda: None, lambda _: call()
