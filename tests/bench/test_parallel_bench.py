"""`longscan bench parallel` with two processes: what is measured, and what of rows that fail."""

import json
import time

import pytest
import torch
from torch.nn import functional as F

from longscan.bench import parallel, parallel_peers, parallel_predict, parallel_report
from longscan.bench.parallel_exact import difference, unequal
from longscan.bench.parallel_group import Job, Settings, measure, read
from longscan.bench.parallel_models import LINEAR, config, shape
from longscan.models import LanguageModel

STEPS = """
import torch
from longscan.bench.gpu_models import SOFT
from longscan.bench.parallel_models import config
from longscan.bench.parallel_peers import PEERS, PeerShards
from longscan.models import LanguageModel
from longscan.parallel import SequenceParallel

def fails(here, what):
    for i in range(3):
        if here.todo(f"t/{what}/{i}"):
            if i == 1 and here.rank == 1:
                raise RuntimeError("no kernel")
            here.write("t", error=here.worst(here.rank / 2)[0])

def peers(here, what):
    torch.manual_seed(0)
    model = LanguageModel(config("tiny", SOFT, n_layers=2)).double()
    ids, targets = torch.randint(97, (2, 2, 24))
    want, _ = model.loss(ids, targets)
    want.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for peer in PEERS:
        here.todo(f"peers/{peer}")
        model.zero_grad()
        sequence = SequenceParallel(here.group)
        shards = PeerShards(sequence, 24, peer)
        loss, _ = model.loss(shards.shard(ids), shards.shard(targets), shards=shards)
        loss.backward()
        sequence.sum_gradients(model.parameters())
        off = max((p.grad - g).abs().max() for p, g in zip(model.parameters(), grads, strict=True))
        error = max(here.worst(off.item(), (loss - want).abs().item()))
        here.write("peers", error=error)
"""


