"""The sLSTM cell: exponential gates, scalar memories, and mixing of memories within a head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._check import (
    cast,
    check_floating,
    check_shape,
    check_state,
    compute_dtype,
    full_precision,
)
from longscan.ops._layout import check_cu_seqlens
from longscan.ops._slstm import slstm_fast
from longscan.ops._slstm_fused import slstm_fits, slstm_fused
from longscan.ops.dispatch import by_sequence, choose


def slstm_reference(
    gates: Tensor,
    r: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `slstm`: a loop over time in the input dtype."""
    if cu_seqlens is not None:
        return by_sequence(
            lambda x, state: slstm_reference(x, r, bias, state=state), [gates], state, cu_seqlens
        )
    s = gates.new_zeros(gates.shape[0], 4, *r.shape[:2]) if state is None else state
    out = []
    for now in gates.unbind(1):
        y, s = slstm_step(now, r, bias, s)
        out.append(y)
    return torch.stack(out, 1), s


def slstm_step(gates: Tensor, r: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `slstm`.

    Shapes: gates [B, N, 4, D]; r [N, D, 4, D]; bias [N, 4, D]; state [B, 4, N, D].
    """
    y, c, n, m = state.unbind(1)
    mixed = torch.bmm(y.transpose(0, 1), r.flatten(2)).transpose(0, 1).unflatten(2, (4, -1))
    i, f, z, o = (gates + bias + mixed).unbind(2)
    kept = F.logsigmoid(f) + m
    # Where n = 0 nothing is remembered yet, and m says nothing.
    m = torch.where((n == 0) | (i >= kept), i, kept)
    write, keep = (i - m).exp(), (kept - m).clamp(max=0).exp()
    c = keep * c + write * z.tanh()
    n = keep * n + write
    y = o.sigmoid() * (c / n)
    return y, torch.stack([y, c, n, m], 1)


def slstm(
    gates: Tensor,
    r: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The sLSTM cell: memories that see, through their gates, what their head put out before.

    i, f, z, o = gates_t + bias + R y_{t-1}                      R mixes within a head
    m_t = max(log sigmoid(f) + m_{t-1}, i)
    f' = exp(log sigmoid(f) + m_{t-1} - m_t);   i' = exp(i - m_t)
    c_t = f' c_{t-1} + i' tanh(z);   n_t = f' n_{t-1} + i';   y_t = sigmoid(o) c_t / n_t
    Where n_{t-1} = 0 (the start) m_t = i.

    Shapes: gates [B, T, N, 4, D], N heads of D channels, in the order i, f, z, o;
    r [N, D_in, 4, D_out]; bias [N, 4, D]; y [B, T, N, D]; state [B, 4, N, D], in the order
    y, c, n, m. cu_seqlens [n + 1] packs n sequences on one row (B = 1), the state then has n rows.
    Precision: everything in float32 (float64 for float64 inputs), y in the dtype of gates.
    Memory: backward keeps 7 numbers per channel and token, a kernel 5 of float32 or 2 and 3
    of bfloat16; where that computes bfloat16, R y_{t-1} is a product of numbers rounded to it.
    Raises: ValueError, TypeError for shapes, dtypes or cu_seqlens that do not fit.
    Source: xLSTM (arXiv 2405.04517, section 2.2).
    Differs: the authors look for n = 0 in the whole batch at once, here each channel does, so a
    sequence may begin anew beside others; gradients of both states are exact. Not affine.
    """
    check_floating(gates=gates, r=r, bias=bias, state=state)
    if gates.ndim != 5 or gates.shape[1] == 0 or gates.shape[3] != 4:
        raise ValueError(f"gates must have shape [B, T >= 1, N, 4, D], got {list(gates.shape)}")
    batch, length, heads, _, d = gates.shape
    check_shape("r", r, (heads, d, 4, d), "[N, D_in, 4, D_out]")
    check_shape("bias", bias, (heads, 4, d), "[N, 4, D]")
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, batch, length)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    check_state("state", state, (rows, 4, heads, d), "[rows, 4, N, D]")
    out, wide = gates.dtype, compute_dtype(gates, r, bias, state)
    forms = {"reference": slstm_reference, "torch": slstm_fast, "triton": slstm_fused}
    run = choose(
        "slstm", gates, backend, forms,
        lambda: wide is torch.float32 and slstm_fits(gates, r, bias),
    )  # fmt: skip
    if run is slstm_fused and (length > 1 or cu_seqlens is not None):
        return run(gates, r, bias, state=state, cu_seqlens=cu_seqlens)
    gates, r, bias, state = cast(wide, gates, r, bias, state)
    with full_precision(gates):
        if length == 1 and cu_seqlens is None and run is not slstm_reference:
            state = gates.new_zeros(rows, 4, heads, d) if state is None else state
            y, end = slstm_step(gates[:, 0], r, bias, state)
            y = y.unsqueeze(1)
        else:
            y, end = run(gates, r, bias, state=state, cu_seqlens=cu_seqlens)
    return y.to(out), end


__all__ = ["slstm", "slstm_fast", "slstm_reference", "slstm_step"]
