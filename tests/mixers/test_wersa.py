"""WERSA: numbers of an independent derivation, its transform, its kernels, and who sees whom."""

import math
from typing import Any

import pytest
import torch
from helpers import assert_close, error, golden
from torch import Tensor
from torch.nn import functional as F

from longscan.mixers._wavelet import block_haar, trailing_haar
from longscan.mixers.wersa import WERSA
from longscan.models import Classifier, ClassifierConfig
from longscan.ops.decay import decay
from longscan.state import State

F64 = torch.float64
ENCODERS: list[dict[str, Any]] = [
    {"causal": False, "filters": filters, "feature_map": phi}
    for filters in ("global", "local", "trailing")
    for phi in ("relu", "favor")
]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def build(seed=0, **settings):
    """A float64 layer whose parameters are moved off their initial values."""
    torch.manual_seed(seed)
    m = WERSA(12, **{"n_heads": 2, "n_features": 10, "d_conv": 5, **settings}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return m


def cut(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("form", ["global", "local", "causal"])
def test_golden(form, split):
    g = golden("wersa/wersa_layer")
    case = f"{form}.{'split' if split else 'shared'}R"
    filters = "trailing" if form == "causal" else form
    m = build(split=split, causal=form == "causal", filters=filters)
    weights = {
        "in_proj.weight": torch.cat([g[f"param.{n}_w"] for n in "qkv"]),
        "out_proj.weight": g["param.o_w"],
        "filter_in.weight": g["param.f1_w"],
        "filter_in.bias": g["param.f1_b"],
        "filter_out.weight": g["param.f2_w"],
        "filter_out.bias": g["param.f2_b"],
        "conv1d.weight": g["param.pool_w"],
        "conv1d.bias": g["param.pool_b"],
        "scale_weights": g["param.scale_weights"],
        "log_bandwidth": g["param.log_bandwidth"],
        "norm.weight": g["param.ln_w"],
        "norm.bias": g["param.ln_b"],
        "random_matrix": torch.stack([g["param.Rq"], g["param.Rk"]][: 1 + split]),
    }
    if form == "global":
        weights = {k: w for k, w in weights.items() if not k.startswith("conv1d")}
    m.load_state_dict(weights)

    x = g["in.x"].clone().requires_grad_()
    y, state = m(x)
    assert_close(y, g[f"{case}.y"], "golden64", "y")
    y.backward(g["in.dy"])
    assert x.grad is not None
    assert_close(x.grad, g[f"{case}.dx"], "golden64", "dx")
    grads = {k: p.grad for k, p in m.named_parameters()}
    assert m.in_proj.weight.grad is not None
    got = {
        **dict(zip(("q_w", "k_w", "v_w"), m.in_proj.weight.grad.chunk(3), strict=True)),
        "o_w": grads["out_proj.weight"],
        "f1_w": grads["filter_in.weight"],
        "f1_b": grads["filter_in.bias"],
        "f2_w": grads["filter_out.weight"],
        "f2_b": grads["filter_out.bias"],
        "ln_w": grads["norm.weight"],
        "ln_b": grads["norm.bias"],
        "scale_weights": grads["scale_weights"],
        "log_bandwidth": grads["log_bandwidth"],
    }
    if form != "global":
        got |= {"pool_w": grads["conv1d.weight"], "pool_b": grads["conv1d.bias"]}
    wanted = {k.removeprefix(f"{case}.grad.") for k in g if k.startswith(f"{case}.grad.")}
    assert got.keys() == wanted
    for name, value in got.items():
        want = g[f"{case}.grad.{name}"]
        if name == "log_bandwidth":  # a sum that cancels to 1e-7
            assert (value - want).abs().max() < 1e-12
        else:
            assert_close(value, want, "golden64", name)

    # What lies between: gains, filtered q and k, sums over k.
    gains, _ = m._gains(g["in.x"], None, None)
    f = g[f"{case}.act.filters"]
    f = f.unsqueeze(1) if form == "global" else f
    assert_close(gains, (f * m.scale_weights).expand_as(gains), "golden64", "filters")
    qk = F.gelu(m.in_proj(g["in.x"])[..., :24])
    bank = trailing_haar(qk, gains)[0] if form == "causal" else block_haar(qk, gains)
    q, k = bank.unflatten(-1, (2, 2, 6)).transpose(1, 3).unbind(2)
    for got_, name in ((q, "q_filt"), (k, "k_filt")):
        assert_close(got_, g[f"{case}.act.{name}"], "golden64", name)
    if form == "causal":
        bw = F.softplus(m.log_bandwidth) + 0.1
        s = state.tensor("s") / (bw * math.sqrt(10))  # kept without the constants of phi
        assert_close(s[..., :6], g[f"{case}.final_kv"], "golden64", "final_kv")
        assert_close(s[..., 6], g[f"{case}.final_z"], "golden64", "final_z")


# --- the transform ----------------------------------------------------------------------------


def published(x: Tensor, gains: Tensor) -> Tensor:
    """Analysis, gains and synthesis of a decimated orthonormal Haar transform, step by step."""
    length, levels = x.shape[1], gains.shape[-1] - 1
    padded = 1 << (length - 1).bit_length()
    a, gains = (F.pad(t, (0, 0, 0, padded - length)) for t in (x, gains))
    details = []
    for j in range(1, levels + 1):
        if a.shape[1] == 1:
            break
        even, odd = a[:, ::2], a[:, 1::2]
        details.append((even - odd) / math.sqrt(2) * gains[:, :: 2**j, j - 1 : j])
        a = (even + odd) / math.sqrt(2)
    done = len(details)
    a = a * gains[:, :: 2**done, done : done + 1]
    for d in reversed(details):
        a = torch.stack([a + d, a - d], 2).flatten(1, 2) / math.sqrt(2)
    return a[:, :length]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 37])
