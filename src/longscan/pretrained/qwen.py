"""Qwen3 with gated attention, and the attention layers of Qwen3-Next.

The two families fuse queries and gates differently: the authors' Qwen3 demo puts them side by
side for each group of queries that share a key/value head, Qwen3-Next for each query head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longscan.models.checkpoint import CheckpointError
from longscan.models.config import LanguageModelConfig

Config = Mapping[str, Any]


def attention_settings(config: Config) -> tuple[str, dict[str, Any]]:
    """The mixer and the settings of the softmax attention layers that a config.json describes.

    Raises: CheckpointError for another model type, or for an option our mixers do not have.
    """
    kind = config.get("model_type")
    if kind not in ("qwen3", "qwen3_next"):
        raise CheckpointError(f"expected a qwen3 or qwen3_next checkpoint, not {kind!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"rotary positions are scaled ({rope}), which is not supported")
    if config.get("use_sliding_window"):
        raise CheckpointError("use_sliding_window is set, which is not supported")
    settings: dict[str, Any] = {
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "d_head": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "qk_norm": bool(config.get("use_qk_norm", True)),
        "norm_eps": config["rms_norm_eps"],
        # The authors' modules read qkv_bias and ignore attention_bias, which their configs have.
        "bias": bool(config.get("qkv_bias", config.get("attention_bias", False))),
    }
    if kind == "qwen3_next":
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
        return "gated_attention", {**settings, "rotary_fraction": share}
    per = _gate_per(config)
    return ("gated_attention", {**settings, "gate_per": per}) if per else ("attention", settings)


def _gate_per(config: Config) -> str | None:
    if config["model_type"] == "qwen3_next" or config.get("elementwise_attn_output_gate"):
        return "element"
    return "head" if config.get("headwise_attn_output_gate") else None


def gated_attention_layer(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict of our mixer from one self_attn module of a Qwen3 or Qwen3-Next checkpoint.

    tensors: the module's, without prefix (q_proj.weight, ...). The mixer is the one that
    `attention_settings` names. Norm weights of Qwen3-Next are stored minus one; they get it back.
    Raises: CheckpointError for missing, left-over or misshapen tensors.
    """
    _, settings = attention_settings(config)
    heads, groups, dim = (settings[k] for k in ("n_heads", "n_kv_heads", "d_head"))
    bias, norm = settings["bias"], settings["qk_norm"]
    wanted = [f"{p}_proj.weight" for p in "qkvo"]
    wanted += [f"{p}_proj.bias" for p in "qkvo"] if bias else []
    wanted += ["q_norm.weight", "k_norm.weight"] if norm else []
    if sorted(wanted) != sorted(tensors):
        raise CheckpointError(
            f"an attention layer of this config has {', '.join(wanted)}; "
            f"found {', '.join(tensors) or 'nothing'}"
        )
    gate_rows = {"element": heads * dim, "head": heads, None: 0}[_gate_per(config)]
    found = tensors["q_proj.weight"].shape[0]
    if found != heads * dim + gate_rows:
        raise CheckpointError(
            f"q_proj has {found} rows, but {heads} heads of {dim} and {gate_rows} gates need "
            f"{heads * dim + gate_rows}"
        )
    # One block of rows for each of these: queries first, then their gates.
    blocks = heads if config["model_type"] == "qwen3_next" else groups
    out = {"out_proj.weight": tensors["o_proj.weight"]}
    if bias:
        out["out_proj.bias"] = tensors["o_proj.bias"]
    for kind in ("weight", "bias") if bias else ("weight",):
        both = tensors[f"q_proj.{kind}"].unflatten(0, (blocks, -1))
        q, gate = both.split([heads * dim // blocks, gate_rows // blocks], 1)
        parts = [q.flatten(0, 1), tensors[f"k_proj.{kind}"], tensors[f"v_proj.{kind}"]]
        out[f"in_proj.{kind}"] = torch.cat([*parts, gate.flatten(0, 1)])
    if norm:
        missing = 1.0 if config["model_type"] == "qwen3_next" else 0.0
        for name in ("q_norm.weight", "k_norm.weight"):
            out[name] = tensors[name] + missing
    return out


def qwen3_config(config: Config) -> LanguageModelConfig:
    """Our configuration of a dense Qwen3 model, gated or not, from its config.json.

    Raises: CheckpointError for models that are not of this kind, Qwen3-Next among them.
    """
    if config.get("model_type") != "qwen3":
        raise CheckpointError(
            f"expected a dense qwen3 checkpoint, not {config.get('model_type')!r} "
            "(of Qwen3-Next single layers can be loaded, not the mixture of experts)"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"the MLP uses {config['hidden_act']}; only silu is supported")
    mixer, settings = attention_settings(config)
    return LanguageModelConfig(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        pattern=mixer,
        mixers={mixer: settings},
        mlp="gated",
        d_ff=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        pad_vocab_multiple=1,
    )


def qwen3_state_dict(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict of our LanguageModel from all tensors of a dense Qwen3 checkpoint.

    Raises: CheckpointError for missing or left-over tensors.
    """
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in left:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        return left.pop(name)

    out = {
        "embedding.weight": take("model.embed_tokens.weight"),
        "norm.weight": take("model.norm.weight"),
    }
    if config.get("tie_word_embeddings"):
        left.pop("lm_head.weight", None)
    else:
        out["head.weight"] = take("lm_head.weight")
    for i in range(config["num_hidden_layers"]):
        here, there = f"blocks.{i}.", f"model.layers.{i}."
        attention = {
            k.removeprefix(f"{there}self_attn."): left.pop(k)
            for k in list(left)
            if k.startswith(f"{there}self_attn.")
        }
        for name, tensor in gated_attention_layer(attention, config).items():
            out[f"{here}mixer.{name}"] = tensor
        out[f"{here}norm.weight"] = take(f"{there}input_layernorm.weight")
        out[f"{here}mlp_norm.weight"] = take(f"{there}post_attention_layernorm.weight")
        gate, up = take(f"{there}mlp.gate_proj.weight"), take(f"{there}mlp.up_proj.weight")
        out[f"{here}mlp.gate_up.weight"] = torch.cat([gate, up])
        out[f"{here}mlp.down.weight"] = take(f"{there}mlp.down_proj.weight")
    if left:
        raise CheckpointError(f"the checkpoint has unknown tensors: {', '.join(sorted(left)[:6])}")
    return out


__all__ = [
    "attention_settings",
    "gated_attention_layer",
    "qwen3_config",
    "qwen3_state_dict",
]
