"""The classifier: the same answer alone, padded or packed; and it learns."""

import json

import ema  # noqa: F401  (registers the mixer)
import pytest
import torch
from torch.nn import functional as F

from longscan.models import Classifier, ClassifierConfig
from longscan.verify import perturbed

F64 = torch.float64
LENGTHS = [7, 1, 12, 4]


def make(seed=0, **settings):
    torch.manual_seed(seed)
    base = {"n_classes": 5, "d_model": 16, "n_layers": 2, "pattern": "ema,gated_deltanet"}
    if "vocab_size" not in settings:
        settings.setdefault("d_input", 3)
    return perturbed(Classifier(ClassifierConfig(**{**base, **settings})).double())


def sequences(d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    if d == 0:
        return [torch.randint(0, 11, (n,), generator=g) for n in LENGTHS]
    return [torch.randn(n, d, generator=g, dtype=F64) for n in LENGTHS]


def padded(parts, filler):
    out = parts[0].new_full((len(parts), max(LENGTHS), *parts[0].shape[1:]), filler)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


def same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize(
    "settings",
    [
        {"pool": "mean"},
        {"pool": "last"},
        {"pool": "mean", "bidirectional": True},
        {"pool": "last", "bidirectional": True},
        {"pool": "first", "bidirectional": True, "norm": "layer", "embedding_norm": True},
        {"vocab_size": 11},
        {"vocab_size": 11, "bidirectional": True, "pool": "first", "checkpoint_blocks": True},
    ],
    ids=str,
)
def test_alone_padded_and_packed_are_one(settings):
    model = make(**settings)
    parts = sequences(0 if "vocab_size" in settings else 3)
    filler = 99 if "vocab_size" in settings else float("nan")
    lengths = torch.tensor(LENGTHS)
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    alone = torch.cat([model(part[None]) for part in parts])
    assert alone.shape == (4, 5)
    same(model(padded(parts, filler), lengths=lengths), alone)
    same(model(torch.cat(parts)[None], cu_seqlens=bounds), alone)
    same(model(torch.stack([parts[0], parts[0]])), alone[:1].expand(2, -1))

    labels = torch.tensor([0, 4, 2, 2])
    parameters = list(model.parameters())
    want = torch.autograd.grad(F.cross_entropy(alone, labels), parameters)
    loss = model.loss(padded(parts, filler), labels, lengths=lengths)
    same(torch.autograd.grad(loss, parameters), want)
    loss = model.loss(torch.cat(parts)[None], labels, cu_seqlens=bounds, reduction="none")
    assert loss.shape == (4,)
    same(torch.autograd.grad(loss.mean(), parameters), want)


def test_sequences_send_each_other_and_padding_no_gradient():
    model = make(bidirectional=True)
    lengths = torch.tensor(LENGTHS)
    x = padded(sequences(), 0.0).requires_grad_()
    (g,) = torch.autograd.grad(model(x, lengths=lengths)[2].sum(), x)
    assert g[2].ne(0).any(-1).all()
    assert g[[0, 1, 3]].eq(0).all()
    (g,) = torch.autograd.grad(model(x, lengths=lengths)[0].sum(), x)
    assert g[0, 7:].eq(0).all()


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooling(pool):
    model = make(pool=pool)
    x = sequences()[0][None]
    h, _ = model.features(model.in_proj(x))
    want = h.mean(1) if pool == "mean" else h[:, -1]
    same(model(x), F.linear(want, model.head.weight, model.head.bias))


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_learns_which_token_came_first(name, bidirectional):
    """Two kinds of sequences that differ in their first token alone."""
    torch.manual_seed(0)
    model = Classifier(
        ClassifierConfig(
            n_classes=2, vocab_size=4, d_model=16, n_layers=1, pattern=name,
            bidirectional=bidirectional, pool="last",
        )
    )  # fmt: skip
    ids = torch.randint(2, 4, (32, 6))
    ids[:, 0] = labels = torch.arange(32) % 2
    optimiser = torch.optim.AdamW(model.parameter_groups(weight_decay=0.0, lr=2e-2))
    for _ in range(30):
        loss = model.loss(ids, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3


def test_narrow_and_autocast():
    model = make()
    x = torch.stack([sequences()[2]] * 2)
    want = model(x)
    got = model.float()(x.float())
    assert got.dtype == torch.float32
    same(got.double(), want, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(x.float(), torch.tensor([0, 1]))
    assert loss.dtype == torch.float32
    model = model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_initialisation_and_reset():
    torch.manual_seed(0)
    config = ClassifierConfig(n_classes=9, vocab_size=500, d_model=64, n_layers=2, pattern="ema")
    model = Classifier(config)
    assert abs(model.embedding.weight.std() / 0.02 - 1) < 0.05
    moved = perturbed(model)
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    moved.reset_parameters()
    for (name, p), q in zip(model.named_parameters(), moved.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


@pytest.mark.parametrize("settings", [{}, {"vocab_size": 11, "bidirectional": True}])
def test_round_trip_on_disk(tmp_path, settings):
    model = make(**settings).float()
    model.save(tmp_path)
    again = Classifier.load(tmp_path)
    assert again.config == model.config
    assert ClassifierConfig.from_json(model.config.to_json()) == model.config
    part = sequences(0 if settings else 3)[0][None]
    part = part if settings else part.float()
    assert torch.equal(again(part), model(part))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "longscan.Classifier"


def test_parameter_groups():
    model = make(vocab_size=11, pattern="ema", bidirectional=True)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = model.parameter_groups(weight_decay=0.1, lr=1e-2)
    members = {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert members["no_decay lr 0.0003"] == {
        f"blocks.{i}.mixer.{way}.rate" for i in (0, 1) for way in ("left_to_right", "right_to_left")
    }
    assert "embedding.weight" in members["no_decay"]
    assert "head.weight" in members["decay"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_input": None}, "give vocab_size"),
        ({"vocab_size": 7, "d_input": 3}, "not both"),
        ({"n_classes": 0}, "n_classes must be"),
        ({"d_input": 0}, "d_input must be"),
        ({"pool": "max"}, "mean, last or first"),
        ({"pool": "first"}, "needs bidirectional"),
        ({"norm": "batch"}, "rms or layer"),
    ],
)
def test_a_bad_config_is_explained(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_bad_calls():
    model, tokens = make(), make(vocab_size=11)
    x, ids = torch.zeros(2, 5, 3, dtype=F64), torch.zeros(2, 5, dtype=torch.int64)
    two = torch.tensor([5, 2])
    for call, error, words in (
        (lambda: model(x[..., 1:]), ValueError, "d_input = 3"),
        (lambda: model(ids), ValueError, "d_input = 3"),
        (lambda: model(x.long()), TypeError, "floating"),
        (lambda: tokens(x), ValueError, r"\[batch, time\]"),
        (lambda: tokens(ids.double()), TypeError, "int64"),
        (lambda: tokens(ids + 11), ValueError, "outside 0..10"),
        (lambda: model(x, lengths=torch.tensor([5, 0])), ValueError, "outside 1..5"),
        (lambda: model(x, lengths=torch.tensor([5, 6])), ValueError, "outside 1..5"),
        (lambda: model(x, lengths=two[:1]), ValueError, "one per row"),
        (lambda: model(x, lengths=two.double()), ValueError, "whole numbers"),
        (lambda: model(x, lengths=two, cu_seqlens=two), ValueError, "not both"),
        (lambda: model.loss(x, two[:1]), ValueError, "one per sequence"),
        (lambda: model.loss(x, two), ValueError, "outside 0..4"),
        (lambda: model.loss(x, two.double()), TypeError, "int64"),
    ):
        with pytest.raises(error, match=words):
            call()
