"""`longscan bench gpu` without a GPU: which rows, what happens to those that fail, what is told."""

import csv
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from longscan.bench import gpu, gpu_report, gpu_rows
from longscan.bench.gpu import Measured, Row
from longscan.bench.gpu_rows import OPS, OURS


def options(**changes):
    return SimpleNamespace(**{"rows": None, "sweep": False, **changes})


def measured(op="gla", side=OURS, batch=8, length=2048, ms=1.0, **more):
    more = {"forward": [ms, 2 * ms, ms], "train": [3 * ms], "mib": 100 * ms, "first": 2.0,
            "bytes": [3 * 10**8, 9 * 10**8], "about": {"bandwidth": "3e12", "device": "toy",
            "commit": "abc"}, **more}  # fmt: skip
    return Measured(op, side, batch, length, **more)


def test_the_plan():
    rows = gpu.plan(options())
    assert [r.side for r in rows[:3]] == [OURS] * 3
    assert len({(r.op, r.side, r.batch, r.length) for r in rows}) == len(rows)
    assert Row("gated_deltanet", "flash_qla", 8, 2048) in rows
    assert Row("mlstm 7B", "mlstm_kernels", 1, 16384) in rows
    assert Row("gla", OURS, 32, 512) in gpu.plan(options(sweep=True))
    assert Row("gla", "fla", 32, 512) not in gpu.plan(options(sweep=True))
    picked = gpu.plan(options(rows=["gla/fla", "attention"]))
    assert {(r.op, r.side) for r in picked} == {("gla", "fla"), ("attention", OURS)}
    with pytest.raises(ValueError, match="no row of this bench contains 'glaa'"):
        gpu.plan(options(rows=["glaa"]))


def test_one_process_for_all_of_ours_and_one_for_each_peer_of_an_op():
    found = gpu.lots(gpu.plan(options()))
    assert len(found) == 1 + sum(len(op.peers) for op in OPS.values())
    assert all(len({r.side for r in lot}) == 1 for lot in found)


CHILD = """
import json, sys, time
rows = json.loads(sys.argv[2])
for row in rows:
    if row["op"] == "kda":
        time.sleep(60)
    if row["op"] == "mamba":
        sys.exit("the kernel died")
    with open(sys.argv[4], "a") as f:
        f.write(json.dumps({**row, "forward": [1.0], "train": [2.0]}) + "\\n")
"""


def test_what_hangs_or_dies_costs_its_own_row(tmp_path):
    """The rows behind it are measured by another process."""
    ops = ("gla", "kda", "mamba", "deltanet")
    rows = [Row(op, OURS, 8, 2048) for op in ops]
    path = tmp_path / "rows.jsonl"
    found = list(gpu.drive(rows, path, 3.0, {}, [sys.executable, "-c", CHILD]))
    assert [m.op for m in found] == list(ops)
    assert [m.why for m in found] == [
        "", "no result within 3 s", "it ended: the kernel died", "",
    ]  # fmt: skip
    assert [(m.op, bool(m.forward)) for m in gpu.read(path)] == [
        ("gla", True), ("kda", False), ("mamba", False), ("deltanet", True),
    ]  # fmt: skip


def test_a_side_has_its_own_path(tmp_path):
    code = (
        "import json, os, sys\n"
        "row = json.loads(sys.argv[2])[0]\n"
        "with open(sys.argv[4], 'a') as f:\n"
        "    f.write(json.dumps({**row, 'why': os.environ['PYTHONPATH']}) + '\\n')\n"
    )
    rows = [Row("gated_deltanet", side, 8, 2048) for side in ("flash_qla", "fla")]
    command = [sys.executable, "-c", code]
    found = list(gpu.drive(rows, tmp_path / "x", 30.0, {"flash_qla": "/tmp/there"}, command))
    assert found[0].why.startswith("/tmp/there")
    assert "/tmp/there" not in found[1].why


def test_a_row_measured_twice_counts_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    for ms in (1.0, 5.0):
        gpu.write(path, measured(ms=ms))
    with open(path, "a") as f:
        f.write('{"half a li')
    assert len(gpu.read_lines(path)) == 2
    assert len(gpu.read(path)) == 1
    with open(path, "a") as f:
        f.write("ne\n")
    (only,) = gpu.read(path)
    assert only == measured(ms=5.0)


RESULTS = [
    measured(ms=0.5),
    measured(side="fla", ms=1.0),
    measured(op="attention", ms=2.0),
    measured(op="kda", side="fla", forward=[], train=[], why="refuses"),
    measured(length=8192, batch=2, ms=0.6),
    measured(op="attention", length=8192, batch=2, ms=7.0),
]


