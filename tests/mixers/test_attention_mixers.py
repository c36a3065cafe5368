"""Attention, SlidingAttention and GatedAttention: authors' vectors, gates, cuts, packing."""

import json

import pytest
import torch
from helpers import GOLDEN, TOLERANCE, assert_close, error, golden
from safetensors.torch import load_file, save_file

from longscan.mixers.attention import Attention, SlidingAttention
from longscan.mixers.gated_attention import ACTIVATIONS, POSITIONS, GatedAttention
from longscan.models.checkpoint import CheckpointError
from longscan.pretrained.models import from_pretrained
from longscan.pretrained.qwen import (
    attention_settings,
    gated_attention_layer,
    qwen3_config,
    qwen3_state_dict,
)
from longscan.registry import mixer_class

F64 = torch.float64
D = 32
QWEN3 = ("qwen3_baseline", "qwen3_headwise", "qwen3_elementwise")
FOLDER = GOLDEN / "gated_attention"


def config_of(name):
    return json.loads((FOLDER / name / "config.json").read_text())


def layer_of(tensors, config):
    mixer, options = attention_settings(config)
    layer = mixer_class(mixer)(config["hidden_size"], **options)
    layer.load_state_dict(gated_attention_layer(tensors, config))
    return layer


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def tokens(batch, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D, dtype=F64, generator=g)


