"""Transformer-VQ: the authors' numbers, training, and what its blocks promise at any length."""

import copy

import pytest
import torch
from helpers import assert_close, error, golden
from torch.utils.checkpoint import checkpoint

from longscan.mixers.transformer_vq import TransformerVQ
from longscan.state import State

F64 = torch.float64


def small(seed=0, **more):
    torch.manual_seed(seed)
    m = TransformerVQ(12, **{"n_heads": 2, "d_key": 6, "n_codes": 5, "block": 4, **more}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


def tokens(*shape, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 12, dtype=F64, generator=g).requires_grad_(grad)


# --- the authors' layer ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors():
    """Their layer on 4 blocks, in training: ours with their parameters, and the results."""
    g = golden("longvq/transformer_vq_attn")
    p = {k.removeprefix("param."): t.double() for k, t in g.items() if k.startswith("param.")}
    m = TransformerVQ(16, n_heads=2, d_key=8, d_value=12, n_codes=6, block=8, commitment=0.1)
    m = m.double().train()
    with torch.no_grad():
        m.in_proj.weight.copy_(torch.cat([p["q_proj.kernel"], p["kvg_proj.kernel"]], 1).T)
        m.r_proj.weight.copy_(p["r_proj.kernel"].T)
        m.out_proj.weight.copy_(p["res_proj.kernel"].T)
        m.bias_u.copy_(p["u"].view(2, 8))
        m.bias_v.copy_(p["v"].view(2, 8))
    m.codebook.c_sum.copy_(p["quantizer.c_sum"])
    m.codebook.c_count.copy_(p["quantizer.c_count"])
    m.codebook.started.fill_(True)
    x = g["in.x"].double().requires_grad_()
    gain, shift = (p[f"input_ln.{k}"].requires_grad_() for k in "gb")
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain + shift
    y, state = m(normed)
    assert m.penalty is not None
    ((y * g["in.dy"].double()).sum() + m.penalty).backward()
    grads = {"x": x.grad, "input_ln.g": gain.grad, "input_ln.b": shift.grad}
    return g, m, y, state, grads


def test_output_and_commitment_are_the_authors(authors):
    g, m, y, _, _ = authors
    assert_close(y, g["out.res"], "golden32", "res")
    assert_close(m.penalty.view(1) / 0.1, g["out.l_commit"], "golden32", "commitment")


def test_gradients_are_the_authors(authors):
    g, m, _, _, grads = authors
    q, kvg = m.in_proj.weight.grad.T.split([16, 64], 1)
    got = {
        **grads,
        "q_proj.kernel": q,
        "kvg_proj.kernel": kvg,
        "r_proj.kernel": m.r_proj.weight.grad.T,
        "res_proj.kernel": m.out_proj.weight.grad.T,
        "u": m.bias_u.grad.flatten(),
        "v": m.bias_v.grad.flatten(),
    }
    names = {k.removeprefix("grad.") for k in g if k.startswith("grad.")}
    assert names - set(got) == {"quantizer.c_sum", "quantizer.c_count"}
    for name, gradient in got.items():
        assert_close(gradient, g[f"grad.{name}"], "golden32", name)


def test_state_is_the_authors(authors):
    g, _, _, state, _ = authors
    assert torch.equal(state.tensor("counts"), g["state.agg_lower"].double())
    assert_close(state.tensor("means"), g["state.agg_upper_div_lower"], "golden32", "means")
    assert torch.equal(state.tensor("codes")[:, -8:].mT, g["state.win_z"].long())
    assert_close(state.tensor("k")[:, -8:].transpose(1, 2), g["state.win_k_hat"], "golden32", "k")
    assert_close(state.tensor("v")[:, -8:].transpose(1, 2), g["state.win_v"], "golden32", "v")


def test_the_codebook_moves_as_the_authors(authors):
    """Their codebook is moved by its gradient, with a learning rate of one."""
    g, m, *_ = authors
    m = copy.deepcopy(m)
    before = m.codebook.book()
    assert_close(m.codebook.c_sum, g["param.quantizer.c_sum"], "stored32", "not yet")
    m(torch.zeros(1, 1, 16, dtype=F64))
    for name in ("c_sum", "c_count"):
        want = g[f"param.quantizer.{name}"].double() - g[f"grad.quantizer.{name}"].double()
        assert_close(getattr(m.codebook, name), want, "golden32", name)
    assert error(m.codebook.book(), before) > 1e-3


# --- whatever the length --------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"carry_gradient": False}, {"n_heads": 1, "block": 1}])
def test_any_cut_and_any_age(settings):
    m, n = small(**settings).eval(), 19
    x = tokens(2, n, grad=True)
    whole, final = m(x)
    (want,) = torch.autograd.grad(whole.square().sum(), x, retain_graph=True)
    for cut in (1, 3, 4, 7, 8, 9, 12, 18):
        a, state = m(x[:, :cut])
        b, state = m(x[:, cut:], state)
        y = torch.cat([a, b], 1)
        assert_close(y, whole, "float64", f"cut at {cut}")
        assert_close(state.tensor("means"), final.tensor("means"), "float64", "means")
        (got,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        assert_close(got, want, "float64", f"gradient, cut at {cut}")
    states = [m(x[i : i + 1, :k])[1] for i, k in ((0, 3), (1, 14))]
    y, _ = m(torch.stack([x[0, 3:8], x[1, 14:19]]), State.cat(states))
    assert_close(y[0], whole[0, 3:8], "float64", "a young row")
    assert_close(y[1], whole[1, 14:19], "float64", "an old row")


def test_packed_sequences():
    m, sizes = small().eval(), [13, 1, 22, 4]
    x = tokens(1, sum(sizes))
    cu = torch.tensor([0, *sizes]).cumsum(0)
    y, state = m(x, cu_seqlens=cu)
    more, _ = m(tokens(4, 3, seed=1), state)
    for i, part in enumerate(x.split(sizes, 1)):
        want, after = m(part)
        assert_close(y[:, cu[i] : cu[i + 1]], want, "float64", f"sequence {i}")
        want, _ = m(tokens(4, 3, seed=1)[i : i + 1], after)
        assert_close(more[i : i + 1], want, "float64", f"what follows {i}")


def test_far_tokens_matter_by_their_code():
    """Two sequences that differ in the order of far tokens alone give the same outputs."""
    m, x = small().eval(), tokens(1, 24)
    shuffled = x.clone()
    shuffled[:, :12] = x[:, torch.randperm(12)]
    a, b = m(x)[0], m(shuffled)[0]
    assert_close(b[:, 16:], a[:, 16:], "float64", "from the second block behind on")
    assert error(b[:, 12:16], a[:, 12:16]) > 1e-3
    changed = x.clone()
    changed[:, 0] += 1
    assert error(m(changed)[0][:, 20:], a[:, 20:]) > 1e-5


# --- training -------------------------------------------------------------------------------


def test_training_moves_the_codebook_and_evaluation_does_not():
    m, x = small().train(), tokens(2, 12)
    before = m.state_dict()
    before = {k: t.clone() for k, t in before.items()}
    m.eval()
    m(x)
    assert m.penalty is None
    m.train()
    with torch.no_grad():
        m(x)
    assert all(torch.equal(t, before[k]) for k, t in m.state_dict().items())
    m(x)
    assert m.penalty.requires_grad
    started = m.codebook.book()
    m(tokens(2, 12, seed=1))
    assert error(m.codebook.book(), started) > 1e-4


def test_commitment_pulls_keys_to_codewords():
    m, x = small(commitment=1.0).train(), tokens(2, 40)
    optimiser = torch.optim.Adam(m.parameters(), 1e-2)
    seen = []
    for _ in range(30):
        m(x)
        optimiser.zero_grad()
        m.penalty.backward()
        optimiser.step()
        seen.append(m.penalty.item())
    assert seen[-1] < 0.5 * seen[0]


def test_recomputed_forwards_change_nothing():
    """With activation checkpointing the codebook, the gradients and the penalty stay the same."""
    x, results = tokens(2, 18, grad=True), []
    for recompute in (False, True):
        m, out = small(commitment=1.0).train(), []
        for _ in range(3):
            y = checkpoint(m, x, use_reentrant=False)[0] if recompute else m(x)[0]
            penalty = m.penalty
            out += torch.autograd.grad(y.square().sum() + penalty, [x, *m.parameters()])
            out.append(penalty)
            assert m.penalty is penalty
        results.append([*out, *m.state_dict().values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compiled_in_training():
    torch._dynamo.reset()
    plain, m = small(commitment=1.0).train(), small(commitment=1.0).train()
    compiled = torch.compile(lambda x: m(x)[0], fullgraph=True, backend="aot_eager")
    for step in range(2):
        x = tokens(2, 14, seed=step)
        results = []
        for model, run in ((plain, lambda x: plain(x)[0]), (m, compiled)):
            y = run(x)
            loss = y.square().sum() + model.penalty
            results.append([y, *torch.autograd.grad(loss, list(model.parameters()))])
        for a, b in zip(*results, strict=True):
            assert_close(b, a, "float64", "output, gradients")
        for a, b in zip(plain.buffers(), m.buffers(), strict=True):
            assert_close(b.double(), a.double(), "float64", "codebook")


def test_copies_and_checkpoints_go_on_alike():
    m = small().train()
    m(tokens(2, 12))
    twin, loaded = copy.deepcopy(m), small(seed=3).train()
    loaded.load_state_dict(m.state_dict())
    x = tokens(2, 12, seed=1)
    want = m(x)[0]
    assert torch.equal(twin(x)[0], want)
    assert torch.equal(loaded(x)[0], want), "what was noted but not yet folded in is saved too"


def test_bfloat16_trains_with_a_float32_codebook():
    m = small().float().to(torch.bfloat16).train()
    for _ in range(2):
        y, state = m(tokens(2, 12).bfloat16())
        (y.float().square().sum() + m.penalty).backward()
    assert y.dtype == torch.bfloat16
    for name, t in m.codebook.named_buffers():
        assert t.dtype in (torch.float32, torch.int64, torch.bool), name
    assert state.tensor("means").dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_heads": 0}, "n_heads must be"),
        ({"block": 0}, "block must be"),
        ({"n_codes": 0}, "n_codes must be"),
        ({"commitment": -1.0}, "commitment must be"),
        ({"codebook_decay": 1.0}, "decay must lie"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        TransformerVQ(8, **settings)
