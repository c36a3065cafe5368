"""The chunked form of the test-time memory op against its definition, and what it costs."""

import random
import weakref
from itertools import pairwise

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._biases import BIASES
from longscan.ops._memory import memory_chunked
from longscan.ops._retentions import RETENTIONS
from longscan.ops.memory import Rule, memory_reference
from longscan.state import State

F64 = torch.float64
# Every bias with every other retention and the other way round.
PAIRS = [(b, r) for i, b in enumerate(BIASES) for j, r in enumerate(RETENTIONS) if (i + j) % 2]
MODELS = {
    "yaad": {"bias": "huber_norm"},
    "titans": {"bias": "squared", "algorithm": "momentum"},
    "memora": {"retention": "kl"},
    "moneta": {"bias": "lp", "retention": "lq_paper", "read": "frozen"},
}


class Case:
    """Inputs of one call, all of them leaves, and the call."""

    def __init__(
        self, rule, seed=0, rows=2, length=11, heads=1, d=3, hidden=5, depth=2, normed=True,
        channels=False, cu_seqlens=None, aged=False, dtype=F64,
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(seed)

        def rn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=F64)

        d_value = d if normed or channels else d + 1
        sizes = [d, *[hidden] * (depth - 1), d_value]
        lead = (rows, length, heads) if cu_seqlens is None else (1, length, heads)
        gate = (*lead, d_value) if channels else lead
        momentum = rule.algorithm == "momentum"
        x = {
            "q": rn(*lead, d),
            "k": rn(*lead, d) / d**0.5,
            "v": rn(*lead, d_value),
            "eta": 0.2 * torch.sigmoid(rn(*gate)),
            "log_a": None if rule.retention == "none" else -F.softplus(rn(*gate) - 2),
            "delta": F.softplus(rn(*lead)),
            "log_mu": -F.softplus(rn(*gate) - 1) if momentum else None,
        }
        w = {f"w{i}": 0.5 * rn(heads, b, a) for i, (a, b) in enumerate(pairwise(sizes))}
        x |= w
        if normed:
            x |= {"gamma": 1 + 0.1 * rn(heads, d), "beta": 0.1 * rn(heads, d)}
        self.rule, self.cu_seqlens, self.state = rule, cu_seqlens, []
        self.depth, self.at = depth, None
        if aged:
            kinds = "a" + "m" * momentum + "g" * (rule.chunk > 1) + "r" * rule.keeps_reader
            for kind in kinds:
                for i in range(depth):
                    start = 0.1 * rn(rows, *w[f"w{i}"].shape)
                    self.state.append(f"{kind}{i}")
                    x[f"{kind}{i}"] = start if kind == "m" else w[f"w{i}"] + start
            if rule.chunk > 1:
                self.at = torch.randint(0, rule.chunk, (rows,), generator=gen)
        self.x = {
            k: t if t is None else t.to(dtype).detach().requires_grad_() for k, t in x.items()
        }

    def run(self, fn=memory_chunked, x=None, at=None, state=None):
        x = x or self.x
        if state is None and self.state:
            state = State({k: x[k] for k in self.state})
            state = state if self.at is None else State(state, at=self.at)
        names = ("q", "k", "v", "eta", "log_a", "delta", "log_mu")
        return fn(
            *(x[k] for k in names), weights=[x[f"w{i}"] for i in range(self.depth)],
            norm=(x["gamma"], x["beta"]) if "gamma" in x else None,
            rule=self.rule, state=state, cu_seqlens=self.cu_seqlens,
        )  # fmt: skip

    def results(self, fn=memory_chunked):
        """Outputs, the state after, and all gradients of a random projection of both."""
        y, end = self.run(fn)
        out = {"y": y, **{f"end {k}": t for k, t in end.items()}}
        gen = torch.Generator().manual_seed(1)
        loss = y.new_zeros(())
        for t in out.values():
            if t.is_floating_point():
                loss = loss + (t * torch.randn(t.shape, generator=gen, dtype=F64).to(t)).sum()
        leaves = {k: t for k, t in self.x.items() if t is not None}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (k, t), g in zip(leaves.items(), found, strict=True):
            out[f"d {k}"] = torch.zeros_like(t) if g is None else g
        return {k: t.detach() for k, t in out.items()}


