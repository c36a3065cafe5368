"""The stack: its settings do what they say, and it is the middle of a language model."""

import copy
import itertools
import pickle

import ema
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longscan import registry
from longscan.mixers.base import Mixer
from longscan.models import LanguageModel, LanguageModelConfig, Stack, StackConfig, parameter_groups
from longscan.models.block import Block, last_linears
from longscan.registry import Entry
from longscan.state import State

F64 = torch.float64


class Sharing(ema.MovingAverage):
    """Keeps half of the first such mixer's input, as RWKV-7 keeps of its first value."""

    shares_value = True

    def mix(self, x, state=None, *, cu_seqlens=None, first=None):
        first = x if first is None else first
        y, state = super().forward(0.5 * (x + first), state, cu_seqlens=cu_seqlens)
        return y, state, first

    def forward(self, x, state=None, *, cu_seqlens=None):
        return self.mix(x, state, cu_seqlens=cu_seqlens)[:2]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    entry = Entry("ema_sharing", Sharing, "A moving average that shares", "none", 2025, "linear")
    monkeypatch.setitem(registry._entries, entry.name, entry)


def make(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"d_model": 16, "n_layers": 2, "pattern": "ema", **settings}
    return Stack(StackConfig(**settings)).double()


def features(*shape, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=F64).requires_grad_(grad)


def same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


EVERYTHING = {
    "pattern": "ema_sharing,gated_deltanet,ema_sharing",
    "n_layers": 3,
    "mlp": "gated",
    "activation": "gelu",
    "norm": "layer",
    "embedding_norm": True,
}