def test_transforms_written_out(length):
    for levels in (1, 2, 4):
        x, gains = randn(2, length, 6), randn(2, length, levels + 1, seed=1)
        assert_close(block_haar(x, gains), published(x, gains), "float64", "decimated")
        assert_close(block_haar(x, torch.ones_like(gains)), x, "float64", "reconstruction")

        a, want = x, torch.zeros_like(x)
        for j in range(1, levels + 1):
            mean = (a + F.pad(a, (0, 0, 2 ** (j - 1), 0))[:, :length]) / 2
            want, a = want + gains[..., j - 1 : j] * (a - mean), mean
        want = want + gains[..., levels:] * a
        y, last = trailing_haar(x, gains)
        assert_close(y, want, "float64", "undecimated")
        assert torch.equal(last, F.pad(x, (0, 0, 2**levels, 0))[:, length + 1 :])
        y, _ = trailing_haar(x, torch.ones_like(gains))
        assert_close(y, x, "float64", "reconstruction")


def test_gains_of_one_leave_plain_linear_attention():
    """sigmoid 1/2 times scale 2: the bank drops out, and so do the filters."""
    m = build(levels=3)
    with torch.no_grad():
        m.filter_out.weight.zero_()
        m.filter_out.bias.zero_()
        m.scale_weights.fill_(2)
    x = randn(2, 21, 12)
    q, k, v = (t.unflatten(-1, (2, 6)) for t in m.in_proj(x).chunk(3, -1))
    bw = F.softplus(m.log_bandwidth) + 0.1
    q, k = (F.relu(F.gelu(t) / bw @ m.random_matrix[0]) / math.sqrt(10) for t in (q, k))
    z, _ = decay(q, k, torch.ones_like(v[..., :1]), backend="reference")
    o = decay(q, k, v, backend="reference")[0] / (z + 1e-6)
    want = m.out_proj(m.norm(o).flatten(2))
    assert_close(m(x)[0], want, "float64", "y")


# --- kernels ----------------------------------------------------------------------------------


COSINES = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0], dtype=F64)


def pairs(d: int, n: int, length) -> Tensor:
    """n queries, each with five keys at the angles of COSINES, as q | k: [n, 5, 2, 1, d]."""
    a, b = torch.linalg.qr(randn(n, d, 2)).Q.mT.unsqueeze(2).unbind(1)
    k = COSINES.unsqueeze(-1) * a + (1 - COSINES.square()).sqrt().unsqueeze(-1) * b
    return torch.stack([a.expand_as(k), k], 2).unsqueeze(3) * length


