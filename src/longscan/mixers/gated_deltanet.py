"""Gated DeltaNet."""

from __future__ import annotations

from longscan.mixers._delta import DeltaMixer


class GatedDeltaNet(DeltaMixer):
    """The delta rule with a forget gate, one number per head.

    alpha_t = exp(-exp(A_log) softplus(w_a x_t + dt_bias)),   beta_t = sigmoid(w_b x_t)
    S_t = (I - beta_t k_t k_t^T) alpha_t S_{t-1} + beta_t k_t v_t^T,   o_t = K^-0.5 S_t^T q_t

    Shapes: x, y [B, T, d_model]; n_heads q/k heads of d_key (default 3/4 of d_model in all),
    n_value_heads heads of d_value = 2 d_key; state [B, n_value_heads, d_key, d_value].
    negative_eigenvalues doubles beta.
    Precision: A_log, dt_bias, gates, norms and state float32.
    Source: arXiv 2412.06464, eq. 10; sizes and initialisation of its maintained implementation.
    Differs: A_log is drawn from log U(0, 16) kept finite.
    Reference: fla-org/flash-linear-attention, MIT, and Hugging Face transformers, Apache-2.0; the
    authors' own repository is non-commercial and was not read.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_value_heads: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        d_conv: int = 4,
        negative_eigenvalues: bool = False,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        d_key = d_key or max(1, 3 * d_model // (4 * n_heads))
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_value_heads or n_heads,
            d_key=d_key,
            d_value=d_value or 2 * d_key,
            d_conv=d_conv,
            gate="silu" if output_gate else None,
            negative_eigenvalues=negative_eigenvalues,
            forget_gate=True,
            norm_eps=norm_eps,
        )
        self.reset_parameters()
