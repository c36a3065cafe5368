"""The two mLSTM layers: the authors' numbers, initial values, what the settings mean."""

import pytest
import torch
from helpers import assert_close, golden
from torch.nn import functional as F

from longscan.mixers._blockdiag import HeadLayerNorm, HeadwiseLinear
from longscan.mixers.mlstm import MLSTM
from longscan.mixers.mlstm_large import MLSTMLarge
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.pretrained.xlstm import mlstm_layer

F64 = torch.float64
HEADS = 4


@pytest.fixture(scope="module")
def file():
    return golden("xlstm/lm_1to1")


def part(file, prefix):
    return {k[len(prefix) :]: v for k, v in file.items() if k.startswith(prefix)}


def layer(file, block):
    m = MLSTM(32, n_heads=HEADS).double()
    m.load_state_dict(mlstm_layer(part(file, f"param.xlstm_block_stack.blocks.{block}.xlstm.")))
    return m


def norm(x, weight):
    """Their LayerNorm, whose weight is stored minus one."""
    return F.layer_norm(x, x.shape[-1:], 1 + weight)


def slstm_block(p, x):
    """The sLSTM block that stands between the two mLSTM blocks, token by token.

    What p calls fgate feeds the input gate, and igate the forget gate.
    """
    y = norm(x, p["xlstm_norm.weight"])
    taps = p["xlstm.conv1d.conv.weight"]
    c = F.conv1d(F.pad(y.mT, (3, 0)), taps, p["xlstm.conv1d.conv.bias"], groups=32).mT
    c = F.silu(c)
    heads = [t.unflatten(-1, (HEADS, 8)) for t in (c, c, y, y)]
    names = ("fgate", "igate", "zgate", "ogate")
    w = [
        torch.einsum("btni,noi->btno", t, p[f"xlstm.{n}.weight"])
        for t, n in zip(heads, names, strict=True)
    ]
    kernel = p["xlstm.slstm_cell._recurrent_kernel_"].unflatten(1, (4, 8))
    bias = p["xlstm.slstm_cell._bias_"].view(4, HEADS, 8)
    h = c = n = m = x.new_zeros(x.shape[0], HEADS, 8)
    out = []
    for t in range(x.shape[1]):
        r = torch.einsum("bni,ngoi->gbno", h, kernel)
        i, f, z, o = (w[g][:, t] + r[g] + bias[g] for g in range(4))
        keep = m + F.logsigmoid(f)
        m = i if t == 0 else torch.maximum(i, keep)
        c = (keep - m).exp() * c * (t > 0) + (i - m).exp() * z.tanh()
        n = (keep - m).exp() * n * (t > 0) + (i - m).exp()
        h = o.sigmoid() * c / n
        out.append(h)
    y = torch.stack(out, 1)
    y = F.layer_norm(y, (8,)).flatten(-2) * (1 + p["xlstm.group_norm.weight"])
    x = x + y
    gate, up = (norm(x, p["ffn_norm.weight"]) @ p["ffn.proj_up.weight"].mT).chunk(2, -1)
    return x + (F.gelu(gate) * up) @ p["ffn.proj_down.weight"].mT


def model(file, layers):
    """The authors' three-block language model around our two layers."""
    stack = part(file, "param.xlstm_block_stack.")
    x = file["param.token_embedding.weight"][file["in.idx"]]
    states = []
    for i in (0, 1, 2):
        p = part(stack, f"blocks.{i}.")
        if i == 1:
            x = slstm_block(p, x)
        else:
            y, state = layers[i](norm(x, p["xlstm_norm.weight"]))
            x = x + y
            states.append(state)
    logits = norm(x, stack["post_blocks_norm.weight"]) @ file["param.lm_head.weight"].mT
    return logits, states


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layer_equals_authors(file, backend, monkeypatch):
    """Logits, states and gradients of a model of the xlstm package.

    Its gradients come from the form with another m, from which ours differ by effects of eps.
    """
    monkeypatch.setenv("LONGSCAN_BACKEND", backend)
    layers = {i: layer(file, i) for i in (0, 2)}
    logits, states = model(file, layers)
    assert_close(logits, file["out.logits_step"], "golden64", "logits of steps")
    assert (logits - file["out.logits"]).abs().max() < 1e-8, "logits of the parallel form"
    for i, state in zip((0, 2), states, strict=True):
        s, m, window = (state.tensor(k) for k in ("s", "m", "conv"))
        c, n, scale = (file[f"state.block_{i}.mlstm_state.{j}"] for j in range(3))
        assert_close(s[..., :-1], c, "golden64", f"C {i}")
        assert_close(s[..., -1:], n, "golden64", f"n {i}")
        assert_close(m, scale.squeeze(-1), "golden64", f"m {i}")
        # Theirs keeps the current input as well.
        assert_close(window, file[f"state.block_{i}.conv_state.0"][:, 1:], "golden64", "window")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), file["in.idx"][:, 1:].flatten())
    assert_close(loss, file["out.loss"], "golden64", "loss")
    loss.backward()
    grads = part(file, "grad.xlstm_block_stack.blocks.2.xlstm.")
    want = mlstm_layer(grads)
    want["norm.weight"] = want["norm.weight"] - 1  # a gradient is not shifted
    for name, grad in want.items():
        assert_close(layers[2].get_parameter(name).grad, grad, "stored32", name)


