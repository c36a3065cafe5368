"""The longscan command: its table, its errors, and a run used from the command line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from longscan import __version__, cli
from longscan.cli import COMMANDS, EXTRAS, main
from longscan.doctor import extras
from longscan.language.corpus import open_corpus
from longscan.language.evaluate import evaluate
from longscan.language.generate import generate
from longscan.language.tokenizer import ByteTokenizer
from longscan.models import LanguageModel, LanguageModelConfig


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as training leaves it, with an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    LanguageModel(LanguageModelConfig(257, d_model=32, n_layers=1)).save(folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(200)))
    (folder / "config.yaml").write_text(f"data: {{path: {text}, text_field: text}}\n")
    return folder


def test_help_lists_every_command(capsys):
    for args in ([], ["--help"], ["-h"]):
        assert main(args) == 0
        out = capsys.readouterr().out
        assert all(words in out for words in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"longscan {__version__}\n"


def test_every_command_but_those_of_other_rooms_leads_to_a_function():
    for words, (target, _) in COMMANDS.items():
        module = target.partition(":")[0]
        if importlib.util.find_spec(module) is not None:
            assert callable(cli.load(target)), words


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian", "language"], "did you mean train?"),
        (["train", "langauge"], "did you mean train language?"),
        (["train"], "choose: language"),
        (["train", "--help"], "choose: language"),
        (["generat"], "did you mean generate?"),
        (["zzz"], "longscan --help"),
    ],
)
def test_unknown_commands_name_the_nearest(args, words, capsys):
    assert main(args) == 2
    assert words in capsys.readouterr().err


def test_missing_extra_says_what_to_install(monkeypatch, capsys):
    for name in [m for m in sys.modules if m.startswith("longscan.language.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["train", "language"]) == 1
    assert "jsonargparse is not installed; pip install 'longscan[train]'" in capsys.readouterr().err


def test_every_named_extra_exists():
    known = {p.lower(): extra for extra, packages in extras().items() for p in packages}
    for module, extra in EXTRAS.items():
        if module != "yaml":  # comes with jsonargparse
            assert known[module] == extra


CORE_ONLY = """
import sys
core = {"torch", "numpy", "safetensors"}
for name in "lightning jsonargparse tokenizers matplotlib yaml zstandard rich pyarrow".split():
    sys.modules[name] = None
from longscan.cli import main
sys.exit(main(["--help"]) or main(["doctor"]) or main(["generate", "--help"]))
"""


def test_help_and_doctor_need_the_core_packages_only():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CORE_ONLY],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: longscan" in done.stdout
    assert "torch" in done.stdout
    assert "usage: longscan generate" in done.stdout


def test_help_does_not_import_torch():
    code = "import sys; from longscan.cli import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_errors_are_one_line_unless_a_traceback_is_asked_for(tmp_path, capsys):
    args = ["generate", str(tmp_path / "nothing")]
    assert main(args) == 1
    err = capsys.readouterr().err
    assert "longscan generate: error:" in err
    assert "holds no trained run" in err
    assert len(err.splitlines()) == 1
    with pytest.raises(ValueError, match="holds no trained run"):
        main(["--traceback", *args])


def test_generate_streams_what_the_library_generates(run_folder, capsys, monkeypatch):
    options = {"max_new_tokens": 20, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    options |= {"repetition_penalty": 1.2, "seed": 3}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    model = LanguageModel.load(run_folder)
    expected = "".join(generate(model, ByteTokenizer(), "line 1", **options))
    assert expected
    assert main(["generate", str(run_folder), "--prompt", "line 1", *flags]) == 0
    assert capsys.readouterr().out == "line 1" + expected + "\n"

    class Stdin:
        def read(self):
            return "line 1"

    monkeypatch.setattr(sys, "stdin", Stdin())
    stop = expected[5:7]
    args = ["generate", str(run_folder), "--prompt", "-", *flags, "--stop", stop]
    assert main([*args, "--device", "cpu"]) == 0
    cut = expected[: expected.find(stop)]
    assert capsys.readouterr().out == "line 1" + cut + "\n"


def test_eval_prints_what_the_library_measures(run_folder, capsys):
    text = run_folder / "text.txt"
    documents = [data for _, data in open_corpus(text).documents("test")]
    expected = evaluate(LanguageModel.load(run_folder), ByteTokenizer(), documents)
    assert main(["eval", str(run_folder), "--data", str(text), "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert f"loss           {expected.loss:.4f}" in out
    assert f"perplexity     {expected.perplexity:.3f}" in out
    assert f"bits per byte  {expected.bits_per_byte:.4f}" in out
    assert f"{expected.n_bytes:,} bytes" in out
    # Without --split, all of what --data names.
    assert main(["eval", str(run_folder), "--data", str(text)]) == 0
    assert f" {len(text.read_bytes()):,} bytes" in capsys.readouterr().out
    # Without --data, the run's own text.
    assert main(["eval", str(run_folder), "--split", "test"]) == 0
    assert f"bits per byte  {expected.bits_per_byte:.4f}" in capsys.readouterr().out


def test_eval_of_nothing_is_an_error(run_folder, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"text": "only"}\n')
    splits = {"train", "valid", "test"}
    statuses = {
        s: main(["eval", str(run_folder), "--data", str(tmp_path / "one.jsonl"), "--split", s])
        for s in splits
    }
    assert sorted(statuses.values()) == [0, 1, 1]
    assert "there are no documents to evaluate on" in capsys.readouterr().err
