"""Memories that learn at test time: the framework's rows, the layer written out, its settings."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import assert_close, error
from torch.nn import functional as F

from longscan import markdown
from longscan.mixers import memories
from longscan.mixers.memories import ROWS
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.ops.decay import decay_reference
from longscan.ops.delta import delta_reference
from longscan.ops.dplr import dplr_reference
from longscan.ops.memory import Rule
from longscan.registry import mixer_class, names
from longscan.state import State
from longscan.synthetic import IGNORED

F64 = torch.float64
NAMES = ("titans", "moneta", "yaad", "memora", "ttt")
every_name = pytest.mark.parametrize("name", NAMES)
GUIDE = Path(__file__).parents[2] / "docs" / "memories.md"


def built(cls=memories.TestTimeMemory, d_model=16, seed=0, **settings):
    """A float64 mixer with two heads whose parameters are moved off their initial values."""
    torch.manual_seed(seed)
    m = cls(d_model, **{"n_heads": 2, "gate_rank": 4, **settings}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return m


def tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def seen_by_op(m, x, monkeypatch, state=None):
    """What a mixer gives its op and gets from it: q, k, v, the gates, o, the state."""
    seen = {}

    def record(q, k, v, eta, log_a, delta, log_mu, **more):
        o, s = real(q, k, v, eta, log_a, delta, log_mu, **more)
        seen.update(q=q, k=k, v=v, eta=eta, log_a=log_a, delta=delta, log_mu=log_mu)
        seen.update(o=o, after=s)
        return o, s

    real = memories.memory
    monkeypatch.setattr(memories, "memory", record)
    m(x, state)
    monkeypatch.undo()
    return seen


# --- the rows -------------------------------------------------------------------------------


def table_of_rows():
    """The table of the guide."""
    head = ["Row", "Memory", "Bias", "Retention", "Algorithm", "A token makes of W",
            "As `TestTimeMemory`", "Own layer"]  # fmt: skip
    lines = []
    for r in ROWS.values():
        settings = "no"
        if r.settings is not None:
            settings = ", ".join(f"`{k}={v!r}`" for k, v in r.settings.items()) or "the defaults"
        own = f"[{r.mixer}](mixers/{r.mixer}.md)" if r.mixer else ""
        paper = f"[{r.title}](https://arxiv.org/abs/{r.arxiv})"
        cells = (r.memory, r.bias, r.retention, r.algorithm)
        lines.append([paper, *cells, f"`{r.update}`", settings, own])
    return markdown.table(head, lines)


def test_the_guide_has_the_rows():
    want = table_of_rows()
    assert want in GUIDE.read_text(encoding="utf-8"), f"docs/memories.md should have\n{want}"


@pytest.mark.parametrize("row", [r for r in ROWS if ROWS[r].settings is not None])
def test_rows_are_settings(row):
    """Every row with settings builds, runs and is cut anywhere."""
    m = built(**ROWS[row].settings)
    x = tokens(2, 21, 16)
    whole, final = m(x)
    y1, state = m(x[:, :10])
    y2, state = m(x[:, 10:], state)
    assert_close(torch.cat([y1, y2], 1), whole, "float64", row)
    assert {k: v.shape for k, v in state.flatten().items()} == {
        k: v.shape for k, v in final.flatten().items()
    }


def test_rows_name_mixers():
    assert {r.mixer for r in ROWS.values() if r.mixer} <= set(names())
    for name in NAMES:
        cls = mixer_class(name)
        assert cls.row.mixer == name
        assert {n for n in vars(cls) if not n.startswith("__")} == {"row"}, "data only"
        for key, value in cls.row.settings.items():
            if key in {f.name for f in fields(Rule)}:
                assert getattr(cls(8).rule, key) == value


@pytest.mark.parametrize(
    "row",
    ["linear_attention", "mamba2", "gla", "deltanet", "longhorn", "gated_deltanet", "rwkv7"],
)
def test_rows_are_the_architectures_recurrences(row, monkeypatch):
    """On its own projections and gates, the memory is what the architecture's op computes."""
    m = built(**ROWS[row].settings)
    got = seen_by_op(m, tokens(2, 23, 16), monkeypatch)
    q, k, v, eta, log_a = (got[n] for n in ("q", "k", "v", "eta", "log_a"))
    start = m.w0.mT.expand(2, -1, -1, -1)
    if row in ("linear_attention", "mamba2", "gla"):
        if row != "mamba2":
            assert torch.equal(eta, torch.ones_like(eta))
        want = decay_reference(q, k * eta.unsqueeze(-1), v, log_a, state=start)
    elif row == "rwkv7":
        want = dplr_reference(q, eta * k, v, log_a, -k, eta * k, state=start)
    else:
        beta = eta
        if row == "longhorn":
            beta = eta / (1 + eta * k.square().sum(-1))
        want = delta_reference(q, k, v, beta, log_a, state=start)
    assert_close(got["o"], want[0], "float64", "o")
    assert_close(got["after"].tensor("a0").mT, want[1], "float64", "state")


