"""Segment maps: the laws of the algebra, and four shards of a sequence against golden vectors."""

import pytest
import torch
from helpers import assert_close, golden

from longscan import algebra
from longscan.algebra import SegmentMap, adjoint, compose, identity
from longscan.ops.decay import decay_segment
from longscan.ops.delta import delta_segment

F64 = torch.float64


def _random(kind, n=1):
    u = torch.randn(n, 3, 4, 5, dtype=F64)
    a = {
        "identity": None,
        "diagonal": -torch.rand(n, 3, 4, dtype=F64),
        "matrix": torch.randn(n, 3, 4, 4, dtype=F64) / 2,
    }[kind]
    return SegmentMap(kind, a, u)


KINDS = ["identity", "diagonal", "matrix"]


@pytest.mark.parametrize("kind", KINDS)
def test_laws(kind):
    f, g, h = (_random(kind) for _ in range(3))
    s = torch.randn(1, 3, 4, 5, dtype=F64)
    assert_close(compose(g, f)(s), g(f(s)), "float64", "composition is function composition")
    left, right = compose(compose(h, g), f), compose(h, compose(g, f))
    assert_close(left(s), right(s), "float64", "associativity")
    one = identity(f)
    assert_close(compose(one, f)(s), f(s), "float64", "left neutral")
    assert_close(compose(f, one)(s), f(s), "float64", "right neutral")


@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_is_the_transpose(kind):
    f = _random(kind)
    x, y = torch.randn(2, 1, 3, 4, 5, dtype=F64)
    back = adjoint(f, torch.zeros_like(f.u))
    assert_close((f.transition(x) * y).sum(), (x * back(y)).sum(), "float64", "<Ax, y> = <x, A*y>")


@pytest.mark.parametrize("kind", KINDS)
def test_scan_of_ragged_rows(kind):
    maps = _random(kind, 6)
    state = torch.randn(3, 3, 4, 5, dtype=F64)
    entering, final = algebra.scan(maps, state, [3, 2, 1])
    first = [maps[i](state[i]) for i in range(3)]
    second = [maps[3](first[0]), maps[4](first[1])]
    want_in = torch.stack([*state, first[0], first[1], second[0]])
    want_out = torch.stack([maps[5](second[0]), second[1], first[2]])
    assert_close(entering, want_in, "float64", "entering")
    assert_close(final, want_out, "float64", "final")


def test_kinds_do_not_mix():
    with pytest.raises(ValueError, match="cannot compose"):
        compose(_random("matrix"), _random("diagonal"))
    with pytest.raises(ValueError, match="kind"):
        SegmentMap("scalar", None, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="identity"):
        SegmentMap("diagonal", None, torch.zeros(1, 1))


def _segment(family, x, part):
    if family == "gla":
        return decay_segment(x["k"][:, part], x["v"][:, part], x["loga"][:, part])
    names = ("k", "v", "beta", "loga")
    k, v, beta, loga = (x[n][:, part] for n in names)
    return delta_segment(k, v, beta, loga)


@pytest.mark.parametrize("family", ["gla", "gdn", "kda", "deltaproduct"])
def test_four_shards(family):
    file = golden(f"seq_parallel/{family}")
    x = {k[3:]: v for k, v in file.items() if k.startswith("in.")}
    state, at, maps = x["S0"], 0, []
    for r, n in enumerate(file["lens"].tolist()):
        m = _segment(family, x, slice(at, at + n))
        a = m.a.exp() if m.kind == "diagonal" else m.a
        want = file[f"rank{r}.A"]
        assert_close(a.reshape(want.shape), want, "golden64", f"A of shard {r}")
        assert_close(m.u, file[f"rank{r}.S_loc"], "golden64", f"U of shard {r}")
        assert_close(state, file[f"rank{r}.S_in"], "golden64", f"state entering shard {r}")
        state = m(state)
        assert_close(state, file[f"rank{r}.S_out"], "golden64", f"state leaving shard {r}")
        maps.append(m)
        at += n
    whole = compose(compose(maps[3], maps[2]), compose(maps[1], maps[0]))
    assert_close(whole(x["S0"]), file["out.S_final"], "golden64", "tree of compositions")
    grad = x["dS_final"]
    for r in reversed(range(4)):
        assert_close(grad, file[f"rank{r}.dS_out"], "golden64", f"gradient leaving shard {r}")
        grad = adjoint(maps[r], file[f"rank{r}.dS_loc"])(grad)
        assert_close(grad, file[f"rank{r}.dS_in"], "golden64", f"gradient entering shard {r}")