def test_initial_values():
    m = MLSTM(256)
    assert m.in_proj.weight.shape == (1024, 256)
    for p in (m.in_proj, m.q_proj, m.k_proj, m.v_proj, m.out_proj):
        assert abs(p.weight.std() / (2 / (5 * 256)) ** 0.5 - 1) < 0.05
    assert m.gate_proj.weight.abs().max() == 0
    i, f = m.gate_bias.chunk(2)
    assert i.abs().max() < 0.5
    assert torch.equal(f, torch.tensor([3.0, 4.0, 5.0, 6.0]))
    assert (m.norm.weight == 1).all()
    assert (m.skip == 1).all()

    m = MLSTMLarge(256)
    q, k, v, o, gates = m.in_proj.weight.split([128, 128, 256, 256, 8])
    for w in (q, k, v, m.out_proj.weight):
        assert abs(w.std() / (2 / (5 * 256)) ** 0.5 - 1) < 0.05
    assert o.abs().max() == gates.abs().max() == 0
    assert torch.equal(m.gate_bias, torch.tensor([-10.0] * 4 + [3.0, 4.0, 5.0, 6.0]))


@pytest.mark.parametrize("name", ["mlstm", "mlstm_large"])
def test_starts_without_a_spike(name):
    """From the initial values, input gates of exp(-10) among them, gradients are moderate."""
    torch.manual_seed(0)
    lm = LanguageModel(LanguageModelConfig(vocab_size=32, d_model=64, n_layers=4, pattern=name))
    ids = torch.randint(32, (2, 129))
    loss, _ = lm.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    total = torch.stack([p.grad.norm() for p in lm.parameters() if p.grad is not None]).norm()
    assert loss < 4
    assert total < 5


def test_inner_width_is_a_multiple_of_64():
    assert MLSTM(40).out_proj.in_features == 128
    assert MLSTM(64, expand=1.0).out_proj.in_features == 64
    with pytest.raises(ValueError, match="must divide the inner width, which is 128"):
        MLSTM(64, n_heads=3)
    with pytest.raises(ValueError, match="gate_cap must be above 0"):
        MLSTMLarge(64, gate_cap=0)


def test_gates_are_capped():
    m = MLSTMLarge(32, gate_cap=2.0)
    with torch.no_grad():
        m.gate_bias.fill_(1e6)
    _, state = m(torch.randn(1, 3, 32))
    assert_close(state.tensor("m"), torch.full((1, 4, 1), 2.0), "float32", "log scale")


@pytest.mark.parametrize("n_blocks", [3, 6])
@pytest.mark.parametrize("length", [1, 8, 9])
def test_headwise_linear_is_block_diagonal(n_blocks, length):
    """More than 16 tokens see blocks of several."""
    m = HeadwiseLinear(12, n_blocks, bias=True).double()
    torch.nn.init.normal_(m.bias)
    x = torch.randn(2, length, 12, dtype=F64)
    assert_close(m(x), x @ torch.block_diag(*m.weight).mT + m.bias, "float64", "y")
    with pytest.raises(ValueError, match="cannot be cut"):
        HeadwiseLinear(12, 5)


def test_head_layer_norm():
    m = HeadLayerNorm(12, eps=1e-5).double()
    torch.nn.init.normal_(m.weight)
    x = torch.randn(2, 5, 3, 4, dtype=F64)
    want = F.group_norm(x.reshape(10, 12), 3, m.weight, eps=1e-5).view(2, 5, 12)
    assert_close(m(x), want, "float64", "a group norm of each token")
