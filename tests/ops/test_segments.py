"""The map of a stretch of tokens against the op that runs them: states, and all gradients.

What crosses from device to device is these maps and nothing else, so a gradient that an op has and
its map lacks would be lost between two devices without any error.
"""

import pytest
import torch
from helpers import assert_close, unit

from longscan.algebra import compose
from longscan.mixers.s4 import S4
from longscan.mixers.wersa import WERSA
from longscan.ops import _across, _cauchy
from longscan.ops.decay import decay, decay_segment
from longscan.ops.delta import delta, delta_segment
from longscan.ops.dplr import dplr, dplr_segment
from longscan.ops.lti import lti, lti_segment
from longscan.ops.mlstm import mlstm, mlstm_segment
from longscan.ops.selective import selective, selective_segment
from longscan.ops.slots import slots, slots_segment
from longscan.ops.trapezoid import state_shapes, trapezoid, trapezoid_segment
from longscan.ops.wkv import wkv, wkv_segment
from longscan.state import State

F64 = torch.float64
B, H, K, V = 2, 4, 3, 5


def _randn(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype)


def _gates(*shape):
    """Log decays from nothing to nearly all."""
    return -torch.rand(*shape, dtype=F64).pow(4) * 20


def _keyed(t, groups=H):
    return {"k": unit(_randn(B, t, groups, K)), "v": _randn(B, t, H, V)}


def _decay(gate, groups=H):
    def make(t):
        log_a = {"head": _gates(B, t, H), "key": _gates(B, t, H, K), None: None}[gate]
        x = _keyed(t, groups)
        return (x if log_a is None else x | {"log_a": log_a}), {}

    def run(x, state):
        return decay(x["k"], **x, state=state)[1]

    return make, run, lambda x: decay_segment(**x), lambda: _randn(B, H, K, V)


def _delta(gate, steps=None, groups=H):
    def make(t):
        n = () if steps is None else (steps,)
        x = {
            "k": unit(_randn(B, t, *n, groups, K)),
            "v": _randn(B, t, *n, H, V),
            "beta": 2 * torch.rand(B, t, *n, H, dtype=F64),
        }
        log_a = {"head": _gates(B, t, H), "key": _gates(B, t, H, K), None: None}[gate]
        return (x if log_a is None else x | {"log_a": log_a}), {}

    def run(x, state):
        q = x["k"] if steps is None else x["k"][:, :, 0]
        return delta(q, **x, state=state)[1]

    return make, run, lambda x: delta_segment(**x), lambda: _randn(B, H, K, V)


def _dplr():
    def make(t):
        erase = unit(_randn(B, t, H, K))
        tokens = {"log_a": _gates(B, t, H, K), "erase": erase, "write": -erase * 0.7}
        return _keyed(t) | tokens, {}

    def run(x, state):
        return dplr(x["k"], **x, state=state)[1]

    return make, run, lambda x: dplr_segment(**x), lambda: _randn(B, H, K, V)


def _mlstm():
    def make(t):
        return _keyed(t) | {"i": 3 * _randn(B, t, H), "f": 3 * _randn(B, t, H)}, {}

    def run(x, state):
        return mlstm(x["k"], **x, state=state)[1]

    return (
        make,
        run,
        lambda x: mlstm_segment(**x),
        lambda: (_randn(B, H, K, V + 1), _randn(B, H, 1)),
    )


def _wkv():
    def make(t):
        return {"k": 3 * _randn(B, t, V), "v": _randn(B, t, V)}, {"log_a": _gates(V)}

    def run(x, state):
        return wkv(x["k"], x["v"], x["log_a"], x["log_a"], state=state)[1]

    return make, run, lambda x: wkv_segment(**x), lambda: (_randn(B, V, 2).abs(), _randn(B, V))


