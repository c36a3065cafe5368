"""Titans' three patterns against definitions written out token by token."""

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.nn import functional as F

from longscan.mixers import _persistent
from longscan.mixers._persistent import persistent_attention
from longscan.mixers.titans_mac import TitansMAC
from longscan.mixers.titans_mag import TitansMAG, TitansMAL
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.ops.attention import attention
from longscan.state import State

F64 = torch.float64
D = 16
SMALL = {"n_heads": 2, "n_persistent": 3, "memory": {"n_heads": 2, "chunk": 4, "expand": 2}}
WINDOW = {TitansMAG: {"window": 6}, TitansMAL: {"window": 6}, TitansMAC: {"segment": 6}}
PATTERNS = [*WINDOW]
every_pattern = pytest.mark.parametrize("cls", PATTERNS, ids=lambda c: c.__name__)


def build(cls, **settings):
    torch.manual_seed(0)
    m = cls(D, **{**SMALL, **WINDOW[cls], **settings}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return m


def tokens(*shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, dtype=F64, generator=g)


# --- the definitions ------------------------------------------------------------------------


def turned(x: Tensor, position: int, theta: float | None) -> Tensor:
    """Heads [H, d] turned by a position, pairs being (i, i + d / 2)."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def seen(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """What one query [H, d] makes of keys and values [H, d]."""
    scores = torch.stack([(q * k).sum(-1) for k in keys]) / q.shape[-1] ** 0.5
    return (scores.softmax(0).unsqueeze(-1) * torch.stack(values)).sum(0)


def key_value(m, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (m.kv_proj.weight @ x).view(2, m.n_heads, -1)
    return k, v


def window_of(m, row: Tensor) -> Tensor:
    """Attention of every token [T, D] to the persistent ones and its window."""
    prefix = [key_value(m, p) for p in m.persistent]
    pairs = [key_value(m, x) for x in row]
    pairs = [(turned(k, t, m.rope_theta), v) for t, (k, v) in enumerate(pairs)]
    out = []
    for t, x in enumerate(row):
        q = turned((m.in_proj.weight @ x).view(m.n_heads, -1), t, m.rope_theta)
        near = [*prefix, *pairs[max(0, t + 1 - m.window) : t + 1]]
        out.append(seen(q, *map(list, zip(*near, strict=True))).flatten())
    return torch.stack(out)


def mag(m, row: Tensor) -> Tensor:
    answers = m.memory(row[None])[0][0]
    a = rms(window_of(m, row), m.attention_norm.weight)
    return (a * rms(answers, m.memory_norm.weight).sigmoid()) @ m.out_proj.weight.T


def mal(m, row: Tensor) -> Tensor:
    u = row + m.memory(row[None])[0][0]
    return window_of(m, rms(u, m.norm.weight)) @ m.out_proj.weight.T


def mac(m, row: Tensor, *, published_mask: bool = False) -> Tensor:
    """With the published mask a token sees what was retrieved for all tokens of its segment."""
    memory, width = m.memory, m.memory.d_head
    prefix = [key_value(m, p) for p in m.persistent]
    state, weights, out = None, [memory.w0, memory.w1], []
    for begin in range(0, len(row), m.segment):
        part = row[begin : begin + m.segment]
        if state is not None:  # a segment begins a chunk
            state = State(state, at=torch.zeros(1, dtype=torch.int64))
        retrieved, own = [], []
        for t, x in enumerate(part):
            r = F.silu(m.in_proj.weight[D:] @ x).view(memory.n_heads, width)
            r = r / (r.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            inner = F.gelu(torch.einsum("hoi,hi->ho", weights[0], r))
            z = torch.einsum("hoi,hi->ho", weights[1], inner)
            z = (z - z.mean(-1, True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
            h = r + memory.ln_weight * z + memory.ln_bias
            k, v = key_value(m, memory.out_proj.weight @ rms(h, memory.norm.weight).flatten())
            retrieved.append((turned(k, t, m.rope_theta), v))
            k, v = key_value(m, x)
            own.append((turned(k, t, m.rope_theta), v))
        for t, x in enumerate(part):
            q = turned((m.in_proj.weight[:D] @ x).view(m.n_heads, -1), t, m.rope_theta)
            context = retrieved if published_mask else retrieved[: t + 1]
            both = [*prefix, *context, *own[: t + 1]]
            a = seen(q, *map(list, zip(*both, strict=True))).flatten()
            answer, state = memory(a[None, None], state)
            gate = rms(answer[0, 0], m.memory_norm.weight).sigmoid()
            out.append(m.out_proj.weight @ (rms(a, m.attention_norm.weight) * gate))
        assert state is not None
        weights = [state.tensor("a0")[0], state.tensor("a1")[0]]
    return torch.stack(out)


DEFINITION = {TitansMAG: mag, TitansMAL: mal, TitansMAC: mac}


@every_pattern
@pytest.mark.parametrize("settings", [{}, {"rope_theta": None, "n_persistent": 0}], ids=str)
def test_equals_the_definition(cls, settings, monkeypatch):
    """Outputs and the gradients of everything, over several windows or segments."""
    m, x = build(cls, **settings), tokens(2, 15)
    leaves = [x.requires_grad_(), *(p for p in m.parameters() if p.numel())]
    y, _ = m(x)
    monkeypatch.setenv("LONGSCAN_BACKEND", "reference")  # of the memory: a loop over tokens
    want = torch.stack([DEFINITION[cls](m, row) for row in x])
    assert_close(y, want, "float64", "y")
    weight = tokens(2, 15, seed=2)
    got, wanted = (torch.autograd.grad((z * weight).sum(), leaves) for z in (y, want))
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_close(a, b, "float64", f"gradient {i}")


def test_the_published_mask_of_mac_sees_the_future():
    """It lets retrieved context of later tokens through; ours does not, to the last bit."""
    m, x = build(TitansMAC), tokens(1, 12).requires_grad_()
    for t in range(6, 12):
        (leak,) = torch.autograd.grad(mac(m, x[0], published_mask=True)[t].sum(), x)
        (ours,) = torch.autograd.grad(m(x)[0][0, t].sum(), x)
        assert ours[0, t + 1 :].abs().sum() == 0
        assert ours[0, t].abs().min() > 0
        if t < 11:
            assert leak[0, t + 1 :].abs().amin(-1).min() > 1e-6, "every later token shows"


# --- states, cuts, packing ------------------------------------------------------------------


@every_pattern
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": {"n_heads": 1, "chunk": 5, "rope_theta": 100.0}},
        {"memory": {"memory": "linear", "n_heads": 2, "d_head": 6, "chunk": 1}},
        {"tiny": True},
    ],
    ids=["chunk-4", "chunk-5-with-positions", "linear-chunk-1", "of-one-token"],
)
def test_cuts_inside_windows_segments_and_chunks(cls, settings):
    settings = dict.fromkeys(WINDOW[cls], 1) if "tiny" in settings else settings
    m, x = build(cls, **settings), tokens(2, 41)
    whole, final = m(x)
    for sizes in ([1, 5, 6, 12, 2, 15], [6, 6, 29], [20, 1, 20], [1] * 41):
        state, out = None, []
        for part in x.split(sizes, 1):
            y, state = m(part, state)
            out.append(y)
        assert_close(torch.cat(out, 1), whole, "float64", f"cut at {sizes}")
        assert state is not None
        flat, want = state.flatten(), final.flatten()
        assert flat.keys() == want.keys()
        for name in want:
            assert_close(flat[name], want[name], "float64", name)


@every_pattern
def test_rows_of_different_ages(cls):
    """States of many ages, joined, go on together as each would alone, packed or as a batch."""
    m = build(cls)
    ages = [0, 3, 5, 6, 14, 23]
    before = [
        m(tokens(1, n, seed=n))[1] if n else m.init_state(1).map(lambda t: t.detach()) for n in ages
    ]
    x = tokens(len(ages), 13)
    alone = [m(row[None], s) for row, s in zip(x, before, strict=True)]
    y, after = m(x, State.cat(before))
    assert_close(y, torch.cat([a for a, _ in alone]), "float64", "batch")
    lengths = [13, 1, 7, 2, 13, 6]
    packed = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])[None]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    z, ends = m(packed, State.cat(before), cu_seqlens=cu)
    probe = tokens(len(ages), 2, seed=7)
    later, _ = m(probe, ends)
    again, _ = m(probe, after)
    for i, n in enumerate(lengths):
        want, s = m(x[i : i + 1, :n], before[i])
        assert_close(z[:, cu[i] : cu[i + 1]], want, "float64", f"sequence {i}")
        assert_close(later[i : i + 1], m(probe[i : i + 1], s)[0], "float64", f"after {i}")
        assert_close(again[i], m(probe[i : i + 1], alone[i][1])[0][0], "float64", f"row {i}")


@every_pattern
def test_packed_documents_are_separate(cls):
    m, x = build(cls), tokens(1, 30).requires_grad_()
    y, _ = m(x, cu_seqlens=torch.tensor([0, 8, 21, 30]))
    want = torch.cat([m(part)[0] for part in x.split([8, 13, 9], 1)], 1)
    assert_close(y, want, "float64", "y")
    (g,) = torch.autograd.grad(y[:, 8:21].sum(), x, retain_graph=True)
    assert g[:, :8].abs().max() == 0
    assert g[:, 21:].abs().max() == 0
    got, wanted = (torch.autograd.grad(z.square().sum(), list(m.parameters())) for z in (y, want))
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, "float64", "gradient")


@pytest.mark.parametrize("length", [6, 7, 12, 14, 17])
def test_states_at_the_edges_of_segments_can_be_saved(length, tmp_path):
    m = build(TitansMAC)
    _, state = m(tokens(2, length))
    _, state = m(tokens(2, 6), state)
    state.save(tmp_path / "state.safetensors")
    y, _ = m(tokens(2, 3), State.load(tmp_path / "state.safetensors"))
    assert torch.equal(y, m(tokens(2, 3), state)[0])


def test_the_memory_carries_across_segments():
    """Attention ends with the segment; what came before is known from the memory only."""
    m, x = build(TitansMAC), tokens(1, 20).requires_grad_()
    (g,) = torch.autograd.grad(m(x)[0][0, 19].sum(), x)
    assert g[0].abs().amin(-1).min() > 0, "every earlier token matters"
    _, state = m(x[:, :18])
    assert state.tensor("k").abs().max() == 0, "no keys at the start of a segment"
    for name, w in state.child("start").items():
        assert torch.equal(w, state.child("memory").tensor(name))
    later = m(x[:, 18:20], state)[1]
    for name, w in state.child("start").items():
        assert torch.equal(w, later.child("start").tensor(name)), "read as it was then"
        assert not torch.equal(w, later.child("memory").tensor(name)), "and written since"


# --- attention with a prefix ----------------------------------------------------------------


@pytest.mark.parametrize(("window", "length"), [(1, 9), (4, 3), (8, 150), (40, 150), (600, 530)])
def test_attention_without_prefix_is_ops_attention(window, length):
    """The same outputs, states and gradients: fresh, continued, packed."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, length, 2, 4, dtype=F64).requires_grad_()
    none = (q.new_zeros(0, 2, 4), q.new_zeros(0, 2, 4))
    cu = torch.tensor([0, length // 3, length // 3 + 1, length])
    for bounds in (None, cu):
        a = b = None
        for _ in range(2):
            y, a = persistent_attention(q, k, v, none, window=window, state=a, cu_seqlens=bounds)
            z, b = attention(q, k, v, window=window, state=b, cu_seqlens=bounds)
            assert_close(y, z, "float64", "o")
            assert_close(a.tensor("k"), b.tensor("k"), "float64", "state")
            got, want = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (y, z))
            for g, w in zip(got, want, strict=True):
                assert_close(g, w, "float64", "gradient")
            a, b = a.detach(), b.detach()


def test_persistent_tokens_are_seen_at_any_distance():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 150, 2, 4, dtype=F64)
    front = torch.randn(2, 3, 2, 4, dtype=F64)
    y, state = persistent_attention(q, k, v, (front[0], front[1]), window=8)
    for t in (0, 5, 149):
        near = slice(max(0, t - 7), t + 1)
        for b in range(2):
            keys, values = (torch.cat([f, x[b, near]]) for f, x in zip(front, (k, v), strict=True))
            want = seen(q[b, t], list(keys), list(values))
            assert_close(y[b, t], want, "float64", f"token {t}")
    assert state.tensor("k").shape[1] == 7, "they are no part of the state"


@every_pattern
def test_cost_is_linear(cls, monkeypatch):
    """Scores computed: the same for every window or segment, however long the sequence."""
    scores = []
    sdpa = F.scaled_dot_product_attention

    def counting(q, k, v, **more):
        scores[-1] += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return sdpa(q, k, v, **more)

    monkeypatch.setattr(_persistent.F, "scaled_dot_product_attention", counting)
    m = build(cls)
    for length in (128, 256, 512):
        scores.append(0)
        with torch.no_grad():
            m(tokens(1, length))
    assert scores[2] - scores[1] == pytest.approx(2 * (scores[1] - scores[0]), rel=0.05)
    assert scores[2] < 4.2 * scores[0]


# --- as part of a model ---------------------------------------------------------------------


def test_a_language_model_learns_with_all_three():
    torch.manual_seed(0)
    small = {"n_heads": 2, "n_persistent": 2, "memory": {"n_heads": 2, "expand": 2, "chunk": 8}}
    config = LanguageModelConfig(
        vocab_size=11, d_model=16, n_layers=3, pattern="titans_mac,titans_mag,titans_mal",
        mixers={
            "titans_mac": {**small, "segment": 8},
            "titans_mag": {**small, "window": 8},
            "titans_mal": {**small, "window": 8},
        },
    )  # fmt: skip
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1, lr=2e-2), lr=2e-2)
    rows = torch.randint(0, 11, (4, 25))
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("persistent")}
    assert len(before) == 3
    losses = []
    for _ in range(12):
        loss, _ = model.loss(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, p in before.items():
        assert not torch.equal(p, model.get_parameter(name)), "persistent tokens learn"


@every_pattern
def test_autocast_keeps_states_wide(cls):
    """And a cut changes no more than the rounding of what lies on either side."""
    m, x = cls(D, **SMALL, **WINDOW[cls]), tokens(1, 20).float()
    with torch.autocast("cpu", torch.bfloat16):
        want, _ = m(x)
        y, state = m(x[:, :13])
        z, state = m(x[:, 13:], state)
    assert_close(torch.cat([y, z], 1).float(), want.double(), "bfloat16", "y")
    recurrent = [t for n, t in state.flatten().items() if not n.endswith("conv")]
    assert all(t.dtype == torch.float32 for t in recurrent if t.is_floating_point())


@every_pattern
def test_bad_settings_are_refused(cls):
    (width,) = WINDOW[cls]
    for settings, said in (
        ({"n_heads": 3}, "divide d_model"),
        ({"n_persistent": -1}, "0 or more"),
        ({width: 0}, "at least 1"),
        ({"n_heads": 16}, "even"),
        ({"memory": {"bias": "l5"}}, "l5"),
    ):
        with pytest.raises(ValueError, match=said):
            cls(D, **settings)
    m = build(cls)
    with pytest.raises(ValueError, match="shape"):
        m(tokens(2, 3), m.init_state(1))