def test_kernel_of_relu_features():
    """With one matrix the arc-cosine kernel of order 1; with two hardly a function of the angle."""
    angles = COSINES.acos()
    want = (angles.sin() + (math.pi - angles) * COSINES) / (2 * math.pi)
    got = {}
    for split in (False, True):
        torch.manual_seed(0)
        m = WERSA(32, n_heads=1, n_features=65536, split=split).double()
        q, k = F.relu(m._products(pairs(32, 6, math.sqrt(32)))).squeeze(3).unbind(2)
        got[split] = (q * k).mean(-1).mean(0)
    assert ((got[False] - want).abs() < 0.03 * want + 1e-6).all()
    flat = got[True]
    assert (flat.max() - flat.min()) / flat.mean() < 0.05


def test_favor_approximates_softmax():
    """Weights of softmax(q . k / (bw^2 d^0.5)) within 3 % for |q|^2 = |k|^2 = bw^2 d^0.5."""
    torch.manual_seed(0)
    m = WERSA(32, n_heads=1, n_features=65536, feature_map="favor", causal=False).double()
    bw = F.softplus(m.log_bandwidth.detach()) + 0.1
    q, k, _, _ = m._exponentials(pairs(32, 6, bw * 32**0.25), bw, None, None)
    weights = (q * k).sum(-1).squeeze(2)
    weights = (weights / weights.sum(1, True)).mean(0)
    want = torch.softmax(COSINES, 0)
    assert ((weights - want).abs() < 0.03 * want).all()


def test_favor_columns_are_orthogonal_and_gaussian_in_length():
    torch.manual_seed(0)
    r = WERSA(64, n_heads=2, n_features=250, feature_map="favor", split=True).random_matrix
    for one in r.double():
        for part in one.split(32, -1):
            gram = part.mT @ part
            assert (gram - gram.diag().diag()).abs().max() < 1e-4
        diagonal = torch.cat([part.diagonal() for part in one.split(32, -1)])
        assert 0.4 < (diagonal > 0).double().mean() < 0.6, "in all directions"
        squares = one.square().sum(0)
        assert abs(squares.mean() / 32 - 1) < 0.1
        assert 0.7 < squares.std() / math.sqrt(2 * 32) < 1.3
    assert error(r[0], r[1]) > 0.1


def test_favor_does_not_overflow():
    """Keys that grow a thousandfold, which the largest exponent so far must follow."""
    torch.manual_seed(0)
    m = WERSA(16, feature_map="favor").eval()
    x = (torch.randn(1, 60, 16) * torch.logspace(-2, 3, 60)[:, None]).requires_grad_()
    y, state = m(x)
    y.sum().backward()
    for t in (y, x.grad, state.tensor("s")):
        assert t is not None
        assert torch.isfinite(t).all()


def test_gradients_of_favor_are_exact():
    """The shift by the largest exponent, which has no gradient of its own, cancels."""
    m = build(feature_map="favor", n_features=4, d_conv=2)
    x = randn(1, 7, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: m(x)[0], x)


# --- who sees whom ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"levels": 4},
        {"levels": 1, "d_conv": 1, "split": True},
        {"feature_map": "favor"},
        {"feature_map": "favor", "split": True, "levels": 3, "d_head": 5},
    ],
)
def test_causal_forms(settings):
    """Any cut, single steps, packing behind states, nothing of the future."""
    m, x = build(**settings), randn(2, 23, 12)
    whole, final = m(x)
    for cuts in ([1] * 23, [2, 20, 1], [9, 14]):
        state, parts = m.init_state(2), []
        for part in x.split(cuts, 1):
            y, state = m(part, state)
            parts.append(y)
        assert_close(torch.cat(parts, 1), whole, "float64", f"cuts {cuts}")
        for key, t in final.flatten().items():
            assert_close(state.tensor(key), t, "float64", key)

    lengths = [1, 3, 14, 5]
    before = State.cat(m(randn(1, 2 + i, 12, seed=i))[1] for i in range(4))
    cu = cut(lengths)
    packed, after = m(x[:1], before, cu_seqlens=cu)
    for i, part in enumerate(x[:1].split(lengths, 1)):
        y, state = m(part, before.select(i))
        assert_close(packed[:, cu[i] : cu[i + 1]], y, "float64", f"sequence {i}")
        for key, t in state.flatten().items():
            assert_close(after.select(i).tensor(key), t, "float64", key)

    x.requires_grad_()
    (g,) = torch.autograd.grad(m(x)[0][:, 9].sum(), x)
    assert g[:, 10:].abs().max() == 0
    assert g[:, :10].abs().amin() > 0


