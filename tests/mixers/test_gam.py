"""GAM against the authors' model, what it can see, and the bank that the sequence writes."""

import pytest
import torch
from helpers import assert_close, golden
from torch import nn
from torch.nn import functional as F

from longscan.mixers.gam import GAM, WrittenGAM
from longscan.state import State

F64 = torch.float64
FILE = golden("gam/gam_small")
V, D, M, L = 41, 24, 20, 2


def ours(params, prefix):
    """The mixer's parameters among the authors', by our names."""
    names = {
        "memory_bank": "memory_bank",
        "causal_conv.weight": "conv1d.weight",
        "causal_conv.bias": "conv1d.bias",
        "gate.weight": "gate.weight",
        "gate.bias": "gate.bias",
    }
    return {new: params[prefix + old] for old, new in names.items()}


class Block(nn.Module):
    """The authors' block around our mixer."""

    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mixer = GAM(D, n_slots=M)
        self.ffn = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x, state=None):
        y, state = self.mixer(self.ln1(x), state)
        x = x + y
        return x + self.ffn(self.ln2(x)), state

    def load(self, params, prefix):
        rest = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "ffn.0.weight", "ffn.0.bias")
        rest += ("ffn.2.weight", "ffn.2.bias")
        loaded = {f"mixer.{k}": t for k, t in ours(params, prefix).items()}
        self.load_state_dict(loaded | {k: params[prefix + k] for k in rest})

    def check_gradients(self, grads, prefix):
        want = {f"mixer.{k}": t for k, t in ours(grads, prefix).items()}
        for name, p in self.named_parameters():
            grad = want[name] if name in want else grads[prefix + name]
            assert p.grad is not None
            assert_close(p.grad, grad, "golden64", name)


class Model(nn.Module):
    """The authors' language model; the head is the embedding."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(V, D), nn.Embedding(32, D)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.norm = nn.LayerNorm(D)

    def forward(self, idx, start=0, states=None):
        positions = torch.arange(start, start + idx.shape[1])
        x, out = self.token(idx) + self.position(positions), []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i])
            out.append(state)
        return F.linear(self.norm(x), self.token.weight), out


def part(prefix):
    return {k[len(prefix) :]: t for k, t in FILE.items() if k.startswith(prefix)}


@pytest.fixture
def model():
    m, params = Model().double(), part("param.")
    m.token.weight.data = params["token_embedding.weight"].clone()
    m.position.weight.data = params["pos_embedding.weight"].clone()
    m.norm.load_state_dict({k: params[f"ln_f.{k}"] for k in ("weight", "bias")})
    for i, block in enumerate(m.blocks):
        block.load(params, f"blocks.{i}.")
    return m


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_block_equals_authors(backend, monkeypatch):
    monkeypatch.setenv("LONGSCAN_BACKEND", backend)
    block = Block().double()
    block.load(part("param."), "blocks.0.")
    x = FILE["blk.x"].clone().requires_grad_()
    y, _ = block(x)
    assert_close(y, FILE["blk.y"], "golden64", "y")
    (y * FILE["blk.dy"]).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, FILE["blk.dx"], "golden64", "dx")
    block.check_gradients(part("blk.grad."), "")


def test_model_equals_authors(model):
    logits, _ = model(FILE["in.idx"])
    assert_close(logits, FILE["out.logits"], "golden64", "logits")
    loss = F.cross_entropy(logits.flatten(0, 1), FILE["in.targets"].flatten())
    assert_close(loss.unsqueeze(0), FILE["out.loss"], "golden64", "loss")
    loss.backward()
    grads = part("grad.")
    for i, block in enumerate(model.blocks):
        block.check_gradients(grads, f"blocks.{i}.")
    assert_close(model.token.weight.grad, grads["token_embedding.weight"], "golden64", "token")
    assert_close(model.position.weight.grad, grads["pos_embedding.weight"], "golden64", "position")
    for k in ("weight", "bias"):
        assert_close(getattr(model.norm, k).grad, grads[f"ln_f.{k}"], "golden64", f"norm {k}")
    x = FILE["act.block0.in"]
    for i, block in enumerate(model.blocks):
        assert_close(x, FILE[f"act.block{i}.in"], "golden64", f"into block {i}")
        x, _ = block(x)
        assert_close(x, FILE[f"act.block{i}.out"], "golden64", f"out of block {i}")


def test_prefixes_and_decoding_equal_authors(model):
    idx = FILE["in.idx"]
    for t in (1, 2, 7):
        assert_close(model(idx[:, :t])[0], FILE[f"out.logits_prefix{t}"], "golden64", f"first {t}")
    states, steps = None, []
    for t in range(idx.shape[1]):
        logits, states = model(idx[:, t : t + 1], t, states)
        steps.append(logits)
    assert_close(torch.cat(steps, 1), FILE["out.logits"], "golden64", "token by token")


def test_float32(model):
    model.float()
    assert_close(model(FILE["in.idx"])[0], FILE["out.logits"], "float32", "logits")


def test_initialisation_is_the_authors():
    """Uniform, with the bounds of Xavier for the bank and of PyTorch's defaults for the rest."""
    torch.manual_seed(3)
    m = GAM(D, n_slots=M)
    bound = (6 / (M + D)) ** 0.5
    assert bound * 0.9 < m.memory_bank.abs().max() <= bound
    assert 3**-0.5 * 0.8 < m.conv1d.weight.abs().max() <= 3**-0.5
    assert D**-0.5 * 0.9 < m.gate.weight.abs().max() <= D**-0.5
    assert [k for k, _ in m.named_parameters()] == [
        "memory_bank", "conv1d.weight", "conv1d.bias", "gate.weight", "gate.bias"
    ]  # fmt: skip


