"""xLSTM-7B and its kin: checkpoints of Hugging Face (xLSTMForCausalLM) and of xLSTMLarge.

Of the 2024 xlstm package single mLSTM layers can be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longscan.models.checkpoint import CheckpointError
from longscan.models.config import LanguageModelConfig
from longscan.pretrained._convert import Table, convert

Config = Mapping[str, Any]

# What a config may say, and the only value that is supported.
_FIXED = {
    "use_bias": False,
    "add_out_norm": True,
    "add_post_norm": False,
    "add_qk_norm": False,
    "eps": 1e-6,  # of the cell
}

# Our name -> their names in a block, with "single" weights | with "fused" ones.
_BLOCK: Table = {
    "norm.weight": "norm_mlstm.weight",
    "mixer.norm.weight": "mlstm_layer.multihead_norm.weight",
    "mixer.out_proj.weight": "mlstm_layer.out_proj.weight",
    "mlp_norm.weight": "norm_ffn.weight",
    "mlp.down.weight": "ffn.proj_down.weight",
}
_SINGLE: Table = {
    "mixer.in_proj.weight": " ".join(
        f"mlstm_layer.{p}.weight"
        for p in ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
    ),
    "mixer.gate_bias": "mlstm_layer.igate_preact.bias mlstm_layer.fgate_preact.bias",
    "mlp.gate_up.weight": "ffn.proj_up_gate.weight ffn.proj_up.weight",
}
_FUSED: Table = {
    "mixer.in_proj.weight": "mlstm_layer.qkv_opreact.weight mlstm_layer.ifgate_preact.weight",
    "mixer.gate_bias": "mlstm_layer.ifgate_preact.bias",
    "mlp.gate_up.weight": "ffn.proj_up_gate_z.weight",
}

_MLSTM: Table = {
    "in_proj.weight": "proj_up.weight",
    "conv1d.weight": "conv1d.conv.weight",
    "conv1d.bias": "conv1d.conv.bias",
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "gate_proj.weight": "mlstm_cell.igate.weight mlstm_cell.fgate.weight",
    "gate_bias": "mlstm_cell.igate.bias mlstm_cell.fgate.bias",
    "norm.weight": "mlstm_cell.outnorm.weight",
    "skip": "learnable_skip",
    "out_proj.weight": "proj_down.weight",
}


def mlstm_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `mlstm` from an mLSTM layer of the 2024 xlstm package.

    tensors: the layer's, without prefix (proj_up.weight, ...). The package stores the weight of
    the norm minus one; it gets it back.
    Raises: CheckpointError for missing or left-over tensors.
    """
    out = convert(tensors, _MLSTM)
    return {**out, "norm.weight": out["norm.weight"] + 1}


def _size(c: Config, *names: str) -> int:
    """The first of `names` that the config gives."""
    for name in names:
        if c.get(name) is not None:
            return c[name]
    raise CheckpointError(
        f"the config gives no {' or '.join(names)}, as that of an xLSTM-7B model does "
        "(models of the 2024 xlstm package have other configs, which are not read)"
    )


def xlstm_config(c: Config) -> LanguageModelConfig:
    """Our configuration from a config.json with model_type "xlstm".

    Raises: CheckpointError for the models of the first paper, and for options ours do not have.
    """
    d_model = _size(c, "hidden_size", "embedding_dim")
    n_heads = _size(c, "num_heads")
    for key, value in _FIXED.items():
        if c.get(key, value) != value:
            raise CheckpointError(f"{key} is {c[key]!r}; only {value!r} is supported")
    multiple = c.get("ffn_round_up_to_multiple_of", 64)
    eps = c.get("norm_eps", 1e-6)
    return LanguageModelConfig(
        vocab_size=c["vocab_size"],
        d_model=d_model,
        n_layers=_size(c, "num_hidden_layers", "num_blocks"),
        pattern="mlstm_large",
        mixers={
            "mlstm_large": {
                "n_heads": n_heads,
                "d_key": int(d_model * c.get("qk_dim_factor", 0.5)) // n_heads,
                "d_value": int(d_model * c.get("v_dim_factor", 1.0)) // n_heads,
                "gate_cap": c.get("gate_soft_cap", 15.0),
                "norm_eps": eps,
            }
        },
        mlp="gated",
        # The authors' rounding, which drops a fraction of a channel first.
        d_ff=int((d_model * c.get("ffn_proj_factor", 2.667) + multiple - 1) // multiple) * multiple,
        norm_eps=eps,
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        pad_vocab_multiple=1,
        logit_cap=c.get("output_logit_soft_cap", 30.0),
    )


def xlstm_state_dict(tensors: Mapping[str, Tensor], c: LanguageModelConfig) -> dict[str, Tensor]:
    """State dict of our LanguageModel from all tensors of such a checkpoint, fused or not.

    Raises: CheckpointError for missing or left-over tensors.
    """
    table = {
        "embedding.weight": "backbone.embeddings.weight|embedding.weight",
        "norm.weight": "backbone.out_norm.weight",
    }
    if c.tie_embeddings:
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    else:
        table["head.weight"] = "lm_head.weight"
    fused = any(k.endswith("qkv_opreact.weight") for k in tensors)
    for i in range(c.n_layers):
        for ours, theirs in {**_BLOCK, **(_FUSED if fused else _SINGLE)}.items():
            names = (f"backbone.blocks.{i}.{name}" for name in theirs.split())
            table[f"blocks.{i}.{ours}"] = " ".join(names)
    return convert(tensors, table)


__all__ = ["mlstm_layer", "xlstm_config", "xlstm_state_dict"]
