"""S4: structured state spaces."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longscan.mixers._hippo import NPLR_BASES, Kept, nplr
from longscan.mixers._ssm import STEPS, SystemMixer
from longscan.ops import _cauchy
from longscan.ops._check import cast, compute_dtype


class S4(SystemMixer):
    """One linear system per feature, x' = A x + B u, with A diagonal plus low rank from HiPPO.

    A = Lambda - P P^*, Lambda = -exp(A_real) - i A_imag, over N modes in conjugate pairs
    s_t = Abar s_{t-1} + Bbar u_t,   v_t = C s_t + D u_t       bilinear with step dt per feature
    y = GLU(out_proj(GELU(v)))

    Shapes: x, y [B, T, d_model]; H = d_model systems of N = d_state, N/2 conjugate pairs;
    inv_dt [H]; A_real, A_imag [n_ssm, N/2]; B [n_ssm, N/2, 2], P [rank, n_ssm, N/2, 2] and C
    [channels, H, N/2, 2] with (re, im) last, twice the channels if bidirectional; D [channels, H];
    out_proj reads H numbers of the first channel, then of the next; state: s [B, H, N/2, 2].
    basis: legs (memory fades over 1 / dt tokens), legt or fout (a window of 2 / dt tokens).
    b_clip: bound of the imaginary part of the initial B, None for none.
    max_lr: largest learning rate of inv_dt, A_real, A_imag, B, P (`lr_limit`), None for none.
    Precision: all parameters but out_proj, the discretisation and the state float32.
    Source: arXiv 2111.00396 (algorithm 1), 2206.12037 (bases, dt).
    Differs: C itself is trained, not C~ = (I - Abar^L)^T C, hence there is no length L anywhere
    and states are exact; `from_authors` converts. Sequences go through chunks, exactly causal,
    instead of an FFT of the whole length; `kernel` is the convolutional view. The initial phases
    of the modes do not depend on the machine.
    Reference: state-spaces/s4, Apache-2.0.
    """

    shardable = True
    keep_float32 = ("inv_dt", "A_real", "A_imag", "B", "P", "C", "D")
    no_weight_decay = ("inv_dt", "A_real", "A_imag", "B", "P")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        basis: str = "legs",
        channels: int = 1,
        n_ssm: int | None = None,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_transform: str = "softplus",
        rate: float = 1.0,
        bidirectional: bool = False,
        activation: str | None = "gelu",
        output: str | None = "glu",
        dropout: float = 0.0,
        tie_dropout: bool = False,
        b_clip: float | None = 2.0,
        max_lr: float | None = 1e-3,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            channels=channels,
            n_ssm=n_ssm,
            dt_range=dt_range,
            dt_transform=dt_transform,
            rate=rate,
            bidirectional=bidirectional,
            activation=activation,
            output=output,
            dropout=dropout,
            tie_dropout=tie_dropout,
        )
        if basis not in NPLR_BASES:
            raise ValueError(f"basis must be one of {', '.join(NPLR_BASES)}; got {basis!r}")
        self.basis, self._b_clip = basis, b_clip
        half, rank = d_state // 2, 2 if basis == "legt" else 1
        self.B = nn.Parameter(torch.empty(self.n_ssm, half, 2))
        self.P = nn.Parameter(torch.empty(rank, self.n_ssm, half, 2))
        self.lr_limit = {} if max_lr is None else dict.fromkeys(self.no_weight_decay, max_lr)
        self._kept, self._kept_step = Kept(), Kept()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A, B, P from HiPPO, -Re and -Im of Lambda at least 1e-4; dt log-uniform in dt_range;
        C complex normal, D normal; out_proj as torch.nn.Linear."""
        values, p, b = nplr(self.basis, self.d_state)
        if self._b_clip is not None:
            b = torch.complex(b.real, b.imag.clamp(-self._b_clip, self._b_clip))
        self._reset_common(values)
        self.B.copy_(torch.view_as_real(b).expand_as(self.B))
        self.P.copy_(torch.view_as_real(p).unsqueeze(1).expand_as(self.P))

    def continuous(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Lambda, P, B, C of every feature, complex, and dt [H, 1] with `rate`."""
        copies = self.d_model // self.n_ssm
        re, im, *others = cast(dtype, self.A_real, self.A_imag, self.P, self.B, self.C)
        values = torch.complex(-re.exp(), -im).repeat(copies, 1)
        p, b, c = (torch.complex(x[..., 0], x[..., 1]) for x in others)
        return values, p.repeat(1, copies, 1), b.repeat(copies, 1), c, self.step_sizes(dtype)

    def system(self, dtype: torch.dtype) -> _cauchy.Discrete:
        """The discrete systems."""
        return self._kept.get(self._tensors(), (dtype, self.rate), lambda: self._discrete(dtype))

    def stepper(self, dtype: torch.dtype) -> _cauchy.Stepper:
        return self._kept_step.get(
            self._tensors(), (dtype, self.rate), lambda: _cauchy.stepper(self._discrete(dtype))
        )

    def _tensors(self) -> list[Tensor]:
        return [self.inv_dt, self.A_real, self.A_imag, self.B, self.P, self.C]

    def _discrete(self, dtype: torch.dtype) -> _cauchy.Discrete:
        return _cauchy.discretise(*self.continuous(dtype))

    def recur(
        self,
        system: _cauchy.Discrete,
        u: Tensor,
        rows: slice,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        some = system._replace(c=system.c[rows])
        return _cauchy.dplr(u, some, state=state, cu_seqlens=cu_seqlens)

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """The convolutional view: v = D u + sum_l k_l u_{t-l}, in O(N length) and float64.

        If bidirectional, the second half of the channels acts on u_{t+1+l}.
        Shapes: [channels, H, length], in the precision of the parameters.
        """
        values, p, b, c, dt = self.continuous(torch.float64)
        k = _cauchy.cauchy_kernel(values, p, b, c, dt * rate, length)
        return k.to(compute_dtype(self.C))


def from_authors(
    tensors: Mapping[str, Tensor], *, dt_transform: str = "softplus", rate: float = 1.0
) -> dict[str, Tensor]:
    """Our state dict of one layer from that of the authors' S4Block.

    tensors: without any prefix before `layer.` and `output_linear.`. A layer that has run holds
    C~ for the length l_kernel, which is turned into C in float64; one that has not holds C.
    dt_transform: what the layer was trained with; the file does not say.
    rate: 1, unless C~ was made at another rate.
    """
    kernel = {
        k.rpartition(".")[2]: t.double().clone() for k, t in tensors.items() if ".kernel." in k
    }
    c, length = kernel["C"], int(kernel.get("l_kernel", torch.tensor(0)))
    b, inv_dt = kernel["B"][0], kernel["inv_dt"].squeeze(-1)
    re, im, p = kernel["A_real"], kernel["A_imag"], kernel["P"]
    if length:
        copies = c.shape[1] // re.shape[0]
        system = _cauchy.discretise(
            torch.complex(-re.exp(), -im).repeat(copies, 1),
            torch.view_as_complex(p).repeat(1, copies, 1),
            torch.view_as_complex(b.contiguous()).repeat(copies, 1),
            torch.view_as_complex(c),
            STEPS[dt_transform](inv_dt).unsqueeze(-1) * rate,
        )
        c = torch.view_as_real(_cauchy.recover_c(system, length))
    out = {"inv_dt": inv_dt, "A_real": re, "A_imag": im, "B": b, "P": p, "C": c}
    dtype = tensors["layer.D"].dtype
    out = {"D": tensors["layer.D"]} | {k: t.to(dtype) for k, t in out.items()}
    for part in ("weight", "bias"):
        if f"output_linear.0.{part}" in tensors:
            out[f"out_proj.{part}"] = tensors[f"output_linear.0.{part}"]
    return out