def _selective(constant):
    def make(t):
        tokens = {"u": _randn(B, t, V), "dt": torch.rand(B, t, V, dtype=F64)}
        weights = {"A": -torch.rand(V, K, dtype=F64)}
        b = _randn(V, K) if constant else _randn(B, t, K)
        (weights if constant else tokens)["B"] = b
        return tokens, weights

    def run(x, state):
        return selective(**x, C=x["B"], state=state.squeeze(-1))[1].unsqueeze(-1)

    return make, run, lambda x: selective_segment(**x), lambda: _randn(B, V, K, 1)


def _slots():
    def make(t):
        return _keyed(t) | {"w": torch.rand(B, t, H, 6, dtype=F64), "log_a": _gates(B, t, H, 6)}, {}

    def run(x, state):
        return slots(x["k"], **x, state=state)[1]

    return make, run, lambda x: slots_segment(**x), lambda: _randn(B, H, 6, K + V)


def _lti(form):
    complex_ = torch.complex128

    def make(t):
        if form == "dense":
            turned = torch.matrix_exp(_randn(V, K, K).triu(1) - _randn(V, K, K).triu(1).mT)
            return {"u": _randn(B, t, V)}, {"a": turned * 0.5, "b": _randn(V, K)}
        a = torch.complex(-torch.rand(V, K, dtype=F64), 4 * _randn(V, K))
        return {"u": _randn(B, t, V)}, {"a": a, "b": _randn(V, K, dtype=complex_)}

    def run(x, state):
        c = torch.ones(1, V, K, dtype=state.dtype)
        given = state.squeeze(-1)
        s = lti(**x, c=c, state=given if form == "dense" else torch.view_as_real(given))[1]
        return (s if form == "dense" else torch.view_as_complex(s)).unsqueeze(-1)

    dtype = F64 if form == "dense" else complex_
    return make, run, lambda x: lti_segment(**x), lambda: _randn(B, V, K, 1, dtype=dtype)


def _low_rank(rank):
    """S4's systems, diagonal plus low rank: all rows of a batch are columns of one state."""

    def make(t):
        values = torch.complex(-torch.rand(V, K, dtype=F64), 4 * _randn(V, K))
        p, b = (_randn(*n, V, K, dtype=torch.complex128) for n in ((rank,), ()))
        dt = torch.rand(V, 1, dtype=F64) / 2
        return {"u": _randn(B, t, V)}, {"values": values, "p": p, "b": b, "dt": dt}

    def system(x):
        c = torch.ones(1, V, K, dtype=torch.complex128)
        return _cauchy.discretise(x["values"], x["p"], x["b"], c, x["dt"])

    def run(x, state):
        given = state.squeeze(0).permute(2, 0, 1).reshape(B, V, K, 2)
        s = _cauchy.dplr(x["u"], system(x), state=given)[1]
        return s.flatten(2).permute(1, 2, 0).unsqueeze(0)

    return (
        make,
        run,
        lambda x: _cauchy.dplr_segment(x["u"], system(x)),
        lambda: _randn(1, V, 2 * K, B),
    )


