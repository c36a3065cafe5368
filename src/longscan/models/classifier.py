"""One label for a whole sequence, of tokens or of real features, over any mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.mixers.base import Mixer
from longscan.models.bidirectional import Bidirectional
from longscan.models.config import StackConfig
from longscan.models.stack import Stack, check_ids
from longscan.ops._check import widen
from longscan.ops._layout import check_cu_seqlens


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(StackConfig):
    """Sizes and parts of a Classifier: those of a StackConfig, its input and its head.

    Args:
        n_classes: number of labels.
        vocab_size: number of token ids, where the input is tokens.
        d_input: numbers per step, where the input is real.
        pool: how a sequence becomes one vector: mean | last | first (bidirectional models only).
        bidirectional: every mixer reads in both directions of time, and their outputs are added.

    Raises: ValueError saying which field is wrong.
    """

    n_classes: int
    vocab_size: int | None = None
    d_input: int | None = None
    pool: str = "mean"
    bidirectional: bool = False

    def __post_init__(self) -> None:
        self._check_count("n_classes")
        if (self.vocab_size is None) == (self.d_input is None):
            raise ValueError(
                "give vocab_size (the input is token ids) or d_input (it is real features)"
                + (", not both" if self.vocab_size is not None else "")
            )
        self._check_count("vocab_size", optional=True)
        self._check_count("d_input", optional=True)
        self._check_choice("pool", ("mean", "last", "first"))
        if self.pool == "first" and not self.bidirectional:
            raise ValueError(
                "pool first needs bidirectional: the first step of a causal model has seen "
                "nothing but itself"
            )
        super().__post_init__()


class Classifier(Stack):
    """Embedding or input projection, blocks, final norm, pooling over time, head.

        x = embedding[ids] or in_proj(features);  x = block_i(x) for each block
        logits = head(pool over time of norm(x))

    Shapes: ids [B, T] int64 or features [B, T, d_input]; logits [B, n_classes]. Sequences of
    different lengths are padded on the right, with lengths [B], or packed on one row B = 1, with
    cu_seqlens [n + 1] and then logits [n, n_classes]. A sequence has the same logits alone, padded
    or packed: padding is taken out before the blocks, and may hold anything.
    Precision: as Stack; pooled in float32 or wider.
    Initialisation: as Stack; embeddings N(0, 0.02), in_proj and head as torch.nn.Linear.
    Raises: ValueError, TypeError for wrong shapes, lengths, ids or labels.
    """

    architecture: ClassVar[str] = "longscan.Classifier"
    config_class = ClassifierConfig
    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        entry: dict[str, nn.Module] = {}
        if config.vocab_size is not None:
            entry["embedding"] = nn.Embedding(config.vocab_size, config.d_model)
        elif config.d_input is not None:
            entry["in_proj"] = nn.Linear(config.d_input, config.d_model)
        super().__init__(config, entry=entry)
        self.head = nn.Linear(config.d_model, config.n_classes)
        self._init_ends()

    def make_mixer(self, name: str, place: tuple[int, int]) -> Mixer:
        """The mixer of a block, as a Stack's; a pair of them if bidirectional."""
        if not self.config.bidirectional:
            return super().make_mixer(name, place)
        pair = super().make_mixer(name, place), super().make_mixer(name, place)
        return Bidirectional(self.config.d_model, pair)

    def _init_ends(self) -> None:
        for part in (self._entry, self.head):
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            else:
                part.reset_parameters()

    @property
    def _entry(self) -> nn.Embedding | nn.Linear:
        name = "in_proj" if self.config.vocab_size is None else "embedding"
        return self.get_submodule(name)  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """All parameters anew, as a fresh model has them."""
        super().reset_parameters()
        self._init_ends()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, *, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits [B, n_classes], or [n, n_classes] for n packed sequences."""
        self._check_rank(x)
        if lengths is not None:
            if cu_seqlens is not None:
                raise ValueError("pass lengths or cu_seqlens, not both")
            keep, cu_seqlens = _unpad(x, lengths)
            x = x[keep][None]
        if self.config.vocab_size is not None:
            check_ids(x, self.config.vocab_size)
        h, _ = self.features(self._entry(x), cu_seqlens=cu_seqlens)
        return self.head(self._pooled(widen(h), cu_seqlens).to(h.dtype))

    def _check_rank(self, x: Tensor) -> None:
        d = self.config.d_input
        if d is None and x.ndim != 2:
            raise ValueError(f"token ids must have shape [batch, time], not {list(x.shape)}")
        if d is not None and (x.ndim != 3 or x.shape[2] != d):
            raise ValueError(
                f"features must have shape [batch, time, d_input = {d}], not {list(x.shape)}"
            )
        if d is not None and not x.is_floating_point():
            raise TypeError(f"features must be floating point, got {x.dtype}")

    def _pooled(self, h: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if self.config.pool == "mean":
            if cu_seqlens is None:
                return h.mean(1)
            bounds = torch.tensor(check_cu_seqlens(cu_seqlens, h.shape[0], h.shape[1]))
            # One sum per sequence: as if it were alone, and the same in every run on any device.
            return torch.stack([part.mean(0) for part in h[0].split(bounds.diff().tolist())])
        if cu_seqlens is None:
            return h[:, -1 if self.config.pool == "last" else 0]
        cu_seqlens = cu_seqlens.to(h.device)
        return h[0, cu_seqlens[1:] - 1 if self.config.pool == "last" else cu_seqlens[:-1]]

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross entropy of labels [B] in 0..n_classes - 1; reduction: mean | sum | none ([B]).

        In training the mean contains the penalties of mixers that have some (see Mixer).
        """
        logits = self(x, lengths=lengths, cu_seqlens=cu_seqlens)
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels must have shape [{logits.shape[0]}], one per sequence, "
                f"not {list(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(labels))
            if low < 0 or high >= self.config.n_classes:
                raise ValueError(
                    f"labels lie in {low}..{high}, outside 0..{self.config.n_classes - 1}"
                )
        loss = F.cross_entropy(widen(logits), labels, reduction=reduction)
        if reduction == "mean" and (penalty := self.penalty()) is not None:
            loss = loss + penalty
        return loss


def _unpad(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where the steps are [B, T] bool, and the boundaries [B + 1] of the rows when packed."""
    batch, time = x.shape[:2]
    if lengths.is_floating_point() or lengths.shape != (batch,):
        raise ValueError(
            f"lengths must be {batch} whole numbers, one per row, not {lengths.dtype} "
            f"{list(lengths.shape)}"
        )
    with torch.inference_mode(False):
        lengths = lengths.to("cpu", torch.int64, copy=True)
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 1 or high > time:
            raise ValueError(f"lengths lie in {low}..{high}, outside 1..{time}, the steps of x")
        keep = torch.arange(time) < lengths[:, None]
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        return keep.to(x.device), bounds.to(x.device)


__all__ = ["Classifier", "ClassifierConfig"]
