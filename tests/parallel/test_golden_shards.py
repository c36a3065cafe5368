"""Ops on four real ranks against golden files, which hold what one process computes."""

from contextlib import contextmanager

import pytest
import torch
from helpers import error, golden
from torch.nn import functional as F

from longscan.mixers._parts import ShortConv
from longscan.ops.attention import attention
from longscan.ops.decay import decay
from longscan.ops.delta import delta
from longscan.ops.mlstm import mlstm
from longscan.ops.selective import selective
from longscan.parallel import SequenceParallel
from longscan.parallel import attention as over_shards
from longscan.parallel.attention import Loan
from longscan.parallel.exchange import Adjoint, Exchange
from longscan.parallel.wire import Wire

CLOSE = 1e-10

METHODS = {
    "allgather": {"method": "allgather"},
    "allscan, 1 block": {"method": "allscan", "blocks": 1},
    "allscan, 2 blocks": {"method": "allscan", "blocks": 2},
    "allscan, 3 blocks": {"method": "allscan", "blocks": 3},
    "doubling": {"method": "doubling"},
    "hosts of 2": {"method": "hierarchical", "per_host": 2},
    "hosts of 3 and 1": {"method": "hierarchical", "per_host": 3},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

# Inputs with a time axis, and parameters.
NAMES = {
    "gla": ("q", "k", "v", "loga"),
    "gla_varlen": ("q", "k", "v", "loga"),
    "gdn": ("q", "k", "v", "beta", "loga"),
    "kda": ("q", "k", "v", "beta", "loga"),
    "deltaproduct": ("q", "k", "v", "beta", "loga"),
    "mamba1": ("u", "dt", "Bm", "C"),
    "mlstm": ("q", "k", "v", "i", "f"),
}
PARAMETERS = {"mamba1": ("A", "Dskip")}


def _op(family, x, state, bounds):
    """The recurrence of a file: (output, state behind it)."""
    if "q" in x:
        x = {**x, "q": x["q"] * x["q"].shape[-1] ** -0.5}
    more = {"state": state, "cu_seqlens": bounds}
    if family in ("gla", "gla_varlen"):
        return decay(x["q"], x["k"], x["v"], x["loga"], **more)
    if family == "mamba1":
        y, h = selective(x["u"], x["dt"], x["A"], x["Bm"], x["C"], **more)
        return y + x["Dskip"] * x["u"], h
    if family == "mlstm":
        return mlstm(*(x[n] for n in NAMES[family]), **more, eps=0.0)
    return delta(*(x[n] for n in NAMES[family]), **more)


@contextmanager
def _seen(found):
    """Note what enters a rank and the gradient of what leaves it."""
    wait, gradients = Exchange.wait, Adjoint.gradients

    def waits(exchange):
        found["enters"] = wait(exchange)
        return found["enters"]

    def told(adjoint, g):
        found["gradient"] = g
        return gradients(adjoint, g)

    Exchange.wait, Adjoint.gradients = waits, told
    try:
        yield
    finally:
        Exchange.wait, Adjoint.gradients = wait, gradients


def _on_shards(group, family, parallel):
    """A task: one rank's part of a golden file."""
    file = golden(f"seq_parallel/{family}")
    sequence = SequenceParallel(group, **parallel)
    lengths, bounds = file["lens"].tolist(), file.get("cu_seqlens")
    shards = sequence.shards(sum(lengths), lengths=lengths, cu_seqlens=bounds)
    leaf = {n: shards.shard(file[f"in.{n}"]).clone() for n in NAMES[family]}
    leaf |= {n: file[f"in.{n}"].clone() for n in PARAMETERS.get(family, ())}
    for x in leaf.values():
        x.requires_grad_()
    first = "Cn0" if family == "mlstm" else "S0"
    state = None
    if f"in.{first}" in file:
        state = leaf[first] = file[f"in.{first}"].clone().requires_grad_()
    if family == "mlstm":
        state = state, file["in.m0"].unsqueeze(-1)
    found = {}
    with _seen(found), shards.active():
        o, last = _op(family, leaf, state, shards.cu_seqlens)
        target = (o * shards.shard(file["in.do"])).sum()
        if sequence.rank == sequence.size - 1 and state is not None:
            target = target + _read(file, last)
        target.backward()
    sequence.finish()
    enters = found["enters"]
    return {
        "o": o.detach(),
        "last": [t.detach() for t in (last if isinstance(last, tuple) else (last,))],
        "enters": [t.detach() for t in (enters if isinstance(enters, tuple) else (enters,))],
        "gradient": found.get("gradient"),
        "grads": {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaf.items()},
    }


def _read(file, last):
    """What the final state adds to the loss."""
    if not isinstance(last, tuple):
        return (last * file["in.dS_final"]).sum()
    s, m = last  # these gradients hold every m constant
    return (s * (m - m.detach()).exp().unsqueeze(-1) * file["in.dCn_final"]).sum()


def _assert_close(got, want, what):
    e = error(got.view(want.shape), want)
    assert e <= CLOSE, f"{what}: relative error {e:.1e}"


@every_method
@pytest.mark.parametrize("family", NAMES)
def test_recurrence(ranks, family, method):
    """Outputs, states and gradients on each rank, of inputs, parameters and first states."""
    file = golden(f"seq_parallel/{family}")
    found = ranks.run(_on_shards, family, method)
    _assert_close(torch.cat([f["o"] for f in found], 1), file["out.o"], "outputs")
    for n in NAMES[family]:
        got = torch.cat([f["grads"][n] for f in found], 1)
        _assert_close(got, file[f"grad.{n}"], f"gradient of {n}")
    for n in (*PARAMETERS.get(family, ()), "S0", "Cn0"):
        if f"grad.{n}" in file:
            got = torch.stack([f["grads"][n] for f in found]).sum(0)
            _assert_close(got, file[f"grad.{n}"], f"gradient of {n}")
    for r, f in enumerate(found):
        _states(family, file, r, f)


def _states(family, file, r, f):
    """What the file knows of the states of rank r."""
    names = ("Cn", "m") if family == "mlstm" else ("S",)
    for i, n in enumerate(names):
        _assert_close(f["enters"][i], file[f"rank{r}.{n}_in"], f"{n} entering rank {r}")
        if f"rank{r}.{n}_out" in file:
            _assert_close(f["last"][i], file[f"rank{r}.{n}_out"], f"{n} leaving rank {r}")
    if f["gradient"] is not None:
        g = f["gradient"]
        if family == "mlstm":  # below it lies what an eps in the normaliser adds; there is none
            g, rest = g[:, :-1], g[:, -1]
            assert rest.abs().max() < CLOSE
        want = file[f"rank{r}.{'dCn' if family == 'mlstm' else 'dS'}_out"]
        _assert_close(g, want, f"gradient of the state leaving rank {r}")


def test_final_states_of_packed_sequences(ranks):
    file = golden("seq_parallel/gla_varlen")
    found = ranks.run(_on_shards, "gla_varlen", METHODS["allgather"])
    bounds, ends = file["cu_seqlens"].tolist(), [8, 16, 24, 32]
    for i, end in enumerate(bounds[1:]):
        rank = next(r for r, e in enumerate(ends) if end <= e)
        begun = sum(b - (ends[rank] - 8) > 0 for b in bounds[1 : i + 1])
        want = file[f"out.S_final_seq{i}"]
        _assert_close(found[rank]["last"][0][begun : begun + 1], want, f"state of sequence {i}")


def _convolved(group):
    file = golden("seq_parallel/short_conv")
    w = file["in.w"]
    conv = ShortConv(*w.shape, bias=True).double()
    with torch.no_grad():
        conv.weight.copy_(w.unsqueeze(1))
        conv.bias.copy_(file["in.b"])
    sequence = SequenceParallel(group)
    shards = sequence.shards(file["in.x"].shape[1])
    x = shards.shard(file["in.x"]).clone().requires_grad_()
    halo = {}
    before = conv.before

    def seen(*args):
        halo["halo"] = before(*args)
        halo["halo"].register_hook(lambda g: halo.setdefault("gradient", g))
        return halo["halo"]

    conv.before = seen
    with shards.active():
        y = F.silu(conv(x, None, None)[0])
    y.backward(shards.shard(file["in.dy"]))
    return {
        "y": y.detach(), "x": x.grad, "w": conv.weight.grad.squeeze(1), "b": conv.bias.grad,
        "halo": halo["halo"].detach(), "d_halo": halo["gradient"],
    }  # fmt: skip


def test_short_convolution(ranks):
    file = golden("seq_parallel/short_conv")
    found = ranks.run(_convolved)
    _assert_close(torch.cat([f["y"] for f in found], 1), file["out.y"], "outputs")
    _assert_close(torch.cat([f["x"] for f in found], 1), file["grad.x"], "gradient of x")
    for n in ("w", "b"):
        got = torch.stack([f[n] for f in found]).sum(0)
        _assert_close(got, file[f"grad.{n}"], f"gradient of {n}")
    for r, f in enumerate(found):
        for n in ("halo", "d_halo"):
            _assert_close(f[n], file[f"rank{r}.{n}"], f"{n} of rank {r}")


class _NoLoan(Loan):
    """Every rank answers its own queries, as in the file."""

    def __init__(self, shards):
        super().__init__(shards)
        self.tokens, self.upto = 0, shards.low


def _attended(group, loan):
    file = golden("seq_parallel/softmax_2h")
    sequence = SequenceParallel(group)
    shards = sequence.shards(file["in.q"].shape[1])
    x = {n: shards.shard(file[f"in.{n}"]).clone().requires_grad_() for n in "qkv"}
    reduce, sent = Wire.reduce, []

    def seen(wire, x, kind):
        sent.append(x.clone())
        return reduce(wire, x, kind)

    Wire.reduce, over_shards.Loan = seen, loan
    try:
        with shards.active():
            o, _ = attention(*x.values())
        o.backward(shards.shard(file["in.do"]))
        sequence.finish()
    finally:
        Wire.reduce, over_shards.Loan = reduce, Loan
    return {"o": o.detach(), "partial": sent[0], **{n: t.grad for n, t in x.items()}}


@pytest.mark.parametrize("loan", [Loan, _NoLoan], ids=["queries lent", "none lent"])
def test_softmax_attention(ranks, loan):
    """LASP-2H, and what each rank adds to the gradients of keys and values of those before."""
    file = golden("seq_parallel/softmax_2h")
    found = ranks.run(_attended, loan)
    _assert_close(torch.cat([f["o"] for f in found], 1), file["out.o"], "outputs")
    for n in "qkv":
        _assert_close(torch.cat([f[n] for f in found], 1), file[f"grad.{n}"], f"gradient of {n}")
    for r, f in enumerate(found if loan is _NoLoan else ()):
        parts = f["partial"].movedim(2, 1)  # [ranks, B, tokens of a rank, Hkv * 2 D]
        for source in range(4):
            got = parts[source].unflatten(-1, (2, 8)).split(4, -1)
            for n, part in zip("KV", got, strict=True):
                want = file[f"rank{r}.d{n}_partial"][:, 8 * source : 8 * source + 8]
                if source >= r:  # its own are added on the spot
                    assert part.abs().max() == 0
                else:
                    _assert_close(part, want, f"d{n} of rank {r} for rank {source}")
