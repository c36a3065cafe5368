"""What `longscan bench gpu` compares: our kernels, the peers' and softmax attention, by op."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = dict[str, Tensor]
Call = Callable[..., Tensor]
OURS = "ours"


@dataclass(frozen=True)
class Op:
    """An op with its peers.

    make(batch, length) -> inputs on the device, bfloat16; ours and the peers: inputs -> output;
    plain: ours by the torch form, which any number of others is checked against.
    sizes: of heads, in words; shapes: (batch, length); sweep: of these only ours and attention.
    step: one token after a state, which is among the inputs: no gradients; it returns (o, state).
    """

    name: str
    sizes: str
    make: Callable[[int, int], Inputs]
    ours: Call
    plain: Call
    peers: dict[str, Call] = field(default_factory=dict)
    shapes: tuple[tuple[int, int], ...] = ((8, 2048), (2, 8192), (1, 32768))
    sweep: tuple[tuple[int, int], ...] = ((32, 512), (16, 1024), (4, 4096), (1, 16384))
    step: bool = False


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def small(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Log decays of gates near one, as models have them."""
    return F.logsigmoid(torch.randn(*shape, device="cuda") + 3).to(dtype)


def need(module: str) -> Any:
    return importlib.import_module(module)


def op(name: str, backend: str) -> Call:
    """One of our ops; it returns the output alone."""

    def run(*args: Any, **more: Any) -> Tensor:
        module = need(f"longscan.ops.{name}")
        return getattr(module, name)(*args, **more, backend=backend)[0]

    return run


# --- linear attention with a gate ----------------------------------------------------------


def heads(
    *,
    heads: int = 16,
    groups: int | None = None,
    key: int = 128,
    value: int = 128,
    gate: str = "",
    beta: bool = False,
) -> Callable[[int, int], Inputs]:
    """q, k, v and what else the op reads; groups: heads of q and k; gate: "", "head" or "key"."""
    n = groups or heads

    def make(b: int, t: int) -> Inputs:
        unit = F.normalize(torch.randn(b, t, n, key, device="cuda"), dim=-1)
        x = {
            "q": normal(b, t, n, key, scale=key**-0.5),
            "k": unit.bfloat16() if beta else normal(b, t, n, key, scale=key**-0.25),
            "v": normal(b, t, heads, value),
        }
        if beta:
            x["beta"] = torch.rand(b, t, heads, device="cuda").bfloat16()
        if gate == "key":
            x["log_a"] = small(b, t, heads, key)
        elif gate:
            x["log_a"] = small(b, t, heads, dtype=torch.float32)
        return x

    return make


def decay(backend: str) -> Call:
    run = op("decay", backend)
    return lambda x: run(x["q"], x["k"], x["v"], x.get("log_a"))


def delta(backend: str) -> Call:
    run = op("delta", backend)
    return lambda x: run(x["q"], x["k"], x["v"], x["beta"], x.get("log_a"))


def fla(path: str, **names: str) -> Call:
    """A function of flash-linear-attention: ours -> their name of an input."""
    module, _, name = path.rpartition(".")

    def run(x: Inputs) -> Tensor:
        function = getattr(need(module), name)
        given = {names.get(n, n): t for n, t in x.items()}
        return function(**given, scale=1.0)[0]

    return run


# --- Mamba ----------------------------------------------------------------------------------


def ssd_inputs(b: int, t: int) -> Inputs:
    h, p, n = 64, 64, 128
    return {
        "x": normal(b, t, h, p),
        "dt": F.softplus(torch.randn(b, t, h, device="cuda") - 4).bfloat16(),
        "A": -torch.rand(h, device="cuda") * 15 - 1,
        "B": normal(b, t, 1, n, scale=n**-0.25),
        "C": normal(b, t, 1, n, scale=n**-0.25),
    }


def ssd(backend: str) -> Call:
    run = op("decay", backend)
    return lambda x: run(x["C"], x["B"], x["x"], x["dt"] * x["A"], scale=x["dt"])


