"""LongVQ: against an independent derivation, full attention, and as an encoder."""

import copy

import pytest
import torch
from helpers import assert_close, error, golden
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from longscan.mixers.longvq import LongVQ
from longscan.mixers.mega import Mega
from longscan.models import Classifier, ClassifierConfig

F64 = torch.float64
NAMES = {
    "norm_w": "norm.weight", "norm_b": "norm.bias", "v_w": "v_proj.weight", "v_b": "v_proj.bias",
    "mx_w": "mx_proj.weight", "mx_b": "mx_proj.bias", "h_w": "h_proj.weight",
    "h_b": "h_proj.bias", "gz": "gamma", "bz": "beta", "rel_b": "rel_bias",
    "c_sum": "codebook.c_sum", "c_count": "codebook.c_count",
    **{k: f"move.{k}" for k in ("delta", "alpha", "beta", "gamma", "omega")},
}  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def longvq(d=8, **settings):
    """Away from the initial values, with a codebook that has keys."""
    torch.manual_seed(0)
    settings = {"d_key": 4, "d_value": 6, "d_state": 3, "n_codes": 5, "block": 4, **settings}
    m = LongVQ(d, **settings).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.5 * torch.randn_like(p))
    m(randn(2, 40, d, seed=1))
    return m.eval()


def gradient(x):
    assert x.grad is not None
    return x.grad


def recorded(m):
    """A dict that will hold what enters and leaves the attention of m."""
    seen, attend = {}, m.attend

    def wrapper(q, k, v, state, cu_seqlens):
        o, entries = attend(q, k, v, state, cu_seqlens)
        seen.update(q=q, k=k, v=v, o=o)
        return o, entries

    m.attend = wrapper
    return seen


# --- golden ---------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["causal", "bi"])
@pytest.mark.parametrize("straight", [True, False])
def test_equals_an_independent_derivation(direction, straight):
    g = {k[len(direction) + 1 :]: v for k, v in golden("longvq/longvq_layer").items()
         if k.startswith(direction)}  # fmt: skip
    m = LongVQ(
        10, d_key=6, d_value=12, d_state=3, n_codes=8, block=4, commitment=0.25,
        bidirectional=direction == "bi", cache_straight_through=straight,
    ).double()  # fmt: skip
    values = m.state_dict()
    for short, name in NAMES.items():
        values[name] = g[f"param.{short}"].view(values[name].shape)
    values["codebook.started"] = torch.tensor(True)
    m.load_state_dict(values)
    seen = recorded(m)
    x = g["x"].requires_grad_()
    y, state = m(x)
    assert_close(x + y, g["y"], "golden64", "y")
    assert m.penalty is not None
    assert_close(m.penalty, 0.25 * g["act.err2"].mean(), "golden64", "penalty")
    for name in ("k", "v", "o"):
        assert_close(seen[name], g[f"act.{name}"], "golden64", name)
    assert_close(seen["q"], g["act.q"], "golden64", "q")
    keys = copy.deepcopy(m.codebook).eval()(seen["k"].unsqueeze(2))
    assert torch.equal(keys.codes.squeeze(2), g["act.z"])
    assert_close(keys.k_hat.squeeze(2), g["act.k_hat"], "golden64", "k_hat")

    ((x + y) * g["dy"]).sum().add(m.penalty).backward()
    got = {"dx": gradient(x)} | {f"grad.{short}": gradient(m.get_parameter(name))
           for short, name in NAMES.items() if f"grad.{short}" in g}  # fmt: skip
    gaps = {name: error(value, g[name]) for name, value in got.items()}
    if straight:
        assert len(gaps) == 17
        for name, value in got.items():
            assert_close(value, g[name], "golden64", name)
    else:  # keys far away get no gradient; whatever does not feed keys is exact
        assert max(gaps[f"grad.{name}"] for name in ("h_w", "h_b", "rel_b", "v_w", "v_b")) < 1e-9
        assert gaps["grad.gz"] > 1e-2

    if direction == "causal":  # two more tokens complete the block, and its predecessor is folded
        assert_close(state.tensor("h"), g["act.ema_state"], "golden64", "h")
        _, state = m.eval()(randn(2, 2, 10), state)
        assert_close(state.tensor("counts")[:, 0], g["act.cnt"], "golden64", "counts")
        assert_close(state.tensor("means")[:, 0], g["act.mean"], "golden64", "means")
    m.train()(x.detach())  # the next step of training folds in what the first has noted
    assert_close(m.codebook.c_sum[0], g["ema_new_c_sum"], "golden64", "c_sum")
    assert_close(m.codebook.c_count[0], g["ema_new_c_count"], "golden64", "c_count")


# --- what quantisation keeps ------------------------------------------------------------------


