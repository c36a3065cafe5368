"""Authors' layer parameters -> ours, one table per mixer.

Names on the right are those of flash-linear-attention (MIT) for the linear attention and delta
families. `layer_state_dict("gla", tensors)` gives what `GatedLinearAttention.load_state_dict`
takes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longscan.pretrained._convert import Table, convert

_CONV = "q_conv1d.weight? k_conv1d.weight? v_conv1d.weight?"
_QKV = "q_proj.weight k_proj.weight v_proj.weight"

LAYERS: dict[str, Table] = {
    "gla": {
        "in_proj.weight": f"{_QKV} g_proj.weight? gk_proj.0.weight",
        "decay_proj.weight": "gk_proj.1.weight",
        "decay_proj.bias": "gk_proj.1.bias",
        "conv1d.weight": _CONV,
        "norm.weight": "g_norm_swish_gate.weight|g_norm.weight",
        "out_proj.weight": "o_proj.weight",
    },
    "deltanet": {
        "in_proj.weight": f"{_QKV} g_proj.weight? b_proj.weight",
        "conv1d.weight": _CONV,
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    },
    "gated_deltanet": {
        "in_proj.weight": f"{_QKV} g_proj.weight? b_proj.weight a_proj.weight",
        "conv1d.weight": _CONV,
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    },
    "kda": {
        "in_proj.weight": f"{_QKV} g_proj.0.weight b_proj.weight f_proj.0.weight",
        "conv1d.weight": _CONV,
        "gate_proj.weight": "g_proj.1.weight",
        "gate_proj.bias": "g_proj.1.bias?",
        "decay_proj.weight": "f_proj.1.weight",
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    },
    "deltaproduct": {
        "in_proj.weight": f"{_QKV} g_proj.weight? b_proj.weight a_proj.weight?",
        "conv1d.weight": _CONV,
        "A_log": "A_log?",
        "dt_bias": "dt_bias?",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    },
}

# Names of the released Kimi Linear checkpoints -> the names above.
_KIMI = {
    "q_conv1d.weight": "q_conv1d.weight",
    "f_a_proj.weight": "f_proj.0.weight",
    "f_b_proj.weight": "f_proj.1.weight",
    "g_a_proj.weight": "g_proj.0.weight",
    "g_b_proj.weight": "g_proj.1.weight",
}


def layer_state_dict(mixer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of one layer from the authors'.

    mixer: a name of LAYERS. tensors: the layer's parameters without any prefix.
    Raises: ValueError for an unknown mixer, CheckpointError for missing or left-over tensors.
    """
    if mixer not in LAYERS:
        raise ValueError(f"no table for {mixer!r}; there is one for {', '.join(LAYERS)}")
    return convert(tensors, LAYERS[mixer])


def kimi_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `kda` (gate_bias=False) from a KDA layer of a Kimi Linear checkpoint."""
    renamed = {_KIMI.get(k, k): v for k, v in tensors.items()}
    renamed["A_log"] = renamed["A_log"].reshape(-1)
    return layer_state_dict("kda", renamed)


def qwen_next_layer(
    tensors: Mapping[str, Tensor], n_heads: int, n_value_heads: int, d_key: int, d_value: int
) -> dict[str, Tensor]:
    """State dict of `gated_deltanet` from a linear_attn layer of a Qwen3-Next checkpoint.

    Its fused projections are grouped by key head, [q | k | v | z] and [b | a] in each group.
    """
    r = n_value_heads // n_heads
    qkvz = tensors["in_proj_qkvz.weight"].unflatten(0, (n_heads, -1))
    ba = tensors["in_proj_ba.weight"].unflatten(0, (n_heads, -1))
    q, k, v, z = qkvz.split([d_key, d_key, r * d_value, r * d_value], 1)
    b, a = ba.split([r, r], 1)
    return {
        "in_proj.weight": torch.cat([t.flatten(0, 1) for t in (q, k, v, z, b, a)]),
        "conv1d.weight": tensors["conv1d.weight"],
        "A_log": tensors["A_log"],
        "dt_bias": tensors["dt_bias"],
        "norm.weight": tensors["norm.weight"],
        "out_proj.weight": tensors["out_proj.weight"],
    }
