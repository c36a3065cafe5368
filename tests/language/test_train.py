"""The training loop: runs killed, resumed, interrupted, limited in time, and refused."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from longscan.io import SaveError
from longscan.language import callbacks
from longscan.language.callbacks import AtomicCheckpointIO, RunKeeper
from longscan.language.data import LanguageData
from longscan.language.metrics import MetricsFile, plot_losses, read_metrics
from longscan.language.task import LanguageTask, OptimOptions, lr_factor
from longscan.language.tokenizer import load_tokenizer
from longscan.language.train import main, parse, precision_for, recipes, train
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.progress import duration


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """Options of a model that trains a step in milliseconds."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"def f{i}(x):\n    return x + {i * i}\n" for i in range(300)]
    (folder / "text.py").write_text("".join(lines))
    options = {
        "data.path": folder / "text.py",
        "data.cache_dir": folder / "cache",
        "data.tokenizer": "byte",
        "data.seq_len": 24,
        "data.batch_size": 2,
        "data.val_batches": 3,
        "model.d_model": 32,
        "model.n_layers": 1,
        "optim.lr": 0.01,
    }
    return [f"--{k}={v}" for k, v in options.items()]


def run(base: list[str], folder: Path, *more: str) -> RunKeeper:
    return train(parse([*base, "--run", str(folder), *more]))


def losses(folder: Path) -> list[tuple]:
    rows = read_metrics(folder / "metrics.csv")
    return [(r["step"], r["tokens"], r["loss"], r["lr"], r["valid_loss"]) for r in rows]


# -- a run ------------------------------------------------------------------------------------


def test_run_folder_holds_all_that_is_needed_to_use_the_run(base, tmp_path, capsys):
    keeper = run(base, tmp_path / "a", "--trainer.max_steps=25", "--keep.validate_every_steps=10")
    assert keeper.ended == "steps"
    assert keeper.exit_status == 0
    folder = tmp_path / "a"
    rows = read_metrics(folder / "metrics.csv")
    assert [r["step"] for r in rows] == list(range(1, 26))
    assert [r["tokens"] for r in rows] == [48 * i for i in range(1, 26)]
    assert [r["step"] for r in rows if r["valid_loss"] is not None] == [10, 20, 25]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "longscan.LanguageModel"
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 0.01
    assert not list(folder.glob(".*"))  # no temporary file stays
    out = capsys.readouterr().out
    assert "32-true" in out
    assert "step 25/25" in out
    assert "tok/s" in out
    assert "ETA" in out
    assert f"longscan generate {folder}" in out

    # The saved model is the trained one: it gives the validation loss that was logged.
    model = LanguageModel.load(folder).eval()
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    data = LanguageData(**parse(base).data.as_dict())
    data.setup("fit")
    nats = n = n_bytes = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            loss, _ = model.loss(
                batch["ids"], batch["targets"], cu_seqlens=batch["cu_seqlens"], reduction="sum"
            )
            nats, n = nats + loss.item(), n + batch["targets"].numel()
            n_bytes += tokenizer.n_bytes(batch["targets"].flatten().tolist())
    assert rows[-1]["valid_loss"] == pytest.approx(nats / n, rel=1e-6)
    bits = nats / math.log(2) / n_bytes
    assert rows[-1]["valid_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_accumulated_step_logs_the_mean_over_its_batches(base, tmp_path):
    run(base, tmp_path / "a", "--trainer.max_steps=1")
    run(base, tmp_path / "b", "--trainer.max_steps=1", "--trainer.accumulate_grad_batches=3")
    data = LanguageData(**parse(base).data.as_dict())
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(257, d_model=32, n_layers=1))
    first = []
    for i in range(3):
        batch = data.batch_at(i)
        first.append(model.loss(batch["ids"], batch["targets"], cu_seqlens=batch["cu_seqlens"])[0])
    assert losses(tmp_path / "a")[0][2] == pytest.approx(first[0].item(), rel=1e-6)
    assert losses(tmp_path / "b")[0][2] == pytest.approx(torch.stack(first).mean().item(), rel=1e-6)


# Lightning scales float16 losses on a GPU only.
@pytest.mark.parametrize(
    "precision", ["bf16-mixed", pytest.param("16-mixed", marks=pytest.mark.gpu)]
)
def test_mixed_precision_keeps_float32_weights_and_follows_float32(base, tmp_path, precision):
    run(base, tmp_path / "a", "--trainer.max_steps=10")
    run(base, tmp_path / "b", "--trainer.max_steps=10", f"--trainer.precision={precision}")
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert [x[2] for x in b] == pytest.approx([x[2] for x in a], rel=0.02)
    assert [x[2] for x in b] != [x[2] for x in a]
    for p in LanguageModel.load(tmp_path / "b").parameters():
        assert p.dtype == torch.float32


