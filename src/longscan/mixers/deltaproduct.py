"""DeltaProduct and Gated DeltaProduct."""

from __future__ import annotations

from longscan.mixers._delta import DeltaMixer


class DeltaProduct(DeltaMixer):
    """Several delta-rule writes per token, so that a token can rotate the state.

    S <- alpha_t S_{t-1};   S <- (I - beta_tj k_tj k_tj^T) S + beta_tj k_tj v_tj^T, j = 1..n_steps
    o_t = K^-0.5 S^T q_t;   beta in [0, 2] with negative_eigenvalues (needed to track states)

    Shapes: x, y [B, T, d_model]; n_heads q/k heads of d_key = d_model / n_heads, n_value_heads
    heads of d_value = d_key; in the rows of k, v and b the step is the slowest index;
    state [B, n_value_heads, d_key, d_value].
    Precision: A_log, dt_bias, gates, norms and state float32.
    Source: arXiv 2502.10297, section 4 (its n_h is n_steps).
    Differs: the query is not stretched over the steps; results are the same.
    Reference: fla-org/flash-linear-attention, MIT.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_steps: int = 2,
        n_heads: int = 4,
        n_value_heads: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        d_conv: int = 4,
        forget_gate: bool = True,
        negative_eigenvalues: bool = True,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        d_key = d_key or max(1, d_model // n_heads)
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_value_heads or n_heads,
            d_key=d_key,
            d_value=d_value or d_key,
            d_conv=d_conv,
            gate="silu" if output_gate else None,
            negative_eigenvalues=negative_eigenvalues,
            forget_gate=forget_gate,
            norm_eps=norm_eps,
            steps=n_steps,
        )
        self.reset_parameters()
