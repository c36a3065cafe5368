"""What a model is made of, as plain data."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self

from longscan import registry

_ITEM = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?:\*\s*(?P<repeat>\S+))?")


def parse_pattern(pattern: str, n_layers: int) -> tuple[str, ...]:
    """The mixer of each block: "a*3,b" is a, a, a, b, and is begun anew until n_layers are named.

    Raises: ValueError for an empty pattern or item, an unknown mixer (naming the nearest), a bad
    repeat, or more blocks than n_layers.
    """
    names: list[str] = []
    for item in pattern.split(","):
        item = item.strip()
        if not item:
            raise ValueError(
                f"the pattern {pattern!r} has an empty item; write mixer names with commas "
                'between them, such as "gated_deltanet*3,gated_attention"'
            )
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f'cannot read {item!r} in the pattern; write "name" or "name*3"')
        registry.entry(match["name"])
        repeat = match["repeat"] or "1"
        if not repeat.isdecimal() or int(repeat) == 0:
            raise ValueError(f"the repeat in {item!r} must be a whole number from 1 on")
        names += [match["name"]] * int(repeat)
    if len(names) > n_layers:
        raise ValueError(
            f"the pattern {pattern!r} names {len(names)} blocks, but n_layers is {n_layers}; "
            "raise n_layers or shorten the pattern"
        )
    return tuple(names[i % len(names)] for i in range(n_layers))


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes and parts of a Stack: what every model has between its input and its head.

    Args:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        pattern: mixers of the blocks, "gated_deltanet*3,gated_attention"; cycled to n_layers.
        mixers: settings of the mixers by name, {"gated_attention": {"n_heads": 8}}.
        mlp: auto (each architecture's own block) | gated (a gated MLP after every mixer) | none.
        d_ff: hidden width of the MLP; None: int(8/3 d_model) rounded up to a multiple of 64.
        activation: of the MLP's gate: silu (SwiGLU) | gelu (the exact one, GEGLU).
        norm: of blocks and stream: rms (RMSNorm) | layer (LayerNorm).
        norm_bias: LayerNorms have a bias.
        norm_eps: added to the mean square or variance in these norms.
        embedding_norm: a norm of the same kind before the first block, as in RWKV.
        dropout: probability of zeroing a number that a residual branch adds, while training.
        checkpoint_blocks: while training keep only the input of each block and compute the rest
            anew in backward; slower by a forward pass, far less memory.

    Raises: ValueError saying which field is wrong.
    """

    d_model: int = 256
    n_layers: int = 4
    pattern: str = "gated_deltanet"
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    mlp: str = "auto"
    d_ff: int | None = None
    activation: str = "silu"
    norm: str = "rms"
    norm_bias: bool = True
    norm_eps: float = 1e-5
    embedding_norm: bool = False
    dropout: float = 0.0
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "d_ff"):
            self._check_count(name, optional=name == "d_ff")
        if self.mlp == "swiglu":  # the word of earlier files, from when there was one activation
            object.__setattr__(self, "mlp", "gated")
        for name, choices in (
            ("mlp", ("auto", "gated", "none")),
            ("activation", ("silu", "gelu")),
            ("norm", ("rms", "layer")),
        ):
            self._check_choice(name, choices)
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability from 0 to below 1, not {self.dropout}")
        if not isinstance(self.mixers, dict) or not all(
            isinstance(v, dict) for v in self.mixers.values()
        ):
            raise ValueError('mixers must map mixer names to settings: {"mamba2": {"d_state": 64}}')
        # A copy, as a frozen value must not change through the caller's dictionary; by way of JSON,
        # so that a config read back equals the one written.
        try:
            object.__setattr__(self, "mixers", json.loads(json.dumps(self.mixers)))
        except TypeError as error:
            raise ValueError(f"settings of mixers must be plain JSON data: {error}") from error
        used = self.layers
        for name in self.mixers:
            registry.entry(name)
            if name not in used:
                raise ValueError(
                    f"mixers has settings for {name!r}, which the pattern {self.pattern!r} "
                    "does not use"
                )

    def _check_count(self, name: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            words = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ValueError(f"{name} must be {words}, not {value!r}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer name of each block."""
        return parse_pattern(self.pattern, self.n_layers)

    def has_mlp(self, mixer: str) -> bool:
        """Whether a block with this mixer has an MLP behind it."""
        return registry.entry(mixer).mlp if self.mlp == "auto" else self.mlp == "gated"

    @property
    def ff_width(self) -> int:
        """The hidden width of the MLPs."""
        return self.d_ff or -(-(self.d_model * 8 // 3) // 64) * 64

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        self._check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; fields left out have their defaults.

        Raises: ValueError for unknown or missing fields.
        """
        cls._check_fields(data)
        for f in dataclasses.fields(cls):
            optional = (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
            if not optional and f.name not in data:
                raise ValueError(f"a {cls.__name__} needs {f.name}")
        return cls(**data)

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def _check_fields(cls, data: dict[str, Any]) -> None:
        known = [f.name for f in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"a {cls.__name__} has no setting {name!r}; {hint}")


@dataclass(frozen=True)
class LanguageModelConfig(StackConfig):
    """Sizes and parts of a LanguageModel: those of a StackConfig, and of its two tables.

    Args:
        vocab_size: number of token ids.
        tie_embeddings: the head is the embedding table.
        pad_vocab_multiple: rows of the tables are padded up to a multiple of this, for speed; the
            padding never takes part in a loss or a prediction.
        logit_cap: logits are bent into (-cap, cap), by cap tanh(logits / cap); None: left as
            they are.

    Raises: ValueError saying which field is wrong.
    """

    vocab_size: int
    _: KW_ONLY
    tie_embeddings: bool = True
    pad_vocab_multiple: int = 8
    logit_cap: float | None = None

    def __post_init__(self) -> None:
        self._check_count("vocab_size")
        self._check_count("pad_vocab_multiple")
        if self.logit_cap is not None and not 0 < self.logit_cap < math.inf:
            raise ValueError(f"logit_cap must be a number above 0, or None, not {self.logit_cap}")
        super().__post_init__()

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table, padding included."""
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple


__all__ = ["LanguageModelConfig", "StackConfig", "parse_pattern"]
