"""Both directions of time: the equation, packing, and the refusal of states."""

import itertools

import ema
import pytest
import torch

from longscan import registry
from longscan.models import Bidirectional, Stack, StackConfig
from longscan.models.bidirectional import reverse
from longscan.models.stack import parameter_groups
from longscan.state import State
from longscan.verify import perturbed

D = 32
F64 = torch.float64


def make(mixer="ema", **settings):
    torch.manual_seed(0)
    return perturbed(Bidirectional(D, mixer, **settings).double())


def features(*shape, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=F64).requires_grad_(grad)


def same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("combine", ["add", "mean", "concat"])
def test_it_is_its_equation(combine):
    m = make(combine=combine)
    x = features(2, 9, D)
    y, state = m(x)
    a = m.left_to_right(x)[0]
    b = m.right_to_left(x.flip(1))[0].flip(1)
    want = {
        "add": lambda: a + b,
        "mean": lambda: (a + b) / 2,
        "concat": lambda: torch.cat([a, b], -1) @ m.out_proj.weight.T,
    }[combine]()
    same(y, want)
    assert len(state) == 0
    names = {n for n, _ in m.named_parameters()}
    assert ("out_proj.weight" in names) == (combine == "concat")
    before = [p.clone() for p in m.parameters()]
    m.reset_parameters()
    for p, q in zip(m.parameters(), before, strict=True):
        assert not torch.equal(p, q)


@pytest.mark.parametrize("name", registry.names())
def test_packed_is_separate_for_every_mixer(name):
    m = make(name)
    bounds = torch.tensor([0, 1, 9, 40])
    x = features(1, 40, D, grad=True)
    y, _ = m(x, cu_seqlens=bounds)
    for a, b in itertools.pairwise(bounds):
        same(y[:, a:b], m(x[:, a:b])[0])
    (g,) = torch.autograd.grad(y[:, 5].sum(), x)
    size = g[0].abs().amax(-1)
    assert size[4:7].gt(0).all(), "before and after"
    assert size[:1].eq(0).all()
    assert size[9:].eq(0).all()


def test_reverse():
    x = torch.arange(6).view(1, 6, 1)
    assert reverse(x).flatten().tolist() == [5, 4, 3, 2, 1, 0]
    bounds = torch.tensor([0, 2, 3, 6])
    assert reverse(x, bounds).flatten().tolist() == [1, 0, 2, 5, 4, 3]
    bounds[1] = 1  # what is remembered of a tensor follows its values
    assert reverse(x, bounds).flatten().tolist() == [0, 2, 1, 5, 4, 3]


def test_two_given_mixers():
    a, b = ema.MovingAverage(D), ema.MovingAverage(D, slowest=8.0)
    m = Bidirectional(D, (a, b))
    assert (m.left_to_right, m.right_to_left) == (a, b)
    groups = parameter_groups(m, weight_decay=0.1, lr=1.0)
    (slow,) = [g for g in groups if g["lr"] == 3e-4]
    assert {id(p) for p in slow["params"]} == {id(a.rate), id(b.rate)}
    m = m.to(torch.bfloat16)
    assert a.rate.dtype == b.rate.dtype == torch.float32


class Sharing(ema.MovingAverage):
    shares_value = True

    def mix(self, x, state=None, *, cu_seqlens=None, first=None):
        first = x if first is None else first
        y, state = super().forward(0.5 * (x + first), state, cu_seqlens=cu_seqlens)
        return y, state, first

    def forward(self, x, state=None, *, cu_seqlens=None):
        return self.mix(x, state, cu_seqlens=cu_seqlens)[:2]


class BothWays(Stack):
    """A stack whose mixers are pairs that share."""

    def make_mixer(self, name, place):
        return Bidirectional(D, (Sharing(D), Sharing(D)))


@pytest.mark.parametrize("again", [False, True])
def test_what_is_shared_is_shared_in_each_direction(again):
    torch.manual_seed(0)
    config = StackConfig(d_model=D, n_layers=2, pattern="ema", mlp="none", checkpoint_blocks=again)
    stack = BothWays(config).double()
    x, bounds = features(1, 12, D), torch.tensor([0, 5, 12])
    y, _ = stack(x, cu_seqlens=bounds)

    def norm(u):
        return u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    for a, b in itertools.pairwise(bounds):
        h = x[:, a:b]
        firsts: list = [None, None]
        for block in stack.blocks:
            u = norm(h)
            pair = block.mixer.left_to_right, block.mixer.right_to_left
            p, _, firsts[0] = pair[0].mix(u, first=firsts[0])
            q, _, firsts[1] = pair[1].mix(u.flip(1), first=firsts[1])
            h = h + p + q.flip(1)
        same(y[:, a:b], norm(h))
    y.square().sum().backward()
    assert all(p.grad.ne(0).any() for p in stack.parameters())


def test_the_last_projections_of_both_directions_are_scaled_by_depth():
    class Plain(Stack):
        def make_mixer(self, name, place):
            return Bidirectional(D, "ema")

    torch.manual_seed(0)
    stack = Plain(StackConfig(d_model=D, n_layers=16, pattern="ema"))
    fresh = ema.MovingAverage(D).out_proj.weight.std()
    for block in stack.blocks:
        for m in (block.mixer.left_to_right, block.mixer.right_to_left):
            assert abs(fresh / m.out_proj.weight.std() / 4 - 1) < 0.1


def test_bad_use():
    m, x = make(), features(2, 5, D)
    for call, words in (
        (lambda: m(x, State()), "begins at the end"),
        (lambda: m.init_state(2), "begins at the end"),
        (lambda: m(x[..., 1:]), "shape"),
        (lambda: m(x, cu_seqlens=torch.tensor([0, 5])), "batch must be 1"),
        (lambda: Bidirectional(D, "emma"), "did you mean ema"),
        (lambda: Bidirectional(D, "ema", slow=3), "did you mean slowest"),
        (lambda: Bidirectional(D, combine="multiply"), "add, mean or concat"),
        (lambda: Bidirectional(D, (ema.MovingAverage(D), ema.MovingAverage(D + 1))), "width 33"),
        (lambda: Bidirectional(D, (ema.MovingAverage(D), Sharing(D))), "either both"),
        (lambda: Bidirectional(D, (m, m), slowest=3.0), "have settings already"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