def test_gradients_are_clipped(base, tmp_path):
    more = ["--trainer.max_steps=2", "--optim.eps=1.0", "--optim.warmup=0"]
    run(base, tmp_path / "a", *more, "--trainer.gradient_clip_val=1e-6")
    run(base, tmp_path / "b", *more, "--trainer.gradient_clip_val=null")
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    # With eps = 1 the update is proportional to the gradient: clipped to nothing, none is left.
    torch.manual_seed(0)
    start = LanguageModel(LanguageModelConfig(257, d_model=32, n_layers=1)).state_dict()
    name = "embedding.weight"
    moved = [
        (LanguageModel.load(tmp_path / n).state_dict()[name] - start[name]).abs().max().item()
        for n in "ab"
    ]
    assert moved[0] < 1e-6 < 1e-4 < moved[1]
    assert a[0][2] == b[0][2]


# -- resuming ---------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from longscan.language.callbacks import RunKeeper
from longscan.language.train import main
at, end = int(sys.argv[1]), RunKeeper.on_train_batch_end
def then_die(self, *args):
    end(self, *args)
    if args[-1] == at:
        os.kill(os.getpid(), signal.SIGKILL)
RunKeeper.on_train_batch_end = then_die
main(sys.argv[2:])
"""


def test_killed_and_resumed_run_equals_one_never_killed(base, tmp_path):
    # Without accumulation, the same is seen after a full disk, below.
    more = ["--trainer.accumulate_grad_batches=2", "--keep.validate_every_steps=3"]
    more += ["--trainer.max_steps=11", "--keep.save_every_steps=4"]
    run(base, tmp_path / "whole", *more)
    # Killed three steps after a checkpoint, in the middle of an accumulation.
    argv = [*base, "--run", str(tmp_path / "killed"), *more]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", KILLED, "14", *argv], env=env, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert main(["--run", str(tmp_path / "killed"), "--resume"]) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    a, b = (tmp_path / n / "model.safetensors" for n in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()


def test_resume_drops_what_was_logged_after_the_checkpoint(base, tmp_path):
    more = ["--trainer.max_steps=6", "--keep.save_every_steps=3"]
    run(base, tmp_path / "a", *more)
    whole = losses(tmp_path / "a")
    file = MetricsFile(tmp_path / "a" / "metrics.csv")
    file.start(3)
    assert losses(tmp_path / "a") == whole[:3]
    with open(file.path, "a") as f:
        f.write("4,99,1.0,2.")  # a line cut short by a kill
    assert losses(tmp_path / "a") == whole[:3]


def test_finished_run_has_nothing_left_and_goes_on_with_more_steps(base, tmp_path, capsys):
    run(base, tmp_path / "a", "--trainer.max_steps=3", "--optim.schedule=constant")
    assert main(["--run", str(tmp_path / "a"), "--resume"]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert len(losses(tmp_path / "a")) == 3
    assert main(["--run", str(tmp_path / "a"), "--resume", "--trainer.max_steps=5"]) == 0
    run(base, tmp_path / "b", "--trainer.max_steps=5", "--optim.schedule=constant")
    a, b = (read_metrics(tmp_path / n / "metrics.csv") for n in "ab")
    assert [r["step"] for r in a] == [1, 2, 3, 4, 5]
    assert a[-1]["valid_loss"] is not None
    # Warm-up is a share of the run, so only a run of equal length has equal losses; the first
    # is before any update.
    assert a[0]["loss"] == b[0]["loss"]


def test_run_killed_before_its_first_checkpoint_starts_over(base, tmp_path, capsys):
    run(base, tmp_path / "whole", "--trainer.max_steps=3")
    run(base, tmp_path / "a", "--trainer.max_steps=3")
    (tmp_path / "a" / "last.ckpt").unlink()
    assert main(["--run", str(tmp_path / "a"), "--resume"]) == 0
    assert "starting at step 0" in capsys.readouterr().out
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


# -- stopping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_resume(base, tmp_path, capsys, monkeypatch, which):
    more = ["--trainer.max_steps=6", "--trainer.accumulate_grad_batches=2"]
    run(base, tmp_path / "whole", *more)
    step = LanguageTask.training_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 4:  # the first half of step 3
            os.kill(os.getpid(), which)
        return step(self, batch, batch_idx)

    before = signal.getsignal(which)
    with monkeypatch.context() as m:
        m.setattr(LanguageTask, "training_step", interrupted)
        status = main([*base, "--run", str(tmp_path / "a"), *more])
    assert status == 128 + which
    assert signal.getsignal(which) is before
    assert len(losses(tmp_path / "a")) == 3
    assert (tmp_path / "a" / "loss.png").exists()
    out = capsys.readouterr().out
    assert f"stopped by {which.name} at step 3" in out
    assert f"longscan train language --run {tmp_path / 'a'} --resume" in out
    assert main(["--run", str(tmp_path / "a"), "--resume"]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


def test_second_ctrl_c_leaves_at_once(base, tmp_path, monkeypatch):
    def twice(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(LanguageTask, "training_step", twice)
    with pytest.raises(SystemExit):  # how Lightning ends on KeyboardInterrupt
        main([*base, "--run", str(tmp_path / "a"), "--trainer.max_steps=6"])
    assert not (tmp_path / "a" / "last.ckpt").exists()


class Clock:
    """A clock by which a batch takes 0.5 s, a batch of validation 1 s, a save 4 s."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(callbacks, "time", self)
        for owner, name, seconds in (
            (LanguageTask, "training_step", 0.5),
            (LanguageTask, "validation_step", 1.0),
            (LanguageModel, "save", 4.0),
        ):
            monkeypatch.setattr(owner, name, self._taking(getattr(owner, name), seconds))

    def monotonic(self) -> float:
        return self.now

    def _taking(self, fn, seconds):
        def slow(*args):
            self.now += seconds
            return fn(*args)

        return slow


