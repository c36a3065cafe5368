"""The language model: the same function however it is called, and its parts as promised."""

import itertools

import ema  # noqa: F401  (registers the mixer)
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longscan.models import LanguageModel, LanguageModelConfig

PATTERNS = ["ema", "gated_deltanet,mamba2", "ema,attention"]


def make(pattern="ema", dtype=torch.float64, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"vocab_size": 37, "d_model": 16, "n_layers": 2, **settings}
    if "mamba2" in pattern:
        settings.setdefault("mixers", {"mamba2": {"d_state": 8, "d_head": 8}})
    return LanguageModel(LanguageModelConfig(pattern=pattern, **settings)).to(dtype)


def tokens(*shape, seed=0, vocab=37):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --- one function ---------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cut_anywhere(pattern):
    model = make(pattern)
    ids = tokens(2, 21)
    whole, last = model(ids)
    assert whole.shape == (2, 21, 37)
    for cut in (1, 8, 20):
        a, s = model(ids[:, :cut])
        b, s = model(ids[:, cut:], s)
        same(torch.cat([a, b], 1), whole)
        same(s.flatten(), last.flatten())
    s = model.init_state(2)
    for t in range(ids.shape[1]):
        logits, s = model(ids[:, t : t + 1], s)
        same(logits[:, 0], whole[:, t])
    same(s.flatten(), last.flatten())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_rows_are_separate_rows(pattern):
    model = make(pattern)
    ids = tokens(1, 20)
    bounds = torch.tensor([0, 1, 9, 20])
    packed, state = model(ids, cu_seqlens=bounds)
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        alone, s = model(ids[:, a:b])
        same(packed[:, a:b], alone)
        again, _ = model(ids[:, :1], state.select(i))
        same(again, model(ids[:, :1], s)[0])


def test_packed_documents_send_each_other_no_gradient():
    model = make("gated_deltanet,mamba2")
    leaf = model.embedding(tokens(1, 12)).detach().requires_grad_()
    model.embedding.forward = lambda ids: leaf
    h, _ = model.hidden(tokens(1, 12), cu_seqlens=torch.tensor([0, 5, 12]))
    h[:, 5:].square().sum().backward()
    assert leaf.grad[:, :5].eq(0).all()
    assert leaf.grad[:, 5:].ne(0).any(-1).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_mask_takes_padding_out_on_either_side(pattern):
    model = make(pattern)
    rows = [tokens(1, n, seed=n) for n in (3, 7, 5)]
    ids, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for i, start in enumerate((5, 0, 2)):
        place = slice(start, start + rows[i].shape[1])
        ids[i, place], mask[i, place] = rows[i][0], 1
    logits, state = model(ids, attention_mask=mask)
    assert logits.shape == (3, 8, 37)
    assert logits[mask == 0].eq(0).all()
    for i, row in enumerate(rows):
        alone, s = model(row)
        same(logits[i][mask[i] == 1], alone[0])
        # The states are rows of their own, ready to decode from.
        same(model(row[:, :1], state.select(i))[0], model(row[:, :1], s)[0])
    full, _ = model(ids, attention_mask=torch.ones_like(ids))
    same(full, model(ids)[0])
    more, _ = model(ids[:, :4], state, attention_mask=mask.flip(1)[:, :4].clamp(min=1))
    same(more, model(ids[:, :4], state)[0])


def test_attention_mask_in_inference_mode_and_its_gradient():
    model = make("gated_deltanet")
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    want, _ = model(ids, attention_mask=mask)
    with torch.inference_mode():
        got, _ = model(ids.clone(), attention_mask=mask.clone())
        packed, _ = model(ids[:1].clone(), cu_seqlens=torch.tensor([0, 2, 6]))
    same(got, want.detach())
    same(packed, model(ids[:1], cu_seqlens=torch.tensor([0, 2, 6]))[0].detach())
    grads = torch.autograd.grad(want[0, 2:].sum() + want[1, :3].sum(), model.norm.weight)
    a, b = model(ids[:1, 2:])[0], model(ids[1:, :3])[0]
    same(grads, torch.autograd.grad(a.sum() + b.sum(), model.norm.weight))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_cross_entropy_of_the_logits(tied, reduction):
    model = make("ema", tie_embeddings=tied)
    ids, targets = tokens(2, 9), tokens(2, 9, seed=1)
    targets[0, :4] = -100
    loss, state = model.loss(ids, targets, reduction=reduction)
    logits, want_state = model(ids)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    same(loss, want.view_as(targets) if reduction == "none" else want)
    same(state.flatten(), want_state.flatten())
    got = torch.autograd.grad(loss.sum(), list(model.parameters()))
    same(got, torch.autograd.grad(want.sum(), list(model.parameters())))


