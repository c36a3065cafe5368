"""What the memories that learn at test time are made of: the framework's rows, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from longscan.ops._cache import with_counts
from longscan.ops._layout import check_cu_seqlens


@dataclass(frozen=True)
class Row:
    """An architecture as four choices, in the words of Miras (arXiv 2504.13173, table 1).

    memory: what is learnt at test time. bias: the loss it learns by (attentional bias).
    retention: what ties it to its past. algorithm: how a token changes it. update: the result.
    arxiv: the paper of the architecture.
    settings: those of `TestTimeMemory` that give this row, or None if it cannot give it.
    mixer: the name of the mixer in the registry that is this architecture's own layer, or None.
    """

    title: str
    arxiv: str
    memory: str
    bias: str
    retention: str
    algorithm: str
    update: str
    settings: Mapping[str, Any] | None = None
    mixer: str | None = None


def _matrix(**settings: Any) -> Mapping[str, Any]:
    """A matrix that learns from every token in turn; y = W q."""
    return MappingProxyType(
        {"memory": "linear", "residual_norm": False, "bias": "l2", "retention": "none",
         "chunk": 1, **settings}
    )  # fmt: skip


def _net(**settings: Any) -> Mapping[str, Any]:
    """A net with a residual connection and a norm, in chunks."""
    return MappingProxyType(settings)


_MIRAS = "2504.13173"

ROWS: Mapping[str, Row] = MappingProxyType({
    "linear_attention": Row(
        "Linear attention", "2006.16236", "matrix", "dot product", "none", "GD",
        "W + v k^T",
        _matrix(bias="dot", eta_gate=False), "linear_attention"),
    "retnet": Row(
        "RetNet", "2307.08621", "matrix", "dot product", "l2", "GD",
        "a W + v k^T", mixer="retention"),
    "gla": Row(
        "GLA", "2312.06635", "matrix", "dot product", "l2", "GD",
        "W diag(a_t) + v k^T",
        _matrix(bias="dot", retention="l2", gates="channel", channels="key", eta_gate=False),
        "gla"),
    "mamba2": Row(
        "Mamba-2", "2405.21060", "matrix", "dot product", "l2", "GD",
        "a_t W + v k^T",
        _matrix(bias="dot", retention="l2"), "mamba2"),
    "hgrn2": Row(
        "HGRN2", "2404.07904", "matrix", "l1", "l2", "GD",
        "W diag(a_t) + v (1 - a_t)^T"),
    "deltanet": Row(
        "DeltaNet", "2406.06484", "matrix", "l2", "none", "GD",
        "W (I - b k k^T) + b v k^T",
        _matrix(), "deltanet"),
    "longhorn": Row(
        "Longhorn", "2407.14207", "matrix", "l2", "none", "implicit GD",
        "as DeltaNet with b / (1 + b k^T k)",
        _matrix(algorithm="implicit")),
    "ttt_linear": Row(
        "TTT-Linear", "2407.04620", "matrix, residual and norm", "l2", "none", "GD in chunks",
        "W - b G",
        _net(memory="linear", retention="none", eta_max=0.3), "ttt"),
    "gated_deltanet": Row(
        "Gated DeltaNet", "2412.06464", "matrix", "l2", "l2", "GD at the decayed W",
        "a_t W (I - b k k^T) + b v k^T",
        _matrix(retention="l2", decay_first=True), "gated_deltanet"),
    "rwkv7": Row(
        "RWKV-7", "2503.14456", "matrix", "l2", "l2", "GD",
        "W (diag(a_t) - k (b k)^T) + v (b k)^T",
        _matrix(retention="l2", gates="channel", channels="key"), "rwkv7"),
    "deltaproduct": Row(
        "DeltaProduct", "2502.10297", "matrix", "l2", "l2", "several steps of GD",
        "W times (I - b_j k_j k_j^T), plus b_j v_j k_j^T, for j = 1, 2, ...",
        mixer="deltaproduct"),
    "attention": Row(
        "Softmax attention", "1706.03762", "all keys and values", "l2, non-parametric", "none",
        "none", "append (k, v)", mixer="attention"),
    "ttt_mlp": Row(
        "TTT-MLP", "2407.04620", "MLP of 2 layers", "l2", "none", "GD in chunks",
        "W - b G",
        _net(retention="none", eta_max=0.1)),
    "titans": Row(
        "Titans (LMM)", "2501.00663", "MLP of 1 to 4 layers", "squared l2", "l2",
        "GD with momentum", "S = m S - b G;  a_t W + S",
        _net(bias="squared", algorithm="momentum", eta_max=0.02), "titans"),
    "moneta": Row(
        "Moneta", _MIRAS, "MLP of 2 layers", "l_p, p = 3", "l_q, q = 4", "GD",
        "A = a_t A - b G;  A / norm(A)^(q-2)",
        _net(bias="lp", retention="lq_paper", p=3.0, q=4.0, eta_max=0.01, init_std=0.2,
             read="frozen"),
        "moneta"),
    "yaad": Row(
        "Yaad", _MIRAS, "MLP of 2 layers", "Huber", "l2", "GD",
        "a_t W - b G",
        _net(bias="huber_norm", eta_max=0.1), "yaad"),
    "yaad_printed": Row(
        "Yaad, as printed", _MIRAS, "MLP of 2 layers", "l2, or l1 of large errors", "l2", "GD",
        "a_t W - b G",
        _net(bias="huber_mix", eta_max=0.1)),
    "memora": Row(
        "Memora", _MIRAS, "MLP of 2 layers", "l2", "KL", "GD",
        "softmax(a_t log W - b G)",
        _net(retention="kl", total=8.0, eta_max=0.05, read="frozen"), "memora"),
})  # fmt: skip
"""Name -> architecture, in the order of the paper's table. G is the gradient of the bias at W."""


def moved_on(x: Tensor, seen: list[int] | None, cu_seqlens: Tensor | None) -> Tensor:
    """Tokens each row or packed sequence has seen after x [B, T, ...]."""
    if cu_seqlens is None:
        new = [x.shape[1]] * x.shape[0]
    else:
        new = [b - a for a, b in pairwise(check_cu_seqlens(cu_seqlens, *x.shape[:2]))]
    total = [n + s for n, s in zip(new, seen or [0] * len(new), strict=True)]
    return with_counts(torch.tensor(total, device=x.device), total)


__all__ = ["ROWS", "Row", "moved_on"]
