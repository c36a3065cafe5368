"""longscan claims: the frame around an experiment, on a toy."""

from __future__ import annotations

import csv
import importlib
import json
import re

import pytest
import torch
from toy_claim import CLAIM, FACTOR, LOG

from longscan import cli, registry
from longscan.claims import CLAIMS, run
from longscan.claims.results import (
    Measurement,
    Row,
    Store,
    draw,
    key_of,
    mean,
    table,
    thinned,
    values,
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(CLAIMS, "toy", CLAIM)
    monkeypatch.setitem(FACTOR, "size", 1.0)
    LOG.clear()


def rows_of(case, *found, metric="accuracy"):
    return [Row(case, "gla", metric, x, "", seed) for seed, x in enumerate(found)]


# -- the table of claims


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_every_claim_points_at_functions_and_known_mixers(claim):
    for target in (claim.target, claim.check):
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert claim.mixers
    for mixer in claim.mixers:
        registry.entry(mixer)
    assert re.search(r"arXiv \d{4}\.\d{5}", claim.source)
    assert claim.title.endswith(".")
    assert CLAIMS[claim.name] is claim


# -- the command


def claims(*words):
    return cli.main(["claims", *map(str, words)])


def test_lists_all_claims(capsys):
    assert claims() == 0
    out = capsys.readouterr().out
    for claim in CLAIMS.values():
        assert f"{claim.name}\n    {claim.title}" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mqaar"], "unknown claim 'mqaar'; did you mean mqar?"),
        (["zzz"], "unknown claim 'zzz'; claims: mqar"),
        (["toy", "--device", "gpu"], "--device must be cpu or cuda, not 'gpu'"),
        (["toy", "--device", "cuda:99"], "CUDA devices here, so not cuda:99"),
        (["toy", "--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["toy", "--quick", "--record"], "leave out --record"),
        (["toy", "--data", "/no/such/folder"], "there is no file or folder /no/such/folder"),
    ],
)
def test_errors_say_what_to_do(toy, words, said, capsys, tmp_path):
    assert claims(*words, "--out", tmp_path) == 1
    assert said in capsys.readouterr().err
    assert not LOG


def test_a_claim_that_needs_data_says_so(toy, monkeypatch, capsys):
    from dataclasses import replace

    monkeypatch.setitem(CLAIMS, "toy", replace(CLAIM, data="the moon's WAV files"))
    assert claims("toy") == 1
    assert "toy needs --data FOLDER with the moon's WAV files" in capsys.readouterr().err


def test_runs_prints_and_says_whether_it_holds(toy, tmp_path, capsys):
    assert claims("toy", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "Steep is more than flat." in out
    assert re.search(r"\| steep +\| gla +\| value +\| 2\.5 +\| 2 to 3, 2 seeds +\| 2 or so", out)
    assert "toy: HOLDS in our hands. The difference is 1.5." in out
    assert LOG == ["steep 0", "steep 1", "flat 0", "flat 1"]
    with open(tmp_path / "toy" / "curves.csv", newline="") as f:
        curve = list(csv.DictReader(f))
    assert [int(r["step"]) for r in curve if (r["case"], r["seed"]) == ("steep", "1")] == [
        *range(1, 26)
    ]
    assert (tmp_path / "toy" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_says_plainly_when_it_does_not_hold(toy, tmp_path, capsys):
    FACTOR["size"] = 0.1
    assert claims("toy", "--out", tmp_path) == 0
    assert "toy: DOES NOT HOLD in our hands. The difference is 0.15." in capsys.readouterr().out


def test_goes_on_after_an_interruption_and_measures_what_changed(toy, tmp_path, capsys):
    assert claims("toy", "--out", tmp_path) == 0
    first = capsys.readouterr().out
    kept = tmp_path / "toy" / "rows.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    # As if killed while the third of four measurements was being written.
    kept.write_text("".join(lines[:2]) + lines[2][:40])
    LOG.clear()
    assert claims("toy", "--out", tmp_path) == 0
    again = capsys.readouterr().out
    assert LOG == ["flat 0", "flat 1"]
    assert "2 of them finished" in again
    assert first[first.index("| case") : first.index("learning")] in again
    for before, now in zip(lines, kept.read_text().splitlines(), strict=True):
        a, b = json.loads(before), json.loads(now)
        assert (a["rows"], a["curve"], a["key"]) == (b["rows"], b["curve"], b["key"])
    LOG.clear()
    assert claims("toy", "--out", tmp_path, "--seeds", 3) == 0
    assert LOG == ["steep 2", "flat 2"]
    LOG.clear()
    FACTOR["size"] = 3.0
    assert claims("toy", "--out", tmp_path, "--seeds", 1) == 0
    assert LOG == ["steep 0", "flat 0"]
    LOG.clear()
    assert claims("toy", "--out", tmp_path, "--seeds", 1, "--fresh") == 0
    assert LOG == ["steep 0", "flat 0"]


def test_records_one_line_for_each_case_and_metric(toy, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert claims("toy", "--record") == 0
    assert claims("toy", "--record", "--seeds", 1) == 0
    with open(tmp_path / "bench" / "claims.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 8
    first = rows[0]
    want = {
        "claim": "toy", "case": "steep", "mixer": "gla", "metric": "value", "mean": "2.5",
        "min": "2", "max": "3", "seeds": "2", "published": "2 or so", "holds": "yes",
        "steps": "25", "torch": torch.__version__,
    }  # fmt: skip
    assert {k: first[k] for k in want} == want
    assert [*first] == [*[*want][:11], "minutes", "device", "threads", "torch", "commit", "date"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["date"])
    assert (rows[4]["case"], rows[4]["seeds"], rows[4]["mean"]) == ("steep", "1", "2")


def test_quick_runs_judge_nothing_and_stay_apart(toy, tmp_path, capsys):
    assert claims("toy", "--quick", "--out", tmp_path) == 0
    assert "nothing is judged" in capsys.readouterr().out
    assert LOG == ["steep 0", "flat 0"]
    assert not (tmp_path / "toy").exists()


def test_all_is_every_claim_that_needs_no_data():
    assert [c.name for c in run.chosen(["all"])] == [n for n, c in CLAIMS.items() if not c.data]
    assert [c.name for c in run.chosen(["s3", "mqar", "s3"])] == ["s3", "mqar"]


# -- results


def test_key_depends_on_everything_that_matters():
    base = ("case", 0, {"a": 1, "b": [1, {"c": 2}]}, "cpu")
    keys = {key_of(*base)}
    assert key_of("case", 0, {"b": [1, {"c": 2}], "a": 1}, "cpu") in keys
    for i, other in enumerate(["other", 1, {"a": 1, "b": [1, {"c": 3}]}, "cuda"]):
        keys.add(key_of(*base[:i], other, *base[i + 1 :]))
    assert len(keys) == 5
    with pytest.raises(TypeError):
        key_of("case", 0, {"a": torch.nn.Linear}, "cpu")


def test_store_gives_back_what_it_was_given(tmp_path):
    m = Measurement("k", tuple(rows_of("x", 0.1, 1 / 3)), 7, 1.5, "abc", "2026", ((1, 0.25),))
    Store(tmp_path).add(m)
    assert Store(tmp_path).get("k") == m
    assert Store(tmp_path).get("other") is None
    assert Store(tmp_path / "empty").get("k") is None


def test_thinned_curve_keeps_the_mean():
    assert thinned([3.0, 1.0]) == ((1, 3.0), (2, 1.0))
    losses = [float(i % 7) for i in range(1003)]
    curve = thinned(losses)
    assert len(curve) <= 200
    assert curve[-1][0] == 1003
    widths = [
        b - a for a, b in zip([0, *(s for s, _ in curve)], (s for s, _ in curve), strict=False)
    ]
    total = sum(w * loss for w, (_, loss) in zip(widths, curve, strict=True))
    assert total == pytest.approx(sum(losses))
    assert thinned([]) == ()


def test_values_mean_and_table():
    rows = rows_of("x", 0.5, 0.7) + rows_of("y", 0.1)
    assert values(rows, "x", "accuracy") == [0.5, 0.7]
    assert mean(rows, "x", "accuracy") == pytest.approx(0.6)
    with pytest.raises(ValueError, match="nothing was measured for 'z'"):
        mean(rows, "z", "accuracy")
    lines = table(rows).splitlines()
    assert len(lines) == 4
    assert "| 0.6      | 0.5 to 0.7, 2 seeds |" in lines[2]
    assert "1 seed" in lines[3]


def test_draw_without_matplotlib(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert draw(tmp_path, [Measurement("k", tuple(rows_of("x", 1.0)), curve=((1, 2.0),))]) is None
