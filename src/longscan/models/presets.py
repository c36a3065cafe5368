"""Published model sizes, and small ones of our own, by name."""

from __future__ import annotations

import difflib
from typing import Any

from longscan.models.config import LanguageModelConfig


def _mamba(d_model: int, n_layers: int, name: str = "mamba", pad: int = 8) -> dict[str, Any]:
    # 50277 is the GPT-NeoX tokenizer; the blocks have no MLP.
    return {
        "vocab_size": 50277,
        "d_model": d_model,
        "n_layers": n_layers,
        "pattern": name,
        "pad_vocab_multiple": pad,
    }


def _fla(
    pattern: str, d_model: int, n_layers: int, tied: bool = False, **settings: Any
) -> dict[str, Any]:
    # The MLP of these authors: int(8/3 d_model) rounded up to a multiple of 256; eps 1e-6
    # everywhere, in the mixers too.
    return {
        "vocab_size": 32000,
        "d_model": d_model,
        "n_layers": n_layers,
        "pattern": pattern,
        "mixers": {pattern: {"norm_eps": 1e-6, **settings}},
        "d_ff": -(-(d_model * 8 // 3) // 256) * 256,
        "norm_eps": 1e-6,
        "tie_embeddings": tied,
    }


def _product(d_model: int, n_steps: int, n_heads: int) -> dict[str, Any]:
    # Ungated, no output gate, heads of 128, eigenvalues in [-1, 1]: the language models of the
    # paper. Fewer heads pay for more steps, so that sizes of one name are equal.
    return _fla(
        "deltaproduct", d_model, 24, tied=True, n_steps=n_steps, n_heads=n_heads, d_key=128,
        d_value=128, forget_gate=False, output_gate=False, negative_eigenvalues=True,
    )  # fmt: skip


def _ours(d_model: int, n_layers: int, pattern: str = "gated_deltanet") -> dict[str, Any]:
    # Bytes by default: preset("micro", vocab_size=...) for another tokenizer.
    return {"vocab_size": 257, "d_model": d_model, "n_layers": n_layers, "pattern": pattern}


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2312.00752
    "mamba-130m": _mamba(768, 24),
    "mamba-370m": _mamba(1024, 48),
    "mamba-790m": _mamba(1536, 48),
    "mamba-1.4b": _mamba(2048, 48),
    "mamba-2.8b": _mamba(2560, 64),
    # arXiv 2405.21060
    "mamba2-130m": _mamba(768, 24, "mamba2", 16),
    "mamba2-370m": _mamba(1024, 48, "mamba2", 16),
    "mamba2-780m": _mamba(1536, 48, "mamba2", 16),
    "mamba2-1.3b": _mamba(2048, 48, "mamba2", 16),
    "mamba2-2.7b": _mamba(2560, 64, "mamba2", 16),
    # arXiv 2312.06635
    "gla-340m": _fla("gla", 1024, 24, n_heads=4),
    "gla-1.3b": _fla("gla", 2048, 24, n_heads=4),
    # arXiv 2406.06484
    "deltanet-340m": _fla("deltanet", 1024, 24, n_heads=8),
    "deltanet-1.3b": _fla("deltanet", 2048, 24, n_heads=16),
    # arXiv 2412.06464, as in its maintained implementation
    "gated_deltanet-1.3b": _fla("gated_deltanet", 2048, 21, n_heads=6, d_key=256, d_value=512),
    # arXiv 2502.10297; the number behind the name is the paper's n_h
    "deltaproduct2-213m": _product(736, 2, 6),
    "deltaproduct3-213m": _product(768, 3, 4),
    "deltaproduct2-392m": _product(1024, 2, 8),
    "deltaproduct3-392m": _product(1024, 3, 6),
    "deltaproduct2-805m": _product(1468, 2, 12),
    "deltaproduct3-805m": _product(1536, 3, 8),
    # ours, for a CPU
    "nano": _ours(128, 4),
    "micro": _ours(256, 6),
    "mini": _ours(384, 8, "gated_deltanet*3,gated_attention"),
    "small": _ours(768, 12, "gated_deltanet*3,gated_attention"),
}


def preset(name: str, **overrides: Any) -> LanguageModelConfig:
    """The configuration of a published or own size; `overrides` replace single fields.

    Raises: ValueError for an unknown name or field, naming the nearest.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}; {hint}")
    return LanguageModelConfig.from_dict({**PRESETS[name], **overrides})


__all__ = ["PRESETS", "preset"]
