"""The layers that are compared: ours and the peers', behind one small interface.

Peers are imported when their row runs, never before: they belong to the extra "bench".
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
"""What a layer reads, each [B, T, ...]; the first is differentiated, all of an op are."""


@dataclass(frozen=True)
class Side:
    """One implementation.

    forward(*inputs) -> y, as in training; prefill(*inputs) -> (y, cache) and
    step(cache, *inputs of one token) -> (y, cache), as in generation; carry(*inputs) -> cache.
    """

    module: nn.Module | None
    forward: Callable[..., Tensor]
    prefill: Callable[..., tuple[Tensor, Any]]
    step: Callable[..., tuple[Tensor, Any]]
    carry: Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """A layer of ours beside one of a peer.

    translate: the peer's parameters (or their gradients) by name -> ours by name.
    """

    name: str
    layer: str
    package: str
    modules: tuple[str, ...]
    inputs: Callable[[int, int, int], Inputs]
    ours: Callable[[int], Side]
    peer: Callable[[int], Side]
    translate: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors


def need(module: str) -> Any:
    """Import a module of a peer.

    Raises: ModuleNotFoundError saying what to install.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched here
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ModuleNotFoundError(
            f"the comparison needs {error.name or package}: pip install 'longscan[bench]', or "
            "leave its rows out with --rows",
            name=error.name,
        ) from error


def tokens(batch: int, length: int, d_model: int) -> Inputs:
    """The input of a layer."""
    return (torch.randn(batch, length, d_model),)


def delta_inputs(batch: int, length: int, d_model: int) -> Inputs:
    """q, unit k, v, beta, log_a of heads of 64."""
    heads = d_model // 64
    q, k, v = torch.randn(3, batch, length, heads, 64)
    beta, log_a = torch.rand(batch, length, heads), -torch.rand(batch, length, heads)
    return q, nn.functional.normalize(k, dim=-1), v, beta, 0.2 * log_a


# -- ours


def _mixer(name: str, d_model: int, **options: Any) -> Side:
    from longscan.registry import mixer_class

    layer = mixer_class(name)(d_model, **options)
    return Side(
        layer,
        forward=lambda x: layer(x)[0],
        prefill=layer,
        step=lambda state, x: layer(x, state),
        carry=lambda x: layer(x)[1],
    )


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
        cache = (None, x.new_zeros(x.shape[0], config.d_inner, config.d_conv - 1))
        for t in range(x.shape[1]):
            _, cache = step(cache, x[:, t : t + 1])
        return cache

    return Side(block, block, lambda x: (block(x), None), step, carry)


_QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
ROWS = (
    Row(
        "mamba-transformers", "mamba", "transformers",
        ("transformers.models.mamba.modeling_mamba",),
        tokens, lambda d: _mixer("mamba", d), _hf_mamba,
    ),
    Row(
        "mamba-mambapy", "mamba", "mambapy", ("mambapy.mamba",),
        tokens, lambda d: _mixer("mamba", d), _mambapy,
    ),
    Row(
        "mamba2-transformers", "mamba2", "transformers",
        ("transformers.models.mamba2.modeling_mamba2",),
        tokens, lambda d: _mixer("mamba2", d, n_groups=1), _hf_mamba2,
    ),
    Row(
        "delta-op-transformers", "gated delta rule (op)", "transformers", (_QWEN,),
        delta_inputs, _delta, _hf_delta,
    ),
    Row(
        "gated_deltanet-transformers", "gated_deltanet", "transformers", (_QWEN,),
        tokens,
        lambda d: _mixer("gated_deltanet", d, n_heads=d // 64, d_key=64, d_value=64),
        _hf_qwen,
        _from_qwen,
    ),
)  # fmt: skip
