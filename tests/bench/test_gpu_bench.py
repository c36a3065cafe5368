"""`longscan bench gpu` without a GPU: which rows, what happens to those that fail, what is told."""

import csv
import importlib
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from longscan.bench import gpu, gpu_measure, gpu_models, gpu_report, gpu_rows, gpu_targets
from longscan.bench.gpu_measure import Measured, Row
from longscan.bench.gpu_rows import OPS, OURS


def options(**changes):
    return SimpleNamespace(
        **{"rows": None, "sweep": False, "models": None, "cold": False, "compile": False, **changes}
    )


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
    assert Row("gated_deltanet", "fla", 8, 2048) not in rows
    sides = ["mamba_ssm", "flash_qla", "fla", "mlstm_kernels"]
    assert list(dict.fromkeys(r.side for r in rows if r.side != OURS)) == sides
    assert rows[-1] == gpu.LATE
    assert rows[-2] == Row("decode mlstm", OURS, 128, 1)
    assert rows.index(Row("attention", OURS, 16, 1024)) < rows.index(
        Row("mamba", "mamba_ssm", 8, 2048)
    )
    swept = gpu.plan(options(sweep=True))
    assert swept.index(Row("gla", OURS, 32, 512)) > swept.index(Row("decode kda", OURS, 128, 1))
    assert Row("gla", "fla", 32, 512) not in gpu.plan(options(sweep=True))
    picked = gpu.plan(options(rows=["gla/fla", "attention"]))
    assert {(r.op, r.side) for r in picked} == {("gla", "fla"), ("attention", OURS)}
    with pytest.raises(ValueError, match="no row of this bench contains 'glaa'"):
        gpu.plan(options(rows=["glaa"]))
    refused = gpu.plan(options(rows=["gated_deltanet/fla/"]))
    assert [r.side for r in refused] == ["fla"] * 3
    models = gpu.plan(options(models=[]))
    assert len(models) == 2 * 3 * 2
    assert Row("1.3b", "mamba2", 4, 8192) in models
    compiled = gpu.plan(options(models=["340m"], compile=True))
    assert compiled[0] == Row("340m", "attention+compile", 16, 2048)
    cold = gpu.plan(options(cold=True))
    assert {r.side for r in cold} == {"cold", "again"}
    assert Row("loss", "cold", 2, 2048) in cold
    assert len(gpu.lots(cold)) == 2


def test_one_process_for_all_of_ours_and_one_for_each_peer_of_an_op():
    found = gpu.lots(gpu.plan(options()))
    # Decoding and the peer's row that comes last have processes of their own.
    assert len(found) == 3 + sum(len(op.peers) for op in OPS.values()) - len(gpu.REFUSED)
    assert all(len({r.side for r in lot}) == 1 for lot in found)
    assert [r for lot in found for r in lot] == gpu.plan(options())


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
    if row["op"] == "gla":
        sys.exit("the first of these processes ends behind its first row")
"""


def test_what_hangs_or_dies_costs_its_own_row(tmp_path):
    """The rows behind it are measured by another process."""
    ops = ("gla", "kda", "mamba", "deltanet")
    rows = [Row(op, OURS, 8, 2048) for op in ops]
    path = tmp_path / "rows.jsonl"
    found = list(gpu.drive(rows, path, 3.0, {}, [sys.executable, "-c", CHILD]))
    assert [m.op for m in found] == list(ops)
    assert [m.why for m in found] == [
        "", "no result within 3 s", "it ended with 1: the kernel died", "",
    ]  # fmt: skip
    assert [(m.op, bool(m.forward)) for m in gpu.read(path)] == [
        ("gla", True), ("kda", False), ("mamba", False), ("deltanet", True),
    ]  # fmt: skip


def test_a_peer_that_dies_loses_all_its_rows_and_no_time_more(tmp_path):
    rows = [Row("mamba", "mamba_ssm", b, 2048) for b in (8, 4, 2)] + [Row("gla", "fla", 8, 2048)]
    path = tmp_path / "rows.jsonl"
    found = list(gpu.drive(rows, path, 9.0, {}, [sys.executable, "-c", CHILD]))
    assert [m.why for m in found] == ["it ended with 1: the kernel died"] * 3 + [""]
    assert len(gpu.read(path)) == 4


def test_what_time_does_not_suffice_for_is_told(tmp_path):
    rows = [Row("kda", OURS, 8, 2048), Row("kda", OURS, 2, 8192), Row("gla", "fla", 8, 2048)]
    command = [sys.executable, "-c", CHILD]
    found = list(gpu.drive(rows, tmp_path / "rows.jsonl", 60.0, {}, command, seconds=1.0))
    assert [m.why for m in found] == ["no result within 1 s"] + ["no time was left"] * 2


WARM = """
import json, os, sys, time
rows, (part, parts) = json.loads(sys.argv[2]), sys.argv[4:6]
if rows[0]["op"] == "kda":
    time.sleep(60)