def test_parameters_of_the_papers_model():
    """22,599,680 in all, of which the mixers have these."""
    n = sum(p.numel() for p in GAM(512).parameters())
    ffn, norms = 2 * 4 * 512 * 512 + 5 * 512, 4 * 512
    assert 6 * (n + ffn + norms) + (10_000 + 256 + 2) * 512 == 22_599_680


def seen(mixer, layers, taps):
    """How many positions, from its own on, the change of one token changes."""
    torch.manual_seed(0)
    stack = [mixer(16, n_slots=8, d_conv=taps).double() for _ in range(layers)]
    x = torch.randn(1, 40, 16, dtype=F64)
    changed = x.clone()
    changed[:, 5] += 1.0
    for m in stack:
        x, changed = (t + m(t)[0] for t in (x, changed))
    far = (x != changed).any(-1).squeeze(0)
    assert not far[:5].any()
    return far[5:]


@pytest.mark.parametrize(("layers", "taps", "field"), [(1, 1, 1), (2, 3, 5), (3, 4, 10)])
def test_receptive_field_is_the_convolutions(layers, taps, field):
    assert field == 1 + layers * (taps - 1)
    reached = seen(GAM, layers, taps)
    assert reached[:field].all()
    assert not reached[field:].any()


def test_a_written_bank_has_no_horizon():
    assert seen(WrittenGAM, 1, 1).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [None, "sqrt"])
@pytest.mark.parametrize("n_heads", [1, 4])
def test_read_of_the_bank(n_heads, scale, tied):
    """With gates of one half and a convolution of zero: softmax attention to the bank."""
    torch.manual_seed(0)
    m = GAM(16, n_slots=8, n_heads=n_heads, scale=scale, tied=tied).double()
    for p in (*m.gate.parameters(), *m.conv1d.parameters()):
        nn.init.zeros_(p)
    x = torch.randn(2, 9, 16, dtype=F64)
    values = m.memory_bank if m.memory_values is None else m.memory_values
    q, k, v = (t.unflatten(-1, (n_heads, -1)).movedim(-2, -3) for t in (x, m.memory_bank, values))
    k, v = (t.expand(2, -1, -1, -1) for t in (k, v))
    factor = 1.0 if scale is None else (16 / n_heads) ** -0.5
    want = F.scaled_dot_product_attention(q, k, v, scale=factor).transpose(1, 2).flatten(-2)
    assert_close(m(x)[0], 0.5 * want, "float64", "y")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_heads", [1, 4])
