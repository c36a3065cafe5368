"""A causal language model over any mixer, or any pattern of mixers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longscan.mixers.base import Mixer
from longscan.models.block import Block, RMSNorm, build_mixer
from longscan.models.checkpoint import load_weights, read_config, read_weights, save_checkpoint
from longscan.models.config import LanguageModelConfig
from longscan.ops.loss import linear_cross_entropy
from longscan.state import State

ARCHITECTURE = "longscan.LanguageModel"


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm, head.

        x = embedding[ids];  x = block_i(x) for each block;  logits = norm(x) @ head^T

    Its state is State({"0": state of block 0's mixer, "1": ...}); a call continues what an earlier
    call returned, so model(a) then model(b, state) is model(a | b), for any cut.

    Shapes: ids [B, T] int64; logits [B, T, vocab_size]; or one row B = 1 of n packed sequences
    with cu_seqlens [n + 1], and then states have n rows.
    Precision: the residual stream is float32 (float64 in a float64 model) whatever the weights;
    `.to(dtype)` leaves a mixer's `keep_float32` parameters in float32.
    Initialisation: embeddings, and an untied head, N(0, 0.02); mixers and MLPs by their own rules;
    the last projection of every residual branch is divided by the root of the number of branches
    (as in GPT-2 and Mamba), so that the stream keeps its scale however deep the model is.
    Raises: ValueError, TypeError for ids out of range, wrong shapes, a state of another model.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = nn.Embedding(c.vocab_rows, c.d_model)
        self.blocks = nn.ModuleList(
            Block(
                build_mixer(name, c.d_model, c.mixers.get(name, {})),
                c.d_model,
                c.ff_width if c.has_mlp(name) else None,
                c.norm_eps,
            )
            for name in c.layers
        )
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_rows, bias=False)
        self._finish_init()

    def _finish_init(self) -> None:
        """What remains when every part has been initialised by itself."""
        for table in (self.embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        branches = sum(block.n_residuals for block in self._blocks)
        for block in self._blocks:
            block.scale_outputs(branches**-0.5)

    def reset_parameters(self) -> None:
        """All parameters anew, as a fresh model has them."""
        for block in self._blocks:
            block.reset_parameters()
        self.norm.reset_parameters()
        self._finish_init()

    @property
    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def head_weight(self) -> Tensor:
        """The table [vocab_rows, d_model] that turns hidden states into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters, tied ones counted once; without the embedding and head tables if asked."""
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            tables = (self.embedding, self.head)
            total -= sum(t.weight.numel() for t in tables if t is not None)
        return total

    def init_state(self, batch: int) -> State:
        """The state before the first token; passing None is the same."""
        return State({str(i): b.mixer.init_state(batch) for i, b in enumerate(self._blocks)})

    def _check(self, ids: Tensor, state: State | None) -> None:
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(
                f"ids must have shape [batch, time], both at least 1, not {list(ids.shape)}"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be int64, got {ids.dtype}")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"ids lie in {low}..{high}, outside 0..{self.config.vocab_size - 1}; "
                    "the model's vocab_size must be the tokenizer's"
                )
        if state is not None and list(state) != [str(i) for i in range(len(self.blocks))]:
            raise ValueError(
                f"the state has entries {list(state)}, but this model has {len(self.blocks)} "
                'blocks "0", "1", ...; a state belongs to the model that returned it'
            )

    def hidden(
        self, ids: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states [B, T, d_model] after the final norm, and the state."""
        self._check(ids, state)
        if cu_seqlens is not None and not torch.compiler.is_compiling():
            cu_seqlens = _ordinary(cu_seqlens)
        x = self.embedding(ids)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        again = self.config.checkpoint_blocks and self.training and torch.is_grad_enabled()
        carried = {}
        for i, block in enumerate(self.blocks):
            s = None if state is None else state.child(str(i))
            if again:
                x, s = checkpoint(block, x, s, cu_seqlens=cu_seqlens, use_reentrant=False)
            else:
                x, s = block(x, s, cu_seqlens=cu_seqlens)
            carried[str(i)] = s
        return self.norm(x), State(carried)

    def logits(self, h: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., d_model]."""
        return F.linear(h, self.head_weight)[..., : self.config.vocab_size]

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits [B, T, vocab_size] and the state.

        attention_mask [B, T]: 1 for tokens, 0 for padding on the left or on the right of a row.
        Padding is taken out before the blocks (the rows are packed) and has logits 0; states have
        B rows and know nothing of it.
        """
        if attention_mask is None:
            h, state = self.hidden(ids, state, cu_seqlens=cu_seqlens)
            return self.logits(h), state
        if cu_seqlens is not None:
            raise ValueError("pass attention_mask or cu_seqlens, not both")
        keep, bounds = _unpad(ids, attention_mask)
        h, state = self.hidden(ids[keep][None], state, cu_seqlens=bounds)
        logits = self.logits(h[0])
        out = logits.new_zeros(*ids.shape, logits.shape[-1])
        return out.masked_scatter(keep[..., None], logits), state

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, State]:
        """Cross entropy of targets [B, T] (-100: none) and the state; logits are never whole.

        reduction: mean over tokens with a target (0 if there are none) | sum | none ([B, T]).
        """
        if targets.shape != ids.shape:
            raise ValueError(
                f"targets {list(targets.shape)} must have the shape of ids {list(ids.shape)}"
            )
        h, state = self.hidden(ids, state, cu_seqlens=cu_seqlens)
        loss = linear_cross_entropy(
            h.flatten(0, 1),
            self.head_weight,
            targets.flatten(),
            reduction=reduction,
            n_classes=self.config.vocab_size,
        )
        return (loss.view_as(targets) if reduction == "none" else loss), state

    def parameter_groups(
        self, *, weight_decay: float, lr: float, decay_embeddings: bool = False
    ) -> list[dict[str, Any]]:
        """Trainable parameters in groups for an optimiser: params, lr, weight_decay and a name.

        Not decayed: whatever has fewer than two axes (biases, norm weights, gates), what a mixer
        lists in `no_weight_decay` or `keep_float32`, and the embedding table unless asked for (an
        untied head is decayed). A mixer class may have `lr_scale`, parameter name -> factor: those
        parameters get groups of their own with lr times the factor.
        """
        spared, factors = set(), {}
        if not decay_embeddings:
            spared.add("embedding.weight")
        for prefix, module in self.named_modules():
            if isinstance(module, Mixer):
                spared.update(f"{prefix}.{n}" for n in module.no_weight_decay)
                spared.update(f"{prefix}.{n}" for n in module.keep_float32)
                scale: dict[str, float] = getattr(module, "lr_scale", {})
                factors.update({f"{prefix}.{n}": f for n, f in scale.items()})
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                decayed = p.ndim >= 2 and name not in spared
                groups.setdefault((decayed, factors.get(name, 1.0)), []).append(p)
        return [
            {
                "params": params,
                "lr": lr * factor,
                "weight_decay": weight_decay if decayed else 0.0,
                "name": ("decay" if decayed else "no_decay")
                + (f" lr x {factor:g}" if factor != 1 else ""),
            }
            for (decayed, factor), params in sorted(
                groups.items(), key=lambda g: g[0], reverse=True
            )
        ]

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, each whole or not at all."""
        save_checkpoint(folder, ARCHITECTURE, self.config.to_dict(), self)

    @staticmethod
    def load(folder: str | Path, device: torch.device | str = "cpu") -> LanguageModel:
        """Read what `save` wrote, with weights in float32 (`.to(dtype)` afterwards, if wanted).

        Raises: models.checkpoint.CheckpointError saying what does not fit.
        """
        model = LanguageModel(LanguageModelConfig.from_dict(read_config(folder, ARCHITECTURE)))
        load_weights(model, read_weights(folder), str(folder))
        return model.to(device)


def _ordinary(cu_seqlens: Tensor) -> Tensor:
    """The same boundaries as a tensor that counts its changes, which inference tensors do not.

    The layout of a packed row is kept with the tensor, so it must not be made anew in each layer.
    """
    if not cu_seqlens.is_inference():
        return cu_seqlens
    with torch.inference_mode(False):
        return cu_seqlens.clone()


def _unpad(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens are [B, T] bool, and the boundaries [B + 1] of the rows when packed."""
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {list(mask.shape)} must have the shape of ids {list(ids.shape)}"
        )
    keep = mask.bool()
    # One run of tokens per row: exactly one rise, counting a rise at the edge.
    rises = (keep & ~F.pad(keep, (1, 0))[:, :-1]).sum(1)
    if (rises != 1).any():
        row = int((rises != 1).nonzero()[0])
        what = "masks every token" if rises[row] == 0 else "has padding between tokens"
        raise ValueError(
            f"row {row} of attention_mask {what}; padding may lie on the left and on the right of "
            "at least one token"
        )
    with torch.inference_mode(False):
        lengths = keep.clone().sum(1)
        return keep, F.pad(lengths.cumsum(0), (1, 0))


__all__ = ["LanguageModel", "LanguageModelConfig"]