def test_peers_are_exact_and_a_row_that_fails_costs_itself_only(tmp_path, monkeypatch):
    (tmp_path / "parallel_steps.py").write_text(STEPS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "rows.jsonl"
    settings = Settings(path, 2, False, "tiny", "now", time.time() + 100, 30.0)
    steps = (("peers", ""), ("fails", "raises"))
    job = Job(tuple((f"parallel_steps:{name}", what) for name, what in steps), "all")
    words = list(measure([job], settings))
    rows = read(path)
    for peer in parallel_peers.PEERS:
        assert rows[f"peers/{peer}"]["error"] < 1e-12
    assert [rows[f"t/raises/{i}"].get("error") for i in range(3)] == [0.5, None, 0.5]
    assert "no kernel" in rows["t/raises/1"]["why"]
    assert sum("another goes on" in w for w in words) == 1


def test_what_no_time_is_left_for_is_told(tmp_path):
    settings = Settings(tmp_path / "rows", 2, False, "tiny", "now", time.time() - 1, 30.0)
    job = Job((("longscan.bench.parallel_exchange:exchange", ""),), "exchange")
    assert list(measure([job], settings)) == ["no time was left for exchange"]


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_a_ring(causal):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(2, 7, 3, 4, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    qt, kt, vt = (x.transpose(1, 2) for x in leaves)
    want = F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal).transpose(1, 2)
    grads = torch.autograd.grad(want, leaves, do)
    with torch.no_grad():
        o, lse = parallel_peers.attend(q, k, v, causal)
        got = parallel_peers.attend_backward(do, q, k, v, o, lse, causal)
    torch.testing.assert_close(o, want)
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrong_gradient_is_found():
    want = {"loss": torch.ones(()), "a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)}
    assert difference(want, want)[0] == 0
    off = want | {"a": torch.tensor([1.0, 2.1])}
    assert difference(off, want) == (pytest.approx(0.05), "a")
    noise = want | {"b": torch.tensor([0.0, 2e-6])}
    assert difference(noise, want) == (pytest.approx(1e-3), "b")
    assert difference({"loss": want["loss"], "a": want["a"]}, want)[0] == float("inf")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_shards_are_unequal(ranks):
    lengths = unequal(512 * ranks, ranks)
    assert len(lengths) == ranks
    assert sum(lengths) == 512 * ranks
    assert min(lengths) > 0
    assert ranks == 1 or len(set(lengths)) > 1


@pytest.mark.parametrize("mixer", LINEAR)
def test_states_are_those_of_the_model(mixer):
    model = LanguageModel(config("tiny", mixer, n_layers=1))
    state = model.init_state(1).child("0")
    s = shape("tiny", mixer)
    assert (s.heads, s.d_key, s.d_value) in [t.shape[1:] for t in state.flatten().values()]


def row(part, name, **more):
    return {"part": part, "name": name, "run": "now", "ranks": 2, "device": "toy", "size": "340m",
            **more}  # fmt: skip


def rows():
    link = {"latency": 1e-5, "bandwidth": 1e11}
    train = {"case": "gla", "tokens": 32768, "parameters": 4e8, "flops": 1e14, "mib": 10.0,
             "computed_again": False, "first": 1.0}  # fmt: skip
    return [
        {"part": "about", "name": "about/now", "about": {"date": "now", "commit": "abc"}},
        row("exchange", "exchange/link", link=link, gather=link, about="nccl"),
        row("training", "training/gla/data/T32768", method="data", seconds=[0.1],
            tokens_s=327680.0, **train),
        row("training", "training/gla/allgather/T32768", method="allgather", seconds=[0.11],
            tokens_s=297890.9, **train),
        row("training", "training/gla/allscan/T32768", why="out of memory"),
        row("correctness", "correctness/gla/float32/batch/doubling", case="gla", dtype="float32",
            mode="batch", method="doubling", error=1e-3, loss=1e-6, limit=1e-4, own=0.0,
            control=0.5, met=False, worst="a"),
        row("longest", "longest/gla/T524288", case="gla", method="allgather", tokens=524288,
            seconds=[1.0], tokens_s=524288.0, mib=5.0),
        row("longest", "longest/gla/T1048576", why="out of memory"),
    ]  # fmt: skip


def test_tables_goals_and_history():
    found = rows()
    text = parallel_report.tables(found)
    assert "0.909" in text
    assert text.count("NOT met") == 2
    assert "- training/gla/allscan/T32768: out of memory" in text
    failed = [r["name"] for r in found if parallel_report.failed(r)]
    assert failed == ["training/gla/allscan/T32768", "correctness/gla/float32/batch/doubling"]
    by = {r["row"] + r["mode"]: r for r in parallel_report.history_rows(found)}
    ours = by["parallel-gla-allgathertraining"]
    assert ours["ratio"] == "0.90909"
    assert ours["target"] == "0.95"
    assert ours["peer_ms"] == "100"
    assert ours["commit"] == "abc"
    assert by["parallel-gla-doublingcorrectness"]["error"] == "0.001"


def test_calibration_is_read_by_the_simulation(tmp_path):
    from longscan.bench.scaling_exchange import load

    path = tmp_path / "c.json"
    path.write_text(parallel_predict.calibration(rows()), encoding="utf-8")
    c = load(path)
    assert c.inner.bandwidth == 1e11
    assert c.per_host == 2
    assert c.compute is not None
    assert c.compute.flops == pytest.approx(1e14 / 0.1 / 2)
    assert 0 < parallel_predict.simulated(rows())["training/gla/allgather/T32768"] <= 1
    with pytest.raises(ValueError, match="no links were measured"):
        parallel_predict.calibration(rows()[:1])


def test_the_command_reports_and_writes(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows()), encoding="utf-8")
    docs = tmp_path / "docs"
    docs.mkdir()
    assert parallel.main(["--no-run", "--out", str(path), "--write", str(docs)]) == 1
    assert "NOT met: correctness/gla" in capsys.readouterr().out
    page = (docs / "scaling.md").read_text(encoding="utf-8")
    assert "<!-- measured -->" in page
    assert "### Training: 2 x toy" in page
    assert (docs / "scaling_gpus.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="as many GPUs"):
        parallel.main(["--device", "cuda", "--ranks", "99"])
    with pytest.raises(ValueError, match="at least 2 ranks"):
        parallel.main(["--device", "cpu", "--ranks", "1", "--out", str(tmp_path / "x")])
