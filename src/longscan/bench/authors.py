"""Rows beside the authors' own torch code: the xlstm package, the S4, GAM and Mega repositories."""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from longscan.bench.row import Row, Side, mixer, need, tokens, walk

XLSTM = "pip install --no-deps xlstm einops omegaconf dacite"
S4 = (
    "git clone https://github.com/state-spaces/s4, put that folder on PYTHONPATH, and "
    "pip install scipy einops pytorch-lightning"
)
GAM = "git clone https://github.com/rishiraj/gam and put that folder on PYTHONPATH"
MEGA = "git clone https://github.com/facebookresearch/mega and put that folder on PYTHONPATH"
# It advises kernels that need a GPU when it is imported; its torch path is what is measured.
logging.getLogger("models.s4.s4").disabled = True


# -- xlstm: layers without a way to carry a prompt but step by step


def _xlstm_side(layer: nn.Module) -> Side:
    def step(states: Any, x: Tensor) -> tuple[Tensor, Any]:
        return layer.step(x, **states)  # type: ignore[operator]

    return Side(layer, layer, lambda x: (layer(x), None), step, lambda x: walk(step, {}, x))


def _mlstm(d_model: int, *, chunked: bool = False) -> Side:
    peer = need("xlstm", XLSTM)
    config = peer.mLSTMLayerConfig(embedding_dim=d_model, num_heads=4, context_length=1)
    layer = peer.mLSTMLayer(config)
    layer.mlstm_cell.causal_mask = None  # without a stored mask it makes one, for any length
    if chunked:
        native = need("xlstm.blocks.mlstm.backends", XLSTM).chunkwise_simple

        def cell(queries: Tensor, **others: Any) -> Tensor:
            # It takes multiples of its chunk only; 64 is its own default.
            return native(queries, chunk_size=math.gcd(64, queries.shape[2]), **others)

        layer.mlstm_cell.backend_fn = cell
    return _xlstm_side(layer)


