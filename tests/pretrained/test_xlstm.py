"""A tiny xLSTM of Hugging Face: the same logits, loss, gradients, caches and decoding."""

import json

import pytest
import torch
from helpers import GOLDEN, TOLERANCE, assert_close, error, golden
from safetensors.torch import load_file

from longscan.models.checkpoint import CheckpointError, load_weights
from longscan.models.language_model import LanguageModel
from longscan.pretrained.models import from_pretrained
from longscan.pretrained.xlstm import xlstm_config, xlstm_state_dict

FOLDER = GOLDEN / "xlstm/hf_tiny"
CONFIG = json.loads((FOLDER / "config.json").read_text())


def tensors():
    out = {}
    for file in sorted(FOLDER.glob("model*.safetensors")):
        out.update(load_file(str(file)))
    return out


def load(tensors, **changes):
    config = xlstm_config({**CONFIG, **changes})
    model = LanguageModel(config)
    load_weights(model, xlstm_state_dict(tensors, config), "the golden checkpoint")
    return model


@pytest.fixture(scope="module")
def file():
    return golden("xlstm/hf_tiny/golden")


def same_cache(state, file, when):
    for i in range(2):
        s, m = (state.child(str(i)).tensor(k) for k in ("s", "m"))
        assert_close(s[..., -1], file[f"cache_{when}.{i}.n"], "golden32", f"n {i}")
        assert_close(m, file[f"cache_{when}.{i}.m"], "golden32", f"m {i}")
        if f"cache_{when}.{i}.C" in file:
            assert_close(s[..., :-1], file[f"cache_{when}.{i}.C"], "golden32", f"C {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_loss_and_gradients(file, dtype):
    model, ids = load(tensors()).to(dtype), file["in.idx"]
    logits, _ = model(ids)
    assert_close(logits, file["out.logits"], "golden32", "logits")
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert_close(loss, file["out.loss"], "golden32", "loss")
    loss.backward()
    want = {k[5:]: v for k, v in file.items() if k.startswith("grad.")}
    for i in range(2):
        ours, theirs = f"blocks.{i}", f"backbone.blocks.{i}"
        pairs = {
            f"{ours}.norm.weight": f"{theirs}.norm_mlstm.weight",
            f"{ours}.mlp_norm.weight": f"{theirs}.norm_ffn.weight",
            f"{ours}.mixer.norm.weight": f"{theirs}.mlstm_layer.multihead_norm.weight",
        }
        for name, key in pairs.items():
            assert_close(model.get_parameter(name).grad, want[key], "golden32", name)
        mixer = model.get_submodule(f"{ours}.mixer")
        for part, kind in (
            (mixer.in_proj.weight.grad[-4:], "weight"),
            (mixer.gate_bias.grad, "bias"),
        ):
            gates = [want[f"{theirs}.mlstm_layer.{g}gate_preact.{kind}"] for g in "if"]
            assert_close(part, torch.cat(gates), "golden32", f"gates' {kind} {i}")
    assert_close(model.embedding.weight.grad, want["backbone.embeddings.weight"], "golden32", "emb")


@torch.no_grad()
def test_decoding_and_caches(file):
    """All but four tokens at once, the rest one by one; states are theirs, C | n side by side."""
    model, ids = load(tensors()), file["in.idx"]
    _, state = model(ids[:, :-4])
    same_cache(state, file, "prefill")
    out = []
    for t in range(4):
        logits, state = model(ids[:, ids.shape[1] - 4 + t][:, None], state)
        out.append(logits)
    assert_close(torch.cat(out, 1), file["out.logits_decode"], "golden32", "decoded logits")
    same_cache(state, file, "final")


@torch.no_grad()
def test_other_names_of_the_same_model(file):
    """xLSTMLarge's embedding, its fused weights and NX-AI's names of sizes."""
    theirs = tensors()
    theirs["embedding.weight"] = theirs.pop("backbone.embeddings.weight")
    for i in range(2):
        block = f"backbone.blocks.{i}."
        fused = {
            "mlstm_layer.qkv_opreact.weight": [f"mlstm_layer.{p}.weight" for p in "qkv"]
            + ["mlstm_layer.ogate_preact.weight"],
            "mlstm_layer.ifgate_preact.weight": [
                f"mlstm_layer.{g}gate_preact.weight" for g in "if"
            ],
            "mlstm_layer.ifgate_preact.bias": [f"mlstm_layer.{g}gate_preact.bias" for g in "if"],
            "ffn.proj_up_gate_z.weight": ["ffn.proj_up_gate.weight", "ffn.proj_up.weight"],
        }
        for name, parts in fused.items():
            theirs[block + name] = torch.cat([theirs.pop(block + p) for p in parts])
    sizes = {"hidden_size": None, "embedding_dim": 128, "num_hidden_layers": None, "num_blocks": 2}
    model = load(theirs, **sizes)
    assert torch.equal(model(file["in.idx"])[0], load(tensors())(file["in.idx"])[0])


def test_the_published_model():
    """Sizes of NX-AI/xLSTM-7b: 6.87 billion parameters, built without memory for them."""
    config = xlstm_config(
        {
            "model_type": "xlstm", "embedding_dim": 4096, "num_blocks": 32, "num_heads": 8,
            "vocab_size": 50304, "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "use_bias": False,
            "ffn_proj_factor": 2.667, "ffn_round_up_to_multiple_of": 64, "norm_eps": 1e-6,
            "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    assert config.d_ff == 10944
    with torch.device("meta"):
        model = LanguageModel(config)
    assert round(model.num_parameters() / 1e9, 2) == 6.87
    mixer = model.get_submodule("blocks.0.mixer")
    assert (mixer.d_key, mixer.d_value) == (256, 512)


def test_from_pretrained(file):
    logits, _ = from_pretrained(FOLDER)(file["in.idx"])
    assert error(logits, file["out.logits"]) < TOLERANCE["golden32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bias": True}, "use_bias is True"),
        ({"eps": 1e-3}, "eps is 0.001"),
        ({"hidden_size": None}, "no hidden_size or embedding_dim"),
        ({"num_hidden_layers": 3}, "no tensor backbone.blocks.2"),
        ({"num_hidden_layers": 1}, "without a place"),
        ({"ffn_proj_factor": 1.0}, "another shape"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        load(tensors(), **change)
