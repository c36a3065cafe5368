"""What the bench compares: one layer of ours and one of a peer, behind one small interface."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EXTRA = "pip install 'longscan[bench]'"
MODES = ("train", "prefill", "decode")

Inputs = tuple[Tensor, ...]
"""What a layer reads, each [B, T, ...]; the first is differentiated, all of an op are."""


@dataclass(frozen=True)
class Side:
    """One implementation.

    forward(*inputs) -> y, as in training; prefill(*inputs) -> (y, cache) and
    step(cache, *inputs of one token) -> (y, cache), as in generation; carry(*inputs) -> cache.
    ready(length): what it does once for sequences of a length; not timed.
    """

    module: nn.Module | None
    forward: Callable[..., Tensor]
    prefill: Callable[..., tuple[Tensor, Any]]
    step: Callable[..., tuple[Tensor, Any]]
    carry: Callable[..., Any]
    ready: Callable[[int], None] = lambda length: None


@dataclass(frozen=True)
class Row:
    """A layer of ours beside one of a peer.

    name: our mixer's, a hyphen, the peer's.
    modules: what must be importable.
    translate: the peer's parameters by name -> ours by name; linear but for constants, so that it
    serves gradients as well.
    install: how to get the peer; rows that need more than the extra "bench" are left out, and
    named, unless they are asked for.
    modes: the calls that can be compared.
    unequal: our parameters whose gradients differ from the peer's by construction; those of all
    others, and of the inputs, must agree.
    same: False if the peer is another architecture, set beside ours for its cost alone: weights and
    outputs are not compared, and no targets are judged.
    """

    name: str
    layer: str
    package: str
    modules: tuple[str, ...]
    inputs: Callable[[int, int, int], Inputs]
    ours: Callable[[int], Side]
    peer: Callable[[int], Side]
    translate: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors
    install: str = EXTRA
    modes: tuple[str, ...] = MODES
    unequal: frozenset[str] = frozenset()
    same: bool = True

    def missing(self) -> ModuleNotFoundError | None:
        """Why the peer cannot be imported, if it cannot."""
        try:
            for module in self.modules:
                need(module, self.install)
        except ModuleNotFoundError as error:
            return error
        return None

    def gradients(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The peer's gradients of its parameters, as gradients of ours."""
        constants = self.translate({name: torch.zeros_like(t) for name, t in tensors.items()})
        return {name: t - constants[name] for name, t in self.translate(tensors).items()}


def need(module: str, install: str = EXTRA) -> Any:
    """Import a module of a peer.

    Raises: ModuleNotFoundError saying what to install.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched here
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ModuleNotFoundError(
            f"the comparison needs {error.name or package}: {install}, or leave its rows out "
            "with --rows",
            name=error.name,
        ) from error


def tokens(batch: int, length: int, d_model: int) -> Inputs:
    """The input of a layer."""
    return (torch.randn(batch, length, d_model),)


def mixer(name: str, d_model: int, **options: Any) -> Side:
    """Our side: a mixer by its name."""
    from longscan.registry import mixer_class

    layer = mixer_class(name)(d_model, **options)
    return Side(
        layer,
        forward=lambda x: layer(x)[0],
        prefill=layer,
        step=lambda state, x: layer(x, state),
        carry=lambda x: layer(x)[1],
    )


def walk(step: Callable[[Any, Tensor], tuple[Tensor, Any]], cache: Any, x: Tensor) -> Any:
    """The cache behind a prompt, for peers that can only read it token by token."""
    for t in range(x.shape[1]):
        _, cache = step(cache, x[:, t : t + 1])
    return cache