def same(got, want, kind="float64"):
    assert got.keys() == want.keys()
    for k, t in want.items():
        if not t.is_floating_point():
            assert torch.equal(got[k], t), k
        elif t.abs().max() > 1e-9:
            assert_close(got[k], t, kind, k)
        else:
            assert got[k].abs().max() < 1e-9, k


@pytest.mark.parametrize(("bias", "retention"), PAIRS)
def test_matches_the_definition(bias, retention):
    """Outputs, states and gradients, over what else there is to choose."""
    pick = random.Random(PAIRS.index((bias, retention)))
    depth = pick.choice([1, 2, 2, 3])
    channels = depth < 3 and pick.random() < 0.4
    known = ["gd", "momentum", "momentum"]
    if bias == "l2" and RETENTIONS[retention].linear and depth == 1 and not channels:
        known = ["implicit"]
    rule = Rule(
        bias=bias, retention=retention, algorithm=pick.choice(known),
        decay_first=pick.random() < 0.2, chunk=pick.choice([1, 2, 3, 4, 8]),
        read=pick.choice(["exact", "exact", "frozen"]), channels=pick.choice(["value", "key"]),
    )  # fmt: skip
    rows, length = pick.choice([1, 2, 2]), pick.choice([1, 2, 5, 6])
    cu = None
    if pick.random() < 0.3:
        length += rows
        cu = torch.tensor([0, *sorted(pick.sample(range(1, length), rows - 1)), length])
    case = Case(
        rule, seed=pick.randrange(1000), rows=rows, length=length, depth=depth, cu_seqlens=cu,
        normed=rule.algorithm != "implicit" and pick.random() < 0.7, channels=channels,
        aged=pick.random() < 0.6, heads=pick.choice([1, 1, 2]),
    )  # fmt: skip
    same(case.results(), case.results(memory_reference))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_through_many_chunks(model, packed):
    """Long enough for several states to be kept for the backward."""
    cu = torch.tensor([0, 3, 16, 17, 22]) if packed else None
    for chunk in (1, 2):
        case = Case(
            Rule(**MODELS[model], chunk=chunk), rows=4 if packed else 1,
            length=22 if packed else 15,            channels=packed, cu_seqlens=cu, aged=chunk > 1,
        )  # fmt: skip
        same(case.results(), case.results(memory_reference))


@pytest.mark.parametrize("model", MODELS)
def test_parts_are_the_whole(model):
    """Any cuts, rows at different ages, and packed sequences like separate ones."""
    rule = Rule(**MODELS[model], chunk=4)
    case = Case(rule, rows=3, length=17, aged=True)
    y, end = case.run()
    ys, state = [], None
    for a, b in pairwise((0, 1, 4, 9, 10, 17)):
        x = {
            k: t[:, a:b] if t is not None and t.ndim > 2 and t.shape[1] == 17 else t
            for k, t in case.x.items()
        }
        out, state = case.run(x=x, state=state)
        ys.append(out)
    assert state is not None
    same(
        {"y": torch.cat(ys, 1), **state.map(torch.Tensor.detach)},
        {"y": y, **end.map(torch.Tensor.detach)},
    )


def test_no_gradient_from_the_future_nor_from_other_documents():
    for model in MODELS.values():
        case = Case(Rule(**model, chunk=4), length=14)
        y, _ = case.run()
        (dv,) = torch.autograd.grad(y[:, 6].sum(), case.x["v"])
        assert dv[:, 7:].abs().max() == 0
        assert dv[:, 6].abs().max() > 0
        case = Case(
            Rule(**model, chunk=4), rows=3, length=14, cu_seqlens=torch.tensor([0, 5, 6, 14])
        )
        y, _ = case.run()
        (dv,) = torch.autograd.grad(y[:, 13].sum(), case.x["v"])
        assert dv[:, :6].abs().max() == 0
        assert dv[:, 6:].abs().max() > 0


@pytest.mark.parametrize("model", MODELS)
def test_slots_without_tokens_change_nothing(model):
    """A state on which nothing is written stays bit for bit, momentum aside."""
    case = Case(Rule(**MODELS[model], chunk=4), length=5, aged=True)
    x = dict(case.x)
    x["eta"] = torch.zeros_like(x["eta"])
    x["log_a"] = torch.zeros_like(x["log_a"])
    if x["log_mu"] is not None:
        x |= {k: torch.zeros_like(x[k]) for k in ("m0", "m1")}
    _, end = case.run(x=x)
    for i in range(2):
        assert torch.equal(end.tensor(f"a{i}"), x[f"a{i}"])


