"""S4D: state spaces with a diagonal state matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from longscan.mixers._hippo import Kept, nplr
from longscan.mixers._ssm import SystemMixer
from longscan.ops import _cauchy
from longscan.ops._check import cast
from longscan.ops.lti import lti, lti_kernel

INITS = ("lin", "inv", "inv2", "quad", "legs", "real", "rand")


def initial(init: str, d_state: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and B of an initialisation, one of each conjugate pair, before any clamp.

    Shapes: [N / 2] each, complex128.
    Raises: ValueError for an unknown name.
    Source: arXiv 2206.11893, section 4 and table 6 (inv2, quad, real, rand: the authors' code).
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if init == "legs":
        values, _, b = nplr("legs", d_state)
        return values, b
    n = torch.arange(d_state // 2, dtype=torch.float64)
    pi, real = math.pi, torch.full_like(n, -0.5)
    if init == "real":
        real, imag = -(n + 1), torch.zeros_like(n)
    elif init == "rand":
        imag = torch.randn_like(n).exp()
    else:
        imag = {
            "lin": pi * n,
            "inv": d_state / pi * (d_state / (2 * n + 1) - 1),
            "inv2": d_state / pi * (d_state / (n + 1) - 1),
            "quad": (1 + 2 * n) ** 2 / pi,
        }[init]
    return torch.complex(real, -imag), torch.ones_like(n, dtype=torch.complex128)


def discretise(a: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Logarithms of the discrete eigenvalues, and the factors that B gets, of x' = a x + B u.

    Shapes: a, results [H, N] complex; dt [H, 1]. method: zoh (the input is constant for a step)
    or bilinear.
    """
    z = dt * a
    if method == "zoh":
        return z, torch.expm1(z) / a
    z = z / 2
    away = (1 - z).abs().square()
    # log((1 + z) / (1 - z)) in real numbers: exact for slow modes, never positive, and finite
    # where 1 + z = 0.
    size = torch.log1p((4 * z.real / away).clamp(min=-1 + torch.finfo(dt.dtype).eps)) / 2
    angle = torch.atan2(2 * z.imag, 1 - z.abs().square())
    return torch.complex(size, angle), dt / (1 - z)


class S4D(SystemMixer):
    """One linear system per feature, x' = A x + B u, with a diagonal A.

    A = -exp(A_real) - i A_imag,   a_t = exp(dt A),   b = B (exp(dt A) - 1) / A        (zoh)
    s_t = a s_{t-1} + b u_t,   v_t = 2 Re(C s_t) + D u_t
    y = GLU(out_proj(GELU(v)))

    Shapes: x, y [B, T, d_model]; H = d_model systems of N = d_state, N/2 conjugate pairs;
    inv_dt [H]; A_real, A_imag [n_ssm, N/2]; B [n_ssm, N/2, 2] and C [channels, H, N/2, 2] with
    (re, im) last, twice the channels if bidirectional; D [channels, H]; out_proj reads H numbers
    of the first channel, then of the next; state: s [B, H, N/2, 2].
    init: lin, inv, inv2 or quad (frequencies by formula), legs (eigenvalues of HiPPO-LegS), real
    (no frequencies), rand.
    method: zoh or bilinear.
    train_b: whether B is a parameter; if not it is 1, and C starts as C B.
    b_clip: bound of the imaginary part of the initial B, None for none.
    max_lr: largest learning rate of inv_dt, A_real, A_imag, B (`lr_limit`), None for none.
    Precision: all parameters but out_proj, the discretisation and the state float32.
    Source: arXiv 2206.11893 (sections 3 and 4), 2206.12037 (dt).
    Differs: sequences go through chunks, exactly causal, instead of an FFT of the whole length;
    `kernel` is the convolutional view. exp(dt A) - 1 keeps its digits for small dt.
    Reference: state-spaces/s4, Apache-2.0.
    """

    shardable = True
    keep_float32 = ("inv_dt", "A_real", "A_imag", "B", "C", "D")
    no_weight_decay = ("inv_dt", "A_real", "A_imag", "B")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: str = "lin",
        method: str = "zoh",
        train_b: bool = True,
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
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
        if method not in ("zoh", "bilinear"):
            raise ValueError(f"method must be zoh or bilinear; got {method!r}")
        self.init, self.method = init, method
        self._b_clip = b_clip
        half = d_state // 2
        self.B = nn.Parameter(torch.empty(self.n_ssm, half, 2)) if train_b else None
        names = self.no_weight_decay if train_b else self.no_weight_decay[:-1]
        self.lr_limit = {} if max_lr is None else dict.fromkeys(names, max_lr)
        self._kept, self._kept_step = Kept(), Kept()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B by `init`, -Re A and -Im A at least 1e-4; dt log-uniform in dt_range; C complex
        normal, D normal; out_proj as torch.nn.Linear."""
        values, b = initial(self.init, self.d_state)
        if self._b_clip is not None:
            b = torch.complex(b.real, b.imag.clamp(-self._b_clip, self._b_clip))
        self._reset_common(values)
        if self.B is not None:
            self.B.copy_(torch.view_as_real(b).expand_as(self.B))
        else:
            c = torch.view_as_complex(self.C.detach().double().contiguous())
            self.C.copy_(torch.view_as_real(c * b))

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """a = dt A or its bilinear counterpart, b [H, N/2], 2 C [M, H, N/2], for `lti`."""

        return self._kept.get(self._tensors(), (dtype, self.rate), lambda: self._discrete(dtype))

    def stepper(self, dtype: torch.dtype) -> _cauchy.Stepper:
        def make() -> _cauchy.Stepper:
            a, b, c = self._discrete(dtype)
            none = a.new_empty(len(a), 0, a.shape[1])  # of low rank
            pole = torch.polar(a.real.exp(), a.imag)
            return _cauchy.stepper(_cauchy.Discrete(pole, none, none, b, c))

        return self._kept_step.get(self._tensors(), (dtype, self.rate), make)

    def _tensors(self) -> list[Tensor]:
        tensors = (self.inv_dt, self.A_real, self.A_imag, self.B, self.C)
        return [t for t in tensors if t is not None]

    def _discrete(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        re, im, b, c = cast(dtype, self.A_real, self.A_imag, self.B, self.C)
        copies = self.d_model // self.n_ssm
        values = torch.complex(-re.exp(), -im).repeat(copies, 1)
        a, factor = discretise(values, self.step_sizes(dtype), self.method)
        if b is not None:
            factor = factor * torch.complex(b[..., 0], b[..., 1]).repeat(copies, 1)
        return a, factor, torch.complex(2 * c[..., 0], 2 * c[..., 1])

    def recur(
        self,
        system: tuple[Tensor, Tensor, Tensor],
        u: Tensor,
        rows: slice,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        a, b, c = system
        return lti(u, a, b, c[rows], state=state, cu_seqlens=cu_seqlens)

    def kernel(self, length: int) -> Tensor:
        """The convolutional view: v = D u + sum_l k_l u_{t-l}, in O(N length).

        If bidirectional, the second half of the channels acts on u_{t+1+l}.
        Shapes: [channels, H, length], in the precision of the parameters.
        """
        return lti_kernel(*self.system(self.C.dtype), length)