def test_a_bank_never_written_is_gams(n_heads, tied):
    """Gates that stay open, q = x and no projection of the output: GAM, whatever k and v are."""
    torch.manual_seed(0)
    options = {"n_slots": 8, "n_heads": n_heads, "tied": tied, "scale": None}
    plain = GAM(16, **options).double()
    written = WrittenGAM(16, gate_temperature=1e30, **options).double()
    missing, extra = written.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, extra) == (["in_proj.weight", "out_proj.weight"], [])
    with torch.no_grad():
        written.in_proj.weight[:16] = torch.eye(16)
        written.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(2, 100, 16, dtype=F64)
    y, state = written(x)
    assert_close(y, plain(x)[0], "float64", "y")
    assert state.tensor("bank").abs().max() < 1e-25


def test_slots_return_to_the_bank():
    """What was written fades while nothing new comes in (in_proj has no bias)."""
    torch.manual_seed(0)
    m = WrittenGAM(16, n_slots=8).double()
    x = torch.randn(1, 30, 16, dtype=F64)
    _, state = m(x)
    with torch.no_grad():
        y, after = m(torch.zeros(1, 400, 16, dtype=F64), state)
        fresh, _ = m(torch.zeros(1, 400, 16, dtype=F64))
    assert after.tensor("bank").abs().max() < 1e-9 * state.tensor("bank").abs().max()
    assert_close(y[:, -1], fresh[:, -1], "float64", "y")


def test_written_bank_recalls_an_association():
    """By hand: token i is written to slot i, as a key and a value that asking for i finds."""
    m = WrittenGAM(8, n_slots=4, n_heads=1, d_conv=1, scale=None).double()
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        m.in_proj.weight[24:] = -50 * torch.cat([torch.zeros(4, 4), torch.eye(4)], 1)
        m.in_proj.weight[:4, :4] = 60 * torch.eye(4)  # q: the name asked for
        m.in_proj.weight[8:12, 4:] = torch.eye(4)  # k: the name written to
        m.in_proj.weight[16:20, 4:] = 3 * torch.eye(4)  # v: a value of the name's
        m.out_proj.weight.copy_(torch.eye(8))
    eye, zero = torch.eye(4, dtype=F64), torch.zeros(4, 4, dtype=F64)
    writes = torch.cat([zero, eye], 1)  # slot i forgets and is written where x's entry 4 + i is 1
    _, state = m(writes.unsqueeze(0))
    for i in range(4):
        ask = torch.cat([eye[i], zero[0]]).view(1, 1, 8)
        y, _ = m(ask, state)
        assert y.argmax() == i


def test_states_of_different_ages_join():
    torch.manual_seed(0)
    for mixer in (GAM, WrittenGAM):
        m = mixer(16, n_slots=8).double()
        x = torch.randn(2, 40, 16, dtype=F64)
        states = [m(x[:1, :3])[1], m(x[1:, :29])[1]]
        y, _ = m(x[:, 29:33], State.cat(states))
        for i, s in enumerate(states):
            assert_close(y[i : i + 1], m(x[i : i + 1, 29:33], s)[0], "float64", f"row {i}")


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="n_heads"):
        GAM(10, n_heads=3)
    with pytest.raises(ValueError, match="at least one slot"):
        GAM(10, n_slots=0)
    with pytest.raises(ValueError, match="scale must be"):
        GAM(10, scale="root")
    with pytest.raises(ValueError, match="at least one tap"):
        GAM(10, d_conv=0)
    with pytest.raises(ValueError, match="gate_temperature"):
        WrittenGAM(8, gate_temperature=0)
