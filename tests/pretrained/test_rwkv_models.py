"""RWKV language models: trained ones give the authors' logits, whole, in parts and by steps."""

from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, assert_close, golden
from safetensors.torch import load_file, save_file

from longscan.models.checkpoint import CheckpointError
from longscan.pretrained.models import from_pretrained

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "checkpoints"
TRAINED = ["4v0-660K", "5v1-730K", "5v2-730K", "7v0-834K"]


def logits_in_three_ways(model, ids):
    """The whole at once, in two parts, token by token."""
    with torch.no_grad():
        whole, _ = model(ids)
        a, state = model(ids[:, :13])
        b, _ = model(ids[:, 13:], state)
        steps, state = [], None
        for t in range(ids.shape[1]):
            y, state = model(ids[:, t : t + 1], state)
            steps.append(y)
    return whole, torch.cat([a, b], 1), torch.cat(steps, 1)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models(name):
    file = SHARED / f"tiny_rwkv_{name}.safetensors"
    if not file.exists():
        pytest.skip(f"{file.name} is not there (shared test data)")
    model = from_pretrained(file).double()
    expected = load_file(str(file))["__expected_logits__"]
    with torch.no_grad():
        logits, _ = model(torch.tensor([[*b'"in']]))
    assert_close(logits[0, -1], expected, "stored32", "the authors' expected output")
    reference = load_file(str(SHARED / "tiny_rwkv_reference_logits.safetensors"))
    want = reference[f"{name.replace('-', '_')}.logits"][None]
    for got in logits_in_three_ways(model, reference["prompt_bytes"].long()[None]):
        assert_close(got, want, "stored32", "logits")


@pytest.mark.parametrize(("name", "kind"), [("rwkv7", "golden64"), ("rwkv5", "stored32")])
def test_first_layers_of_trained_models(name, kind):
    """Decays of RWKV-5 pass through a double logarithm in float32, those of RWKV-7 do not."""
    io = golden(f"rwkv/{name}_io")
    model = from_pretrained(GOLDEN / "rwkv" / f"{name}.safetensors").double()
    for got in logits_in_three_ways(model, io["ids"]):
        assert_close(got, io["logits"], kind, "logits")


def authors_layout(tensors, version):
    """The same model as in the authors' .pth files."""
    out = {}
    for name, t in tensors.items():
        t, leaf = t.float(), name.rpartition(".")[2]
        if leaf == "x_rwkvag":
            out |= {name.replace(leaf, f"x_{c}"): row for c, row in zip("rwkvag", t, strict=True)}
            continue
        if leaf.startswith("time_mix") or leaf == "x_k":
            t = t.reshape(1, 1, -1)
        elif leaf == "time_decay":
            t = torch.log(-t.double() if version == 4 else -t.double().log()).float()
        if leaf.startswith("time_") and version == 5 and not leaf.startswith("time_mix"):
            t = t.squeeze(-1)
        out[name] = t.mT if leaf in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2") else t
    if version == 7:  # there, but without a use
        out |= {f"blocks.0.att.v{i}": out[f"blocks.1.att.v{i}"] for i in range(3)}
    return out


def random_rwkv4():
    """A tiny RWKV-4 in rwkv.cpp's layout."""
    g = torch.Generator().manual_seed(0)
    d = 8
    shapes = {"emb.weight": (11, d), "head.weight": (11, d)}
    for i in range(2):
        block = f"blocks.{i}."
        for ln in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            shapes |= {f"{block}{ln}.weight": (d,), f"{block}{ln}.bias": (d,)}
        shapes |= {f"{block}att.time_{n}": (d,) for n in ("decay", "first")}
        shapes |= {f"{block}att.time_mix_{n}": (d,) for n in "rkv"}
        shapes |= {f"{block}ffn.time_mix_{n}": (d,) for n in "rk"}
        shapes |= {
            f"{block}att.{n}.weight": (d, d) for n in ("receptance", "key", "value", "output")
        }
        shapes |= {f"{block}ffn.{n}.weight": s for n, s in
                   (("receptance", (d, d)), ("key", (24, d)), ("value", (d, 24)))}  # fmt: skip
    shapes |= {"ln_out.weight": (d,), "ln_out.bias": (d,)}
    tensors = {k: torch.randn(*s, generator=g) for k, s in shapes.items()}
    return {k: -t.exp() if k.endswith("time_decay") else t for k, t in tensors.items()}


@pytest.mark.parametrize("version", [4, 5, 7])
def test_both_layouts_are_the_same_model(version, tmp_path):
    if version == 4:
        tensors = random_rwkv4()
        save_file(tensors, tmp_path / "cpp.safetensors")
        ours = from_pretrained(tmp_path / "cpp.safetensors")
        decay = ours.state_dict()["blocks.2.mixer.time_decay"]
        assert_close(-decay.exp(), tensors["blocks.1.att.time_decay"], "stored32", "decay")
    else:
        tensors = golden(f"rwkv/rwkv{version}")
        ours = from_pretrained(GOLDEN / "rwkv" / f"rwkv{version}.safetensors")
    torch.save(authors_layout(tensors, version), tmp_path / "model.pth")
    theirs = from_pretrained(tmp_path / "model.pth")
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, "stored32", name)
    assert ours.config.layers[:2] == (f"rwkv{version}", "rwkv_channel_mix")
    if version == 5:  # trained with o / 8 and eps 1e-5
        assert theirs.config.mixers["rwkv5"].get("norm_eps", 64e-5) == 64e-5


def test_converted_models_are_ordinary_models(tmp_path):
    """They train, save and load like any other."""
    model = from_pretrained(GOLDEN / "rwkv" / "rwkv7.safetensors")
    ids = golden("rwkv/rwkv7_io")["ids"]
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    model.save(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(ids)[0], model(ids)[0])


def test_what_does_not_fit_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = golden("rwkv/rwkv5")

    def refused(tensors, message):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(file)

    left = {k: t for k, t in tensors.items() if k != "blocks.0.ffn.key.weight"}
    refused({**tensors, "extra": torch.zeros(1)}, "without a place here.*extra")
    refused({k: t for k, t in tensors.items() if k != "ln_out.bias"}, "no tensor ln_out.bias")
    refused({k: t for k, t in tensors.items() if "time_mix_k" not in k}, "4, 5 and 7 are")
    refused({"some.weight": torch.zeros(1)}, "config.json")
    refused(left, "no tensor blocks.0.ffn.key.weight")
    one = authors_layout(tensors, 5)
    one["blocks.0.att.time_first"] = one.pop("blocks.0.att.time_faaaa")
    refused({k: t.contiguous() for k, t in one.items()}, r"RWKV-5\.1 in the authors' layout")
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="damaged"):
        from_pretrained(file)