def ssd_peer(x: Inputs) -> Tensor:
    function = need("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return function(x["x"], x["dt"], x["A"], x["B"], x["C"], 256)


def mamba_inputs(b: int, t: int) -> Inputs:
    e, n = 4096, 16
    return {
        "u": normal(b, t, e),
        "dt": normal(b, t, e, scale=0.5),
        "A": -torch.arange(1, n + 1, device="cuda", dtype=torch.float32).repeat(e, 1),
        "B": normal(b, t, n),
        "C": normal(b, t, n),
        "D": torch.ones(e, device="cuda"),
        "z": normal(b, t, e),
        "dt_bias": torch.full((e,), -4.0, device="cuda"),
    }


def mamba_ours(x: Inputs) -> Tensor:
    """With what Mamba does around the scan in the kernel, as the peer."""
    return need("longscan.ops._selective_fused").selective_fused(**x, softplus=True)[0]


def mamba_plain(x: Inputs) -> Tensor:
    dt = F.softplus(x["dt"].float() + x["dt_bias"])
    y = op("selective", "torch")(x["u"].float(), dt, x["A"], x["B"], x["C"])
    return (y + x["D"] * x["u"]) * F.silu(x["z"].float())


def mamba_peer(x: Inputs) -> Tensor:
    """Time lies last in the peer's tensors, in memory too."""
    function = need("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    first = [x[n] for n in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    return function(*first, True).mT


# --- mLSTM ----------------------------------------------------------------------------------


def mlstm_inputs(h: int, key: int, value: int) -> Callable[[int, int], Inputs]:
    def make(b: int, t: int) -> Inputs:
        return {
            "q": normal(b, t, h, key),
            "k": normal(b, t, h, key, scale=key**-0.5),
            "v": normal(b, t, h, value),
            "i": normal(b, t, h),
            "f": normal(b, t, h) + 3,
        }

    return make


def mlstm(backend: str) -> Call:
    run = op("mlstm", backend)
    return lambda x: run(x["q"], x["k"], x["v"], x["i"], x["f"])


def mlstm_peer(x: Inputs) -> Tensor:
    """Heads lie before time in the peer's tensors."""
    module = need("mlstm_kernels.torch.chunkwise.triton_xl_chunk")
    return module.mlstm_chunkwise__xl_chunk(
        **x, return_last_states=False, chunk_size=128, autocast_kernel_dtype=torch.bfloat16
    ).transpose(1, 2)


# --- one token after another ----------------------------------------------------------------


def step(row: str, words: str, make: Callable[[int, int], Inputs], name: str, *state: int) -> Op:
    """Row `decode ...`: one token of the op `name`, as a model decodes; words: the sizes; state:
    its shape behind the batch."""

    def inputs(b: int, t: int) -> Inputs:
        x = make(b, t)
        x["state"] = torch.randn(b, *state, device="cuda") * 0.1
        if name == "mlstm":
            x["m"] = torch.zeros(b, state[0], 1, device="cuda")
        return x

    plain = token_plain(name) if name != "selective" else mamba_token_plain
    ours = token if name != "selective" else mamba_token
    return Op(f"decode {row}", words, inputs, ours, plain, {}, ((128, 1),), (), True)


def token_plain(name: str) -> Call:
    """By the torch form of the op."""

    def run(x: Inputs) -> Any:
        state: Any = (x["state"], x["m"]) if "m" in x else x["state"]
        order = {"decay": "qkv", "delta": "qkv", "mlstm": "qkvif"}[name]
        given = [x[n] for n in order] + ([x["beta"]] if "beta" in x else [])
        given += [] if name == "mlstm" else [x.get("log_a")]
        return getattr(need(f"longscan.ops.{name}"), name)(*given, state=state, backend="torch")

    return run


def token(x: Inputs) -> Any:
    """By the kernel of a step."""
    op = need("longscan.ops.step")
    decay, rule = None, None
    if "log_a" in x:
        decay = op.Decay("given", x["log_a"][:, 0])
    if "beta" in x:
        rule = op.Delta(x["beta"][:, 0])
    elif "m" in x:
        decay = op.Decay("logsigmoid", x["f"][:, 0])
        rule = op.Exponential(x["i"][:, 0], x["m"])
    q, k, v = (x[n][:, 0] for n in ("q", "k", "v"))
    o, s, _, m = op.step(q, k, v, x["state"], decay=decay, rule=rule)
    return (o.unsqueeze(1), s) if m is None else (o.unsqueeze(1), s, m)


def mamba_token_inputs(b: int, t: int) -> Inputs:
    x = mamba_inputs(b, t)
    x["a_log"] = (-x.pop("A")).log()
    return x


def mamba_token(x: Inputs) -> Any:
    kernel = need("longscan.ops._step_fused")
    u, dt, b, c, z = (x[n][:, 0] for n in ("u", "dt", "B", "C", "z"))
    return kernel.scan_fused(u, dt, x["dt_bias"], x["a_log"], b, c, x["D"], z, x["state"])


def mamba_token_plain(x: Inputs) -> Any:
    dt = F.softplus(x["dt"].float() + x["dt_bias"])
    run = need("longscan.ops.selective").selective
    y, state = run(x["u"].float(), dt, -x["a_log"].exp(), x["B"], x["C"], state=x["state"],
                   backend="torch")  # fmt: skip
    return ((y + x["D"] * x["u"]) * F.silu(x["z"].float()))[:, 0], state


def steps() -> list[Op]:
    words, sizes = "H16 K128 V128", (16, 128, 128)
    ssd_heads = heads(heads=64, groups=1, key=128, value=64, gate="head")
    return [
        step("decay", words, heads(gate="head"), "decay", *sizes),
        step("gla", words, heads(gate="key"), "decay", *sizes),
        step("deltanet", words, heads(beta=True), "delta", *sizes),
        step("gated_deltanet", words, heads(beta=True, gate="head"), "delta", *sizes),
        step("kda", words, heads(beta=True, gate="key"), "delta", *sizes),
        step("mamba2", "H64 P64 N128", ssd_heads, "decay", 64, 128, 64),
        step("mamba", "D4096 N16", mamba_token_inputs, "selective", 4096, 16),
        step("mlstm", "H8 K256 V512", mlstm_inputs(8, 256, 512), "mlstm", 8, 256, 513),
    ]


# --- softmax attention ----------------------------------------------------------------------


def attention(x: Inputs) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x[n].transpose(1, 2) for n in ("q", "k", "v"))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def time_last(x: Inputs) -> Inputs:
    return {n: t.mT.contiguous() if t.ndim == 3 else t for n, t in x.items()}


def heads_first(x: Inputs) -> Inputs:
    """And keys without the scale that the peer applies by itself, and gates in float32: of
    bfloat16 ones its kernels end Triton 3.6 by an assertion of LLVM."""
    x = {**x, "k": x["k"] * x["k"].shape[-1] ** 0.5, "i": x["i"].float(), "f": x["f"].float()}
    return {n: t.transpose(1, 2).contiguous() for n, t in x.items()}


LAYOUT = {"mamba/mamba_ssm": time_last, "mlstm/mlstm_kernels": heads_first}
"""How a peer wants its inputs, by the first word of the op and the peer."""

GATES = {"log_a": "g"}
_FLA = {"fla": fla("fla.ops.simple_gla.chunk_simple_gla", **GATES)}
_MLSTM = {"mlstm_kernels": mlstm_peer}
OPS = {
    o.name: o
    for o in (
        Op("decay", "H16 K128 V128", heads(gate="head"), decay("triton"), decay("torch"), _FLA),
        Op("gla", "H16 K128 V128", heads(gate="key"), decay("triton"), decay("torch"),
           {"fla": fla("fla.ops.gla.chunk_gla", **GATES)}),
        Op("deltanet", "H16 K128 V128", heads(beta=True), delta("triton"), delta("torch"),
           {"fla": fla("fla.ops.delta_rule.chunk_delta_rule")}),
        Op("gated_deltanet", "H16 K128 V128", heads(beta=True, gate="head"), delta("triton"),
           delta("torch"),
           {"flash_qla": fla("flash_qla.chunk_gated_delta_rule", **GATES),
            "fla": fla("fla.ops.gated_delta_rule.chunk_gated_delta_rule", **GATES)}),
        Op("kda", "H16 K128 V128", heads(beta=True, gate="key"), delta("triton"), delta("torch"),
           {"fla": fla("fla.ops.kda.chunk_kda", **GATES)}),
        Op("mamba2", "H64 P64 N128", ssd_inputs, ssd("triton"), ssd("torch"),
           {"mamba_ssm": ssd_peer}, sweep=()),
        Op("mamba", "D4096 N16", mamba_inputs, mamba_ours, mamba_plain,
           {"mamba_ssm": mamba_peer}, sweep=()),
        Op("mlstm 7B", "H8 K256 V512", mlstm_inputs(8, 256, 512), mlstm("triton"),
           mlstm("torch"), _MLSTM, ((8, 2048), (1, 16384)), ()),
        Op("mlstm", "H16 K128 V128", mlstm_inputs(16, 128, 128), mlstm("triton"), mlstm("torch"),
           _MLSTM),
        Op("attention", "H16 D128", heads(), attention, attention),
        *steps(),
    )
}  # fmt: skip
"""By name. Attention is no op of ours: its "ours" is PyTorch's by cuDNN."""


def inputs(name: str, side: str, batch: int, length: int) -> Inputs:
    """Leaves of a call, the same numbers for each side."""
    torch.manual_seed(0)
    x = OPS[name].make(batch, length)
    x = LAYOUT.get(f"{name.split()[0]}/{side}", lambda x: x)(x)
    return {n: t.detach().requires_grad_(not OPS[name].step) for n, t in x.items()}


def small_ops() -> dict[str, tuple[Call, Callable[[], Inputs]]]:
    """Ops that are no rows of their own, for the seconds of a first call."""

    def given(**x: Tensor) -> Inputs:
        return {n: t.requires_grad_(t.is_floating_point()) for n, t in x.items()}

    def conv(x: Inputs) -> Tensor:
        return need("longscan.ops._conv_fused").conv_fused(x["x"], x["w"], x["b"], silu=True)[0]

    def norm(x: Inputs) -> Tensor:
        return need("longscan.ops._norm_fused").norm_fused(x["x"], x["w"])

    def loss(x: Inputs) -> Tensor:
        return need("longscan.ops.loss").linear_cross_entropy(x["x"], x["w"], x["targets"])

    def rotary(x: Inputs) -> Tensor:
        op = need("longscan.ops.rotary")
        cos, sin = op.rotary_factors(x["x"].shape[1], 128, device=x["x"].device)
        return op.rotary_heads(x["x"], cos, sin, heads=16, groups=16, d_head=128)[0]

    def slstm(x: Inputs) -> Tensor:
        return need("longscan.ops.slstm").slstm(x["gates"], x["r"], x["bias"])[0]

    return {
        "conv": (conv, lambda: given(x=normal(2, 512, 6144), w=normal(6144, 4), b=normal(6144))),
        "norm": (norm, lambda: given(x=normal(1024, 2048), w=normal(2048))),
        "add_norm": (lambda x: need("longscan.ops.norm").add_rms_norm(x["x"], x["y"], x["w"]),
                     lambda: given(x=normal(1024, 2048), y=normal(1024, 2048), w=normal(2048))),
        "glu": (lambda x: need("longscan.ops.glu").glu(x["x"]),
                lambda: given(x=normal(1024, 11264))),
        "rotary": (rotary, lambda: given(x=normal(2, 512, 6144))),
        "slstm": (slstm, lambda: given(gates=normal(2, 64, 4, 4, 64), r=normal(4, 64, 4, 64),
                                       bias=normal(4, 4, 64))),
        "step": (token, lambda: heads(gate="key")(2, 1)
                 | {"state": torch.zeros(2, 16, 128, 128, device="cuda")}),
        "loss": (loss, lambda: given(x=normal(1024, 2048), w=normal(32000, 2048), targets=
                                     torch.randint(32000, (1024,), device="cuda"))),
    }  # fmt: skip
