"""What the mixers with query, key and value heads share around their recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from longscan.mixers._parts import RMSNorm, ShortConv, convolved_projection
from longscan.mixers.base import Mixer
from longscan.ops._check import compute_dtype
from longscan.ops.norm import gated_rms_norm
from longscan.ops.step import Conv, is_token, step
from longscan.state import State

GATES = ("silu", "sigmoid")


class HeadMixer(Mixer):
    """One fused projection, an optional short convolution, a recurrence, a normed gated output.

        q | k | v | g | extras = in_proj(x)
        q, k, v = activate(conv(q | k | v))              the convolution only if d_conv > 0
        q, k = normalise(q, k)
        o, S = recur(q, k, v, extras, S)                 the mixer's own part
        y = out_proj(norm_per_head(o) * gate(g))

    Rows of in_proj: q (n_heads d_key), k (steps n_heads d_key), v (steps n_value_heads d_value);
    n_kv_heads, where given, counts the heads of k and v both; then g (n_value_heads d_value, or
    `gate_rank` when the gate is low-rank; none without a gate), then the extras in the order
    given. Within q, k, v, g heads are the slower index.
    State: conv [B, d_conv - 1, channels of q | k | v] (absent without a convolution),
    s [B, n_value_heads, d_key, d_value].
    """

    reads_by_product = True
    shardable = True

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        n_value_heads: int,
        d_key: int,
        d_value: int,
        extras: list[int],
        d_conv: int,
        gate: str | None,
        norm_eps: float | None,
        steps: int = 1,
        n_kv_heads: int | None = None,
        gate_rank: int | None = None,
        gate_bias: bool = False,
    ) -> None:
        super().__init__()
        if n_value_heads % n_heads:
            raise ValueError(
                f"n_value_heads ({n_value_heads}) must be a multiple of n_heads ({n_heads})"
            )
        if gate is not None and norm_eps is None:
            raise ValueError("a gated output is normalised first: give norm_eps as well")
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate must be None, {' or '.join(GATES)}; got {gate!r}")
        self.d_model, self.steps = d_model, steps
        self.n_heads, self.n_value_heads = n_heads, n_value_heads
        self.d_key, self.d_value = d_key, d_value
        values = n_value_heads * d_value
        self._qkv = [
            n_heads * d_key,
            steps * (n_kv_heads or n_heads) * d_key,
            steps * (n_kv_heads or n_value_heads) * d_value,
        ]
        gate_rows = 0 if gate is None else (gate_rank or values)
        self._split = [sum(self._qkv), gate_rows, *extras]
        self.in_proj = nn.Linear(d_model, sum(self._split), bias=False)
        self.conv1d = ShortConv(self._split[0], d_conv) if d_conv else None
        self.gate_proj = (
            nn.Linear(gate_rank, values, bias=gate_bias) if gate and gate_rank else None
        )
        self._gate = gate
        self.norm = None if norm_eps is None else RMSNorm(d_value, norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def rows(self) -> dict[str, tuple[int, int]]:
        """Where the parts named q, k, v, g and the extras x0, x1, ... lie among in_proj's rows."""
        names = ["q", "k", "v", "g", *(f"x{i}" for i in range(len(self._split) - 2))]
        out, at = {}, 0
        for name, n in zip(names, [*self._qkv, *self._split[1:]], strict=True):
            out[name] = (at, at + n)
            at += n
        return out

    def reset_parameters(self) -> None:
        """Linear weights N(0, 0.02), biases 0, norms 1; the convolution as torch.nn.Conv1d."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, RMSNorm | ShortConv):
                m.reset_parameters()

    def init_state(self, batch: int) -> State:
        w = next(self.parameters())
        shape = (batch, self.n_value_heads, self.d_key, self.d_value)
        s = w.new_zeros(shape, dtype=compute_dtype(w))
        if self.conv1d is None:
            return State(s=s)
        return State(conv=self.conv1d.init_state(batch), s=s)

    silu_behind_conv = True
    """Whether the nonlinearity behind a convolution is SiLU on all of q | k | v."""

    @property
    def unit_heads(self) -> bool:
        """Whether `normalise` is `_parts.unit_heads`, which kernels do behind a convolution."""
        return False

    def normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as `recur` wants them."""
        return q, k

    def activate(self, qkv: Tensor) -> Tensor:
        """The nonlinearity on q | k | v where that is not SiLU behind a convolution."""
        return qkv

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extras: list[Tensor],
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The recurrence.

        Shapes: q [B, T, n_heads, d_key]; k, v likewise, with a step axis after T if steps > 1;
        state: the mixer's; returns o [B, T, n_value_heads, d_value] and the new state's tensors.
        """
        raise NotImplementedError(f"{type(self).__name__} is abstract")

    def step_options(self, extras: list[Tensor], state: State) -> dict[str, Any] | None:
        """What `ops.step.step` is told to do the recurrence of one token, beside the convolution;
        None where it cannot. Shapes: extras [B, n]."""
        return None

    def _step(
        self, qkv: Tensor, state: State, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `recur` returns, and the window, for one token. qkv [B, channels]."""
        q, k, v = qkv.split(self._qkv, -1)
        conv = None
        if self.conv1d is not None:
            at = (0, self._qkv[0], self._qkv[0] + self._qkv[1])
            conv = Conv(state.tensor("conv"), self.conv1d.weight, self.conv1d.bias, at)
        done = step(
            self._heads(q, self.d_key), self._heads(k, self.d_key), self._heads(v, self.d_value),
            state.tensor("s"), conv=conv, **options,
        )  # fmt: skip
        carried = {} if done.window is None else {"conv": done.window}
        return done.o.unsqueeze(1), {**carried, "s": done.s}

    def _gated_norm(self, o: Tensor, g: Tensor) -> Tensor:
        """The norm of each head times its gate; one kernel where there is one."""
        assert self.norm is not None
        if self._gate is None:
            return self.norm(o)
        g = self._heads(g if self.gate_proj is None else self.gate_proj(g), self.d_value)
        return gated_rms_norm(o, g, self.norm.weight, self.norm.eps, activation=self._gate)

    def _heads(self, x: Tensor, d: int) -> Tensor:
        return x.unflatten(-1, (-1, d))

    def _stepped(self, x: Tensor, d: int) -> Tensor:
        if self.steps == 1:
            return self._heads(x, d)
        return x.unflatten(-1, (self.steps, -1, d))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check_input(x)
        carried: dict[str, Tensor] = {}
        window = None if state is None or self.conv1d is None else state.tensor("conv")
        token = state is not None and is_token(x, state, cu_seqlens)
        unit = 0
        if self.conv1d is not None and self.silu_behind_conv and not token:
            unit = self.d_key if self.unit_heads else 0
            (q, k, v), carried["conv"], (g, *extras) = convolved_projection(
                self.in_proj, self.conv1d, x, self._split, self._qkv, state=window,
                cu_seqlens=cu_seqlens, unit=unit,
            )  # fmt: skip
        else:
            qkv, g, *extras = self.in_proj(x).split(self._split, -1)
            if state is not None and token:
                options = self.step_options([e[:, 0] for e in extras], state)
                if options is not None:
                    o, after = self._step(qkv[:, 0], state, options)
                    return self._project(o, g, x), State(after)
            if self.conv1d is not None:
                conv = self.conv1d.activated if self.silu_behind_conv else self.conv1d
                qkv, carried["conv"] = conv(qkv, window, cu_seqlens)
            if self.conv1d is None or not self.silu_behind_conv:
                qkv = self.activate(qkv)
            q, k, v = qkv.split(self._qkv, -1)
        q, k = self._heads(q, self.d_key), self._stepped(k, self.d_key)
        if not unit:
            q, k = self.normalise(q, k)
        v = self._stepped(v, self.d_value)
        o, recurrent = self.recur(q, k, v, extras, state, cu_seqlens)
        return self._project(o, g, x), State(carried, **recurrent)

    def _project(self, o: Tensor, g: Tensor, x: Tensor) -> Tensor:
        o = o if self.norm is None else self._gated_norm(o, g)
        return self.out_proj(o.flatten(-2).to(x.dtype))