def dense(m, x):
    """The docstring with all scores at once; one sequence [T, D]."""
    normed = F.layer_norm(x, x.shape[-1:], m.norm.weight, m.norm.bias, 1e-5)
    base = m.mx_proj(m.move(normed[None])[0][0])
    u, z, r, hx = base.split([m.d_model, m.d_key, m.d_value, m.d_model], -1)
    z, r = F.silu(z), F.silu(r)
    q, k = z * m.gamma[0] + m.beta[0], z * m.gamma[1] + m.beta[1]
    words = m.codebook.book()[0]
    k_hat = words[torch.cdist(k, words).argmin(1)].detach() + (k - k.detach())
    i, j = torch.arange(len(x))[:, None], torch.arange(len(x))
    near = (i // m.block - j // m.block).abs() <= 1
    bias = m.rel_bias[(i - j + 2 * m.block).where(near, 0)] * near
    s = q @ k_hat.mT * m.d_key**-0.5 + bias
    if not m.bidirectional:
        s = s.masked_fill(j > i, -torch.inf)
    o = s.softmax(-1) @ F.silu(m.v_proj(normed))
    return u.sigmoid() * (F.silu(hx + m.h_proj(r * o)) - x)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_linear_time_equals_all_pairs(bidirectional):
    """Outputs and all gradients, packed sequences of any length."""
    m = longvq(bidirectional=bidirectional, cache_straight_through=True)
    lengths = [1, 8, 37, 22]
    parts = [randn(n, 8, seed=n) for n in lengths]
    want = torch.cat([dense(m, p) for p in parts])
    got, _ = m(torch.cat(parts)[None], cu_seqlens=torch.tensor([0, 1, 9, 46, 68]))
    assert_close(got[0], want, "float64", "y")
    dy, names = randn(*want.shape, seed=9), [k for k, _ in m.named_parameters()]
    expected = torch.autograd.grad((want * dy).sum(), [*m.parameters()])
    for name, a, b in zip(
        names, torch.autograd.grad((got[0] * dy).sum(), [*m.parameters()]), expected, strict=True
    ):
        assert_close(a, b, "float64", name)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_codebook_of_all_keys_changes_nothing(bidirectional):
    """Then it is Mega, with a bias on near pairs only, and keys pay no penalty."""
    t = 30
    m = longvq(d_key=4, n_codes=2 * t, bidirectional=bidirectional, commitment=1.0)
    x, seen = randn(2, t, 8, seed=4), recorded(m)
    m(x)
    with torch.no_grad():
        m.codebook.c_sum.copy_(seen["k"].reshape(1, 2 * t, 4))
        m.codebook.c_count.fill_(1)
    full = Mega(
        8, d_key=4, d_value=6, d_state=3, bias=None, bidirectional=bidirectional
    ).double()  # fmt: skip
    mine = {k: v for k, v in m.state_dict().items() if k in full.state_dict()}
    full.load_state_dict(mine)
    with torch.no_grad():
        m.rel_bias.zero_()
    assert_close(m(x)[0], full(x)[0], "float64", "without a bias")
    # Two blocks hold the whole sequence: every pair is near, and the bias is one of Mega's.
    m.rel_bias = torch.nn.Parameter(randn(4 * 15 + 1, seed=3))
    m.block = 15
    full = Mega(
        8, d_key=4, d_value=6, d_state=3, bias="simple", max_positions=t,
        bidirectional=bidirectional,
    ).double()  # fmt: skip
    full.load_state_dict({**mine, "rel_bias": m.rel_bias.detach().flip(0)[1:-1]})
    assert_close(m(x)[0], full(x)[0], "float64", "with a bias")
    m.codebook.pending.zero_()
    m.train()(x)
    assert m.penalty is not None
    assert m.penalty < 1e-25


def test_far_keys_count():
    """All of the past is read: not only the window, and not its order."""
    m = longvq()
    x = randn(1, 40, 8, seed=2).requires_grad_()
    m.move.requires_grad_(False)
    (g,) = torch.autograd.grad(m(x)[0][:, -1].sum(), x)
    assert g[:, :20].abs().amax(-1).min() > 0


# --- an encoder --------------------------------------------------------------------------------


def test_encoder_packed_equals_separate():
    m = longvq(bidirectional=True)
    parts = [randn(1, n, 8, seed=n) for n in (5, 1, 33, 12)]
    packed, state = m(torch.cat(parts, 1), cu_seqlens=torch.tensor([0, 5, 6, 39, 51]))
    assert len(state) == len(m.init_state(3)) == 0
    assert_close(packed, torch.cat([m(p)[0] for p in parts], 1), "float64", "y")
    with pytest.raises(ValueError, match="carries no state"):
        m(parts[0], longvq().init_state(1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_classifier_learns(bidirectional):
    torch.manual_seed(0)
    settings = {"n_codes": 16, "block": 8, "bidirectional": bidirectional, "d_state": 4}
    config = ClassifierConfig(
        d_model=16, n_layers=1, pattern="longvq", mixers={"longvq": settings}, n_classes=3,
        vocab_size=11,
    )  # fmt: skip
    model = Classifier(config)
    ids = torch.randint(0, 11, (6, 20))
    ids[:, 10] = labels = torch.arange(6) % 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = model.loss(ids, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    penalty = model.penalty()
    assert penalty is not None
    assert penalty > 0


def test_training_compiles():
    torch._dynamo.reset()
    m = longvq(block=8).train()
    other, x = copy.deepcopy(m), randn(2, 20, 8)
    compiled = torch.compile(lambda x: m(x)[0], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(x), other(x)[0], "float64", "y")
    assert_close(m.codebook.c_sum, other.codebook.c_sum, "float64", "codebook")


def test_work_grows_with_length():
    """Twice the tokens, twice the work of products: counted, not timed."""
    m = LongVQ(16, n_codes=16, block=16)

    def work(length):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            m.eval()(torch.zeros(1, length, 16))
        return counter.get_total_flops()

    assert work(2048) < 2.1 * work(1024)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"block": 0}, "block"),
        ({"n_codes": 0}, "n_codes"),
        ({"commitment": -1.0}, "commitment"),
        ({"codebook_decay": 1.0}, "decay"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        LongVQ(8, **settings)