if rows[0]["op"] == "mlstm":
    os.abort()
sys.exit(f"{rows[0]['op']} {len(rows)} {part}/{parts} {sys.argv[7:]}")
"""


def test_compiling_is_shared_and_ends_in_time():
    rows = [Row("gla", "fla", 8, t) for t in (512, 2048)] + [Row("kda", "fla", 8, 2048)]
    rows += [Row("gla", OURS, 8, t) for t in (512, 2048)] + [Row("attention", OURS, 8, 2048)]
    qla = [Row("gated_deltanet", "flash_qla", 8, t) for t in (512, 2048)]
    mlstm = [Row("mlstm", "mlstm_kernels", 8, t) for t in (512, 2048)]
    rows += qla + mlstm
    ended = list(gpu.warm(rows, 32, 3.0, {}, [sys.executable, "-c", WARM], "0-7"))
    found, lost = zip(*ended, strict=True)
    n = gpu.PARTS["fla"]
    assert len(found) == n + n + 1 + 2 + 1
    assert sum("not done in time" in text for text in found) == n
    assert any(text.endswith(f": gla 1 6/{n} ['0-7']") for text in found)
    assert any(text.endswith(": gla 2 0/1 ['0-7']") for text in found)
    assert sum("gated_deltanet 1 0/1" in text for text in found) == 2  # each length by itself
    # A peer that an assertion ended is not run again.
    assert [rows for rows in lost if rows] == [mlstm]
    ((text, _),) = gpu.warm(rows, 1, 0.0, {}, [sys.executable, "-c", WARM])
    assert text.startswith("not compiled in time: 2 x gated_deltanet/flash_qla, ")


def test_cores():
    assert gpu.numbers("0-3,8") == {0, 1, 2, 3, 8}
    assert gpu.numbers("") == set()


def test_a_share_of_what_a_tuner_tries(monkeypatch):
    """Each process compiles its part, and a part that does not run is replaced by one that does."""
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    tuner = autotuner.Autotuner
    for name in ("__init__", "run", "_bench"):
        monkeypatch.setattr(tuner, name, getattr(tuner, name))

    class Kernel:
        def __init__(self):
            self.tried, self.fn = [], lambda: None

        def run(self, *args, warps, **more):
            self.tried.append(warps)
            if warps in (2, 9):
                raise autotuner.OutOfResources(1, 0, "shared memory")

    gpu_measure.compile_share(1, 4)
    configs = [autotuner.Config({"warps": n}) for n in (1, 2, 3, 4, 5, 9, 7)]
    fn = Kernel()
    made = tuner(fn, ["x"], configs, ["x"], None, None, cache_results=True)
    assert not made.cache_results
    made.run(8)
    # 2 and 9 are its share; 1 is the first of the others that runs, and is then used.
    assert fn.tried == [2, 9, 1, 1]
    single = tuner(fn, ["x"], [configs[0]], ["x"], None, None)
    single.run(8)
    assert fn.tried[4:] == [1]


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
        gpu_measure.write(path, measured(ms=ms))
    gpu_measure.write(path, measured(forward=[], train=[], first=0.0, why="hung"))
    with open(path, "a") as f:
        f.write('{"half a li')
    assert len(gpu.read_lines(path)) == 3
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


def cells(text, *start):
    rows = [[cell.strip() for cell in line.split("|")][1:-1] for line in text.splitlines()]
    return next(r for r in rows if r[: len(start)] == list(start))


def test_the_table():
    text = gpu_report.table(RESULTS)
    ours = cells(text, "gla", OURS, "H16 K128 V128", "8", "2048")
    # 0.1 and 0.3 ms are the floors; attention takes four times as long.
    assert ours[5:15] == ["0.500", "1.50", "", "", "5.00", "5.00", "", "", "4.00", "4.00"]
    fla = cells(text, "gla", "fla")
    assert fla[11:13] == ["2.00", "2.00"]
    assert fla[16] == "2.00"
    assert "refuses" in cells(text, "kda", "fla")
    assert cells(text, "attention", "cuDNN")
    assert "refuses" in gpu_report.line(RESULTS[3])
    assert "forward 0.500 ms" in gpu_report.line(RESULTS[0])


def test_targets():
    found = {(v.what, v.quantity): v for v in gpu_targets.verdicts(RESULTS) if v.by != "graph"}
    fla = found["gla B8 T2048 / fla", "forward+backward"]
    assert (fla.got, fla.asked, fla.met, fla.source) == (2, 2, True, "same run")
    memory = found["gla B8 T2048 / fla", "memory"]
    assert (memory.got, memory.met) == (0.5, True)
    assert found["gla B2 T8192 / cuDNN attention", "forward"].got == pytest.approx(7 / 0.6)
    other = measured("gated_deltanet", ms=0.2, about={"run": "b"})
    found = {(v.what, v.quantity): v for v in gpu_targets.verdicts([*RESULTS, other])}
    qla = found["gated_deltanet B8 T2048 / flash_qla", "forward"]
    assert (qla.source, qla.met, round(qla.got, 3)) == ("kernel_targets.md", False, 0.965)
    assert found["gated_deltanet B8 T2048 / cuDNN attention", "forward"].source == "other run"
    step = measured("decode gla", length=1, batch=128, train=[], graph=[0.16, 0.0])
    colds = [measured(op, "cold", forward=[], train=[], first=8.0) for op in ("gla", "kda")]
    steps = gpu_targets.verdicts([step, *colds])
    assert [(v.quantity, v.by, round(v.got, 2), v.met) for v in steps] == [
        ("forward", "called", 10.0, False), ("forward", "graph", 1.6, False),
        ("all together", "", 16.0, False),
    ]  # fmt: skip
    colds[0].first, colds[0].why = 0.0, "died"
    assert not gpu_targets.verdicts(colds)  # a sum without one of them is none
    colds[0].first, colds[0].why = 8.0, ""
    text = gpu_report.tables([*RESULTS, step, *colds])
    assert "NOT met" in text
    assert cells(text, "all")[1] == "16.00"
    (total,) = gpu_report.history_rows(colds)
    assert (total["row"], total["mode"], total["first_s"]) == ("all", "cold", "16")
    assert all(key[0] in OPS for key in (*gpu_targets.TARGETS, *gpu_targets.EARLIER))


def test_a_peer_of_another_run_is_compared_within_its_run(tmp_path):
    """Two calls on the device, one file or two: the newest of a row, sides of one run together."""
    first = [measured(ms=0.5, about={"run": "1"}), measured(side="fla", ms=1.0, about={"run": "1"})]
    second = [measured(ms=0.25, about={"run": "2"}), measured("kda", ms=0.3, about={"run": "2"})]
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for path, results in zip(paths, (first, second), strict=True):
        for m in results:
            gpu_measure.write(path, m)
    gpu_measure.write(paths[1], measured(side="fla", forward=[], train=[], first=0.0, why="late"))
    for given in (paths, paths[::-1]):
        found = gpu.read(*given)
        assert [(m.op, m.side, m.run) for m in gpu_targets.newest(found)] == [
            ("gla", OURS, "2"), ("gla", "fla", "1"), ("kda", OURS, "2"),
        ]  # fmt: skip
        (fla,) = [
            v for v in gpu_targets.verdicts(found) if v.quantity == "forward" and "fla" in v.what
        ]
        assert (fla.got, fla.ours, fla.beside, fla.source) == (2, 0.5, 1, "same run")
        text = gpu_report.table(found)
        assert cells(text, "gla", OURS)[5] == "0.250"
        assert cells(text, "gla", "fla")[11] == "2.00"
        records = gpu_report.history_rows(found)
        assert [(r["row"], r["ours_forward_ms"]) for r in records] == [
            ("gla", "0.25"), ("gla-fla", "0.5"), ("kda", "0.3"),
        ]  # fmt: skip


def test_what_is_replayed_must_be_what_was_called():
    x = torch.arange(1.0, 4.0)
    assert gpu_measure.alike([x, x * 1.001], [x, x])
    assert not gpu_measure.alike([x, x * torch.nan], [x, x])
    assert not gpu_measure.alike([torch.zeros(3)], [x])
    assert gpu_measure.alike([torch.zeros(3)], [torch.zeros(3)])


def test_times_are_judged_as_called_and_as_graphs():
    rows = [measured(ms=0.2, graph=[0.2, 0.5]), measured("attention", ms=0.3, graph=[0.3, 0.9])]
    found = [v for v in gpu_targets.verdicts(rows) if "cuDNN" in v.what]
    assert [(v.quantity, v.by, round(v.got, 2)) for v in found] == [
        ("forward", "called", 1.5), ("forward", "graph", 1.5),
        ("forward+backward", "called", 1.5), ("forward+backward", "graph", 1.8),
    ]  # fmt: skip
    rows[1].graph = [0.3, 0.0]  # of a peer that cannot be captured
    found = [v for v in gpu_targets.verdicts(rows) if "cuDNN" in v.what]
    assert [v.by for v in found] == ["called", "graph", "called"]
    floors = [v for v in gpu_targets.verdicts(rows) if "floor" in v.what]
    assert [(round(v.got, 2), v.asked, v.met) for v in floors] == [
        (2, 3, True), (2, 3, True), (2, 6, True), (1.67, 6, True),
    ]  # fmt: skip
    assert "(called from Python)" in gpu_report.target_table(rows)


def model_row(mixer, ms):
    more = {"tokens": 32768, "parameters": 10**9, "flops": 1e14, "peak_flops": 8e14,
            "pieces": 2, "blocks": 24, "compiled": False}  # fmt: skip
    return measured("1.3b", mixer, 4, 8192, forward=[], train=[ms], more=more, mib=70000)


def test_models_are_told_beside_attention():
    results = [model_row("attention", 1300.0), model_row("mamba2", 1000.0)]
    (only,) = gpu_targets.verdicts(results)
    assert (only.got, only.asked, only.met) == (1.3, 1.3, True)
    text = gpu_report.tables(results)
    assert cells(text, "1.3b", "mamba2")[9:12] == ["32,768", "1.30", "0.125"]
    record = gpu_report.history_rows(results)[1]
    assert (record["row"], record["ratio"], record["tokens_s"]) == ("1.3b-mamba2", "1.3", "32768")
    assert "tokens/s" in gpu_report.line(results[0])
    faster = [model_row("attention+compile", 1100.0), model_row("mamba2+compile", 1000.0)]
    found = gpu_targets.verdicts([*results, *faster])
    assert [round(v.got, 2) for v in found] == [1.3, 1.1]
    refused = measured("1.3b", "mamba2", 4, 8192, forward=[], train=[], first=0.0, why="no room")
    assert "no room" in gpu_report.tables([refused])
    assert gpu_report.history_rows([refused])[0]["note"] == "no room"


def test_sizes_of_the_models():
    for size, about in (("340m", 374e6), ("1.3b", 1.364e9)):
        with torch.device("meta"):
            models = {m: gpu_models.LanguageModel(gpu_models.config(size, m))
                      for m in gpu_models.MIXERS}  # fmt: skip
        for model in models.values():
            assert model.num_parameters() == pytest.approx(about, rel=0.03)
            assert model.config.d_model == gpu_models.SIZES[size]["d_model"]
        soft = models["attention"]
        assert gpu_models.flops(soft, 8192) > gpu_models.flops(soft, 2048)


def test_models_train_here(tmp_path, capsys):
    """The whole command, with models of 0.4 million parameters."""
    path = tmp_path / "models.jsonl"
    assert (
        gpu.main(["--models", "tiny", "--rows", "attention", "mamba2/B4", "--out", str(path)]) == 0
    )
    text = capsys.readouterr().out
    results = gpu.read(path)
    assert [(m.side, m.length) for m in results] == [
        ("attention", 32), ("attention", 64), ("mamba2", 32),
    ]  # fmt: skip
    assert all(len(m.train) >= gpu_models.RUNS and not m.why for m in results)
    assert "scaled_dot_product" in results[0].more["attention"]
    assert "| tiny" in text


def test_pieces_where_memory_is_short(monkeypatch):
    tried = []

    def steps(model, optimiser, ids, pieces, out):
        tried.append(pieces)
        if pieces < 4:
            raise torch.OutOfMemoryError("no room")
        return [1.0]

    monkeypatch.setattr(gpu_models, "steps", steps)
    done = gpu_models.measure(Row("tiny", "mamba2", 4, 64))
    assert (tried, done.more["pieces"]) == ([1, 2, 4], 4)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_models.measure(Row("tiny", "mamba2", 2, 64))


def test_history():
    rows = gpu_report.history_rows(RESULTS)
    assert len(rows) == len(RESULTS)
    fla = next(r for r in rows if r["row"] == "gla-fla")
    assert (fla["mode"], fla["ours_ms"], fla["peer_ms"], fla["ratio"]) == ("train", "1.5", "3", "2")
    assert (fla["ours_forward_ms"], fla["forward_ratio"], fla["target"]) == ("0.5", "2", "2")
    assert fla["shape"] == "B=8 T=2048 H16 K128 V128"
    assert fla["memory_ratio"] == "0.5"
    assert fla["floor_ms"] == "0.3"
    refused = next(r for r in rows if r["row"] == "kda-fla")
    assert (refused["note"], refused["peer_ms"], refused["ratio"]) == ("refuses", "", "")
    soft = next(r for r in rows if r["row"] == "attention-cudnn")
    assert (soft["ours_ms"], soft["peer_ms"]) == ("", "6")
    known = {"date", "command", "ours_ms_max", "peer_reps", "note"}
    with open("bench/history.csv", newline="") as f:
        columns = set(next(csv.reader(f)))
    assert known <= columns
    new = {c for r in rows for c in r} - columns
    assert new <= {"backend", "floor_ms", "first_s", "peer_version", "graph_ms", "tokens_s",
                   "ptxas", "forward_ratio", "ours_forward_ms", "peer_forward_ms"}  # fmt: skip


def test_reporting_without_a_gpu(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "rows.jsonl", tmp_path / "speed.png"
    for m in RESULTS:
        gpu_measure.write(path, m)
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    more = ["--no-run", "--out", str(path), "--plot", str(picture), "--record"]
    assert gpu.main(more) == 0
    assert "6 rows added" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    with open(tmp_path / "bench" / "history.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 6
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            gpu.main(["--out", str(path)])
    with pytest.raises(ValueError, match="holds no result"):
        gpu.main(["--no-run", "--out", str(tmp_path / "none")])


def test_a_child_writes_down_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_measure, "about_gpu", lambda: {"device": "toy"})

    def broken(row, graph):
        raise ImportError("no\n such thing")

    monkeypatch.setattr(gpu_measure, "measure", broken)
    path = tmp_path / "rows.jsonl"
    rows = json.dumps([asdict(Row("gla", "fla", 8, 2048))])
    assert gpu.main(["--child", rows, "--out", str(path)]) == 0
    (only,) = gpu.read(path)
    assert only.why == "ImportError: no such thing"
    assert only.about["device"] == "toy"


def test_a_broken_capture_ends_the_process(tmp_path, monkeypatch):
    """What measured the row goes on afresh, without graphs of that op."""
    monkeypatch.setattr(gpu_measure, "about_gpu", dict)
    monkeypatch.setattr(gpu_measure, "measure", lambda row, graph: measured(more={"graph": "no"}))
    begun = []

    def replace(program, argv):
        begun.append(argv)
        raise SystemExit

    monkeypatch.setattr(gpu_measure.os, "execv", replace)
    path = tmp_path / "rows.jsonl"
    rows = json.dumps([asdict(Row("gla", OURS, 8, t)) for t in (2048, 8192)])
    with pytest.raises(SystemExit):
        gpu.main(["--child", rows, "--out", str(path), "--ready", "--run", "now"])
    again = gpu.parser().parse_args(begun[0][3:])
    assert [r["length"] for r in json.loads(again.child)] == [8192]
    assert (again.skip_graph, again.ready, again.run, again.out) == (["gla"], True, "now", path)
    assert len(gpu.read(path)) == 1


@pytest.fixture
def no_device(monkeypatch):
    """Everything that a measurement asks of a device, answered by the CPU."""
    testing = pytest.importorskip("triton.testing")
    for maker in ("randn", "rand", "arange", "ones", "full", "zeros"):
        plain = getattr(torch, maker)
        on_cpu = lambda *a, plain=plain, **k: plain(*a, **{**k, "device": "cpu"})  # noqa: E731
        monkeypatch.setattr(torch, maker, on_cpu)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)

    def do_bench(call, warmup, rep, return_mode):
        call()
        return [0.12345, 0.2] if return_mode == "all" else 0.2

    monkeypatch.setattr(testing, "do_bench", do_bench)


def test_measuring_a_row(no_device, monkeypatch):
    sizes = gpu_rows.heads(heads=2, key=16, value=16, gate="key")
    plain = OPS["gla"].plain
    tiny = gpu_rows.Op("gla", "", sizes, plain, plain, {"fla": lambda x: plain(x) * 1.01})
    monkeypatch.setitem(OPS, "gla", tiny)
    ours = gpu_measure.measure(Row("gla", OURS, 2, 8))
    assert (ours.forward, ours.train, ours.mib, ours.error) == ([0.1235, 0.2],) * 2 + (2.0, 0.0)
    x = 2 * 8 * 2 * 16 * 2  # bytes of a tensor
    assert ours.bytes == [5 * x, 2 * 4 * x + 2 * x + 4 * x]
    assert ours.first > 0
    assert "graph" in ours.more  # there is nothing to capture on a CPU
    peer = gpu_measure.measure(Row("gla", "fla", 2, 8), graph=False)
    assert peer.error == pytest.approx(0.01, rel=0.2)
    assert "graph" not in peer.more
    monkeypatch.setitem(OPS, "gla", replace(tiny, plain=lambda x: 1 / 0))
    failed = gpu_measure.measure(Row("gla", OURS, 2, 8), graph=False)
    assert "ZeroDivisionError" in failed.more["error"]
    assert failed.forward
    mamba = OPS["decode mamba"]
    monkeypatch.setitem(OPS, "decode mamba", replace(mamba, ours=mamba.plain))
    step = gpu_measure.measure(Row("decode mamba", OURS, 2, 1), graph=False)
    assert (step.train, step.error) == ([], 0.0)
    assert step.bytes[0] > 2 * 2 * 4096 * 16 * 4
    monkeypatch.setattr(gpu_measure, "replayed", lambda call: call() and 0.1)
    step = gpu_measure.measure(Row("decode mamba", OURS, 2, 1))
    assert step.graph == [0.1, 0.0]
    assert step.more == {}
    monkeypatch.setattr(gpu_measure, "replayed", lambda call: 0.0)
    step = gpu_measure.measure(Row("decode mamba", OURS, 2, 1))
    assert "not all was captured" in step.more["replay"]
    assert "not all was captured" in gpu_report.line(step)


def test_first_calls(no_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    sizes = gpu_rows.heads(heads=2, key=16, value=16)
    monkeypatch.setitem(OPS, "decay", replace(OPS["decay"], make=sizes, ours=OPS["decay"].plain))
    assert gpu_measure.first_call(Row("decay", "cold", 2, 8)).first > 0
    given = {"x": torch.ones(2, 3, requires_grad=True)}
    small = {"norm": (lambda x: 2 * x["x"], lambda: given)}
    monkeypatch.setattr(gpu_measure, "small_ops", lambda: small)
    assert gpu_measure.first_call(Row("norm", "cold", 2, 8)).first > 0


@pytest.mark.parametrize("name", ["add_norm", "glu", "rotary", "slstm", "step"])
def test_small_ops(no_device, name):
    """Those that do without a device too run on what is made for them."""
    call, make = gpu_rows.small_ops()[name]
    x = make()
    outs, grads = gpu_measure.run(call, x, [t for t in x.values() if t.requires_grad])
    assert all(t.isfinite().all() for t in (*outs, *grads))
    assert name == "step" or len(grads) == len(x)


# --- the sides compute the same -------------------------------------------------------------

TINY = {
    "decay": gpu_rows.heads(heads=2, key=16, value=16, gate="head"),
    "gla": gpu_rows.heads(heads=2, key=16, value=16, gate="key"),
    "deltanet": gpu_rows.heads(heads=2, key=16, value=16, beta=True),
    "gated_deltanet": gpu_rows.heads(heads=2, key=16, value=16, beta=True, gate="head"),
    "mlstm": gpu_rows.mlstm_inputs(2, 16, 32),
    "mamba2": gpu_rows.ssd_inputs,
    "mamba": gpu_rows.mamba_inputs,
    "decode mamba": OPS["decode mamba"].make,
    "decode mamba2": OPS["decode mamba2"].make,
    "decode mlstm": OPS["decode mlstm"].make,
    "decode kda": OPS["decode kda"].make,
}


@pytest.mark.parametrize("name", TINY)
def test_inputs_fit_the_op(name, no_device):
    """The inputs of every op are what it takes; checked on the CPU."""
    step = OPS[name].step
    x = TINY[name](1, 1 if step else 10)
    assert all(t.dtype in (torch.bfloat16, torch.float32) for t in x.values())
    y, *state = gpu_measure.flat(OPS[name].plain(x))
    assert y.isfinite().all()
    assert y.shape[0] == 1
    assert step or y.shape[1] == 10
    assert [s.shape for s in state] == [x[n].shape for n in ("state", "m") if n in x]


@pytest.mark.parametrize("name", ["gated_deltanet", "kda", "decay", "mamba2", "mamba", "mlstm"])
def test_a_step_is_asked_what_the_op_computes(name, no_device, monkeypatch):
    """The kernel is replaced by its definition."""
    fused = pytest.importorskip("longscan.ops._step_fused")
    torch_step = importlib.import_module("longscan.ops.step").step_torch
    monkeypatch.setattr(fused, "step_fused", torch_step)
    x = OPS[f"decode {name}"].make(2, 1)
    if name == "mamba":

        def scan(u, raw, bias, a_log, b, c, skip, z, state):
            given = {"u": u, "dt": raw, "B": b, "C": c, "z": z}
            given = {n: t.unsqueeze(1) for n, t in given.items()}
            return OPS["decode mamba"].plain(
                {**given, "dt_bias": bias, "a_log": a_log, "D": skip, "state": state}
            )

        monkeypatch.setattr(fused, "scan_fused", scan)
    with torch.no_grad():
        got, want = (gpu_measure.flat(f(x)) for f in (OPS[f"decode {name}"].ours,
                                                      OPS[f"decode {name}"].plain))  # fmt: skip
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