def test_the_table():
    text = gpu_report.table(RESULTS)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    ours = next(r for r in rows if r[1:3] == ["gla", OURS] and r[5] == "2048")
    # 0.1 and 0.3 ms are the floors; attention takes four times as long.
    assert ours[6:14] == ["0.500", "1.50", "5.00", "5.00", "", "", "4.00", "4.00"]
    fla = next(r for r in rows if r[1:3] == ["gla", "fla"])
    assert fla[10:12] == ["2.00", "2.00"]
    assert any("refuses" in r for r in rows)
    assert any(r[1:3] == ["attention", "cuDNN"] for r in rows)
    assert "refuses" in gpu_report.line(RESULTS[3])
    assert "forward 0.500 ms" in gpu_report.line(RESULTS[0])


def test_history():
    rows = gpu_report.history_rows(RESULTS)
    assert len(rows) == 2 * len(RESULTS)
    train = next(r for r in rows if (r["row"], r["mode"]) == ("gla-fla", "train"))
    assert (train["ours_ms"], train["peer_ms"], train["ratio"]) == ("1.5", "3", "2")
    assert train["shape"] == "B=8 T=2048 H16 K128 V128"
    assert train["memory_ratio"] == "0.5"
    assert train["floor_ms"] == "0.3"
    refused = next(r for r in rows if r["row"] == "kda-fla")
    assert (refused["note"], refused["peer_ms"], refused["ratio"]) == ("refuses", "", "")
    soft = next(r for r in rows if r["row"] == "attention-cudnn")
    assert (soft["ours_ms"], soft["peer_ms"]) == ("", "2")
    known = {"date", "command", "ours_ms_max", "peer_reps", "note"}
    with open("bench/history.csv", newline="") as f:
        columns = set(next(csv.reader(f)))
    assert known <= columns
    new = {c for r in rows for c in r} - columns
    assert new == {"floor_ms", "first_s", "peer_version"}


def test_reporting_without_a_gpu(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "rows.jsonl", tmp_path / "speed.png"
    for m in RESULTS:
        gpu.write(path, m)
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    more = ["--no-run", "--out", str(path), "--plot", str(picture), "--record"]
    assert gpu.main(more) == 0
    assert "12 rows added" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    with open(tmp_path / "bench" / "history.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 12
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            gpu.main(["--out", str(path)])
    with pytest.raises(ValueError, match="holds no result"):
        gpu.main(["--no-run", "--out", str(tmp_path / "none")])


def test_a_child_writes_down_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "about_gpu", lambda: {"device": "toy"})

    def broken(row):
        raise ImportError("no\n such thing")

    monkeypatch.setattr(gpu, "measure", broken)
    path = tmp_path / "rows.jsonl"
    rows = json.dumps([asdict(Row("gla", "fla", 8, 2048))])
    assert gpu.main(["--child", rows, "--out", str(path)]) == 0
    (only,) = gpu.read(path)
    assert only.why == "ImportError: no such thing"
    assert only.about["device"] == "toy"


# --- the sides compute the same -------------------------------------------------------------

TINY = {
    "decay": gpu_rows.heads(heads=2, key=16, value=16, gate="head"),
    "gla": gpu_rows.heads(heads=2, key=16, value=16, gate="key"),
    "deltanet": gpu_rows.heads(heads=2, key=16, value=16, beta=True),
    "gated_deltanet": gpu_rows.heads(heads=2, key=16, value=16, beta=True, gate="head"),
    "mlstm": gpu_rows.mlstm_inputs(2, 16, 32),
    "mamba2": gpu_rows.ssd_inputs,
    "mamba": gpu_rows.mamba_inputs,
}


@pytest.mark.parametrize("name", TINY)
def test_inputs_fit_the_op(name, monkeypatch):
    """The inputs of every op are what it takes; checked on the CPU."""
    for maker in ("randn", "rand", "arange", "ones", "full"):
        plain = getattr(torch, maker)
        on_cpu = lambda *a, plain=plain, **k: plain(*a, **{**k, "device": "cpu"})  # noqa: E731
        monkeypatch.setattr(torch, maker, on_cpu)
    x = TINY[name](1, 10)
    assert all(t.dtype in (torch.bfloat16, torch.float32) for t in x.values())
    y = OPS[name].plain(x)
    assert y.isfinite().all()
    assert y.shape[:2] == (1, 10)
