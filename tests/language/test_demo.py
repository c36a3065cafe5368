"""The demo, made short: its numbers are those of the model and of the compressors."""

from __future__ import annotations

import json
import lzma

import pytest
import zstandard

from longscan.language.corpus import open_corpus
from longscan.language.demo import compressors, main, table
from longscan.language.evaluate import evaluate
from longscan.language.tokenizer import load_tokenizer
from longscan.models import LanguageModel


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    lines = [f"def f{i}(x):\n    return x + {i * i}\n" for i in range(2000)]
    (folder / "text.py").write_text("".join(lines))
    more = {
        "data.path": folder / "text.py",
        "data.cache_dir": folder / "cache",
        "data.vocab_size": 300,
        "data.seq_len": 32,
        "data.batch_size": 2,
        "data.val_batches": 2,
        "model.d_model": 32,
        "model.n_layers": 1,
    }
    return [f"--{k}={v}" for k, v in more.items()]


def test_demo_reports_true_numbers_and_runs_twice(options, tmp_path, capsys):
    run = tmp_path / "demo"
    short = ["--run", str(run), "--max-minutes=0.04", "--max-new-tokens=12", *options]
    assert main(short) == 0
    out = capsys.readouterr().out
    numbers = json.loads((run / "demo.json").read_text())

    corpus = open_corpus(_path(options))
    documents = [data for _, data in corpus.documents("valid")]
    text = b"".join(documents)
    model = LanguageModel.load(run)
    result = evaluate(model, load_tokenizer(run / "tokenizer.json"), documents)
    bits = numbers["bits_per_byte"]
    assert bits["longscan (gated_deltanet)"] == pytest.approx(result.bits_per_byte, rel=1e-6)
    assert bits["xz -9"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    packed = zstandard.ZstdCompressor(level=19).compress(text)
    assert bits["zstd -19"] == 8 * len(packed) / len(text)
    assert numbers["valid_bytes"] == len(text)
    assert numbers["model_bytes"] == (run / "model.safetensors").stat().st_size
    assert numbers["train_seconds"] <= 2.4 + 1  # and some patience with a busy machine
    for name, value in bits.items():
        assert f"{value:.3f}" in next(x for x in out.splitlines() if x.startswith(name))
    assert f"{numbers['model_bytes']:,} bytes of weights" in out
    assert numbers["sample"] in out
    assert numbers["sample"].startswith("def ")
    assert (run / "loss.png").exists()

    first = (run / "model.safetensors").read_bytes()
    (run / "notes.txt").write_text("mine")
    assert main([*short, "--seed=1", "--max-valid-bytes=10"]) == 0
    assert (run / "model.safetensors").read_bytes() != first
    assert (run / "notes.txt").read_text() == "mine"


def _path(options: list[str]) -> str:
    return next(o.partition("=")[2] for o in options if o.startswith("--data.path="))


def test_demo_leaves_other_folders_alone(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights of weeks")
    with pytest.raises(ValueError, match="something other than a demo"):
        main(["--run", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_compressors_at_their_usual_maximum():
    data = b"the same words again and again. " * 1000
    sizes = compressors(data)
    assert set(sizes) == {"xz -9", "zstd -19"}
    assert all(0 < size < 300 for size in sizes.values())


def test_table_has_the_lowest_first_whoever_wins():
    text = table([("ours", 2.5, "note"), ("theirs", 1.25, "")])
    assert text.splitlines() == [
        "        bits per byte",
        "theirs          1.250",
        "ours            2.500  note",
    ]
