"""Tiny checkpoints of other libraries: the same logits, losses, gradients and greedy tokens."""

import json
import shutil

import pytest
import torch
from helpers import GOLDEN, TOLERANCE, assert_close, error, golden

import longscan
from longscan.models.checkpoint import CheckpointError
from longscan.pretrained.models import FAMILIES, from_pretrained

FLA = [
    "gla/model_tiny",
    "deltanet/model_deltanet_tiny",
    "deltanet/model_gated_deltanet_tiny",
    "deltanet/model_kda_tiny",
    "deltaproduct/model_tiny",
]
AUTHORS = ["mamba/official_mamba1_lm", "mamba/official_mamba2_lm"]
HUB = ["mamba/hf_mamba1", "mamba/hf_mamba2", "mamba/hf_falcon_mamba"]


@torch.no_grad()
def greedy(model, ids, n):
    """Greedy continuation with a carried state."""
    logits, state = model(ids)
    out = []
    for _ in range(n):
        out.append(logits[:, -1].argmax(-1, keepdim=True))
        logits, state = model(out[-1], state)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", FLA)
def test_fla_models(name):
    io = golden(f"{name}/io")
    model = from_pretrained(GOLDEN / name).double()
    ids = io["input_ids"]
    logits, _ = model(ids)
    assert_close(logits, io["logits"], "golden64", "logits")
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert_close(loss, io["loss"].squeeze(), "golden64", "loss")
    loss.backward()
    grads = {k[5:]: v for k, v in io.items() if k.startswith("grad.")}
    convert = FAMILIES[json.loads((GOLDEN / name / "config.json").read_text())["model_type"]]
    for key, want in convert.state_dict(grads, model.config).items():
        grad = model.get_parameter(key).grad
        assert grad is not None
        assert_close(grad, want, "stored32", key)
    got = greedy(model, ids, io["greedy_ids"].shape[1])
    sure = (io["greedy_margin"] > 1e-6).cumprod(1).bool()
    assert sure.any()
    assert (got == io["greedy_ids"])[sure].all()


@pytest.mark.parametrize("name", [*AUTHORS, *HUB])
def test_mamba_models(name):
    file = golden(f"{name}/golden")
    model = from_pretrained(GOLDEN / name)
    ids = file["input_ids"]
    logits, _ = model(ids)
    assert_close(logits, file["logits"], "golden32", "logits")
    assert (logits - file["logits"]).abs().max() < 1e-4
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert_close(loss, file["loss"].squeeze(), "golden32", "loss")
    if "grad_embedding" in file:
        loss.backward()
        assert model.embedding.weight.grad is not None
        assert_close(model.embedding.weight.grad, file["grad_embedding"], "golden32", "gradient")
    n = file["greedy_ids"].shape[1] - ids.shape[1]
    real = json.loads((GOLDEN / name / "config.json").read_text())["vocab_size"]
    with torch.no_grad():
        logits, state = model(ids)
        steps, out = [logits[:, -1]], [ids]
        for i in range(n):
            out.append(steps[-1][:, :real].argmax(-1, keepdim=True))
            if i < n - 1 or "decode_logits" in file:
                logits, state = model(out[-1], state)
                steps.append(logits[:, -1])
    assert torch.equal(torch.cat(out, 1), file["greedy_ids"])
    if "decode_logits" in file:
        want = file["decode_logits"]
        got = torch.stack(steps, 1)[:, : want.shape[1]]
        assert_close(got, want, "golden32", "decoded logits")


@pytest.mark.parametrize("name", HUB)
def test_left_padding(name):
    """A masked row equals the same row without its padding."""
    file = golden(f"{name}/golden")
    model = from_pretrained(GOLDEN / name)
    mask = file["attention_mask"]
    logits, state = model(file["masked_input_ids"], attention_mask=mask)
    keep = mask.bool()
    assert_close(logits[keep], file["masked_logits"][keep], "golden32", "logits")
    assert state.batch_size == 2


def test_inner_states_of_the_hub_models():
    file = golden("mamba/hf_mamba1/golden")
    model = from_pretrained(GOLDEN / "mamba/hf_mamba1")
    h, _ = model.hidden(file["input_ids"])
    assert_close(h, file["last_hidden"], "golden32", "after the final norm")


def test_float32_models_are_close():
    for name in FLA:
        io = golden(f"{name}/io")
        logits, _ = from_pretrained(GOLDEN / name)(io["input_ids"])
        assert error(logits, io["logits"]) < TOLERANCE["float32"], name


def test_our_own_folders_load_too(tmp_path):
    config = longscan.LanguageModelConfig(vocab_size=11, d_model=32, n_layers=1, pattern="gla")
    model = longscan.LanguageModel(config)
    model.save(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(from_pretrained(tmp_path)(ids)[0], model(ids)[0])


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_pretrained(tmp_path)
    shutil.copytree(GOLDEN / FLA[0], tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    for change, message in [
        ({"model_type": "bert"}, "unknown model type 'bert'"),
        ({"attn": {"layers": [0]}}, "mixes in softmax attention"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "without a place"),
        ({"hidden_size": 96}, "another shape"),
        ({"feature_map": "relu"}, "feature map"),
    ]:
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(tmp_path / "a")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        from_pretrained(tmp_path / "a")
