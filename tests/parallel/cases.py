"""A language model on whole sequences and on shards of them: the same numbers must come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import error
from torch import Tensor

from longscan.models.language_model import LanguageModel, LanguageModelConfig
from longscan.parallel import SequenceParallel
from longscan.state import State

VOCABULARY = 29
Found = dict[str, Tensor]

# Largest error relative to the largest entry of what an unsharded model gives.
EXACT = {"float64": 1e-9, "float32": 1e-5}


@dataclass(frozen=True)
class Case:
    """A model and how its tokens lie.

    pattern: of mixers, one block each; lengths: tokens of each rank; rows: of a batch, or packed:
    boundaries of one row; warm: states of an earlier call enter, and get gradients; loss: what is
    differentiated is the loss, not logits; again: blocks are computed again in backward.
    """

    pattern: str
    lengths: tuple[int, ...]
    rows: int = 2
    packed: tuple[int, ...] | None = None
    warm: bool = False
    loss: bool = False
    again: bool = False
    dtype: str = "float64"
    parallel: dict[str, Any] = field(default_factory=lambda: {"method": "allgather"})
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def bounds(self) -> Tensor | None:
        return None if self.packed is None else torch.tensor(self.packed)

    @property
    def sequences(self) -> int:
        return self.rows if self.packed is None else len(self.packed) - 1


def build(case: Case) -> LanguageModel:
    """A model whose parameters are moved off their initial values, so that none is special."""
    torch.manual_seed(0)
    layers = case.pattern.count(",") + 1
    config = LanguageModelConfig(
        VOCABULARY, d_model=16, n_layers=layers, pattern=case.pattern, mlp="none",
        checkpoint_blocks=case.again, **case.config,
    )  # fmt: skip
    model = LanguageModel(config).to(getattr(torch, case.dtype)).train(case.again)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def _random(seed: int, like: Tensor) -> Tensor:
    """The same numbers on all ranks."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, dtype=torch.float64, generator=g).to(like.dtype)


def inputs(case: Case, model: LanguageModel) -> tuple[Tensor, Tensor, State | None]:
    """Ids, targets and the states that enter, of whole rows and the same on all ranks."""
    g = torch.Generator().manual_seed(1)
    rows = case.rows if case.packed is None else 1
    ids = torch.randint(VOCABULARY, (rows, case.total), generator=g)
    targets = torch.randint(VOCABULARY, ids.shape, generator=g)
    targets[:, ::5] = -100
    if not case.warm:
        return ids, targets, None
    before = torch.randint(VOCABULARY, (case.sequences, 5), generator=g)
    with torch.no_grad():
        _, state = model(before)
    leaf = state.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t.clone())
    return ids, targets, leaf


def run(case: Case, model: LanguageModel, sequence: SequenceParallel | None) -> Found:
    """What the model gives, and all gradients, of this rank's tokens."""
    ids, targets, state = inputs(case, model)
    cotangent = _random(2, torch.empty(*ids.shape, VOCABULARY, dtype=getattr(torch, case.dtype)))
    found: Found = {}
    more: dict[str, Any] = {"cu_seqlens": case.bounds}
    part = 1.0  # final states are everywhere: each rank adds its share of what reads them
    if sequence is not None:
        shards = sequence.shards(case.total, cu_seqlens=case.bounds, lengths=case.lengths)
        ids, targets, cotangent = (shards.shard(x) for x in (ids, targets, cotangent))
        more = {"shards": shards}
        n = sequence.size
        part = 2 * (sequence.rank + 1) / (n * (n + 1))
    if case.loss:
        target, after = model.loss(ids, targets, state, **more)
        found["loss"] = target
    else:
        logits, after = model(ids, state, **more)
        found["logits"] = logits
        target = (logits * cotangent).sum()
    for i, (name, t) in enumerate(after.flatten().items()):
        found[f"state {name}"] = t
        if t.is_floating_point() and t.requires_grad:
            target = target + part * (t * _random(3 + i, t)).sum()
    target.backward()
    if sequence is not None:
        sequence.finish()
    for name, p in model.named_parameters():
        found[f"gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    for name, t in ({} if state is None else state.flatten()).items():
        if t.is_floating_point():
            grad = torch.zeros_like(t) if t.grad is None else t.grad
            found[f"gradient of first state {name}"] = grad
    return {name: t.detach() for name, t in found.items()}


def whole(case: Case) -> Found:
    """Without shards."""
    return run(case, build(case), None)


def sharded(group: Any, case: Case) -> Found:
    """A task for ranks."""
    return run(case, build(case), SequenceParallel(group, **case.parallel))


def joined(parts: list[Found]) -> Found:
    """What the ranks gave together: gradients are sums; states and loss are the same on all."""
    out = dict(parts[0])
    for name in out:
        if name == "logits":
            out[name] = torch.cat([p[name] for p in parts], 1)
        elif name.startswith("gradient"):
            out[name] = torch.stack([p[name] for p in parts]).sum(0)
    return out


def differences(got: Found, want: Found) -> dict[str, float]:
    """Errors, relative to the largest entry, or to a thousandth of the largest of its kind.

    The second for gradients that are zero but for rounding.
    """
    assert got.keys() == want.keys()
    tops: dict[str, float] = {}
    for name, t in want.items():
        kind = name.split(" ")[0]
        top = t.abs().max().item() if t.is_floating_point() and t.numel() else 0.0
        tops[kind] = max(tops.get(kind, 0.0), top if top < 1e20 else 0.0)
    out = {}
    for name, t in want.items():
        if not t.is_floating_point():
            out[name] = 0.0 if torch.equal(got[name], t) else float("inf")
            continue
        top = t.abs().max().item() if t.numel() else 0.0
        scale = max(1.0, 1e-3 * tops[name.split(" ")[0]] / max(top, 1e-300))
        out[name] = error(got[name], t) / scale
    return out


def agree(ranks: Any, case: Case) -> None:
    """Fail unless the ranks give what one process gives, and the same states and loss each."""
    ranks.start(sharded, case, size=len(case.lengths))
    want = whole(case)
    parts = ranks.results()
    for name in parts[0]:
        if name == "loss" or name.startswith("state"):
            assert all(torch.equal(p[name], parts[0][name]) for p in parts), name
    wrong = {
        k: e for k, e in differences(joined(parts), want).items() if not e <= EXACT[case.dtype]
    }
    assert not wrong, f"{case}: relative errors {wrong}"