CASES = {
    "linear attention": _decay(None),
    "decay of heads": _decay("head"),
    "decay of heads, shared keys": _decay("head", H // 2),
    "decay of keys": _decay("key"),
    "decay of keys, shared keys": _decay("key", H // 2),
    "delta": _delta(None),
    "gated delta": _delta("head"),
    "delta, shared keys": _delta("head", groups=H // 2),
    "delta, gates of keys": _delta("key"),
    "delta product": _delta("head", 2),
    "dplr": _dplr(),
    "mlstm": _mlstm(),
    "wkv": _wkv(),
    "selective": _selective(False),
    "selective, constant B": _selective(True),
    "slots": _slots(),
    "dense systems": _lti("dense"),
    "diagonal systems": _lti("diagonal"),
    "systems of rank 1": _low_rank(1),
    "systems of rank 2": _low_rank(2),
}


def _as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def _gradients(out, leaves):
    """Of a sum of `out` with weights that depend on nothing but its shape."""
    torch.manual_seed(5)
    out = [torch.view_as_real(o) if o.is_complex() else o for o in out]
    loss = sum((o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in out)
    return torch.autograd.grad(loss, leaves)


def _real(x):
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _agree(got, want, leaves, names):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(_real(a), _real(b), "float64", f"state {i}")
    grads = zip(names, _gradients(got, leaves), _gradients(want, leaves), strict=True)
    for name, a, b in grads:
        assert_close(_real(a), _real(b), "float64", f"gradient of {name}")


@pytest.mark.parametrize("length", [1, 2, 70])
@pytest.mark.parametrize("name", CASES)
def test_a_segment_is_its_op(name, length):
    torch.manual_seed(length)
    make, run, segment, start = CASES[name]
    tokens, weights = make(length)
    x, state = tokens | weights, start()
    leaves = [t.requires_grad_() for t in (*x.values(), *_as_tuple(state))]
    names = [*x, *(f"state {i}" for i in range(len(_as_tuple(state))))]
    _agree(_as_tuple(segment(x)(state)), _as_tuple(run(x, state)), leaves, names)


@pytest.mark.parametrize("name", CASES)
def test_segments_compose_to_the_whole(name):
    torch.manual_seed(0)
    make, _, segment, start = CASES[name]
    tokens, weights = make(11)
    leaves = [t.requires_grad_() for t in (*tokens.values(), *weights.values())]
    state = start()
    parts = [
        segment({n: t[:, cut] for n, t in tokens.items()} | weights)
        for cut in (slice(0, 4), slice(4, 5), slice(5, 11))
    ]
    pairs = compose(compose(parts[2], parts[1]), parts[0])
    got, want = (_as_tuple(f(state)) for f in (pairs, segment(tokens | weights)))
    _agree(got, want, leaves, [*tokens, *weights])


class Neighbour:
    """Shards of a batch one after another in one process, each handed what left the one before."""

    packed = False

    def __init__(self, length, before=None):
        self.first = self.last = slice(0, length)
        self.continues = before is not None
        self.left, self.leaving = [] if before is None else before.leaving, []

    def begin(self, segment, state):
        of = segment(self.last)
        if self.continues:
            self.enters = self.left[len(self.leaving)]
        else:
            self.enters = torch.zeros_like(of.u) if state is None else state
        self.leaving.append(of(self.enters))
        return self

    def wait(self):
        return self.enters

    def place(self, entering):
        return entering

    def others(self):
        return None

    def window(self, tokens, n, state):
        if self.continues:
            state = self.left[len(self.leaving)]
        elif state is None:
            state = tokens.new_zeros(tokens.shape[0], n, tokens.shape[2])
        self.leaving.append(torch.cat([state, tokens], 1)[:, -n:])
        return state


def _trapezoid_inputs(length, ranks, groups):
    n, angles = 6, 2
    x = {
        "q": _randn(B, length, groups, ranks, n),
        "k": _randn(B, length, groups, ranks, n),
        "v": _randn(B, length, H, ranks, V),
        "log_a": _gates(B, length, H),
        "dt": torch.rand(B, length, H, dtype=F64),
        "lam": torch.rand(B, length, H, dtype=F64),
        "rate": 6 * _randn(B, length, 1, angles),
    }
    weights = {name: _randn(H, ranks, n) for name in ("q_bias", "k_bias")}
    shapes = state_shapes(H, ranks, n, V, angles)
    state = {name: _randn(B, *shape) for name, shape in shapes.items()}
    return x, weights, state


@pytest.mark.parametrize(("ranks", "groups"), [(1, H), (3, 2)])
@pytest.mark.parametrize("pairs", ["neighbours", "halves"])
def test_the_turning_state_in_shards(ranks, groups, pairs):
    torch.manual_seed(ranks)
    x, weights, start = _trapezoid_inputs(13, ranks, groups)
    leaves = [t.requires_grad_() for t in (*x.values(), *weights.values(), *start.values())]
    names = [*x, *weights, *(f"first {name}" for name in start)]
    y, end = trapezoid(**x, **weights, state=State(start), pairs=pairs)
    shards, parts, last = None, [], State()
    for cut in (slice(0, 6), slice(6, 8), slice(8, 13)):
        part = {name: t[:, cut] for name, t in x.items()}
        shards = Neighbour(cut.stop - cut.start, shards)
        with _across.within(shards):
            o, last = trapezoid(**part, **weights, state=State(start), pairs=pairs)
        parts.append(o)
    got, want = (
        (a, *(s.tensor(n) for n in start)) for a, s in ((torch.cat(parts, 1), last), (y, end))
    )
    _agree(got, want, leaves, names)
    # The state that leaves is that of the map, not only that of the op.
    assert shards is not None
    assert_close(shards.leaving[-1], end.tensor("s"), "float64", "s of the map")


def test_angles_of_a_million_turns():
    """Angles cross in float64 and without whole turns, so that float32 keeps their digits."""
    x, weights, start = _trapezoid_inputs(600, 1, H)
    x["rate"] = x["rate"].abs() * 1e3
    narrow = {name: t.float() for name, t in (x | weights).items()}
    wide = {name: t.double() for name, t in narrow.items()}
    first = State({name: torch.zeros_like(t) for name, t in start.items()})
    want, _ = trapezoid(**wide, state=first)
    shards, parts = None, []
    for cut in (slice(0, 200), slice(200, 400), slice(400, 600)):
        part = {n: t[:, cut] if n in x else t for n, t in narrow.items()}
        shards = Neighbour(200, shards)
        with _across.within(shards):
            parts.append(trapezoid(**part, state=first.to(dtype=torch.float32))[0])
    turns = (wide["rate"] * wide["dt"].unsqueeze(-1)).sum(1).abs().max()
    assert turns > 1e5
    assert_close(torch.cat(parts, 1), want, "float32", "outputs")


def test_the_map_of_the_turning_state_needs_what_entered():
    torch.manual_seed(0)
    x, weights, start = _trapezoid_inputs(7, 1, H)
    tokens = {name: t for name, t in x.items() if name != "q"}
    state = State(start)
    f = trapezoid_segment(**tokens, k_bias=weights["k_bias"], state=state)
    _, end = trapezoid(**x, **weights, state=state)
    assert_close(f(start["s"]), end.tensor("s"), "float64", "s")
    other = trapezoid_segment(
        **tokens, k_bias=weights["k_bias"], state=State(start, angle=start["angle"] + 1)
    )
    assert (other.u - f.u).abs().max() > 0.1


def test_one_mask_for_all_tokens_of_a_sequence():
    """Dropout that is tied over time keeps the mask of the first shard."""
    mixer = S4(6, d_state=4, dropout=0.5, tie_dropout=True).train()
    shards, masks = None, []
    for seed in range(3):
        shards = Neighbour(4, shards)
        torch.manual_seed(seed)
        with _across.within(shards):
            masks.append(mixer._drop(torch.ones(B, 4, 6), None))
    torch.manual_seed(1)
    own = mixer._drop(torch.ones(B, 4, 6), None)
    assert torch.equal(masks[1], masks[0])
    assert torch.equal(masks[2], masks[0])
    assert not torch.equal(own, masks[0]), "the second shard alone has another"


@pytest.mark.parametrize("feature_map", ["relu", "favor"])
def test_filters_and_features_in_shards(feature_map):
    torch.manual_seed(0)
    mixer = WERSA(8, n_heads=2, d_conv=4, levels=2, n_features=6, feature_map=feature_map).double()
    leaf = (3 * torch.randn(B, 12, 8, dtype=F64)).requires_grad_()
    want = mixer(leaf)[0]
    shards, parts = None, []
    for cut in (slice(0, 2), slice(2, 7), slice(7, 12)):
        shards = Neighbour(cut.stop - cut.start, shards)
        with _across.within(shards):
            parts.append(mixer(leaf[:, cut])[0])
    names = [n for n, _ in mixer.named_parameters() if n != "log_bandwidth"]
    leaves = [leaf, *(p for n, p in mixer.named_parameters() if n in names)]
    _agree([torch.cat(parts, 1)], [want], leaves, ["x", *names])


def test_an_encoder_says_that_it_reads_ahead():
    assert WERSA(8, causal=False).bidirectional
    assert not WERSA(8).bidirectional