def test_max_minutes_alone_drives_the_schedule_and_stops_in_time(
    base, tmp_path, capsys, monkeypatch
):
    Clock(monkeypatch)
    resume = ["--run", str(tmp_path / "a"), "--resume"]
    # 30 s: a save after the first step, the last validation and save: 38 steps, less a margin.
    keeper = run(base, tmp_path / "a", "--max-minutes=0.5", "--optim.final_lr=0.0")
    assert keeper.ended == "time"
    assert 26 <= keeper.seconds <= 30
    rows = read_metrics(tmp_path / "a" / "metrics.csv")
    assert 30 <= len(rows) <= 38
    assert rows[-1]["valid_loss"] is not None
    assert max(r["lr"] for r in rows) > 0.009
    assert rows[-1]["lr"] < 0.0002  # the cosine has come down by the end of the time
    assert f"longscan generate {tmp_path / 'a'}" in capsys.readouterr().out
    # Its time is used up, over all sessions together; a larger budget goes on.
    assert main(resume) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert main([*resume, "--max-minutes=0.7"]) == 0
    # The last row is written before the last validation and save, which take 7 s.
    assert 31 <= read_metrics(tmp_path / "a" / "metrics.csv")[-1]["seconds"] <= 42 - 7


def test_max_minutes_with_max_steps_limits_each_session(base, tmp_path, capsys, monkeypatch):
    Clock(monkeypatch)
    more = ["--trainer.max_steps=36", "--max-minutes=0.5", "--keep.validate_every_steps=10"]
    assert run(base, tmp_path / "a", *more).ended == "time"
    assert "--resume" in capsys.readouterr().out
    rows = read_metrics(tmp_path / "a" / "metrics.csv")
    assert [r["step"] for r in rows if r["valid_loss"] is not None] == [10, 20, rows[-1]["step"]]
    assert main(["--run", str(tmp_path / "a"), "--resume"]) == 0
    run(base, tmp_path / "b", "--trainer.max_steps=36", "--keep.validate_every_steps=10")
    # The schedule follows the steps, so that both are the same run.
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert [row[:4] for row in a] == [row[:4] for row in b]


def test_validation_that_would_not_fit_is_left_out(base, tmp_path, capsys, monkeypatch):
    clock = Clock(monkeypatch)
    slow = clock._taking(LanguageTask.validation_step, 20.0)
    monkeypatch.setattr(LanguageTask, "validation_step", slow)
    run(base, tmp_path / "a", "--max-minutes=1.2", "--keep.validate_every_steps=3")
    rows = read_metrics(tmp_path / "a" / "metrics.csv")
    assert [r["step"] for r in rows if r["valid_loss"] is not None] == [3]
    assert rows[-1]["seconds"] <= 72
    assert "no time left to validate" in capsys.readouterr().out