def shaken(model, seed=1):
    """Parameters moved off their initial values, so that no weight is one and no bias zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_it_is_its_equations():
    stack = shaken(make(**EVERYTHING))
    x, first = features(2, 9, 16), None

    def norm(part, x):
        return F.layer_norm(x, (16,), part.weight, part.bias, 1e-5)

    want = norm(stack.embedding_norm, x)
    for block in stack.blocks:
        h = norm(block.norm, want)
        if block.mixer.shares_value:
            y, _, first = block.mixer.mix(h, first=first)
        else:
            y, _ = block.mixer(h)
        want = want + y
        gate, up = F.linear(norm(block.mlp_norm, want), block.mlp.gate_up.weight).chunk(2, -1)
        gate = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
        want = want + F.linear(gate * up, block.mlp.down.weight)
    same(stack(x)[0], norm(stack.norm, want))


def test_cut_and_packed():
    stack = shaken(make(**EVERYTHING))
    x = features(1, 20, 16)
    whole, last = stack(x)
    a, s = stack(x[:, :7])
    b, s = stack(x[:, 7:], s)
    same(torch.cat([a, b], 1), whole)
    same(s.flatten(), last.flatten())
    assert list(stack.init_state(2)) == ["0", "1", "2"]
    bounds = torch.tensor([0, 1, 9, 20])
    packed, _ = stack(x, cu_seqlens=bounds)
    for a, b in itertools.pairwise(bounds):
        same(packed[:, a:b], stack(x[:, a:b])[0])


def test_the_first_value_reaches_every_mixer_that_shares_it():
    stack = shaken(make(**EVERYTHING))
    seen = []
    inner = Sharing.mix

    def watch(self, x, state=None, *, cu_seqlens=None, first=None):
        seen.append((x, first))
        return inner(self, x, state, cu_seqlens=cu_seqlens, first=first)

    Sharing.mix = watch
    try:
        stack(features(2, 5, 16))
    finally:
        Sharing.mix = inner
    assert len(seen) == 2
    assert seen[0][1] is None
    assert seen[1][1] is seen[0][0]


def test_rwkv7_layers_use_the_first_layers_values():
    mixers = {"rwkv7": {"value_residual": True}}
    settings = {"pattern": "rwkv7,rwkv_channel_mix", "n_layers": 6, "mixers": mixers}
    stack = shaken(make(**settings, norm="layer", embedding_norm=True))
    assert [block.mixer.layer for block in stack.blocks] == [0, 0, 1, 1, 2, 2]
    assert stack.blocks[0].mixer.v0 is None
    x = features(1, 20, 16)
    whole, _ = stack(x)
    a, s = stack(x[:, :7])
    same(torch.cat([a, stack(x[:, 7:], s)[0]], 1), whole)
    packed, _ = stack(x, cu_seqlens=torch.tensor([0, 7, 20]))
    same(packed, torch.cat([a, stack(x[:, 7:])[0]], 1))
    whole.square().sum().backward()
    assert all(p.grad.ne(0).any() for p in stack.parameters())
    # With the values of another first layer, the last one says something else.
    with torch.no_grad():
        h = stack.blocks[4].norm(x)
        (y, _, first), (z, _, _) = (stack.blocks[4].mixer.mix(h, first=f) for f in (h, 2 * h))
    assert torch.equal(first, h)
    assert (y - z).abs().max() > 1e-3


def test_mixers_that_change_with_depth_are_told_their_place(monkeypatch):
    class Placed(Sharing):
        def __init__(self, d_model, *, layer=None, n_layers=None):
            super().__init__(d_model)
            self.place = layer, n_layers

    entry = Entry("placed", Placed, "A moving average by depth", "none", 2025, "linear")
    monkeypatch.setitem(registry._entries, "placed", entry)
    stack = make(pattern="placed,ema,placed", n_layers=7)
    places = [getattr(block.mixer, "place", None) for block in stack.blocks]
    assert places == [(0, 5), None, (1, 5), (2, 5), None, (3, 5), (4, 5)]
    stack = make(pattern="placed", mixers={"placed": {"layer": 8, "n_layers": 9}})
    assert [block.mixer.place for block in stack.blocks] == [(8, 9)] * 2


def test_checkpointed_blocks_share_the_first_value_and_redraw_the_same_dropout():
    grads = []
    for again in (False, True):
        stack = shaken(make(**EVERYTHING, dropout=0.3, checkpoint_blocks=again))
        torch.manual_seed(7)
        y, _ = stack(features(2, 9, 16))
        grads.append(torch.autograd.grad(y.square().sum(), list(stack.parameters())))
    same(*grads)


def test_dropout_is_on_every_branch_while_training_only():
    stack = make(mlp="gated", dropout=0.5)
    x = features(2, 9, 16)
    block = stack.blocks[0]
    with torch.no_grad():
        for part in (block.mixer.out_proj, block.mlp.down):
            part.weight.zero_()
    same(block(x)[0], x, 0)
    for part in (block.mixer.out_proj, block.mlp.down):
        with torch.no_grad():
            part.weight.copy_(torch.eye(16, part.weight.shape[1]))
        added = block(x)[0] - x
        full = block.eval()(x)[0] - x
        block.train()
        dropped = added == 0
        assert 0.3 < dropped.double().mean() < 0.7
        same(added[~dropped], 2 * full[~dropped])
        with torch.no_grad():
            part.weight.zero_()
    stack.eval()
    assert torch.equal(stack(x)[0], stack(x)[0])


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_keep_the_stream_wide_in_narrow_models(norm):
    stack = make(norm=norm, embedding_norm=True, norm_bias=False).to(torch.bfloat16)
    seen = []
    for block in stack.blocks:
        block.register_forward_hook(lambda m, a, out: seen.append((a[0].dtype, out[0].dtype)))
        block.mixer.register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
    y, _ = stack(features(1, 4, 16).bfloat16())
    assert y.dtype == torch.bfloat16
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)] * 2


def test_reset_reaches_every_parameter():
    stack, fresh = shaken(make(**EVERYTHING)), make(**EVERYTHING)
    torch.manual_seed(5)
    stack.reset_parameters()
    torch.manual_seed(5)
    fresh.reset_parameters()
    for (name, p), q in zip(stack.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_language_model_is_a_stack_between_two_tables():
    names = [n for n, _ in LanguageModel(LanguageModelConfig(37, d_model=16)).named_parameters()]
    assert names[0] == "embedding.weight"
    assert names[-1] == "norm.weight"
    assert all(n.startswith("blocks.") for n in names[1:-1])
    torch.manual_seed(0)
    config = LanguageModelConfig(37, d_model=16, **EVERYTHING, logit_cap=0.5, tie_embeddings=False)
    model = shaken(LanguageModel(config).double())
    ids = torch.arange(18).view(2, 9)
    h, _ = model.features(model.embedding(ids))
    logits, _ = model(ids)
    raw = F.linear(h, model.head.weight)[..., :37]
    same(logits, 0.5 * torch.tanh(raw / 0.5))
    assert 0.4 < logits.abs().max() < 0.5
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    want = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
    same(loss, want)
    parameters = list(model.parameters())
    same(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters))


def test_round_trip_on_disk(tmp_path):
    stack = shaken(make(**EVERYTHING)).float()
    stack.save(tmp_path)
    again = Stack.load(tmp_path)
    assert again.config == stack.config
    x = features(2, 5, 16).float()
    assert torch.equal(again(x)[0], stack(x)[0])
    with pytest.raises(ValueError, match=r"of longscan.Stack, not of longscan.LanguageModel"):
        LanguageModel.load(tmp_path)


class Pair(Mixer):
    """A mixer made of two."""

    def __init__(self, d_model):
        super().__init__()
        self.d_model = d_model
        self.left, self.right = ema.MovingAverage(d_model), ema.MovingAverage(d_model)

    def reset_parameters(self):
        self.left.reset_parameters()
        self.right.reset_parameters()

    def init_state(self, batch):
        return State(left=self.left.init_state(batch), right=self.right.init_state(batch))

    def forward(self, x, state=None, *, cu_seqlens=None):
        a, s = self.left(x, state and state.child("left"), cu_seqlens=cu_seqlens)
        b, t = self.right(x, state and state.child("right"), cu_seqlens=cu_seqlens)
        return a + b, State(left=s, right=t)


def test_groups_and_outputs_of_mixers_inside_mixers():
    pair = Pair(16)
    model = nn.Sequential(Block(pair, StackConfig(d_model=16), mlp=False), nn.Linear(16, 4))
    groups = parameter_groups(model, weight_decay=0.1, lr=1e-2, no_weight_decay=["1.weight"])
    names = {id(p): n for n, p in model.named_parameters()}
    members = {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert [g["lr"] for g in groups] == [1e-2, 1e-2, 3e-4]
    assert members["no_decay lr 0.0003"] == {"0.mixer.left.rate", "0.mixer.right.rate"}
    assert {"1.weight", "0.mixer.left.table", "0.mixer.right.table"} < members["no_decay"]
    assert members["decay"] == {
        f"0.mixer.{side}.{part}.weight"
        for side in ("left", "right")
        for part in ("in_proj", "out_proj")
    }
    alone = parameter_groups(pair.left, weight_decay=0.1, lr=1e-2)
    assert [g["name"] for g in alone] == ["decay", "no_decay", "no_decay lr 0.0003"]
    assert last_linears(pair) == [pair.left.out_proj, pair.right.out_proj]
    before = pair.right.out_proj.weight.clone()
    model[0].scale_outputs(0.5)
    assert torch.equal(pair.right.out_proj.weight, before * 0.5)


def test_bad_input():
    stack = make()
    for x in (features(2, 5, 15), features(2, 0, 16), features(5, 16)):
        with pytest.raises(ValueError, match=r"\[batch, time >= 1, 16\]"):
            stack(x)
    with pytest.raises(ValueError, match="2 blocks"):
        stack(features(2, 5, 16), State())


# -- what a mixer may ask of the model around it


class Demanding(ema.MovingAverage):
    """Normalises its input itself, and in training wants the loss to hold its input's square."""

    owns_norm = True

    def forward(self, x, state=None, *, cu_seqlens=None):
        self.penalty = 0.1 * x.square().mean() if self.training else None
        return super().forward(F.normalize(x, dim=-1), state, cu_seqlens=cu_seqlens)


