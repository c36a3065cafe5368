"""A mesh of processes trains as one process does: losses, resuming, other meshes, refusals."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from lightning.fabric.utilities.rank_zero import rank_zero_only

from longscan import registry
from longscan.language.mesh import MeshStrategy, ShardedStrategy, trainer_settings
from longscan.language.metrics import read_metrics
from longscan.language.task import LanguageTask, OptimOptions
from longscan.language.train import TrainerOptions, clear_run, main, parse, train
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.parallel.mesh import MeshSizes

STEPS, STOP = 20, 8
PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
FSDP = "--trainer.strategy=fsdp2"
Job = tuple[list[str], int | None]
"""Options of a run, and the step in which one rank is sent SIGTERM (None: it runs to its end)."""


def _rank(rank: int, size: int, port: int, work: Callable[[int, int], None], log: Path) -> None:
    """One process as torchrun would start it."""
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # found out on import, which the server that forks has done
    try:
        work(rank, size)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def launch(size: int, work: Callable[[int, int], None], log: Path, *, fails: bool = False) -> str:
    """work(rank, size) in `size` processes, all of which succeed or fail; what they printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longscan.language.train"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    parts = [(rank, size, port, work, log) for rank in range(size)]
    children = [context.Process(target=_rank, args=args) for args in parts]
    for child in children:
        child.start()
    end = time.monotonic() + 240
    while any(c.exitcode is None for c in children) and time.monotonic() < end:
        if not fails and any(c.exitcode for c in children):
            break  # the others would wait for the one that failed
        time.sleep(0.05)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    text = log.read_text()
    assert codes == [int(fails)] * size, text[-6000:]
    return text


def _train(jobs: list[Job], rank: int, size: int) -> None:
    """Runs, one after another; the last rank gets the signals."""
    step = LanguageTask.training_step
    for argv, stop in jobs:

        def stopping(task, batch, batch_idx, stop=stop):
            if batch_idx + 1 == stop and rank == size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(task, batch, batch_idx)

        LanguageTask.training_step = stopping
        train(parse(argv))