# -- a full disk ------------------------------------------------------------------------------


def test_full_disk_keeps_the_earlier_checkpoint(base, tmp_path, monkeypatch):
    more = ["--trainer.max_steps=8", "--keep.save_every_steps=3"]
    run(base, tmp_path / "whole", *more)
    save, calls = torch.save, []

    def full(obj, f, *args, **kwargs):
        calls.append(f)
        if len(calls) == 3:  # steps 1 and 3 are saved, 6 is not
            f.write(b"half a check")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(obj, f, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(callbacks.torch, "save", full)
        with pytest.raises(SaveError, match="disk is full"):
            run(base, tmp_path / "a", *more)
    folder = tmp_path / "a"
    assert not list(folder.glob(".*"))
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    LanguageModel.load(folder)
    assert main(["--run", str(folder), "--resume"]) == 0
    assert losses(folder) == losses(tmp_path / "whole")


def test_checkpoint_that_the_system_refuses_to_write_is_a_save_error(tmp_path):
    # A real failing write: torch.save reports it as a RuntimeError of its own.
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1, "x": torch.zeros(8)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SaveError, match=r"could not write .*last\.ckpt"):
            io.save_checkpoint({"step": 2, "x": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert io.load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(
    base, tmp_path, monkeypatch
):
    step = LanguageTask.training_step

    def diverging(self, batch, batch_idx):
        return step(self, batch, batch_idx) * (math.nan if batch_idx == 3 else 1)

    def nan_from_4(self):
        loss = step_loss(self)
        return loss * (math.nan if self.trainer.global_step == 4 else 1)

    step_loss = LanguageTask.step_loss
    monkeypatch.setattr(LanguageTask, "training_step", diverging)
    monkeypatch.setattr(LanguageTask, "step_loss", nan_from_4)
    with pytest.raises(ValueError, match=r"loss is nan at step 4.*--optim\.lr"):
        run(base, tmp_path / "a", "--trainer.max_steps=8", "--keep.save_every_steps=2")
    assert torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["global_step"] == 2


# -- clear errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.pattern=gated_deltanett"], "did you mean gated_deltanet"),
        (["--data.seq_len=100000"], "too small for one batch"),
        (["--data.path=nowhere.txt"], "nowhere.txt"),
        (["--trainer.max_steps=-1"], "say how long to train"),
        (["--max-minutes=0"], "above 0"),
        (["--optim.lr=0"], "lr must be above 0"),
        (["--config=demo-cpo"], "did you mean demo-cpu"),
        (["--preset=mamba-131m"], "did you mean mamba-130m"),
        (["--resume"], "nothing to resume"),
        (["--model.nlayers=3"], r"did you mean --model\.n_layers"),
        (["--model.n_layers=x"], r"model\.n_layers.*Expected"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(base, tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        run(base, tmp_path / "a", "--trainer.max_steps=3", *more)
    assert not (tmp_path / "a").exists()


def test_run_folder_is_never_overwritten_or_mixed(base, tmp_path):
    run(base, tmp_path / "a", "--trainer.max_steps=2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    resume = ["--run", str(tmp_path / "a"), "--resume"]
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        run(base, tmp_path / "a", "--trainer.max_steps=2")
    with pytest.raises(ValueError, match=r"another architecture: d_model was 32, now 64"):
        main([*resume, "--model.d_model=64"])
    with pytest.raises(ValueError, match="accumulate_grad_batches 1, not 2"):
        main([*resume, "--trainer.accumulate_grad_batches=2"])
    with pytest.raises(ValueError, match="leave out --preset"):
        main([*resume, "--preset=nano"])
    with pytest.raises(ValueError, match=r"tokenizer .* differs"):
        main([*resume, "--data.tokenizer=bpe", "--data.vocab_size=260"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    with pytest.raises(ValueError, match="other training data"):
        main([*resume, "--trainer.max_steps=4", "--data.seq_len=12"])


# -- options ----------------------------------------------------------------------------------


def test_shipped_recipes_parse_and_name_a_model():
    assert {"demo-cpu", "stdlib-small-cpu", "gpu-340m"} <= set(recipes())
    for name in recipes():
        config = parse(["--config", name])
        LanguageModelConfig(vocab_size=300, **config.model.as_dict())
        OptimOptions(**config.optim.as_dict())
        assert config.trainer.max_steps > 0 or config.max_minutes > 0
    assert parse(["--config=demo-cpu"]).max_minutes == 3


def test_gpu_recipe_has_the_size_of_its_name():
    config = parse(["--config", "gpu-340m"])
    with torch.device("meta"):
        model = LanguageModel(LanguageModelConfig(32000, **config.model.as_dict()))
    assert 3.2e8 < model.num_parameters() < 3.7e8


def test_command_line_wins_over_a_recipe_wherever_it_stands(tmp_path):
    (tmp_path / "my.yaml").write_text("model: {d_model: 48, n_layers: 3}\nseed: 7\n")
    config = parse(["--model.d_model=96", "--config", str(tmp_path / "my.yaml")])
    assert (config.model.d_model, config.model.n_layers, config.seed) == (96, 3, 7)
    config = parse(["--preset", "micro", "--config", str(tmp_path / "my.yaml")])
    assert (config.model.d_model, config.model.n_layers) == (48, 3)
    assert parse(["--preset=micro"]).model.n_layers == 6


def test_recipes_are_listed(capsys):
    assert main(["--recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(recipes())
    assert all(len(line.split()) > 4 for line in lines)


def test_default_precision_depends_on_the_device_alone(monkeypatch):
    assert precision_for("cpu")[0] == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision_for("auto")[0] == "bf16-mixed"
    assert precision_for("cpu")[0] == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert precision_for("gpu")[0] == "32-true"


def test_learning_rate_schedules():
    def at(progress, step=0, **options):
        return lr_factor(OptimOptions(**options), step, progress)

    assert at(0.025, warmup=0.05) == pytest.approx(0.5)
    assert at(0.05, warmup=0.05, final_lr=0.1) == pytest.approx(1.0)
    assert at(1.0, warmup=0.05, final_lr=0.1) == pytest.approx(0.1)
    assert at(0.5, warmup=0, final_lr=0.0) == pytest.approx(0.5)
    assert at(0.5, step=4, warmup=10) == pytest.approx(0.5)
    assert at(0.7, schedule="wsd", decay=0.25, warmup=0) == 1.0
    assert at(0.875, schedule="wsd", decay=0.25, warmup=0, final_lr=0.2) == pytest.approx(0.6)
    assert at(1.0, schedule="constant") == 1.0
    assert at(2.0, warmup=0, final_lr=0.3) == pytest.approx(0.3)
    falling = [at(p / 50, warmup=0.1) for p in range(5, 51)]
    assert falling == sorted(falling, reverse=True)
    for wrong in ({"schedule": "linear"}, {"warmup": -1}, {"final_lr": 2}, {"decay": 0}):
        with pytest.raises(ValueError, match=r"schedule|warmup"):
            OptimOptions(**wrong)


def test_every_group_follows_the_schedule_from_its_own_peak(base, tmp_path, monkeypatch):
    groups = LanguageModel.parameter_groups

    def two_rates(self, **options):
        first, *rest = groups(self, **options)
        return [{**first, "lr": first["lr"] * 0.5}, *rest]

    monkeypatch.setattr(LanguageModel, "parameter_groups", two_rates)
    run(base, tmp_path / "a", "--trainer.max_steps=4", "--optim.schedule=wsd")
    saved = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    first, *rest = saved["optimizer_states"][0]["param_groups"]
    logged = read_metrics(tmp_path / "a" / "metrics.csv")[-1]["lr"]
    assert first["lr"] == pytest.approx(0.5 * logged)
    assert all(g["lr"] == pytest.approx(logged) for g in rest)
    decays = {g["name"]: g["weight_decay"] for g in [first, *rest]}
    assert decays["decay"] == 0.1
    assert decays["no_decay"] == 0.0


def test_loss_curve_of_a_long_run_has_its_mean(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.start(0)
    for step in range(1, 101):
        row = {"step": step, "tokens": step, "valid_loss": 2.0 if step % 50 == 0 else None}
        file.add(row, torch.tensor(3.0 / step))
    assert file.flush() == pytest.approx(0.03)
    assert file.flush() is None
    rows = read_metrics(file.path)
    assert [r["loss"] for r in rows] == [
        float(f"{torch.tensor(3.0 / s):.9g}") for s in range(1, 101)
    ]
    assert plot_losses(tmp_path).stat().st_size > 10_000
    assert [duration(s) for s in (0, 61.6, 3723)] == ["0:00", "1:02", "1:02:03"]