@pytest.mark.parametrize("settings", ENCODERS)
def test_encoders(settings):
    """They see the future, of their own sequence only; packed sequences are as if alone."""
    m = build(levels=3, **settings)
    lengths = [1, 2, 70, 3, 5, 4, 13]
    cu = cut(lengths)
    x = randn(1, 98, 12).requires_grad_()
    packed, state = m(x, cu_seqlens=cu)
    assert len(state) == len(m.init_state(2)) == 0
    for i, part in enumerate(x.split(lengths, 1)):
        assert_close(packed[:, cu[i] : cu[i + 1]], m(part)[0], "float64", f"sequence {i}")
    (g,) = torch.autograd.grad(packed[:, 5].sum(), x, retain_graph=True)
    assert g[:, 3:73].abs().amin() > 0, "the leak that a causal model must not have"
    assert g[:, :3].abs().max() == g[:, 73:].abs().max() == 0
    (packed_g,) = torch.autograd.grad(packed.square().sum(), x)
    apart = sum(m(part)[0].square().sum() for part in x.split(lengths, 1))
    assert isinstance(apart, Tensor)
    assert_close(packed_g, torch.autograd.grad(apart, x)[0], "float64", "dx")
    assert_close(m(x.expand(3, -1, -1))[0][1:2], m(x)[0], "float64", "rows of a batch")

    with pytest.raises(ValueError, match="whole sequences"):
        m(x, State(s=torch.zeros(1, 2)))


def test_leaks_are_refused():
    for filters, why in (("global", "mean over the whole"), ("local", "tokens ahead")):
        with pytest.raises(ValueError, match=why) as caught:
            WERSA(32, filters=filters, levels=3)
        for word in ("blocks of 8", "filters='trailing'", "causal=False"):
            assert word in str(caught.value)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"n_heads": 5}, "must divide"),
        ({"levels": 0}, "at least 1"),
        ({"filters": "haar"}, "trailing, local or global"),
        ({"feature_map": "elu"}, "relu or favor"),
        ({"d_conv": 0}, "one tap"),
    ]
    for settings, why in bad:
        with pytest.raises(ValueError, match=why):
            WERSA(32, **settings)


def test_initialisation():
    torch.manual_seed(0)
    m = WERSA(256)
    assert (m.n_heads, m.d_head, m.n_features) == (4, 64, 128)
    assert WERSA(32).n_features == 64
    assert (m.scale_weights == 0.5).all()
    assert m.log_bandwidth.item() == 0
    assert abs(m.random_matrix.std().item() * 8 - 1) < 0.03
    assert m.random_matrix.dtype == torch.float32
    assert "random_matrix" in m.state_dict(), "a checkpoint is nothing without it"
    before = m.random_matrix.clone()
    m.reset_parameters()
    assert error(m.random_matrix, before) > 0.1


def test_dead_features_give_the_bias_of_the_norm():
    """phi(q) = 0: output 0 behind the division, and the norm of zeros is its bias."""
    m = build()
    with torch.no_grad():
        m.random_matrix.zero_()
    y, _ = m(randn(1, 4, 12))
    assert_close(y, m.out_proj(m.norm.bias.repeat(2)).expand_as(y), "float64", "y")


def test_classifier_learns_with_padding():
    """The encoder in a classifier: padding may hold anything, and a few steps fit a batch."""
    torch.manual_seed(0)
    config = ClassifierConfig(
        n_classes=2, vocab_size=11, d_model=16, n_layers=2, pattern="wersa",
        mixers={"wersa": {"causal": False, "filters": "global", "n_heads": 2, "n_features": 16}},
    )  # fmt: skip
    model = Classifier(config)
    ids, lengths = torch.randint(0, 11, (6, 20)), torch.tensor([20, 3, 11, 1, 17, 8])
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    other = ids.clone()
    for row, n in zip(other, lengths, strict=True):
        row[n:] = 0
    assert torch.equal(model(ids, lengths=lengths), model(other, lengths=lengths))
    assert_close(model(ids[1:2, :3]), model(ids, lengths=lengths)[1:2].double(), "float32", "alone")
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.0, lr=1e-2), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model.loss(ids, labels, lengths=lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