@pytest.fixture
def demanding(monkeypatch):
    entry = Entry("ema_demanding", Demanding, "A demanding moving average", "none", 2025, "linear")
    monkeypatch.setitem(registry._entries, entry.name, entry)
    torch.manual_seed(0)
    config = LanguageModelConfig(11, d_model=8, n_layers=2, pattern="ema_demanding", mlp="none")
    return LanguageModel(config).double()


def test_a_mixer_with_its_own_norm_gets_the_residual_stream(demanding):
    assert demanding.blocks[0].norm is None
    x = torch.randn(1, 5, 8, dtype=F64)
    y, _ = demanding.features(x)
    first, _, _ = demanding.blocks[0](x)
    mixed, _ = demanding.blocks[0].mixer(x)
    torch.testing.assert_close(first, x + mixed)
    assert torch.isfinite(y).all()
    demanding.reset_parameters()


def test_penalties_are_part_of_the_mean_loss_in_training_only(demanding):
    ids = torch.randint(0, 11, (2, 6))
    each = demanding.loss(ids, ids, reduction="none")[0]
    loss, _ = demanding.loss(ids, ids)
    penalty = demanding.penalty()
    assert penalty > 0
    torch.testing.assert_close(loss, each.mean() + penalty)
    penalty.backward()
    assert demanding.embedding.weight.grad.abs().max() > 0
    demanding.eval()
    torch.testing.assert_close(demanding.loss(ids, ids)[0], each.mean())
    assert demanding.penalty() is None


def test_a_penalty_is_neither_copied_nor_pickled(demanding):
    ids = torch.randint(0, 11, (2, 6))
    demanding.loss(ids, ids)
    other = copy.deepcopy(demanding)
    assert other.penalty() is None
    assert pickle.loads(pickle.dumps(demanding.state_dict()))
    torch.testing.assert_close(other(ids)[0], demanding(ids)[0])


def test_penalties_survive_recomputed_blocks(demanding):
    config = demanding.config.replace(checkpoint_blocks=True)
    again = LanguageModel(config).double()
    again.load_state_dict(demanding.state_dict())
    ids = torch.randint(0, 11, (2, 6))
    for model in (demanding, again):
        model.loss(ids, ids)[0].backward()
    for a, b in zip(demanding.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