@pytest.mark.parametrize("model", MODELS)
def test_float32(model):
    rule = Rule(**MODELS[model], chunk=8)
    args = {"rows": 1, "length": 14, "d": 8, "hidden": 16, "seed": 3}
    wide = Case(rule, **args).results(memory_reference)
    case = Case(rule, **args, dtype=torch.float32)
    got = case.results()
    assert got["y"].dtype is torch.float32
    same(got, wide, "float32")


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("algorithm", ["gd", "momentum"])
def test_extremes_are_finite(retention, algorithm):
    """Closed and open gates, no keys, repeated keys, large values, in float32."""
    rule = Rule(bias="huber_norm", retention=retention, algorithm=algorithm, chunk=4)
    case = Case(rule, length=12, dtype=torch.float32)
    with torch.no_grad():
        x = case.x
        x["k"][:, 2] = 0
        x["v"][:, 2] = 0
        x["k"][:, 3:6] = x["k"][:, 3:4]
        x["v"][:, 7] = 1e4
        x["eta"][:, 4] = 1
        x["eta"][:, 5] = 0
        if x["log_a"] is not None:
            x["log_a"][:, 1] = -torch.inf
            x["log_a"][:, 6] = -1e4
            x["log_a"][:, 8:] = 0
        if x["log_mu"] is not None:
            x["log_mu"][:, 3] = -torch.inf
            x["log_mu"][:, 8:] = 0
    for k, t in case.results().items():
        assert t.isfinite().all(), k


class Kept:
    """The most bytes that are kept for a backward at any time, backward itself included."""

    def __init__(self):
        self.holders, self.now, self.most = {}, 0, 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    def pack(self, t: Tensor):
        kept = _Kept(t)
        storage = t.untyped_storage()
        key = storage.data_ptr()
        count, size = self.holders.get(key, (0, storage.nbytes()))
        self.holders[key] = count + 1, size
        weakref.finalize(kept, self.free, key)
        if not count:
            self.now += size
            self.most = max(self.most, self.now)
        return kept

    def free(self, key):
        count, size = self.holders.pop(key)
        if count > 1:
            self.holders[key] = count - 1, size
        else:
            self.now -= size


class _Kept:
    """A tensor that is kept, in something that can be referred to weakly."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@pytest.mark.parametrize("model", ["yaad", "memora"])
def test_memory_grows_with_the_tokens_and_not_with_their_weights(model):
    """Each further chunk takes less than one state more; each of its 4 tokens would take one."""
    rule = Rule(**MODELS[model], chunk=4)

    def most(chunks: int) -> float:
        case = Case(rule, rows=1, length=4 * chunks, d=4, hidden=64, dtype=torch.float32)
        with Kept() as kept:
            y, end = case.run()
            (y.sum() + end.tensor("a0").sum()).backward()
        tokens = sum(t.nbytes for t in case.x.values() if t is not None and t.ndim > 2)
        state = sum(t.nbytes for k, t in end.items() if k[0] in "am")
        return (kept.most - 3 * tokens) / state

    assert most(48) - most(8) < 48 - 8


def test_two_runs_are_equal_to_the_bit():
    case = Case(Rule(chunk=4), rows=3, length=30, cu_seqlens=torch.tensor([0, 7, 9, 30]))
    one, two = case.results(), case.results()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("model", ["titans"])
def test_compiles(model):
    case = Case(Rule(**MODELS[model], chunk=4), length=6)
    want = case.results()
    torch._dynamo.reset()
    fn = torch.compile(memory_chunked, fullgraph=True, backend="aot_eager")
    same(case.results(fn), want)


@pytest.mark.parametrize("length", [4, 20])
def test_second_derivatives_are_refused(length):
    case = Case(Rule(chunk=4), length=length)
    y, _ = case.run()
    with pytest.raises(RuntimeError, match="LONGSCAN_BACKEND=reference"):
        torch.autograd.grad(y.sum(), case.x["k"], create_graph=True)