def _train_on_a_full_disk(jobs: list[Job], rank: int, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    _train(jobs, rank, size)


def options(folder: Path, **more) -> list[str]:
    """Options of a run whose steps depend on the size of gradients, and on their clipping."""
    values = {
        "data.path": folder / "text.py",
        "data.cache_dir": folder / "cache",
        "data.tokenizer": "byte",
        "data.seq_len": 20,
        "data.batch_size": 1,
        "data.val_batches": "null",
        "model.d_model": 16,
        "model.n_layers": 2,
        "model.pattern": "gated_deltanet,attention",
        "optim.lr": 0.1,
        "optim.eps": 0.1,  # near plain descent: Adam's steps alone have no scale
        "trainer.max_steps": STEPS,
        "trainer.accelerator": "cpu",
        "trainer.gradient_clip_val": 1.5,
        "keep.validate_every_steps": 0,
        **{k.replace("__", "."): v for k, v in more.items()},
    }
    return [f"--{k}={v}" for k, v in values.items()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.csv")]


def same_run(run: Path, other: Path, rel: float = 1e-5) -> None:
    """Both logged the same: steps, tokens and rates exactly, losses within rel."""
    a, b = (read_metrics(r / "metrics.csv") for r in (run, other))
    for key in ("step", "tokens", "lr"):
        assert [row[key] for row in a] == [row[key] for row in b]
    assert losses(run) == pytest.approx(losses(other), rel=rel, abs=0)
    for key in ("valid_loss", "valid_bits_per_byte"):
        assert a[-1][key] == pytest.approx(b[-1][key], rel=rel, abs=0)
    ours, theirs = (LanguageModel.load(r).state_dict() for r in (run, other))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def exactly_the_same_run(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    weights = [(r / "model.safetensors").read_bytes() for r in (run, other)]
    assert weights[0] == weights[1]
    assert len(list(run.glob("last.ckpt.shards-*"))) == 1  # earlier ones are gone


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text, tokens, and runs: one process; meshes of 4, one of them stopped; meshes of 2."""
    f = tmp_path_factory.mktemp("mesh")
    lines = [f"def f{i}(x):\n    return x + {i * i}\n" for i in range(300)]
    (f / "text.py").write_text("".join(lines))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(parse([*options(f, data__batch_size=2), f"--run={f / 'one'}"]))
    torch.set_num_threads(threads)
    four = [*options(f), "--trainer.mesh=dp=2,sp=2"]
    jobs: list[Job] = [
        ([*four, f"--run={f / 'four'}"], None),
        ([*four, FSDP, f"--run={f / 'sharded'}"], None),
        ([*four, FSDP, f"--run={f / 'stopped'}"], STOP),
    ]
    launch(4, partial(_train, jobs), f / "log.4")
    return f


@pytest.fixture(scope="module")
def stopped(folder: Path):
    """Copies of the stopped run, to be resumed."""
    assert len(losses(folder / "stopped")) == STOP

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "stopped", folder / name))

    return copy


# -- one loss, however many processes -------------------------------------------------------------


def test_runs_are_sensitive_to_what_a_mesh_could_get_wrong(folder):
    """Steps that ignore the size or the clipping of gradients would hide mistakes in them."""
    found = losses(folder / "one")
    assert found[-1] < 0.8 * found[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    more = {"trainer__gradient_clip_val": 0.75, "trainer__max_steps": 4}
    train(parse([*options(folder, data__batch_size=2, **more), f"--run={folder / 'clip'}"]))
    torch.set_num_threads(threads)
    assert losses(folder / "clip")[3] != pytest.approx(found[3], rel=1e-3)


@pytest.mark.parametrize("run", ["four", "sharded"])
def test_two_groups_of_two_ranks_train_as_one_process(folder, run):
    same_run(folder / run, folder / "one")


def test_meshes_of_two_train_as_one_process(folder, stopped):
    """Copies and shards; and a sharded run goes on with copies, and these as shards again."""
    whole, half = options(folder, data__batch_size=2), options(folder)
    resume = ["--resume", "--data.batch_size=2", "--trainer.mesh=sp=2"]
    copies = [f"--run={stopped('copies')}", *resume]
    more = {"trainer__accumulate_grad_batches": 2, "trainer__max_steps": 6}
    again = [*options(folder, **more, model__checkpoint_blocks=True), "--trainer.mesh=sp=2", FSDP]
    drops = [
        *options(folder, model__dropout=0.2, trainer__max_steps=6),
        "--trainer.mesh=sp=2",
        FSDP,
    ]
    jobs: list[Job] = [
        ([*whole, "--trainer.mesh=sp=2", f"--run={folder / 'sp'}"], None),
        ([*half, "--trainer.mesh=dp=2", f"--run={folder / 'dp'}"], None),
        ([*copies, "--trainer.strategy=ddp"], STOP + 4),
        ([*copies, FSDP], None),
        ([*again, f"--run={folder / 'accumulated'}"], None),
        ([*drops, f"--run={folder / 'drops'}"], None),
        ([*drops, f"--run={folder / 'drops_stopped'}"], 3),
        ([f"--run={folder / 'drops_stopped'}", "--resume"], None),
    ]
    log = launch(2, partial(_train, jobs), folder / "log.2")
    exactly_the_same_run(folder / "drops_stopped", folder / "drops")
    assert "stopped by another process at step 12" in log
    for run in ("sp", "dp", "copies"):
        same_run(folder / run, folder / "one")
    train(parse([*options(folder, **more), f"--run={folder / 'accumulated_one'}"]))
    same_run(folder / "accumulated", folder / "accumulated_one")


def test_sharded_run_resumes_exactly_and_in_one_process(folder, stopped):
    alone = stopped("alone")
    more = ["--data.batch_size=2", "--trainer.strategy=auto", "--trainer.mesh=null"]
    assert main([f"--run={alone}", "--resume", *more]) == 0
    assert not list(alone.glob("last.ckpt.shards-*"))
    same_run(alone, folder / "one")
    same = stopped("same")
    jobs: list[Job] = [([f"--run={same}", "--resume"], None)]
    launch(4, partial(_train, jobs), folder / "log.resumed")
    exactly_the_same_run(same, folder / "sharded")


# -- what is drawn, and what is kept --------------------------------------------------------------


def test_ranks_draw_differently_and_repeat_themselves():
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=9, d_model=8, n_layers=1, dropout=0.5)
    task = LanguageTask(LanguageModel(config), OptimOptions())
    ids = torch.arange(8)[None]
    batch = {"ids": ids, "targets": ids, "cu_seqlens": torch.tensor([0, 8])}

    def loss(rank: int, number: int) -> float:
        task.draws = (3, rank)
        return task.training_step(batch, number).item()

    seen = [loss(rank, number) for rank in (0, 1) for number in (0, 1)]
    assert len(set(seen)) == 4
    assert [loss(rank, number) for rank in (0, 1) for number in (0, 1)] == seen


def test_failing_write_of_shards_keeps_the_checkpoint(folder, stopped):
    run = stopped("full")
    before = {p: p.read_bytes() for p in run.glob("last.ckpt*/*")}
    job: Job = ([f"--run={run}", "--resume", "--data.batch_size=2", "--trainer.mesh=sp=2"], None)
    text = launch(2, partial(_train_on_a_full_disk, [job]), folder / "log.full", fails=True)
    assert re.search(rf"SaveError: could not write .*last\.ckpt\.shards-{STOP + 1}", text)
    assert {p: p.read_bytes() for p in before} == before
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == STOP
    shutil.rmtree(run / f"last.ckpt.shards-{STOP}")
    with pytest.raises(ValueError, match=r"shards-8 is missing or not complete.*move both"):
        main([f"--run={run}", "--resume", "--trainer.mesh=null", "--trainer.strategy=auto"])
    clear_run(run)
    assert list(run.iterdir()) == []


def _programs_of_the_page(rank: int, size: int) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {"__name__": "__main__"}
    blocks = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    by_hand, sharded, prefill = (compile(b, f"block {i}", "exec") for i, b in enumerate(blocks))
    exec(by_hand, names)
    # What one process finds.
    model = names["model"]
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss, _ = model.loss(names["ids"], names["targets"])
    loss.backward()
    torch.testing.assert_close(names["loss"], loss, rtol=1e-5, atol=0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-4, atol=1e-6, msg=n)
    exec(sharded, names)
    assert names["loss"] < loss
    names["model"] = model
    exec(prefill, names)
    want = model(names["ids"])[0][:, -1:]
    torch.testing.assert_close(names["logits"], want, rtol=1e-4, atol=1e-5)
    torch.distributed.destroy_process_group()


def test_programs_of_the_page(tmp_path):
    launch(2, _programs_of_the_page, tmp_path / "log")


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dp", "sp"),
    [("dp=2,sp=4", 2, 4), ("sp=3", 1, 3), ("dp=5", 5, 1), ("sp=2, dp=3", 3, 2)],
)
def test_meshes_are_read(text, dp, sp):
    assert MeshSizes.parse(text) == MeshSizes(dp, sp)
    assert MeshSizes.parse(str(MeshSizes(dp, sp))) == MeshSizes(dp, sp)


@pytest.mark.parametrize("text", ["", "4", "dp=0", "tp=2", "dp=2,dp=2", "dp=2;sp=2", "sp=-1"])
def test_other_meshes_are_refused(text):
    with pytest.raises(ValueError, match=r"cannot read the mesh.*dp=2,sp=4"):
        MeshSizes.parse(text)


def settings(**more):
    return trainer_settings({**vars(TrainerOptions()), **more}, seed=0)


def test_a_mesh_says_how_many_devices(monkeypatch):
    assert settings()["strategy"] == "auto"
    assert settings(strategy="ddp", devices=2)["strategy"] == "ddp"
    found = settings(mesh="dp=2,sp=4", num_nodes=2)
    assert (type(found["strategy"]), found["devices"]) == (MeshStrategy, 4)
    assert type(settings(mesh="dp=2", strategy="fsdp2")["strategy"]) is ShardedStrategy
    assert settings(strategy="fsdp2")["devices"] == "auto"
    assert settings(mesh="sp=2", devices="0,1")["devices"] == "0,1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    found = settings(mesh="dp=4,sp=4")
    assert (found["devices"], found["num_nodes"]) == (8, 2)
    with pytest.raises(ValueError, match=r"dp=4,sp=8 is of 32 processes.*torchrun started 16"):
        settings(mesh="dp=4,sp=8")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mesh": "4"}, "cannot read the mesh"),
        ({"mesh": "dp=2,sp=2", "devices": 2}, r"is of 4 processes, but .*devices 2 .* makes 2"),
        ({"mesh": "dp=3", "devices": [0, 1]}, r"is of 3 processes.*makes 2"),
        ({"mesh": "sp=3", "num_nodes": 2}, r"cannot be spread evenly over 2 nodes"),
        ({"mesh": "sp=2", "sp_method": "gossip"}, r"unknown sp_method 'gossip'.*allscan"),
        ({"strategy": "fsdp2", "precision": "16-mixed"}, r"not 16-mixed; use .*ddp"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        settings(**more)
    words_of = [f"--trainer.{k}={v}" for k, v in more.items()]
    with pytest.raises(ValueError, match=words):
        train(parse([*words_of, f"--run={tmp_path / 'a'}", "--trainer.max_steps=1"]))
    assert not (tmp_path / "a").exists()


# -- every mixer, minutes -------------------------------------------------------------------------


@pytest.mark.slow
def test_every_mixer_trains_sharded_as_alone(folder):
    names = registry.names()
    jobs: list[Job] = []
    more = {"trainer__max_steps": 3, "data__batch_size": 2, "optim__lr": 0.05}
    for name in names:
        base = options(folder, **more, model__pattern=name, model__n_layers=2)
        train(parse([*base, f"--run={folder / name}.one"]))
        jobs.append(([*base, FSDP, "--trainer.mesh=sp=2", f"--run={folder / name}.two"], None))
    launch(2, partial(_train, jobs), folder / "log.mixers")
    for name in names:
        found, want = (losses(folder / f"{name}.{n}") for n in ("two", "one"))
        # With shared sequences its codebook starts in the second step, not in the first.
        rel = 0.05 if name == "transformer_vq" else 1e-5
        assert found == pytest.approx(want, rel=rel), name


@pytest.mark.slow
def test_mixed_precision_keeps_float32_weights_and_follows_float32(folder):
    base = [*options(folder, data__batch_size=2), "--trainer.mesh=sp=2"]
    base += ["--trainer.precision=bf16-mixed"]
    runs = [folder / f"mixed_{strategy}" for strategy in ("ddp", "fsdp2")]
    jobs: list[Job] = [
        ([*base, f"--trainer.strategy={run.name[6:]}", f"--run={run}"], None) for run in runs
    ]
    launch(2, partial(_train, jobs), folder / "log.mixed")
    for run in runs:
        assert losses(run) == pytest.approx(losses(folder / "one"), rel=0.03)
        assert losses(run) != pytest.approx(losses(folder / "one"), rel=1e-6)
        for p in LanguageModel.load(run).parameters():
            assert p.dtype == torch.float32
    # What is rounded is the same, whether weights are sharded or not.
    assert losses(runs[1])[:3] == pytest.approx(losses(runs[0])[:3], rel=1e-5)
