"""A model on disk: back bit for bit, never half written, and clear words when it does not fit."""

import errno
import json

import ema  # noqa: F401  (registers the mixer)
import pytest
import torch
from safetensors.torch import load_file, save_file

from longscan.io import SaveError
from longscan.models import CheckpointError, LanguageModel, LanguageModelConfig

IDS = torch.arange(12)[None]


def make(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"vocab_size": 37, "d_model": 16, "n_layers": 2, **settings}
    settings.setdefault("pattern", "ema,gated_deltanet")
    return LanguageModel(LanguageModelConfig(**settings))


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    model = make(tie_embeddings=tied, d_ff=40, mixers={"ema": {"slowest": 9.0}})
    model.save(tmp_path / "new" / "folder")
    again = LanguageModel.load(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert torch.equal(again(IDS)[0], model(IDS)[0])
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config["architecture"] == "longscan.LanguageModel"
    assert config["format"] == 1
    assert config["d_model"] == 16
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_narrow_model_comes_back_as_float32_of_the_same_values(tmp_path):
    model = make().to(torch.bfloat16)
    model.save(tmp_path)
    again = LanguageModel.load(tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.float(), q)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    model = make()
    model.save(tmp_path)
    want = model(IDS)[0]
    with torch.no_grad():
        model.embedding.weight.add_(1)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SaveError, match="disk is full"):
        model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path)(IDS)[0], want)
    assert len(list(tmp_path.iterdir())) == 2


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "MambaForCausalLM"}, "of MambaForCausalLM, not of longscan.Lang"),
        ({"architecture": None, "architectures": ["GLAForCausalLM"]}, "of GLAForCausalLM"),
        ({"format": 2}, "format 2"),
        ({"n_layers": 3}, "missing: blocks.2.norm.weight, blocks.2.mixer"),
        ({"n_layers": 1, "pattern": "ema"}, r"unexpected: blocks.1.* and \d more"),
        ({"d_ff": 20}, r"blocks.1.mlp.gate_up.weight \(here \[40, 16\], there \[128, 16\]\)"),
        ({"vocab_size": 400}, r"embedding.weight \(here \[400, 16\], there \[40, 16\]\)"),
        ({"tie_embeddings": False}, "missing: head.weight"),
        ({"pattern": "gla"}, "missing: blocks.0.mixer"),
        ({"pattern": "glaa"}, "did you mean gla"),
        ({"width": 3}, "no setting 'width'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_explained(tmp_path, changes, words):
    make().save(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        LanguageModel.load(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        LanguageModel.load(tmp_path)
    make().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        LanguageModel.load(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        LanguageModel.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        LanguageModel.load(tmp_path)


def test_nothing_is_loaded_where_something_does_not_fit(tmp_path):
    from longscan.models.checkpoint import load_weights

    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {k: v + 1 for k, v in tensors.items()}
    tensors["norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm.weight \(here \[16\], there \[3\]\)"):
        load_weights(model, tensors, "it")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