# --- the layer ------------------------------------------------------------------------------


def cotangent(bias, e, delta):
    if bias == "l2":
        return e
    if bias == "squared":
        return 2 * e
    if bias == "lp":
        return 3 * torch.tanh(10 * e) * (e * e + 1e-6)
    assert bias == "huber_norm"
    return e if e.norm() <= delta else delta * e / e.norm()


def weights_of(name, a):
    if name == "moneta":
        return [x / x.abs().pow(4).sum().sqrt() for x in a]  # |A|_4^2
    return [8 * x.softmax(-1) for x in a] if name == "memora" else a


@every_name
@pytest.mark.parametrize("chunk", [1, 5])
def test_the_layer_written_out(name, chunk):
    """A loop over tokens and heads, the inner gradients by autograd."""
    m = built(mixer_class(name), chunk=chunk, read="exact")
    if name == "yaad":
        with torch.no_grad():
            m.delta_bias.add_(1.5)  # so that some tokens are above it and some below
    x, d = tokens(1, 13, 16), 8
    raw = x @ m.in_proj.weight.T
    rows = m.rows()
    qkv = F.pad(raw[..., : 3 * 16].mT, (3, 0))
    q, k, v = F.silu(F.conv1d(qkv, m.conv1d.weight, groups=48).mT).split(16, -1)
    gate = {}
    for i, g in enumerate(m._gates):
        part = raw[..., slice(*rows[f"x{i}"])]
        gate[g] = part @ getattr(m, f"{g}_proj").weight.T + getattr(m, f"{g}_bias")
    out = torch.zeros(13, 16, dtype=F64)
    count = {1: 0, 2: 0}
    for h in range(2):
        a = [w[h].detach() for w in m.weights()]
        momentum = [torch.zeros_like(w) for w in a]

        def answer(w, z, h=h):
            y = w[0] @ z
            for matrix in w[1:]:
                y = matrix @ (0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
            y = (y - y.mean()) / (y.var(unbiased=False) + 1e-6).sqrt()
            return z + m.ln_weight[h] * y + m.ln_bias[h]

        for t in range(13):
            at = (0, t, slice(h * d, h * d + d))
            kt, qt = (z / (z.square().sum() + 1e-6).sqrt() for z in (k[at], q[at]))
            if t % chunk == 0:
                start = [w.detach().requires_grad_() for w in weights_of(name, a)]
            known = answer(start, kt)
            delta = F.softplus(gate["delta"][0, t, h]) if "delta" in gate else None
            e = known - v[at]
            if delta is not None:
                count[1 if e.norm() <= delta else 2] += 1
            pull = cotangent(m.rule.bias, e, delta).detach()
            grads = torch.autograd.grad((known * pull).sum(), start, retain_graph=True)
            eta = m.eta_max * gate["eta"][0, t, h].sigmoid()
            keep = gate["alpha"][0, t, h].sigmoid() if "alpha" in gate else 1.0
            updates = [-eta * g for g in grads]
            if "momentum" in gate:
                mu = gate["momentum"][0, t, h].sigmoid()
                updates = momentum = [mu * s + u for s, u in zip(momentum, updates, strict=True)]
            a = [(keep * w + u).detach() for w, u in zip(a, updates, strict=True)]
            y = answer(weights_of(name, a), qt)
            y = y / (y.square().mean() + 1e-5).sqrt() * m.norm.weight
            out[t, at[2]] = y * F.silu(raw[0, t, slice(*rows["g"])][at[2]])
    if name == "yaad":
        assert min(count.values()) > 0, "both branches of the loss"
    assert_close(m(x)[0][0], out @ m.out_proj.weight.T, "float64", name)


@every_name
def test_initialisation(name, monkeypatch):
    torch.manual_seed(0)
    m = mixer_class(name)(256)
    got = seen_by_op(m, torch.randn(1, 6, 256), monkeypatch)
    most = {"titans": 0.02, "moneta": 0.01, "yaad": 0.1, "memora": 0.05, "ttt": 0.3}[name]
    assert torch.allclose(got["eta"], torch.tensor(0.1 * most))
    if name == "ttt":
        assert got["log_a"] is None
    else:
        assert torch.allclose(got["log_a"].exp(), torch.tensor(0.999))
    if name == "yaad":
        assert torch.allclose(got["delta"], torch.tensor(4.0))  # sqrt(64) / 2
    if name == "titans":
        assert torch.allclose(got["log_mu"].exp(), torch.tensor(0.8))
    want = {"memora": 1.0, "moneta": 0.2}.get(name, 0.5)
    for w in m.weights():
        assert abs(w.std().item() / want - 1) < 0.05
    assert torch.equal(m.ln_weight, torch.ones(4, 64))
    assert torch.equal(m.ln_bias, torch.zeros(4, 64))


@every_name
def test_parameters(name):
    """Only the gates that a rule uses exist."""
    d_model, heads, d, rank = 64, 4, 16, 32
    m = mixer_class(name)(d_model)
    gates = {"titans": 3, "moneta": 2, "yaad": 3, "memora": 2, "ttt": 1}[name]
    memory = heads * d * d * (1 if name == "ttt" else 8) + 2 * heads * d
    layer = 5 * d_model * d_model + 4 * 3 * d_model + d  # q k v g out, convolution, norm
    gate = gates * (d_model * rank + rank * heads + heads)
    assert sum(p.numel() for p in m.parameters()) == memory + layer + gate


def test_state_sizes():
    d, h = 8, 32
    state = memories.Yaad(32).init_state(3)
    assert state["a0"].shape == state["g0"].shape == (3, 4, h, d)
    assert state["a1"].shape == (3, 4, d, h)
    assert "m0" in memories.Titans(32).init_state(1)
    assert set(memories.Yaad(32, chunk=1, d_conv=0).init_state(1)) == {"a0", "a1"}


# --- settings -------------------------------------------------------------------------------


def test_chunk_can_change_on_the_way(monkeypatch):
    """From chunks to single tokens and back: the weights go on, the running chunk ends."""
    m = built(memories.Titans)
    x = tokens(2, 40, 16)
    y1, state = m(x[:, :21])
    m.chunk = 1
    assert m.chunk == m.rule.chunk == 1
    y2, after = m(x[:, 21:30], state)
    bare = State({k: v for k, v in state.items() if k[0] not in "g" and k != "at"})
    assert_close(m(x[:, 21:30], bare)[0], y2, "float64", "only a and m count")
    assert not any(k.startswith("g") or k == "at" for k in after)
    m.chunk = 16
    y3, end = m(x[:, 30:], after)
    assert end.tensor("at").tolist() == [10, 10]
    fresh = State(after, g0=after["a0"], g1=after["a1"], at=torch.zeros(2, dtype=torch.long))
    assert_close(m(x[:, 30:], fresh)[0], y3, "float64", "a new chunk")
    whole, _ = m(x)
    assert_close(whole[:, :21], y1, "float64", "chunk 16")
    assert error(y2, whole[:, 21:30]) > 1e-6, "the chunk is part of the model"


def test_trained_in_chunks_read_token_by_token():
    """chunk = 1 set later is the mixer that was built with it."""
    a, b = built(memories.Yaad), built(memories.Yaad, chunk=1)
    x = tokens(1, 20, 16)
    a.chunk = 1
    assert torch.equal(a(x)[0], b(x)[0])
    with pytest.raises(ValueError, match="chunk"):
        a.chunk = 0


@pytest.mark.parametrize(
    "settings",
    [
        {"gates": "channel"},
        {"gates": "channel", "memory": "linear", "bias": "huber_coord"},
        {"gates": "channel", "memory": "linear", "channels": "key", "bias": "huber_norm"},
        {"depth": 3, "expand": 2, "algorithm": "momentum"},
        {"depth": 1, "residual_norm": False, "bias": "l1"},
        {"residual_norm": False, "bias": "value_shift", "retention": "elastic_net"},
        {"retention": "lq_mirror", "read": "frozen", "chunk": 4},
        {"retention": "kl", "read": "frozen", "chunk": 4, "total": 2.0},
        {"retention": "bregman", "d_conv": 0, "output_gate": None},
        {"decay_first": True, "chunk": 4, "d_head": 6, "output_gate": "sigmoid"},
        {"rope_theta": 100.0},
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()),
)
def test_parts_can_be_combined(settings):
    """Settings that no row has: cut anywhere, packed or not, and every parameter learns."""
    m = built(**settings)
    x = tokens(2, 17, 16)
    whole, final = m(x)
    y1, state = m(x[:, :6])
    y2, state = m(x[:, 6:], state)
    assert_close(torch.cat([y1, y2], 1), whole, "float64", "outputs")
    assert state.flatten().keys() == final.flatten().keys()
    assert m.init_state(2).flatten().keys() == final.flatten().keys()
    packed, _ = m(x[:1], cu_seqlens=torch.tensor([0, 6, 17]))
    assert_close(packed[:, :6], y1[:1], "float64", "packed")
    assert_close(packed[:, 6:], m(x[:1, 6:])[0], "float64", "packed")
    whole.square().sum().backward()
    for key, p in m.named_parameters():
        assert p.grad is not None, key
        assert p.grad.abs().max() > 0, key


def test_gates_by_channel():
    m = memories.Yaad(16, n_heads=2, gates="channel")
    shapes = {k: v.shape for k, v in m.gates([torch.zeros(3, 5, 32)] * 3).items()}
    assert shapes == {"eta": (3, 5, 2, 8), "log_a": (3, 5, 2, 8), "delta": (3, 5, 2)}
    m = memories.Yaad(16, n_heads=2, gates="channel", bias="huber_coord")
    assert m.gates([torch.zeros(3, 5, 32)] * 3)["delta"].shape == (3, 5, 2, 8)


def test_positions_are_relative_and_of_each_row():
    """A memory of dot products reads what stands between q and k, not where they stand."""
    settings = {**ROWS["linear_attention"].settings, "rope_theta": 100.0}
    m = built(**settings)
    with torch.no_grad():
        m.w0.zero_()
    x = tokens(2, 12, 16)
    y, state = m(x)
    assert state.tensor("length").tolist() == [12, 12]
    start = m.init_state(2)
    later = State(start, length=torch.tensor([5, 1000]))
    moved, after = m(x, later)
    assert_close(moved, y, "float64", "moved")
    assert after.tensor("length").tolist() == [17, 1012]
    assert error(built(**ROWS["linear_attention"].settings)(x)[0], y) > 1e-3
    # Rows at different places, joined, go on as each would alone.
    m = built(memories.Yaad, rope_theta=100.0)
    states = [m(x[:1, :n])[1] for n in (3, 9)]
    y, _ = m(x, State.cat(states))
    for i in range(2):
        assert_close(y[i : i + 1], m(x[i : i + 1], states[i])[0], "float64", f"row {i}")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"memory": "tree"}, "linear or mlp"),
        ({"memory": "linear", "depth": 2}, "depth 1"),
        ({"depth": 9}, "1 to 8"),
        ({"gates": "both"}, "scalar or channel"),
        ({"gates": "channel", "depth": 3}, "two matrices"),
        ({"channels": "key"}, "linear memory"),
        ({"n_heads": 3}, "divide"),
        ({"eta_max": 0.0}, "eta_max"),
        ({"bias": "l7"}, "bias"),
        ({"retention": "l7"}, "retention"),
        ({"algorithm": "newton"}, "algorithm"),
        ({"chunk": 0}, "chunk"),
        ({"rope_theta": 10.0, "d_head": 5}, "even"),
        ({"output_gate": "relu"}, "silu"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        memories.TestTimeMemory(32, **settings)


def test_bfloat16_keeps_its_float32_parts():
    torch.manual_seed(0)
    m = memories.Titans(32, rope_theta=100.0)
    kept = {k: v.clone() for k, v in m.state_dict().items() if k in m.keep_float32}
    assert kept.keys() == {"w0", "w1", "ln_weight", "ln_bias", "eta_bias", "alpha_bias",
                           "momentum_bias"}  # fmt: skip
    m = m.to(torch.bfloat16)
    assert m.in_proj.weight.dtype == m.eta_proj.weight.dtype == torch.bfloat16
    for k, v in kept.items():
        assert torch.equal(m.state_dict()[k], v)
    y, state = m(torch.randn(1, 20, 32, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.tensor("conv").dtype == torch.bfloat16
    assert all(state.tensor(k).dtype == torch.float32 for k in ("a0", "a1", "m0", "g1"))
    groups = LanguageModel(
        LanguageModelConfig(vocab_size=5, d_model=32, n_layers=1, pattern="titans")
    ).parameter_groups(weight_decay=0.1, lr=1e-3)
    spared = [g for g in groups if g["weight_decay"] == 0]
    assert any(p.shape == (4, 32, 8) for g in spared for p in g["params"]), "w0 is not decayed"


# --- in a model -----------------------------------------------------------------------------


def test_hybrid_with_attention():
    """A memory and attention in a window, in turn: trains, and its state carries on."""
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=16, d_model=32, n_layers=2, pattern="yaad,sliding_attention",
        mixers={"sliding_attention": {"window": 8}},
    )  # fmt: skip
    model = LanguageModel(config).double()
    ids = torch.randint(16, (2, 41))
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        after, _ = model.loss(ids[:, :-1], ids[:, 1:])
        assert after < loss
        whole, _ = model(ids)
        first, state = model(ids[:, :23])
        rest, _ = model(ids[:, 23:], state)
    assert_close(torch.cat([first, rest], 1), whole, "float64", "logits")


def recall_batch(rows, keys, values, pairs, g):
    """k v k v ... by a table of each row; labels: the values of keys seen before."""
    table = torch.randint(values, (rows, keys), generator=g)
    k = torch.randint(keys, (rows, pairs), generator=g)
    v = table.gather(1, k) + keys
    seen = (k.unsqueeze(2) == k.unsqueeze(1)).tril(-1).any(-1)
    labels = torch.stack([torch.where(seen, v, IGNORED), torch.full_like(v, IGNORED)], -1)
    return torch.stack([k, v], -1).flatten(1), labels.flatten(1)


@every_name
def test_learns_to_recall(name):
    """In seconds: clearly better than any guess that does not look back, log 2."""
    torch.manual_seed(0)
    settings = {"n_heads": 2, "chunk": 4, "expand": 2}
    config = LanguageModelConfig(
        vocab_size=5, d_model=32, n_layers=1, pattern=name, mixers={name: settings}
    )
    model = LanguageModel(config)
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        inputs, labels = recall_batch(16, 3, 2, 8, g)
        logits, _ = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.8 * math.log(2)
