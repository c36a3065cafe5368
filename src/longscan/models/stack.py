"""A stack of blocks around any mixer, or any pattern of mixers: the middle of every model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longscan.mixers.base import Mixer
from longscan.models.block import Block, Stream, build_mixer, build_norm, enter
from longscan.models.checkpoint import load_weights, read_config, read_weights, save_checkpoint
from longscan.models.config import StackConfig
from longscan.ops.norm import adds
from longscan.state import State

if TYPE_CHECKING:
    from longscan.parallel import Shards


class Stack(nn.Module):
    """Blocks and a final norm on features [B, T, d_model]; the base of the models.

        x = embedding_norm(x) if asked for;  x = block_i(x) for each block;  y = norm(x)

    Its state is State({"0": state of block 0's mixer, "1": ...}); a call continues what an earlier
    call returned, so stack(a) then stack(b, state) is stack(a | b), for any cut.

    Shapes: x, y [B, T, d_model]; or one row B = 1 of n packed sequences with cu_seqlens [n + 1],
    and then states have n rows.
    entry: modules that a model has before its blocks, by name.
    Precision: the residual stream is float32 (float64 in a float64 model) whatever the weights;
    `.to(dtype)` leaves a mixer's `keep_float32` parameters in float32.
    Initialisation: mixers and MLPs by their own rules; the last projection of every residual
    branch is divided by the root of the number of branches (as in GPT-2 and Mamba), so that the
    stream keeps its scale however deep the model is.
    Raises: ValueError for wrong shapes and for a state of another model.
    """

    architecture: ClassVar[str] = "longscan.Stack"
    config_class: ClassVar[type[StackConfig]] = StackConfig

    def __init__(
        self, config: StackConfig, *, entry: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        for name, module in (entry or {}).items():
            self.add_module(name, module)
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList()
        names = config.layers
        for i, name in enumerate(names):
            mixer = self.make_mixer(name, (names[:i].count(name), names.count(name)))
            self.blocks.append(Block(mixer, config, mlp=config.has_mlp(name)))
        self.norm = build_norm(config)
        self._scale_outputs()

    def make_mixer(self, name: str, place: tuple[int, int]) -> Mixer:
        """The mixer of a block: its name in the pattern, and its place as in `build_mixer`."""
        c = self.config
        return build_mixer(name, c.d_model, c.mixers.get(name, {}), place=place)

    def _scale_outputs(self) -> None:
        branches = sum(block.n_residuals for block in self._blocks)
        for block in self._blocks:
            block.scale_outputs(branches**-0.5)

    def reset_parameters(self) -> None:
        """All parameters anew, as a fresh model has them."""
        if self.embedding_norm is not None:
            self.embedding_norm.reset_parameters()
        for block in self._blocks:
            block.reset_parameters()
        self.norm.reset_parameters()
        self._scale_outputs()

    @property
    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def init_state(self, batch: int) -> State:
        """The state before the first token; passing None is the same."""
        return State({str(i): b.mixer.init_state(batch) for i, b in enumerate(self._blocks)})

    def _check_state(self, state: State | None) -> None:
        if state is not None and list(state) != [str(i) for i in range(len(self.blocks))]:
            raise ValueError(
                f"the state has entries {list(state)}, but this model has {len(self.blocks)} "
                'blocks "0", "1", ...; a state belongs to the model that returned it'
            )

    def features(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shards: Shards | None = None,
    ) -> tuple[Tensor, State]:
        """Features after the final norm [B, T, d_model], and the state.

        shards: x is this rank's part of sequences that `longscan.parallel` spreads over ranks;
        states are those of whole rows, the same on all ranks.
        """
        self._check_state(state)
        if shards is not None and cu_seqlens is not None:
            raise ValueError("pass cu_seqlens to `SequenceParallel.shards`, not beside shards")
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.config.d_model:
            raise ValueError(
                f"features must have shape [batch, time >= 1, {self.config.d_model}], "
                f"not {list(x.shape)}"
            )
        if cu_seqlens is not None and not torch.compiler.is_compiling():
            cu_seqlens = ordinary(cu_seqlens)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        again = self.config.checkpoint_blocks and self.training and torch.is_grad_enabled()
        carried, first = {}, None
        # Sums are left to the norm behind them, where a kernel makes both and nobody looks.
        stream: Stream = (x, None) if not again and adds(x) and not self._watched() else x
        for i, block in enumerate(self._blocks):
            s = None if state is None else state.child(str(i))
            more: dict[str, Any] = {"cu_seqlens": cu_seqlens, "first": first, "shards": shards}
            if again:
                if shards is not None:  # what came from other ranks is kept (see parallel/tape.py)
                    more["context_fn"] = shards.tape.twice
                stream, s, first = checkpoint(block, stream, s, **more, use_reentrant=False)  # type: ignore[misc]
            else:
                stream, s, first = block(stream, s, **more)
            carried[str(i)] = s
        x, branch = stream if isinstance(stream, tuple) else (stream, None)
        after = State(carried) if shards is None else shards.final(State(carried))
        return enter(self.norm, x, branch)[0], after

    def _watched(self) -> bool:
        """Whether hooks look at what enters or leaves a block: they shall see the whole stream."""
        return any(
            b._forward_hooks or b._forward_pre_hooks or b._backward_hooks or b._backward_pre_hooks
            for b in self._blocks
        )

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shards: Shards | None = None,
    ) -> tuple[Tensor, State]:
        return self.features(x, state, cu_seqlens=cu_seqlens, shards=shards)

    def penalty(self) -> Tensor | None:
        """What mixers want added to the loss of the last forward in training, or None."""
        asked = [m.penalty for m in self.modules() if isinstance(m, Mixer)]
        penalties = [p for p in asked if p is not None]
        return torch.stack(penalties).sum() if penalties else None

    def parameter_groups(
        self, *, weight_decay: float, lr: float, decay_embeddings: bool = False
    ) -> list[dict[str, Any]]:
        """`parameter_groups` of this model: an embedding table is not decayed unless asked for."""
        spared = () if decay_embeddings else ("embedding.weight",)
        return parameter_groups(self, weight_decay=weight_decay, lr=lr, no_weight_decay=spared)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, each whole or not at all."""
        save_checkpoint(folder, self.architecture, self.config.to_dict(), self)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote, with weights in float32 (`.to(dtype)` afterwards, if wanted).

        Raises: models.checkpoint.CheckpointError saying what does not fit.
        """
        model = cls(cls.config_class.from_dict(read_config(folder, cls.architecture)))
        load_weights(model, read_weights(folder), str(folder))
        return model.to(device)


def parameter_groups(
    module: nn.Module, *, weight_decay: float, lr: float, no_weight_decay: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters in groups for an optimiser: params, lr, weight_decay and a name.

    Not decayed: whatever has fewer than two axes (biases, norm weights, gates), what a mixer
    anywhere inside lists in its `no_weight_decay` or `keep_float32`, and the full names in the
    argument. What a mixer lists in `lr_limit` gets no more than that learning rate: where lr is
    above it, in a group of its own.
    """
    spared, limits = set(no_weight_decay), {}
    for prefix, part in module.named_modules():
        if isinstance(part, Mixer):
            dot = prefix and prefix + "."
            spared.update(dot + n for n in (*part.no_weight_decay, *part.keep_float32))
            limits.update({dot + n: limit for n, limit in part.lr_limit.items()})
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            decayed = p.ndim >= 2 and name not in spared
            groups.setdefault((decayed, min(lr, limits.get(name, lr))), []).append(p)
    return [
        {
            "params": params,
            "lr": rate,
            "weight_decay": weight_decay if decayed else 0.0,
            "name": ("decay" if decayed else "no_decay") + (f" lr {rate:g}" if rate != lr else ""),
        }
        for (decayed, rate), params in sorted(groups.items(), key=lambda g: g[0], reverse=True)
    ]


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError, TypeError unless ids are [B, T] token ids of the vocabulary.

    Values are looked at on a CPU only, as doing so would stall a device.
    """
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(
            f"ids must have shape [batch, time], both at least 1, not {list(ids.shape)}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"ids lie in {low}..{high}, outside 0..{vocab_size - 1}; "
                "the model's vocab_size must be the tokenizer's"
            )


def ordinary(cu_seqlens: Tensor) -> Tensor:
    """The same boundaries as a tensor that counts its changes, which inference tensors do not.

    The layout of a packed row is kept with the tensor, so it must not be made anew in each layer.
    """
    if not cu_seqlens.is_inference():
        return cu_seqlens
    with torch.inference_mode(False):
        return cu_seqlens.clone()


__all__ = ["Stack", "check_ids", "ordinary", "parameter_groups"]
