"""Language models of the `xlstm` package of 2024 (xLSTM[a:b]: mLSTM and sLSTM blocks).

The package saves no folder of its own; what there is are a model's state dict and the values of
its xLSTMLMModelConfig, as in the YAML files of its experiments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longscan.models.checkpoint import CheckpointError, load_weights
from longscan.models.config import LanguageModelConfig
from longscan.models.language_model import LanguageModel
from longscan.pretrained._convert import convert
from longscan.pretrained.xlstm import _MLSTM as MLSTM_LAYER

Config = Mapping[str, Any]

_MLSTM = {
    "norm.weight": "xlstm_norm.weight",
    **{
        f"mixer.{ours}": " ".join(f"xlstm.{name}" for name in theirs.split())
        for ours, theirs in MLSTM_LAYER.items()
    },
}
_SLSTM = {
    "norm.weight": "xlstm_norm.weight",
    "mixer.conv1d.weight": "xlstm.conv1d.conv.weight?",
    "mixer.conv1d.bias": "xlstm.conv1d.conv.bias?",
    # The package feeds the input gate from the layer called fgate, and the forget gate from igate.
    "mixer.i_proj.weight": "xlstm.fgate.weight",
    "mixer.f_proj.weight": "xlstm.igate.weight",
    "mixer.z_proj.weight": "xlstm.zgate.weight",
    "mixer.o_proj.weight": "xlstm.ogate.weight",
    "mixer.recurrent": "xlstm.slstm_cell._recurrent_kernel_",
    "mixer.gate_bias": "xlstm.slstm_cell._bias_",
    "mixer.norm.weight": "xlstm.group_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate_up.weight": "ffn.proj_up.weight",
    "mlp.down.weight": "ffn.proj_down.weight",
}
_TABLES = {"mlstm": _MLSTM, "slstm": _SLSTM}
_ACTIVATIONS = {"gelu": "gelu", "swish": "silu"}


def xlstm_2024_config(config: Config) -> LanguageModelConfig:
    """Our configuration from the values of an xLSTMLMModelConfig.

    Raises: CheckpointError for parts that have no counterpart here.
    """
    c = config
    for name, plain in (("bias", False), ("add_post_blocks_norm", True)):
        if c.get(name, plain) is not plain:
            raise CheckpointError(f"{name} {c[name]!r} is not supported, only {plain}")
    n_layers, width = c["num_blocks"], c["embedding_dim"]
    of_mlstm, of_slstm = (c.get(f"{x}_block") for x in _TABLES)
    at = c.get("slstm_at", [])
    at = set(range(n_layers) if at == "all" or of_mlstm is None else at)
    layers = ["slstm" if i in at else "mlstm" for i in range(n_layers)]
    mixers, more = {}, {}
    if "mlstm" in layers:
        own = (of_mlstm or {}).get("mlstm", {})
        mixers["mlstm"] = {
            "n_heads": own.get("num_heads", 4),
            "expand": _rounded(own, "proj_factor", 2.0, width) / width,
            "d_conv": own.get("conv1d_kernel_size", 4),
            "qkv_block": own.get("qkv_proj_blocksize", 4),
        }
    if "slstm" in layers:
        own, mlp = ((of_slstm or {}).get(x, {}) for x in ("slstm", "feedforward"))
        for name, plain in (("function", "slstm"), ("forward_clipval", None)):
            if own.get(name, plain) != plain:
                raise CheckpointError(f"the sLSTM cell's {name} {own[name]!r} is not supported")
        activation = mlp.get("act_fn", "gelu")
        if activation not in _ACTIVATIONS:
            raise CheckpointError(f"the MLP uses {activation!r}; only gelu and swish are supported")
        more = {
            "d_ff": _rounded(mlp, "proj_factor", 1.3, width),
            "activation": _ACTIVATIONS[activation],
        }
        mixers["slstm"] = {
            "n_heads": own.get("num_heads", 4),
            "d_conv": own.get("conv1d_kernel_size", 4),
        }
    return LanguageModelConfig(
        vocab_size=c["vocab_size"],
        d_model=width,
        n_layers=n_layers,
        pattern=",".join(layers),
        mixers=mixers,
        norm="layer",
        norm_bias=False,
        norm_eps=1e-5,
        tie_embeddings=bool(c.get("tie_weights", False)),
        pad_vocab_multiple=1,
        **more,
    )


def _rounded(own: Config, name: str, default: float, width: int) -> int:
    """A width that the package gives as a factor and rounds to a multiple."""
    multiple = own.get("round_proj_up_to_multiple_of", 64)
    many = own.get(name, default) * width / multiple
    return (math.ceil if own.get("round_proj_up_dim_up", True) else math.floor)(many) * multiple


def xlstm_2024_state_dict(
    tensors: Mapping[str, Tensor], config: LanguageModelConfig
) -> dict[str, Tensor]:
    """Our state dict from the package's, of a model with either backend of the sLSTM cell.

    Raises: CheckpointError for missing or left-over tensors, or a cell of neither layout.
    """
    table = {
        "embedding.weight": "token_embedding.weight",
        "norm.weight": "xlstm_block_stack.post_blocks_norm.weight",
    }
    if not config.tie_embeddings:
        table["head.weight"] = "lm_head.weight"
    for i, mixer in enumerate(config.layers):
        for ours, theirs in _TABLES[mixer].items():
            names = [f"xlstm_block_stack.blocks.{i}.{name}" for name in theirs.split()]
            table[f"blocks.{i}.{ours}"] = " ".join(names)
    given = dict(tensors)
    if config.tie_embeddings:
        given.pop("lm_head.weight", None)
    out = convert(given, table)
    for name in list(out):
        if name.endswith("norm.weight"):
            out[name] = out[name] + 1  # the package stores what a weight differs from one by
        elif name.endswith(".recurrent"):
            bias = name.replace("recurrent", "gate_bias")
            out[name], out[bias] = _cell(name, out[name], out[bias])
    return out


def _cell(name: str, kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Recurrent weights [N, D (from), 4, D (to)] and biases [N, 4, D].

    The vanilla backend stores [N, 4 D (to), D (from)] and [4 N D], the CUDA backend
    [N, D (from), 4 D (to)] and [N 4 D]; the shape of the kernel tells which.
    """
    heads, rows, columns = kernel.shape
    if rows == 4 * columns:
        kernel = kernel.unflatten(1, (4, -1)).permute(0, 3, 1, 2)
        return kernel, bias.unflatten(0, (4, heads, -1)).transpose(0, 1)
    if columns == 4 * rows:
        return kernel.unflatten(2, (4, -1)), bias.unflatten(0, (heads, 4, -1))
    raise CheckpointError(
        f"{name}: a recurrent kernel of shape {list(kernel.shape)} is neither the vanilla "
        "backend's [heads, 4 D, D] nor the CUDA backend's [heads, D, 4 D]"
    )


def load_xlstm_2024(tensors: Mapping[str, Tensor], config: Config) -> LanguageModel:
    """The LanguageModel with the weights of an xLSTMLMModel of the `xlstm` package.

    tensors: its state dict, such as torch.load("model.pt", weights_only=True) returns;
    config: the values of its xLSTMLMModelConfig, such as yaml.safe_load returns of the file that
    the model was built from; what matters for training only (dropout, initialisation) is not read.
    Precision: weights become float32, whatever they were stored in.
    Raises: CheckpointError saying what is missing, unknown or does not fit.
    """
    ours = xlstm_2024_config(config)
    model = LanguageModel(ours)
    load_weights(model, xlstm_2024_state_dict(tensors, ours), "the state dict")
    return model


__all__ = ["load_xlstm_2024", "xlstm_2024_config", "xlstm_2024_state_dict"]