def build(cls=GatedAttention, seed=0, **options):
    """A float64 mixer with all parameters moved off their initial values."""
    torch.manual_seed(seed)
    m = cls(D, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return m


@pytest.mark.parametrize("name", QWEN3)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layer_equals_authors(name, backend, monkeypatch):
    monkeypatch.setenv("LONGSCAN_BACKEND", backend)
    io, weights = golden(f"gated_attention/{name}/io"), golden(f"gated_attention/{name}/model")
    layer = layer_of(part(weights, "model.layers.0.self_attn."), config_of(name))
    x, want = io["layer0_attn_in"], io["layer0_attn_out"]
    y, _ = layer(x)
    assert_close(y, want, "golden32", "output")
    p, expected = layer.weights(x), io["layer0_attn_weights"]
    assert_close(p, expected, "golden32", "weights")
    sink, expected = p[..., 0].mean(), expected[..., 0].mean()
    assert_close(sink, expected, "golden32", "attention sink")
    exact, _ = layer.double()(x.double())
    assert_close(y, exact, "float32", "float32 against float64")


def test_qwen3_next_layer_equals_hugging_face():
    file = golden("gated_attention/qwen3_next_tiny/layer3")
    config = config_of("qwen3_next_tiny")
    layer = layer_of(part(file, "param."), config)
    y, _ = layer(file["in_x"])
    assert_close(y, file["out_y"], "golden32")
    state, out = None, []
    with torch.no_grad():
        for t in range(file["in_x"].shape[1]):
            o, state = layer(file["in_x"][:, t : t + 1], state)
            out.append(o)
    assert_close(torch.cat(out, 1), file["out_y"], "golden32", "step by step")
    # Its groups of rows are per query head; read per key/value head they give another layer.
    wrong = layer_of(part(file, "param."), {**config, "model_type": "qwen3",
                                            "elementwise_attn_output_gate": True})  # fmt: skip
    assert error(wrong(file["in_x"])[0], file["out_y"]) > 0.1


@pytest.mark.parametrize("name", QWEN3)
def test_language_model_equals_authors(name):
    io = golden(f"gated_attention/{name}/io")
    model = from_pretrained(FOLDER / name)
    ids = io["input_ids"]
    logits, _ = model(ids)
    assert (logits - io["logits"]).abs().max() <= 2e-4
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert_close(loss, io["loss"].squeeze(), "golden32", "loss")
    loss.backward()
    grads = qwen3_state_dict(part(io, "grad."), config_of(name))
    named = dict(model.named_parameters())
    assert grads.keys() == named.keys()
    for key, want in grads.items():
        assert named[key].grad is not None
        assert_close(named[key].grad, want, "golden32", key)
    steps = io["greedy_ids"].shape[1]
    got = []
    with torch.no_grad():
        logits, state = model(ids)
        for _ in range(steps):
            got.append(logits[:, -1].argmax(-1, keepdim=True))
            logits, state = model(got[-1], state)
    sure = (io["greedy_margin"] > 1e-3).cumprod(1).bool()
    assert sure.any()
    assert (torch.cat(got, 1) == io["greedy_ids"])[sure].all()


def test_checkpoints_that_do_not_fit(tmp_path):
    config = config_of("qwen3_elementwise")
    tensors = golden("gated_attention/qwen3_elementwise/model")
    layer = part(tensors, "model.layers.0.self_attn.")
    with pytest.raises(CheckpointError, match="128 rows, but 4 heads of 16 and 4 gates need 68"):
        gated_attention_layer(
            layer,
            {**config, "elementwise_attn_output_gate": False, "headwise_attn_output_gate": True},
        )
    with pytest.raises(CheckpointError, match="found"):
        gated_attention_layer({k: v for k, v in layer.items() if k != "k_norm.weight"}, config)
    with pytest.raises(CheckpointError, match="not 'llama'"):
        attention_settings({**config, "model_type": "llama"})
    with pytest.raises(CheckpointError, match="scaled"):
        attention_settings({**config, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    with pytest.raises(CheckpointError, match="mixture of experts"):
        qwen3_config(config_of("qwen3_next_tiny"))
    with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.weight"):
        qwen3_state_dict({k: v for k, v in tensors.items() if k != "model.norm.weight"}, config)
    with pytest.raises(CheckpointError, match="unknown tensors: extra"):
        qwen3_state_dict({**tensors, "extra": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no weights"):
        from_pretrained(tmp_path)
    # Sharded and tied files are read as well.
    names = sorted(k for k in tensors if k != "lm_head.weight")
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for i, half in enumerate((names[::2], names[1::2])):
        save_file(
            {k: tensors[k] for k in half}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors"
        )
    model = from_pretrained(tmp_path)
    assert torch.equal(model.head_weight, tensors["model.embed_tokens.weight"])


GATES = [
    {"gate": gate, "gate_per": per, "gate_shared": shared,
     # A norm would undo one factor per head.
     "qk_norm": not (gate in ("query", "key") and per == "head")}
    for gate in POSITIONS
    for per in ("element", "head")
    for shared in (False, True)
    if gate != "output" or (per == "element" and not shared)
]  # fmt: skip


@pytest.mark.parametrize("gate", GATES, ids=lambda g: "-".join(map(str, g.values())))
@pytest.mark.parametrize("gate_input", [True, False])
def test_cut_packed_and_definition(gate, gate_input, monkeypatch):
    m = build(**gate, gate_input=gate_input, n_kv_heads=2, rotary_fraction=0.5)
    x = tokens(1, 23)
    y, _ = m(x)
    first, state = m(x[:, :9])
    second, state = m(x[:, 9:10], state)
    third, _ = m(x[:, 10:], state)
    assert_close(torch.cat([first, second, third], 1), y, "float64", "cut")
    other = tokens(1, 6, seed=1)
    both, _ = m(torch.cat([x, other], 1), cu_seqlens=torch.tensor([0, 23, 29]))
    assert_close(both, torch.cat([y, m(other)[0]], 1), "float64", "packed")
    monkeypatch.setenv("LONGSCAN_BACKEND", "reference")
    assert_close(m(x)[0], y, "float64", "definition")


@pytest.mark.parametrize("gate", GATES, ids=lambda g: "-".join(map(str, g.values())))
@pytest.mark.parametrize("gate_input", [True, False])
def test_open_gate_is_no_gate(gate, gate_input):
    gated = build(**gate, gate_input=gate_input, n_kv_heads=2, bias=True)
    plain = Attention(D, n_kv_heads=2, bias=True, qk_norm=gate["qk_norm"]).double()
    rows = plain.in_proj.out_features
    weights = gated.state_dict()
    weights.pop("gate_logits", None)
    for name in ("in_proj.weight", "in_proj.bias"):
        weights[name] = weights[name][:rows]
    plain.load_state_dict(weights)
    x = tokens(2, 11)
    assert error(gated(x)[0], plain(x)[0]) > 1e-2
    with torch.no_grad():
        if gate_input:
            gated.in_proj.weight[rows:] = 0
            gated.in_proj.bias[rows:] = 1000
        else:
            gated.gate_logits.fill_(1000)
    assert torch.equal(gated.gate_scores(x), torch.ones_like(gated.gate_scores(x)))
    assert_close(gated(x)[0], plain(x)[0], "float64")
    assert_close(gated.weights(x), plain.weights(x), "float64")


@pytest.mark.parametrize("position", ["sdpa", "value", "key", "query"])
def test_coarse_gates_are_fine_gates_with_repeated_rows(position):
    x = tokens(2, 11)
    fine = build(gate=position, n_kv_heads=2, qk_norm=False)
    heads, dim = (2 if position in ("key", "value") else 4), fine.d_head
    rows = 4 * dim + 2 * 2 * dim
    for per, shared in (("head", False), ("element", True), ("head", True)):
        coarse = build(gate=position, n_kv_heads=2, gate_per=per, gate_shared=shared, qk_norm=False)
        weights = coarse.state_dict()
        scores = weights["in_proj.weight"][rows:]
        scores = scores.view(1 if shared else heads, 1 if per == "head" else dim, D)
        scores = scores.expand(heads, dim, D).flatten(0, 1)
        weights["in_proj.weight"] = torch.cat([weights["in_proj.weight"][:rows], scores])
        fine.load_state_dict(weights)
        assert_close(coarse(x)[0], fine(x)[0], "float64", f"{per} {shared}")


def test_each_gate_stands_where_it_says():
    """Written out with one head, without rotary positions and norms."""
    x = tokens(1, 7)
    for position in POSITIONS:
        for form in ("multiply", "add"):
            for name, act in ACTIVATIONS.items():
                m = build(gate=position, gate_form=form, gate_activation=name, n_heads=1,
                          rope_theta=None, qk_norm=False)  # fmt: skip
                q, k, v, logits = m.in_proj(x[0]).split([D] * 4, -1)
                s = act(logits)

                def gated(y, here, s=s, position=position, form=form):
                    if here != position:
                        return y
                    return y * s if form == "multiply" else y + s

                q, k, v = gated(q, "query"), gated(k, "key"), gated(v, "value")
                scores = (q @ k.T) / D**0.5
                p = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
                want = gated(m.out_proj(gated(p @ v, "sdpa")), "output")
                assert_close(m(x)[0][0], want, "float64", f"{position} {form} {name}")


def test_gate_activations():
    x = torch.linspace(-30, 30, 61, dtype=F64)
    assert_close(ACTIVATIONS["ns_sigmoid"](x), 0.5 + 0.5 / (1 + (-x).exp()), "float64")
    assert ACTIVATIONS["ns_sigmoid"](x).min() >= 0.5
    assert_close(ACTIVATIONS["silu"](x), x / (1 + (-x).exp()), "float64")


def test_gate_without_input_starts_at_one_half_and_is_not_decayed():
    m = GatedAttention(D, gate_input=False)
    assert torch.equal(m.gate_scores(tokens(1, 1).float()), torch.full((4, 8), 0.5))
    assert "gate_logits" in m.no_weight_decay
    assert m.in_proj.out_features == 3 * D


def test_default_gate():
    """After attention, per head and element, sigmoid, from the input; starts near one half."""
    torch.manual_seed(0)
    m = GatedAttention(64)
    assert m.in_proj.weight.shape == (4 * 64, 64)
    s = m.gate_scores(torch.randn(2, 5, 64))
    assert s.shape == (2, 5, 4, 16)
    assert (s - 0.5).abs().max() < 0.2
    assert abs(m.in_proj.weight.std().item() - 0.02) < 0.001
    assert abs(m.out_proj.weight.std().item() - 0.02) < 0.001


def test_sliding_attention_is_attention_with_a_window():
    x = tokens(2, 30)
    sliding, full = build(SlidingAttention, window=7), build(Attention)
    full.load_state_dict(sliding.state_dict())
    assert_close(sliding(x[:, :7])[0], full(x[:, :7])[0], "float64")
    assert error(sliding(x)[0], full(x)[0]) > 1e-3
    full.window = 7
    y, state = full(x)
    assert_close(sliding(x)[0], y, "float64")
    assert state["k"].shape[1] == 6
    # The last token is reached from the 7 tokens it sees, through one layer.
    x.requires_grad_()
    (g,) = torch.autograd.grad(sliding(x)[0][:, -1].sum(), x)
    assert g[:, :23].abs().max() == 0
    assert g[:, 23:].abs().amin(-1).min() > 0
    assert SlidingAttention(D).window == 512


def test_without_positions_order_does_not_matter():
    x = tokens(1, 12)
    shuffled = x[:, [*torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist(), 11]]
    for theta, same in ((None, True), (10000.0, False)):
        m = build(Attention, rope_theta=theta)
        assert (error(m(x)[0][:, -1], m(shuffled)[0][:, -1]) < TOLERANCE["float64"]) == same


def test_empty_state_is_no_state():
    m = build(n_kv_heads=2)
    x = tokens(2, 5)
    y, state = m(x, m.init_state(2))
    want, other = m(x)
    assert torch.equal(y, want)
    for name in other:
        assert state[name].dtype == other[name].dtype
        assert torch.equal(state[name], other[name])


@pytest.mark.parametrize("name", ["attention", "sliding_attention", "gated_attention"])
def test_saved_and_half_precision_states(name, tmp_path):
    torch.manual_seed(0)
    m = mixer_class(name)(D)
    x = torch.randn(2, 6, D)
    with torch.no_grad():
        _, state = m(x[:, :5])
        state.save(tmp_path / "state.safetensors")
        want, _ = m(x[:, 5:], state)
        got, _ = m(x[:, 5:], type(state).load(tmp_path / "state.safetensors"))
        assert torch.equal(got, want)
        low, half = m.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert half["k"].dtype == torch.float32
    assert (low[:, 5:].float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "must divide d_model"),
        ({"n_kv_heads": 3}, "must divide n_heads"),
        ({"window": 0}, "at least 1"),
        ({"rotary_fraction": 1.5}, "rotary_fraction"),
        ({"gate": "sdap"}, "gate must be one of sdpa, value"),
        ({"gate_per": "channel"}, "gate_per must be one of"),
        ({"gate_form": "times"}, "gate_form must be one of"),
        ({"gate_activation": "relu"}, "gate_activation must be one of"),
        ({"gate": "output", "gate_per": "head"}, "no heads"),
        ({"gate": "query", "gate_per": "head"}, "undone by the norm"),
        ({"gate": "key", "gate_per": "head", "gate_activation": "silu"}, "undone by the norm"),
        ({"gate": "output", "gate_shared": True}, "no heads"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        GatedAttention(D, **options)


def test_golden_files_are_whole():
    """Every variant is there, so that no parametrised test passes for want of data."""
    for name in QWEN3:
        assert load_file(str(FOLDER / name / "io.safetensors"))["logits"].shape == (2, 40, 61)