def test_a_step_of_training_lowers_the_loss_and_state_carries_gradients():
    model = make("gated_deltanet,mamba2", dtype=torch.float32)
    ids = tokens(2, 24)
    optimiser = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1, lr=1e-2))
    losses = []
    for _ in range(8):
        first, state = model.loss(ids[:, :8], ids[:, 1:9])
        second, _ = model.loss(ids[:, 8:-1], ids[:, 9:], state)
        optimiser.zero_grad()
        (first + second).backward()
        optimiser.step()
        losses.append((first + second).item())
    assert losses[-1] < 0.8 * losses[0]
    _, state = model.loss(ids[:, :8], ids[:, 1:9])
    second, _ = model.loss(ids[:, 8:-1], ids[:, 9:], state)
    entering = list(state.flatten().values())
    assert all(g.ne(0).any() for g in torch.autograd.grad(second, entering))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpointed_blocks_have_the_same_gradients(pattern):
    ids, targets = tokens(1, 12), tokens(1, 12, seed=1)
    bounds = torch.tensor([0, 5, 12])
    grads = []
    for again in (False, True):
        model = make(pattern, checkpoint_blocks=again)
        loss, state = model.loss(ids, targets, cu_seqlens=bounds)
        loss = loss + sum(t.double().square().sum() for t in state.flatten().values())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    same(*grads)


def test_checkpointed_blocks_keep_only_their_inputs():
    ids = tokens(1, 64)

    def kept(**settings):
        model = make("gated_deltanet", n_layers=4, **settings)
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.hidden(ids)
        return total

    assert kept(checkpoint_blocks=True) < 0.2 * kept()


# --- precision ------------------------------------------------------------------------------


def test_residual_stream_is_float32_in_narrow_models():
    seen = []
    ids = tokens(1, 4)
    model = make("ema", dtype=torch.bfloat16)
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: seen.append((a[0].dtype, out[0].dtype)))
    logits, _ = model(ids)
    assert logits.dtype == torch.bfloat16
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert len(seen) == 4


def test_to_keeps_float32_parameters():
    model = make("gated_deltanet,ema", dtype=torch.float32)
    rate = model.blocks[1].mixer.rate.detach().clone()
    model.to(torch.bfloat16)
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    kept = {n for n, k in kinds.items() if k == torch.float32}
    assert kept == {"blocks.0.mixer.A_log", "blocks.0.mixer.dt_bias", "blocks.1.mixer.rate"}
    assert torch.equal(model.blocks[1].mixer.rate, rate)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_loss_is_near_the_float32_loss(reduction):
    model = make("gated_deltanet", dtype=torch.float32)
    ids, targets = tokens(1, 16), tokens(1, 16, seed=1)
    want, _ = model.loss(ids, targets, reduction=reduction)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = model.loss(ids, targets, reduction=reduction)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


# --- parts ----------------------------------------------------------------------------------


def test_initialisation():
    model = make("ema", n_layers=8, d_model=64, mlp="gated", vocab_size=999, dtype=torch.float32)
    assert abs(model.embedding.weight.std().item() - 0.02) < 1e-3
    fresh = type(model.blocks[0].mixer)(64)
    branches = 16  # a mixer and an MLP in each of 8 blocks
    for block in model.blocks:
        ratio = fresh.out_proj.weight.std() / block.mixer.out_proj.weight.std()
        assert abs(ratio / branches**0.5 - 1) < 0.1
        # A uniform on +-1/sqrt(n) has standard deviation 1/sqrt(3 n).
        down = block.mlp.down.weight.std() * (3 * 192 * branches) ** 0.5
        assert abs(down - 1) < 0.05
    before = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    model.reset_parameters()
    for n, p in model.named_parameters():
        if p.ndim > 1 and "table" not in n:
            assert not torch.equal(p, before[n])
            assert abs(p.std() / before[n].std() - 1) < 0.1, n


def test_padded_vocabulary_takes_no_part():
    model = make("ema", vocab_size=37, pad_vocab_multiple=16)
    assert model.embedding.weight.shape[0] == 48
    with torch.no_grad():
        model.embedding.weight[37:] = 100.0  # would win every time
    logits, _ = model(tokens(1, 5))
    assert logits.shape[-1] == 37
    loss, _ = model.loss(tokens(1, 5), tokens(1, 5, seed=1))
    loss.backward()
    assert model.embedding.weight.grad[37:].eq(0).all()
    assert loss < 10


def test_parameter_counts():
    model = make("ema", tie_embeddings=False)
    table = 40 * 16
    block = 16 + 2 * 16 * 16 + 16 + 16 + 16  # norm, two projections, bias, rate, table
    assert model.num_parameters() == 2 * table + 2 * block + 16
    assert model.num_parameters(embeddings=False) == 2 * block + 16
    assert make("ema").num_parameters() == model.num_parameters() - table