def _from_mlstm(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    from longscan.pretrained.xlstm import mlstm_layer

    return mlstm_layer(tensors)


def _slstm(d_model: int) -> Side:
    peer = need("xlstm", XLSTM)
    config = peer.sLSTMLayerConfig(
        embedding_dim=d_model, num_heads=4, backend="vanilla", dtype="float32"
    )
    layer = peer.sLSTMLayer(config)
    layer.reset_parameters()
    return _xlstm_side(layer)


def _from_slstm(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    from longscan.pretrained import xlstm_2024 as pretrained

    out = layer_of(pretrained._SLSTM, "xlstm.", tensors)
    recurrent, bias = pretrained._cell("recurrent", out["recurrent"], out["gate_bias"])
    return out | {"norm.weight": out["norm.weight"] + 1, "recurrent": recurrent, "gate_bias": bias}


def layer_of(
    table: Mapping[str, str], prefix: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State dict of a mixer alone, by the table of a block.

    table: our name -> theirs, as `longscan.pretrained._convert` reads it; prefix: of their layer.
    """
    from longscan.pretrained._convert import convert

    mine = {k.removeprefix("mixer."): v for k, v in table.items() if k.startswith("mixer.")}
    return convert(tensors, {k: v.replace(prefix, "") for k, v in mine.items()})


# -- S4


@cache
def _nodes(length: int) -> tuple[Tensor, Tensor]:
    """The FFT nodes of a length and what S4 makes of them, in complex64 but from complex128.

    The authors take powers of the first node in complex64, where the last ones have three digits
    left at length 4096: too few for a comparison, and no faster, as nodes are made once.
    """
    with torch.inference_mode(False):
        turns = torch.arange(length // 2 + 1, dtype=torch.float64) / length
        w = torch.exp(-2j * math.pi * turns)
        return w.to(torch.complex64), (2 * (1 - w) / (1 + w)).to(torch.complex64)


def _s4(d_model: int, **options: Any) -> Side:
    block = need("models.s4.s4", S4).S4Block(
        d_model,
        transposed=False,
        dt_transform="softplus",
        backend="naive",
        verbose=False,
        **options,
    )
    how = {}
    if options["mode"] == "dplr":
        how["mode"] = "diagonal"  # the fastest of its ways to step
        block.layer.kernel._omega = lambda length, *_, **__: _nodes(length)

    def step(state: Any, x: Tensor) -> tuple[Tensor, Any]:
        y, state = block.step(x[:, 0], state)
        return y.unsqueeze(1), state

    def carry(x: Tensor) -> Any:
        block.setup_step(**how)
        return walk(step, block.default_state(x.shape[0]), x)

    def ready(length: int) -> None:
        # C~ for this length, as its forward would make it: many products of dense matrices.
        while options["mode"] == "dplr" and block.layer.kernel.l_kernel < length:
            block.layer.kernel._setup_C(length)

    return Side(block, lambda x: block(x)[0], block, step, carry, ready)


def _from_s4(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    from longscan.mixers.s4 import from_authors

    return from_authors(tensors)


def _from_s4d(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A diagonal layer is one of S4 without P."""
    out = dict(_from_s4({**tensors, "layer.kernel.P": torch.zeros(1)}))
    del out["P"]
    return out


# -- GAM and Mega: what is theirs includes the residual connection


def _residual(name: str, d_model: int, **options: Any) -> Side:
    """Our mixer, its input added to its output."""
    side = mixer(name, d_model, **options)

    def run(x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = side.prefill(x, state)
        return x + y, state

    return replace(side, forward=lambda x: run(x)[0], prefill=run, step=lambda s, x: run(x, s))


class _Nothing(nn.Module):
    """In the place of a feed-forward layer."""

    def forward(self, x: Tensor) -> float:
        return 0.0


def _gam(d_model: int) -> Side:
    peer = need("gam_model", GAM)
    block = peer.GAMBlock(peer.ModelConfig(N_EMBED=d_model))
    # Of the block only what our mixer is: no norms and no feed-forward layer.
    block.ln1, block.ln2, block.ffn = nn.Identity(), nn.Identity(), _Nothing()

    def step(cache: Any, x: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError("the authors' block has no state to decode with")

    return Side(block, block, lambda x: (block(x), None), step, lambda x: None)


def _from_gam(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name.replace("causal_conv", "conv1d"): t for name, t in tensors.items()}


@cache
def _mega_class() -> Any:
    """The authors' layer, which lies in their copy of fairseq.

    Importing a package of fairseq imports all that is in it, which needs much that the layer does
    not. So the packages are made but not run, and only the modules the layer asks for are.
    """
    for name in ("fairseq", "fairseq.data", "fairseq.modules"):
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None:
            sys.modules[name] = importlib.util.module_from_spec(spec)
    gelu = need("fairseq.modules.gelu", MEGA)
    # What fairseq.utils takes from a package itself; the layer calls neither.
    vars(sys.modules["fairseq.modules"]).update(gelu=gelu.gelu, gelu_accurate=gelu.gelu_accurate)
    module = need("fairseq.modules.moving_average_gated_attention", MEGA)
    return module.MovingAverageGatedAttention


def _mega(d_model: int, *, chunk: int | None = None) -> Side:
    layer = _mega_class()(
        d_model, zdim=d_model // 2, hdim=2 * d_model, ndim=16, rel_pos_bias="rotary",
        chunk_size=chunk or -1, max_positions=2**14,
    )  # fmt: skip
    with torch.no_grad():  # as it starts, what attention reads hardly shows in the output
        for p in (layer.gamma, *layer.rel_pos_bias.parameters()):
            p.normal_(std=0.5)
        for linear in (layer.v_proj, layer.mx_proj, layer.h_proj):
            linear.weight.mul_(5)

    @cache
    def mask(length: int) -> Tensor:
        with torch.inference_mode(False):
            n = min(length, chunk or length)
            return torch.full((n, n), -math.inf).triu(1)

    def run(x: Tensor, state: Any = None) -> Tensor:
        x = x.transpose(0, 1)
        y, _ = layer(x, incremental_state=state, attn_mask=mask(len(x)) if len(x) > 1 else None)
        return y.transpose(0, 1)

    def step(state: Any, x: Tensor) -> tuple[Tensor, Any]:
        return run(x, state), state  # changed in place

    def prefill(x: Tensor) -> tuple[Tensor, Any]:
        return step({}, x)

    def ready(length: int) -> None:
        mask(length)  # their decoder keeps it as well

    return Side(layer, run, prefill, step, lambda x: prefill(x)[1], ready)


def _from_mega(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    out = {name.replace("norm.norm", "norm"): t for name, t in tensors.items()}
    out.pop("rel_pos_bias._float_tensor", None)  # holds nothing but its dtype
    out["rel_bias"] = torch.cat([out.pop(f"rel_pos_bias.{part}") for part in ("alpha", "beta")])
    average = ("move.delta", "move.alpha", "move.beta")
    return out | {name: out[name].squeeze(-1) for name in average}


ROWS = (
    Row(
        "mlstm-xlstm", "mlstm", "xlstm", ("xlstm",),
        tokens, lambda d: mixer("mlstm", d), _mlstm, _from_mlstm, XLSTM,
    ),
    Row(
        "mlstm-xlstm_chunked", "mlstm", "xlstm, chunked", ("xlstm",),
        tokens, lambda d: mixer("mlstm", d), partial(_mlstm, chunked=True), _from_mlstm, XLSTM,
        modes=("train", "prefill"),  # a token takes the same path as in the row above
    ),
    Row(
        "slstm-xlstm", "slstm", "xlstm", ("xlstm",),
        tokens, lambda d: mixer("slstm", d), _slstm, _from_slstm, XLSTM,
    ),
    Row(
        "s4d-authors", "s4d", "state-spaces/s4", ("models.s4.s4",),
        tokens, lambda d: mixer("s4d", d),
        partial(_s4, mode="diag", init="diag-lin"), _from_s4d, S4,
    ),
    # The authors train C~ = (I - Abar^L)^T C. What is held fixed while another parameter moves is
    # C~ there and C here, so gradients differ for C itself and for all that Abar is made of.
    Row(
        "s4-authors", "s4", "state-spaces/s4", ("models.s4.s4",),
        tokens, lambda d: mixer("s4", d),
        partial(_s4, mode="dplr", init="legs"), _from_s4, S4,
        unequal=frozenset({"C", "inv_dt", "A_real", "A_imag", "P"}),
    ),
    Row(
        "gam-authors", "gam", "rishiraj/gam", ("gam_model",),
        tokens, partial(_residual, "gam"), _gam, _from_gam, GAM, modes=("train",),
    ),
    # fairseq_cli lies beside fairseq, which is not imported as a whole.
    Row(
        "mega-authors", "mega", "facebookresearch/mega", ("fairseq_cli",),
        tokens, partial(_residual, "mega"), _mega, _from_mega, MEGA,
    ),
    Row(
        "mega-authors_chunk", "mega, chunks", "facebookresearch/mega", ("fairseq_cli",),
        tokens, partial(_residual, "mega", chunk=128), partial(_mega, chunk=128), _from_mega,
        MEGA,
    ),
)  # fmt: skip
