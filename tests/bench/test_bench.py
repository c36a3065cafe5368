"""The pieces of `longscan bench`, on toy peers: the real ones are an extra."""

import csv
import dataclasses
import itertools

import pytest
import torch

from longscan.bench import compare, cpu, measure, peers, report
from longscan.bench import row as rows
from longscan.bench.measure import Timing
from longscan.ops.delta import delta_reference


def result(**changes):
    base = report.Result(
        "mamba-mambapy", "mamba", "mambapy", "train", 2, 512, 256,
        Timing((2.0, 1.0, 9.0)), Timing((8.0,)), 10.0, 20.0, 1e-6,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


# -- measuring time


def test_timing_is_a_median_and_prints_its_spread():
    assert Timing((5.0, 1.0, 2.0)).median == 2
    assert str(Timing((5.0, 1.0, 2.0))) == "2.00 (1.00-5.00) x3"
    assert str(Timing((15500.0,))) == "15500 x1"


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0"), (0.01234, "0.0123"), (1, "1.00"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_digits(x, text):
    assert measure.digits(x) == text


def test_interleave_alternates_and_keeps_sides_apart():
    seen = []
    ticks = itertools.count()
    clock = lambda: float(next(ticks)) / 1e3  # noqa: E731 - every look at the clock is 1 ms
    ours, peer = measure.interleave(
        [lambda: seen.append("ours"), lambda: (seen.append("peer"), clock())],
        seconds=0, least=3, clock=clock,
    )  # fmt: skip
    assert seen == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert ours.ms == pytest.approx((1, 1, 1))
    assert peer.ms == pytest.approx((2, 2, 2))


def test_interleave_stops_at_most():
    (only,) = measure.interleave([lambda: None], seconds=60, most=5)
    assert len(only.ms) == 5


# -- measuring memory

MIB = 2**18  # float32 numbers


def _known_allocation(held, passing):
    """Keeps `held` MiB, needs `passing` MiB more during the call; 100 MiB before do not count."""
    torch.ones(100 * MIB).sum()

    def call(kept):
        for _ in range(3):  # freed each time: counts once
            torch.ones(passing * MIB).sum()
        return kept

    return lambda: torch.ones(held * MIB), call


def test_memory_of_a_known_allocation_in_a_child():
    children = measure.Children(["torch"])
    found = children.peak_growth(_known_allocation, 30, 50)
    assert 78 < found < 90
    assert 48 < children.peak_growth(_known_allocation, 0, 50, repetitions=2) < 60


def test_memory_job_of_our_side():
    children = measure.Children(["torch"])
    args = ("delta-op-transformers", True)
    short = children.peak_growth(compare.memory_job, *args, "prefill", 2, 256, 64, 1)
    long = children.peak_growth(compare.memory_job, *args, "prefill", 2, 2048, 64, 1)
    # The output alone is 2 x 2048 x 64 numbers, 1 MiB.
    assert long > short + 1


def _broken(_):
    raise ValueError("no such layer")


def test_an_error_in_a_child_arrives_here():
    with pytest.raises(ValueError, match="no such layer"):
        measure.Children(["torch"]).peak_growth(_broken, 0)


# -- equal weights, equal outputs


def slow_delta(scale=0.125, cut=False):
    """The definition of the delta rule as a peer, right only with the defaults."""

    def run(q, *rest, state=None):
        if cut:
            rest = (rest[0].detach(), *rest[1:])
        return delta_reference(q * scale, *rest, state=state)

    return rows.Side(
        None,
        forward=lambda *inputs: run(*inputs)[0],
        prefill=run,
        step=lambda state, *inputs: run(*inputs, state=state),
        carry=lambda *inputs: run(*inputs)[1],
    )


def toy_row(**options):
    real = next(r for r in peers.ROWS if r.name == "delta-op-transformers")
    return dataclasses.replace(
        real, name="toy", package="torch", modules=("torch",), peer=lambda d: slow_delta(**options)
    )


def judged(row, mode):
    torch.manual_seed(0)
    ours, peer = row.ours(64), row.peer(64)
    inputs, more = row.inputs(2, 24, 64), row.inputs(2, 5, 64)
    cotangent = torch.randn_like(compare.prefill(ours, inputs))
    a, b = (compare.calls(mode, side, inputs, more, cotangent) for side in (ours, peer))
    return compare.check(row, (a, a()), (b, b()), mode)


@pytest.mark.parametrize("mode", rows.MODES)
def test_equal_sides_pass_and_unequal_ones_do_not(mode):
    assert 0 < judged(toy_row(), mode) < 1e-5
    with pytest.raises(compare.DisagreementError, match="output"):
        judged(toy_row(scale=0.126), mode)


def test_a_missing_gradient_is_a_disagreement():
    with pytest.raises(compare.DisagreementError, match="input 1"):
        judged(toy_row(cut=True), "train")


def test_weights_are_disturbed_and_copied():
    mamba = next(r for r in peers.ROWS if r.name == "mamba-mambapy")
    row = dataclasses.replace(mamba, peer=mamba.ours)
    ours, peer = row.ours(64), row.peer(64)
    compare.equal_weights(row, ours, peer)
    for (name, a), b in zip(ours.module.named_parameters(), peer.module.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(ours.module.D, torch.ones_like(ours.module.D))


def toy_layer_row(scale=1.0, **changes):
    """Linear layers; the peer stores its bias negated, from one down, and grows the weight's
    gradient by `scale`."""

    def side(names, grow):
        layer = torch.nn.Module()
        layer.register_parameter(names[0], torch.nn.Parameter(torch.randn(3, 3)))
        layer.register_parameter(names[1], torch.nn.Parameter(torch.zeros(3)))

        def forward(x):
            w, b = (getattr(layer, name) for name in names)
            w = w.detach() + grow * (w - w.detach())
            return x @ w + (b if names[1] == "bias" else 1 - b)

        return rows.Side(layer, forward, lambda x: (forward(x), None), None, None)

    row = rows.Row(
        "toy-layer", "toy", "torch", ("torch",), lambda b, t, d: (torch.randn(b, t, 3),),
        lambda d: side(("weight", "bias"), 1.0), lambda d: side(("matrix", "offset"), scale),
        lambda tensors: {"weight": tensors["matrix"], "bias": 1 - tensors["offset"]},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def judged_layers(row):
    torch.manual_seed(0)
    ours, peer = row.ours(3), row.peer(3)
    compare.equal_weights(row, ours, peer)
    inputs = row.inputs(2, 5, 3)
    a, b = (compare.calls("train", s, inputs, (), torch.randn(2, 5, 3)) for s in (ours, peer))
    b.cotangent = a.cotangent
    return compare.check(row, (a, a()), (b, b()), "train")


def test_gradients_of_translated_parameters_are_compared():
    """A translation with constants moves weights by them, gradients not."""
    assert judged_layers(toy_layer_row()) < 1e-5
    with pytest.raises(compare.DisagreementError, match="gradient of weight"):
        judged_layers(toy_layer_row(scale=1.01))
    wrong = lambda t: {"weight": t["matrix"], "bias": t["offset"]}  # noqa: E731
    with pytest.raises(compare.DisagreementError, match="gradient of bias"):
        judged_layers(toy_layer_row(translate=wrong))


def test_gradients_that_differ_by_construction_are_left_out():
    unequal = frozenset({"weight"})
    assert judged_layers(toy_layer_row(scale=1.01, unequal=unequal)) < 1e-5
    wrong = lambda t: {"weight": t["matrix"], "bias": t["offset"]}  # noqa: E731
    with pytest.raises(compare.DisagreementError, match="bias"):
        judged_layers(toy_layer_row(unequal=unequal, translate=wrong))


def test_zeros_are_disturbed_too():
    row = toy_layer_row()
    ours, peer = row.ours(3), row.peer(3)
    compare.equal_weights(row, ours, peer)
    assert peer.module.offset.abs().min() > 0
    assert torch.equal(ours.module.bias, 1 - peer.module.offset)


@pytest.mark.parametrize("mode", rows.MODES)
def test_what_a_side_does_once_comes_before_the_calls(mode):
    seen = []
    row = toy_row()
    side = dataclasses.replace(row.peer(64), ready=seen.append)
    call = compare.calls(mode, side, row.inputs(1, 6, 64), row.inputs(1, 2, 64), torch.ones(()))
    assert seen == [6]
    if mode != "train":
        call()
        call()
        assert seen == [6]


# -- targets and tables


def test_ratio_and_verdicts():
    r = result()
    assert (r.ratio, r.memory_ratio, r.target) == (4, 0.5, 3)
    assert r.verdicts() == {"time": True, "memory": True}
    worse = result(peer=Timing((5.0,)), ours_mib=20.0)
    assert worse.verdicts() == {"time": False, "memory": False}
    assert "NOT met" in report.table([worse])
    assert report.summary([r, worse]).startswith("2 of 4 targets met.")
    assert "mamba / mambapy, train, T=512: 2.50x, target 3.00x" in report.summary([worse])


def test_only_the_shapes_of_the_targets_are_judged():
    small = result(d_model=64)
    assert small.verdicts() == {}
    assert "no targets are set" in report.summary([small])


def test_a_peer_left_out_says_why():
    r = result(peer=None, peer_mib=None, why="left out: at least 90 s expected, limit 60 s")
    assert r.ratio is None
    assert r.verdicts() == {}
    assert r.why in report.table([r])
    assert "1 comparison(s) left out" in report.summary([r])


def test_every_row_has_a_target():
    assert {row for row, _ in report.TARGETS} == {row.name for row in peers.ROWS if row.same}


def test_decode_targets():
    slow = {"mode": "decode", "ours": Timing((7.0,)), "peer": Timing((8.0,))}
    assert result(**slow).target == 1.5
    assert result(**slow).verdicts()["time"] is False
    beside = result(row="s4-authors", **slow)
    assert beside.target == 1
    assert beside.verdicts()["time"] is True
    assert result(mode="prefill").target is None


# -- history


def test_history_keeps_old_rows_and_adds_columns(tmp_path):
    path = tmp_path / "bench" / "history.csv"
    report.append_history(path, [{"date": "1", "ours_ms": "2,5"}])
    report.append_history(path, report.history_rows([result()], {"date": "2"}))
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [r["date"] for r in rows] == ["1", "2"]
    assert (rows[0]["ours_ms"], rows[0]["ratio"]) == ("2,5", "")
    assert (rows[1]["ours_ms"], rows[1]["ratio"], rows[1]["ours_reps"]) == ("2", "4", "3")
    assert rows[1]["shape"] == "B=2 T=512 d_model=256"


def test_history_lies_in_the_project(tmp_path):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert report.history_path(deep) == deep.resolve() / "bench" / "history.csv"
    (tmp_path / "pyproject.toml").touch()
    assert report.history_path(deep) == tmp_path.resolve() / "bench" / "history.csv"


# -- the command


def test_the_whole_command_on_a_toy_peer(tmp_path, monkeypatch, capsys):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpu, "ROWS", (toy_row(),))
    args = ["--quick", "--no-memory", "--record", "--seconds", "0", "--lengths", "32", "8"]
    assert cpu.main(args) == 0
    shown = capsys.readouterr()
    assert shown.out.count("| gated delta rule (op) | torch |") == 6
    assert "[6/6]" in shown.err
    with open(tmp_path / "bench" / "history.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [r["mode"] for r in rows] == ["train", "prefill", "decode"] * 2
    assert [r["shape"].split()[1] for r in rows] == ["T=8"] * 3 + ["T=32"] * 3
    for r in rows:
        assert float(r["ratio"]) == pytest.approx(
            float(r["peer_ms"]) / float(r["ours_ms"]), rel=1e-3
        )
        assert float(r["error"]) < compare.TOLERANCE
        assert r["torch"] == torch.__version__


def test_a_peer_that_would_take_too_long_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "ROWS", (toy_row(),))
    args = ["--quick", "--no-memory", "--seconds", "0", "--lengths", "8", "16", "--limit", "0"]
    assert cpu.main([*args, "--modes", "prefill"]) == 0
    out = capsys.readouterr().out
    assert "left out: at least 0 s expected, limit 0 s" in out
    assert "1 comparison(s) left out" in out


def test_a_wrong_peer_fails_before_timing(monkeypatch):
    monkeypatch.setattr(cpu, "ROWS", (toy_row(scale=1.0),))
    with pytest.raises(compare.DisagreementError, match="Nothing was timed"):
        cpu.main(["--quick", "--no-memory"])


def test_bad_arguments_are_explained(monkeypatch):
    with pytest.raises(ValueError, match="rows: mamba-transformers"):
        cpu.main(["--rows", "mamab"])
    monkeypatch.setattr(cpu, "ROWS", (toy_row(),))
    with pytest.raises(ValueError, match="multiple of 64"):
        cpu.main(["--d-model", "100"])
    with pytest.raises(ValueError, match="at least 4"):
        cpu.main(["--lengths", "1"])


def test_another_architecture_is_timed_but_neither_compared_nor_judged(monkeypatch, capsys):
    other = dataclasses.replace(toy_row(scale=1.0), same=False)
    monkeypatch.setattr(cpu, "ROWS", (other,))
    args = ["--quick", "--no-memory", "--seconds", "0", "--lengths", "8"]
    assert cpu.main(args) == 0
    out = capsys.readouterr().out
    assert out.count("| gated delta rule (op) | torch |") == 3
    assert "no targets are set" in out
    assert result(same=False).ratio == 4
    assert result(same=False).verdicts() == {}


def test_only_the_calls_of_a_row_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "ROWS", (dataclasses.replace(toy_row(), modes=("prefill",)),))
    args = ["--quick", "--no-memory", "--seconds", "0", "--lengths", "8"]
    assert cpu.main(args) == 0
    shown = capsys.readouterr()
    assert "[1/1]" in shown.err
    assert shown.out.count("| gated delta rule (op) | torch |") == 1


def test_a_missing_peer_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'longscan\[bench\]'"):
        rows.need("no_such_peer_anywhere.layers")


def test_only_peers_beyond_the_extra_are_left_out(monkeypatch, capsys):
    absent = dataclasses.replace(
        toy_row(), name="absent", modules=("no_such_peer_anywhere",), install="climb the hill"
    )
    monkeypatch.setattr(cpu, "ROWS", (toy_row(), absent))
    args = ["--quick", "--no-memory", "--seconds", "0", "--lengths", "8", "--modes", "prefill"]
    assert cpu.main(args) == 0
    shown = capsys.readouterr()
    assert "absent is left out: the comparison needs no_such_peer_anywhere: climb" in shown.err
    assert "[1/1]" in shown.err
    with pytest.raises(ModuleNotFoundError, match="climb the hill"):
        cpu.main([*args, "--rows", "absent"])
    # What the extra brings is expected to be there: without it nothing runs.
    expected = dataclasses.replace(absent, install=rows.EXTRA)
    monkeypatch.setattr(cpu, "ROWS", (toy_row(), expected))
    with pytest.raises(ModuleNotFoundError, match="no_such_peer_anywhere"):
        cpu.main(args)


def test_rows_are_chosen_by_parts_of_names():
    assert [r.name for r in cpu.chosen(["mambapy", "op"])] == [
        "mamba-mambapy",
        "delta-op-transformers",
    ]
    assert cpu.chosen(None) == list(peers.ROWS)
