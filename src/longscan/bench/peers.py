"""The rows of the bench: ours beside transformers and mambapy, and the authors' code.

Peers are imported when their row runs, never before: they belong to the extra "bench", or to
nothing that we ask users to install.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longscan.bench import authors
from longscan.bench.row import Inputs, Row, Side, mixer, need, tokens, walk


def delta_inputs(batch: int, length: int, d_model: int) -> Inputs:
    """q, unit k, v, beta, log_a of heads of 64."""
    heads = d_model // 64
    q, k, v = torch.randn(3, batch, length, heads, 64)
    beta, log_a = torch.rand(batch, length, heads), -torch.rand(batch, length, heads)
    return q, nn.functional.normalize(k, dim=-1), v, beta, 0.2 * log_a


# -- ours


def _delta(d_model: int) -> Side:
    from longscan.ops.delta import delta

    def run(q: Tensor, *rest: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # The peer's op scales queries itself; ours leaves that to the mixer.
        return delta(q * q.shape[-1] ** -0.5, *rest, state=state)

    return Side(
        None,
        forward=lambda *inputs: run(*inputs)[0],
        prefill=run,
        step=lambda state, *inputs: run(*inputs, state=state),
        carry=lambda *inputs: run(*inputs)[1],
    )


# -- transformers


def _transformers(layer: nn.Module, config: Any) -> Side:
    cache_class = need("transformers").DynamicCache
    # It advises compiled kernels that need a GPU; its torch path is what is measured.
    need("transformers.utils.logging").set_verbosity_error()

    def prefill(x: Tensor) -> tuple[Tensor, Any]:
        cache = cache_class(config=config)
        return layer(x, cache_params=cache), cache

    return Side(
        layer,
        forward=layer,
        prefill=prefill,
        step=lambda cache, x: (layer(x, cache_params=cache), cache),
        carry=lambda x: prefill(x)[1],
    )


def _hf_mamba(d_model: int) -> Side:
    hf = need("transformers.models.mamba.modeling_mamba")
    config = hf.MambaConfig(hidden_size=d_model, num_hidden_layers=1)
    return _transformers(hf.MambaMixer(config, 0), config)


def _hf_mamba2(d_model: int) -> Side:
    hf = need("transformers.models.mamba2.modeling_mamba2")
    config = hf.Mamba2Config(
        hidden_size=d_model, num_hidden_layers=1, num_heads=2 * d_model // 64, n_groups=1
    )
    return _transformers(hf.Mamba2Mixer(config, 0), config)


def _hf_qwen(d_model: int) -> Side:
    hf = need("transformers.models.qwen3_next.modeling_qwen3_next")
    heads = d_model // 64
    config = hf.Qwen3NextConfig(
        hidden_size=d_model,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        rms_norm_eps=1e-5,
    )
    layer = hf.Qwen3NextGatedDeltaNet(config, 0)
    # Built alone it starts with gates that forget everything within a token, where the gradient
    # of A_log is rounding noise. These are gates of a model as its authors start it.
    with torch.no_grad():
        layer.dt_bias.uniform_(-7, -2)
        layer.A_log.uniform_(0, 2.7)
    return _transformers(layer, config)


def _from_qwen(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    from longscan.pretrained.layers import qwen_next_layer

    heads = tensors["A_log"].shape[0]
    return qwen_next_layer(tensors, heads, heads, 64, 64)


def _hf_delta(d_model: int) -> Side:
    hf = need("transformers.models.qwen3_next.modeling_qwen3_next")
    need("transformers.utils.logging").set_verbosity_error()
    chunked, recurrent = hf.torch_chunk_gated_delta_rule, hf.torch_recurrent_gated_delta_rule

    def prefill(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(q, k, v, g=g, beta=beta, output_final_state=True)

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
        return recurrent(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)

    return Side(
        None,
        forward=lambda q, k, v, beta, g: chunked(q, k, v, g=g, beta=beta)[0],
        prefill=prefill,
        step=step,
        carry=lambda *inputs: prefill(*inputs)[1],
    )


def _hf_xlstm(d_model: int) -> Side:
    # With the package xlstm installed it would hand over to that, which wants kernels of another
    # licence for this layer. What is measured is the torch path of transformers itself.
    utils = need("transformers.utils")
    found, utils.is_xlstm_available = utils.is_xlstm_available, lambda: False
    try:
        hf = need("transformers.models.xlstm.modeling_xlstm")
    finally:
        utils.is_xlstm_available = found
    config = hf.xLSTMConfig(hidden_size=d_model, num_heads=4, num_hidden_layers=1)
    layer = hf.xLSTMLayer(config)
    with torch.no_grad():  # gates that remember, as its authors start a model
        layer.igate_preact.bias.normal_(std=0.1)
        layer.fgate_preact.bias.copy_(torch.linspace(3, 6, 4))
    return Side(
        layer,
        forward=lambda x: layer(x)[0],
        prefill=layer,
        step=lambda cache, x: layer(x, cache),
        carry=lambda x: layer(x)[1],
    )


def _from_hf_xlstm(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    from longscan.pretrained import xlstm

    return authors.layer_of({**xlstm._BLOCK, **xlstm._SINGLE}, "mlstm_layer.", tensors)


def _hf_rwkv4(d_model: int) -> Side:
    hf = need("transformers.models.rwkv.modeling_rwkv")
    config = hf.RwkvConfig(hidden_size=d_model, num_hidden_layers=1)
    layer = hf.RwkvSelfAttention(config, 0)
    with torch.no_grad():  # built alone it holds whatever was in memory
        layer.time_decay.uniform_(-5, 3)
        layer.time_first.uniform_(-1.7, -0.7)
        for mix in (layer.time_mix_receptance, layer.time_mix_key, layer.time_mix_value):
            mix.uniform_(0, 1)

    def prefill(x: Tensor) -> tuple[Tensor, Any]:
        # The last token (of the channel mix and of this layer), the two sums, their scale.
        state = list(x.new_zeros(5, x.shape[0], d_model, 1).unbind())
        state[4] -= 1e30
        return layer(x, state, use_cache=True)

    return Side(
        layer,
        forward=lambda x: layer(x)[0],
        prefill=prefill,
        step=lambda state, x: layer(x, state, use_cache=True),
        carry=lambda x: prefill(x)[1],
    )


def _from_rwkv4(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    from longscan.pretrained._convert import convert

    linear = {"r": "receptance", "k": "key", "v": "value"}
    table = {f"{c}_proj.weight": f"{name}.weight" for c, name in linear.items()}
    table |= {"out_proj.weight": "output.weight", "time_decay": "time_decay", "u": "time_first"}
    out = convert(tensors, table | {"mu": " ".join(f"time_mix_{x}" for x in linear.values())})
    return out | {"mu": 1 - out["mu"].flatten(0, 1)}


# -- mambapy


def _mambapy(d_model: int) -> Side:
    peer = need("mambapy.mamba")
    config = peer.MambaConfig(d_model=d_model, n_layers=1)
    block = peer.MambaBlock(config)

    def step(cache: Any, x: Tensor) -> tuple[Tensor, Any]:
        y, cache = block.step(x[:, 0], cache)
        return y.unsqueeze(1), cache

    def carry(x: Tensor) -> Any:
        # Its parallel scan returns no state: generation walks through the prompt.
        window = x.new_zeros(x.shape[0], config.d_inner, config.d_conv - 1)
        return walk(step, (None, window), x)

    return Side(block, block, lambda x: (block(x), None), step, carry)


# -- what most have no peer for that runs on a CPU: beside another of ours, for their cost

RIVAL = "gated_deltanet"
ALONE = (
    "titans", "moneta", "yaad", "memora", "ttt", "titans_mac", "titans_mag", "titans_mal", "gam",
    "gam_written", "wersa", "mega", "transformer_vq", "longvq",
)  # fmt: skip

_QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
ROWS = (
    Row(
        "mamba-transformers", "mamba", "transformers",
        ("transformers.models.mamba.modeling_mamba",),
        tokens, lambda d: mixer("mamba", d), _hf_mamba,
    ),
    Row(
        "mamba-mambapy", "mamba", "mambapy", ("mambapy.mamba",),
        tokens, lambda d: mixer("mamba", d), _mambapy,
    ),
    Row(
        "mamba2-transformers", "mamba2", "transformers",
        ("transformers.models.mamba2.modeling_mamba2",),
        tokens, lambda d: mixer("mamba2", d, n_groups=1), _hf_mamba2,
    ),
    Row(
        "delta-op-transformers", "gated delta rule (op)", "transformers", (_QWEN,),
        delta_inputs, _delta, _hf_delta,
    ),
    Row(
        "gated_deltanet-transformers", "gated_deltanet", "transformers", (_QWEN,),
        tokens,
        lambda d: mixer("gated_deltanet", d, n_heads=d // 64, d_key=64, d_value=64),
        _hf_qwen,
        _from_qwen,
    ),
    Row(
        "mlstm_large-transformers", "mlstm_large", "transformers", ("transformers",),
        tokens, lambda d: mixer("mlstm_large", d), _hf_xlstm, _from_hf_xlstm,
    ),
    Row(
        "rwkv4-transformers", "rwkv4", "transformers",
        ("transformers.models.rwkv.modeling_rwkv",),
        tokens, lambda d: mixer("rwkv4", d), _hf_rwkv4, _from_rwkv4,
        modes=("train", "prefill"),  # its step mixes up the sequences of a batch
    ),
    *authors.ROWS,
    *(
        Row(
            f"{name}-{RIVAL}", name, f"{RIVAL} (ours)", (), tokens,
            partial(mixer, name), partial(mixer, RIVAL), same=False,
        )
        for name in ALONE
    ),
)  # fmt: skip
