"""Whole language models from other libraries' checkpoint folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from longscan.models.checkpoint import CheckpointError, load_weights
from longscan.models.config import LanguageModelConfig
from longscan.models.language_model import LanguageModel
from longscan.pretrained import qwen, rwkv, xlstm
from longscan.pretrained._convert import convert
from longscan.pretrained.layers import LAYERS

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one kind of checkpoint becomes a LanguageModel."""

    config: Callable[[Config], LanguageModelConfig]
    state_dict: Callable[[Mapping[str, Tensor], LanguageModelConfig], dict[str, Tensor]]


def _fla(mixer: str, settings: Callable[[Config], dict[str, Any]]) -> Family:
    """A model of flash-linear-attention whose layers are all the same mixer."""

    def config(c: Config) -> LanguageModelConfig:
        if c.get("attn"):
            raise CheckpointError(
                "this checkpoint mixes in softmax attention (its config has 'attn'), which the "
                f"{mixer} loader does not read; load its layers with layer_state_dict"
            )
        if c.get("hidden_act", "swish") not in ("swish", "silu"):
            raise CheckpointError(f"the MLP uses {c['hidden_act']!r}; only swish is supported")
        width = c.get("intermediate_size")
        if width is None:
            width = -(-int(c["hidden_size"] * c.get("hidden_ratio", 4) * 2 / 3) // 256) * 256
        own = {
            "d_conv": c.get("conv_size", 4) if c.get("use_short_conv", True) else 0,
            "n_heads": c["num_heads"],
            "norm_eps": c.get("norm_eps", 1e-6),
            **settings(c),
        }
        return LanguageModelConfig(
            vocab_size=c["vocab_size"],
            d_model=c["hidden_size"],
            n_layers=c["num_hidden_layers"],
            pattern=mixer,
            mixers={mixer: own},
            mlp="gated",
            d_ff=width,
            norm_eps=c.get("norm_eps", 1e-6),
            tie_embeddings=bool(c.get("tie_word_embeddings", False)),
            pad_vocab_multiple=1,
        )

    def state_dict(tensors: Mapping[str, Tensor], c: LanguageModelConfig) -> dict[str, Tensor]:
        table = {"embedding.weight": "model.embeddings.weight", "norm.weight": "model.norm.weight"}
        if not c.tie_embeddings:
            table["head.weight"] = "lm_head.weight"
        for i in range(c.n_layers):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            for name, sources in LAYERS[mixer].items():
                table[f"{ours}.mixer.{name}"] = _prefixed(f"{theirs}.attn.", sources)
            table[f"{ours}.norm.weight"] = f"{theirs}.attn_norm.weight"
            table[f"{ours}.mlp_norm.weight"] = f"{theirs}.mlp_norm.weight"
            mlp = f"{theirs}.mlp"
            table[f"{ours}.mlp.gate_up.weight"] = f"{mlp}.gate_proj.weight {mlp}.up_proj.weight"
            table[f"{ours}.mlp.down.weight"] = f"{mlp}.down_proj.weight"
        return convert(_untied(tensors, c), table)

    return Family(config, state_dict)


def _prefixed(prefix: str, sources: str) -> str:
    """A table entry with `prefix` before each name."""
    return " ".join(
        "|".join(prefix + name for name in source.split("|")) for source in sources.split()
    )


def _untied(tensors: Mapping[str, Tensor], c: LanguageModelConfig) -> dict[str, Tensor]:
    """Without the copy of the embedding that some writers store for a tied head."""
    return {k: v for k, v in tensors.items() if not (c.tie_embeddings and k == "lm_head.weight")}


def _head_sizes(c: Config) -> dict[str, Any]:
    """Head sizes of the layers that give them as a share of the width."""
    return {
        "d_key": int(c["hidden_size"] * c.get("expand_k", 1.0)) // c["num_heads"],
        "d_value": int(c["hidden_size"] * c.get("expand_v", 1.0)) // c["num_heads"],
    }


def _head_dim(c: Config) -> dict[str, Any]:
    """Head sizes of the layers that name a head_dim."""
    return {
        "d_key": c["head_dim"],
        "d_value": int(c["head_dim"] * c.get("expand_v", 1.0)),
        "negative_eigenvalues": bool(c.get("allow_neg_eigval", False)),
    }


def _gla(c: Config) -> dict[str, Any]:
    if c.get("feature_map"):
        raise CheckpointError(f"GLA with the feature map {c['feature_map']!r} is not supported")
    return {
        **_head_sizes(c),
        "n_kv_heads": c.get("num_kv_heads"),
        "gate_floor": c.get("clamp_min"),
        "output_gate": c.get("use_output_gate", True),
    }


def _deltanet(c: Config) -> dict[str, Any]:
    if not c.get("use_beta", True) or not c.get("use_output_norm", True):
        raise CheckpointError("DeltaNet without beta or without output norm is not supported")
    return {
        **_head_sizes(c),
        "qk_activation": c.get("qk_activation", "silu"),
        "qk_norm": c.get("qk_norm", "l2"),
        "output_gate": bool(c.get("use_gate", False)),
        "negative_eigenvalues": bool(c.get("allow_neg_eigval", False)),
    }


def _gated_deltanet(c: Config) -> dict[str, Any]:
    return {
        **_head_dim(c),
        "n_value_heads": c.get("num_v_heads"),
        "output_gate": bool(c.get("use_gate", True)),
    }


def _kda(c: Config) -> dict[str, Any]:
    return {
        **_head_dim(c),
        "n_value_heads": c.get("num_v_heads"),
        "gate_floor": c.get("lower_bound") if c.get("safe_gate") else None,
    }


def _deltaproduct(c: Config) -> dict[str, Any]:
    return {
        **_head_dim(c),
        "n_value_heads": c.get("num_v_heads"),
        "n_steps": c.get("num_householder", 1),
        "forget_gate": bool(c.get("use_forget_gate", False)),
        "output_gate": bool(c.get("use_output_gate", True)),
    }


def _mamba_tensors(tensors: Mapping[str, Tensor], c: LanguageModelConfig) -> dict[str, Tensor]:
    """Mamba and Mamba-2, the authors' names or Hugging Face's."""
    table = {
        "embedding.weight": "backbone.embedding.weight|backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
    }
    if not c.tie_embeddings:
        table["head.weight"] = "lm_head.weight"
    tensors = _untied(tensors, c)
    for name in tensors:
        if name.startswith("backbone.layers."):
            _, _, i, rest = name.split(".", 3)
            table[f"blocks.{i}.{rest}"] = name
    return convert(tensors, table)


def _mamba_hub(c: Config) -> LanguageModelConfig:
    """A config.json of Hugging Face: mamba, falcon_mamba, mamba2."""
    kind = c["model_type"]
    if kind == "mamba2":
        low, high = (_number(x) for x in c.get("time_step_limit", (0.0, float("inf"))))
        mixer, own = (
            "mamba2",
            {
                "d_state": c["state_size"],
                "d_head": c["head_dim"],
                "n_groups": c["n_groups"],
                "norm_eps": c["layer_norm_epsilon"],
                **({} if (low, high) == (0.0, float("inf")) else {"dt_limit": [low, high]}),
            },
        )
    else:
        mixer, own = (
            "mamba",
            {
                "d_state": c["state_size"],
                "dt_rank": c["time_step_rank"],
                "bcdt_norm_eps": c["mixer_rms_eps"] if kind == "falcon_mamba" else None,
            },
        )
    if c.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {c['hidden_act']!r} is not supported, only silu")
    own |= {
        "d_conv": c["conv_kernel"],
        "expand": c["expand"],
        "bias": c.get("use_bias", False),
        "conv_bias": c.get("use_conv_bias", True),
    }
    return LanguageModelConfig(
        vocab_size=c["vocab_size"],
        d_model=c["hidden_size"],
        n_layers=c["num_hidden_layers"],
        pattern=mixer,
        mixers={mixer: own},
        norm_eps=c["layer_norm_epsilon"],
        tie_embeddings=bool(c.get("tie_word_embeddings", True)),
        pad_vocab_multiple=1,
    )


def _number(x: Any) -> float:
    """A number of a config.json, in any of the ways infinity is written there."""
    return float(x["__float__"] if isinstance(x, Mapping) else x)


_OFFICIAL_NAMES = {"headdim": "d_head", "ngroups": "n_groups", "rmsnorm": "norm"}
_OFFICIAL_SAME = (
    "d_state", "d_conv", "expand", "dt_rank", "d_ssm", "norm_before_gate", "bias", "conv_bias",
)  # fmt: skip
_OFFICIAL_NO_EFFECT = (
    "dt_min", "dt_max", "dt_init", "dt_init_floor", "dt_scale", "A_init_range", "conv_init",
    "chunk_size", "use_mem_eff_path", "use_fast_path",
)  # fmt: skip


def _mamba_authors(c: Config) -> LanguageModelConfig:
    """A config.json of the authors' code."""
    if c.get("attn_layer_idx") or c.get("d_intermediate"):
        raise CheckpointError("hybrids with attention or MLP layers are not supported here")
    if not c.get("rms_norm", True):
        raise CheckpointError("this checkpoint uses LayerNorm (rms_norm false); not supported")
    ssm = dict(c.get("ssm_cfg") or {})
    mixer = {"Mamba1": "mamba", "Mamba2": "mamba2"}.get(ssm.pop("layer", "Mamba1"))
    if mixer is None:
        raise CheckpointError(f"ssm_cfg names an unknown layer: {c['ssm_cfg']['layer']}")
    own = {}
    for key, value in ssm.items():
        if key in _OFFICIAL_SAME or key in _OFFICIAL_NAMES:
            own[_OFFICIAL_NAMES.get(key, key)] = value
        elif key not in _OFFICIAL_NO_EFFECT:
            raise CheckpointError(f"ssm_cfg has {key!r}, which is not supported")
    multiple = c.get("pad_vocab_size_multiple", 8)
    return LanguageModelConfig(
        # The padded vocabulary, as its rows were trained and count in the published losses.
        vocab_size=-(-c["vocab_size"] // multiple) * multiple,
        d_model=c["d_model"],
        n_layers=c["n_layer"],
        pattern=mixer,
        mixers={mixer: own},
        tie_embeddings=c.get("tie_embeddings", True),
        pad_vocab_multiple=1,
    )


FAMILIES: dict[str, Family] = {
    "gla": _fla("gla", _gla),
    "delta_net": _fla("deltanet", _deltanet),
    "gated_deltanet": _fla("gated_deltanet", _gated_deltanet),
    "kda": _fla("kda", _kda),
    "gated_deltaproduct": _fla("deltaproduct", _deltaproduct),
    "mamba": Family(_mamba_hub, _mamba_tensors),
    "falcon_mamba": Family(_mamba_hub, _mamba_tensors),
    "mamba2": Family(_mamba_hub, _mamba_tensors),
    "authors' mamba": Family(_mamba_authors, _mamba_tensors),
    "xlstm": Family(xlstm.xlstm_config, xlstm.xlstm_state_dict),
}


def from_pretrained(path: str | Path) -> LanguageModel:
    """The LanguageModel in a checkpoint of another library, or of longscan itself.

    From one file (*.safetensors, *.pth): RWKV-4, 5 and 7 with the authors' names, in their layout
    or rwkv.cpp's; those below if their config.json is in its metadata, as "config". A folder:
    reads config.json and the weights (*.safetensors, or the pytorch_model.bin of the Mamba
    authors) of: flash-linear-attention (gla, delta_net, gated_deltanet, kda,
    gated_deltaproduct), the Mamba authors' package, Hugging Face (mamba, mamba2, falcon_mamba,
    qwen3 with or without gated attention, xlstm).

    Precision: weights become float32, whatever they were stored in.
    Raises: CheckpointError saying what is missing, unknown or does not fit.
    """
    folder = Path(path)
    if folder.is_file():
        return _from_file(folder)
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no checkpoint: there is no config.json") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json is not JSON: {error}") from error
    if "architecture" in c:
        return LanguageModel.load(folder)
    return _build(c, _read_tensors(folder), str(folder))


def _from_file(file: Path) -> LanguageModel:
    tensors, metadata = _read_file(file)
    if rwkv.is_rwkv(tensors):
        config = rwkv.rwkv_config(tensors)
        model = LanguageModel(config)
        load_weights(model, rwkv.rwkv_state_dict(tensors, config), str(file))
        return model
    if "config" not in metadata:
        raise CheckpointError(
            f"{file} alone does not say what model it is: give the folder with its config.json"
        )
    return _build(json.loads(metadata["config"]), tensors, str(file))


def _build(c: Config, tensors: Mapping[str, Tensor], source: str) -> LanguageModel:
    kind = c.get("model_type", "authors' mamba" if "ssm_cfg" in c else None)
    family = {**FAMILIES, "qwen3": Family(qwen.qwen3_config, _qwen_state_dict(c))}.get(kind)
    if family is None:
        raise CheckpointError(f"unknown model type {kind!r}; known: {', '.join(FAMILIES)}, qwen3")
    config = family.config(c)
    model = LanguageModel(config)
    load_weights(model, family.state_dict(tensors, config), source)
    return model


def _qwen_state_dict(c: Config):
    return lambda tensors, _: qwen.qwen3_state_dict(tensors, c)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in float32 if they are floating point."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(_read_file(file)[0])
    binary = folder / "pytorch_model.bin"
    if not tensors and binary.exists():
        tensors = _read_file(binary)[0]
    if not tensors:
        raise CheckpointError(
            f"{folder} holds no weights: neither model*.safetensors nor pytorch_model.bin"
        )
    return tensors


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, in float32 if they are floating point, and its metadata.

    Raises: CheckpointError if the file is not a checkpoint, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    metadata: dict[str, str] = {}
    try:
        if file.suffix == ".safetensors":
            with safe_open(str(file), "pt") as f:
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
                metadata = f.metadata() or {}
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{file} is not a checkpoint, or damaged: {error}") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, metadata