def test_parameter_groups():
    model = make("ema,gated_deltanet", tie_embeddings=False)
    model.blocks[1].mixer.out_proj.weight.requires_grad_(False)
    groups = model.parameter_groups(weight_decay=0.1, lr=3e-3)
    by_name = {g["name"]: g for g in groups}
    names = {id(p): n for n, p in model.named_parameters()}
    members = {k: {names[id(p)] for p in g["params"]} for k, g in by_name.items()}
    assert {k: (g["lr"], g["weight_decay"]) for k, g in by_name.items()} == {
        "decay": (3e-3, 0.1),
        "no_decay": (3e-3, 0.0),
        "no_decay lr 0.0003": (3e-4, 0.0),
    }
    assert members["no_decay lr 0.0003"] == {"blocks.0.mixer.rate"}
    assert members["decay"] == {
        "head.weight",
        "blocks.0.mixer.in_proj.weight",
        "blocks.0.mixer.out_proj.weight",
        "blocks.1.mixer.in_proj.weight",
        "blocks.1.mixer.conv1d.weight",
        "blocks.1.mlp.gate_up.weight",
        "blocks.1.mlp.down.weight",
    }
    assert "blocks.0.mixer.table" in members["no_decay"]  # two axes, but exempt
    everything = set(names.values()) - {"blocks.1.mixer.out_proj.weight"}
    assert set.union(*members.values()) == everything
    torch.optim.AdamW(groups)
    decayed = model.parameter_groups(weight_decay=0.1, lr=1.0, decay_embeddings=True)
    assert any(p is model.embedding.weight for p in decayed[0]["params"])
    assert decayed[0]["name"] == "decay"
    slow = model.parameter_groups(weight_decay=0.1, lr=1e-4)
    assert [(g["name"], g["lr"]) for g in slow] == [("decay", 1e-4), ("no_decay", 1e-4)]


def test_state_is_a_tree_named_by_blocks():
    model = make("ema,gated_deltanet", n_layers=3)
    _, state = model(tokens(2, 3))
    assert list(state) == ["0", "1", "2"]
    assert state.batch_size == 2
    assert {k: v.shape for k, v in state.flatten().items()} == {
        k: v.shape for k, v in model.init_state(2).flatten().items()
    }


# --- bad input ------------------------------------------------------------------------------


def test_bad_calls():
    model, ids = make("ema"), tokens(2, 5)
    _, state = model(ids)
    holes = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]])
    for call, error, words in (
        (lambda: model(ids[0]), ValueError, r"\[batch, time\]"),
        (lambda: model(ids[:, :0]), ValueError, "at least 1"),
        (lambda: model(ids.float()), TypeError, "int64"),
        (lambda: model(ids + 30), ValueError, "outside 0..36"),
        (lambda: model(ids - 30), ValueError, "vocab_size"),
        (lambda: model(ids, state.child("0")), ValueError, "2 blocks"),
        (lambda: model.loss(ids, ids[:, 1:]), ValueError, "shape of ids"),
        (lambda: model.loss(ids, ids + 30), ValueError, "outside 0..36"),
        (lambda: model(ids, attention_mask=holes), ValueError, "row 1.*between"),
        (lambda: model(ids, attention_mask=holes * 0), ValueError, "row 0.*every token"),
        (lambda: model(ids, attention_mask=holes[:1]), ValueError, "shape of ids"),
        (
            lambda: model(ids, attention_mask=holes, cu_seqlens=torch.tensor([0, 5])),
            ValueError,
            "not both",
        ),
    ):
        with pytest.raises(error, match=words):
            call()


def test_bad_mixer_settings():
    for settings, words in (
        ({"slow": 2.0}, "no setting 'slow'; did you mean slowest"),
        ({"d_model": 3}, "no setting 'd_model'; known: slowest"),
    ):
        with pytest.raises(ValueError, match=words):
            make("ema", mixers={"ema": settings})


# --- wrapped and compiled -------------------------------------------------------------------


class LoRA(nn.Module):
    """base(x) + (x A) B with A, B of low rank and B zero at first."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(base.in_features, rank, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.zeros(rank, base.out_features, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_trains_and_is_the_base_model_at_first(pattern):
    model = make(pattern).requires_grad_(False)
    ids = tokens(2, 12)
    want, _ = model(ids)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LoRA):
                setattr(module, name, LoRA(child))
    same(model(ids)[0], want)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.AdamW(model.parameter_groups(weight_decay=0.0, lr=3e-2))
    losses = []
    for _ in range(5):
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for n, p in model.named_parameters():
        assert not p.requires_grad or p.grad.ne(0).any(), n
        assert n not in frozen or torch.equal(p, frozen[n]), n


# torch's compiler uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("pattern", "backend"),
    [("ema", "eager")]
    + [pytest.param(p, "inductor", marks=pytest.mark.slow) for p in PATTERNS[1:]],
)
def test_compiled_agrees(pattern, backend):
    model = make(pattern)
    ids, targets = tokens(2, 16), tokens(2, 16, seed=1)
    want, last = model.loss(ids, targets)
    want_grads = torch.autograd.grad(want, list(model.parameters()))
    loss, state = torch.compile(model.loss, backend=backend)(ids, targets)
    same(loss, want)
    same(dict(state.flatten()), dict(last.flatten()))
    same(torch.autograd.grad(loss, list(model.parameters())), want_grads)
    torch._dynamo.reset()
