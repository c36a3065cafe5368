"""longscan train language: from text to a run folder that can be resumed, used and shared."""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import shlex
import shutil
import warnings
from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # pyright: ignore[reportPrivateImportUsage]
from lightning.fabric.utilities.rank_zero import rank_zero_only

from longscan.io import save_text
from longscan.language.callbacks import AtomicCheckpointIO, RunKeeper, RunOptions
from longscan.language.data import LanguageData
from longscan.language.mesh import trainer_settings
from longscan.language.task import LanguageTask, OptimOptions
from longscan.models import LanguageModel, LanguageModelConfig, preset
from longscan.progress import duration

# What a run leaves in its folder.
RUN_FILES = (
    "config.yaml",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "last.ckpt",
    "metrics.csv",
    "loss.png",
)


@dataclass
class TrainerOptions:
    """The options of Lightning's Trainer that make sense for a stream of batches.

    Args:
        max_steps: optimiser steps of the run (-1: until --max-minutes).
        accelerator: auto | cpu | gpu | ...
        devices: how many devices, which ones, or auto.
        num_nodes: machines.
        strategy: auto | ddp | fsdp2 (parameters and optimiser sharded over all processes).
        mesh: dp=2,sp=4: 2 groups with data of their own, of 4 processes that share sequences
            (docs/parallel.md); null: each process has data of its own.
        sp_method: how states cross between processes, where sp > 1: auto | allgather | allscan |
            doubling | hierarchical.
        precision: 32-true | bf16-mixed | ...; null: bf16-mixed on a CUDA GPU, else 32-true.
        accumulate_grad_batches: batches whose gradients make one step.
        gradient_clip_val: largest norm of the gradient; null: any.
        deterministic: refuse operations that are not deterministic.
        benchmark: let cuDNN choose by timing.
        profiler: simple | advanced | pytorch.
        detect_anomaly: find where a NaN came from; slow.
    """

    max_steps: int = -1
    accelerator: str = "auto"
    devices: list[int] | int | str = "auto"
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    mesh: str | None = None
    sp_method: str = "auto"
    precision: str | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    deterministic: bool | None = None
    benchmark: bool | None = None
    profiler: str | None = None
    detect_anomaly: bool = False


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(importlib.resources.files("longscan.language") / "recipes"))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path that exists, or the name of a shipped one.

    Raises: ValueError naming the nearest shipped recipe.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    near = difflib.get_close_matches(stem, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"shipped recipes: {', '.join(known)}"
    raise ValueError(f"no file and no shipped recipe called {name!r}; {hint}")


def build_parser() -> ArgumentParser:
    """Every option of longscan train language."""
    parser = ArgumentParser(
        prog="longscan train language",
        usage="longscan train language [--config RECIPE] [--run FOLDER] [--resume] [options]",
        exit_on_error=False,
        description="Train a language model on text. Options on the command line win over the "
        "recipe's; names with dots are also the keys of a recipe.",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe: file or shipped name")
    parser.add_argument("--recipes", action="store_true", help="list the shipped recipes")
    parser.add_argument("--run", default="runs/language", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run")
    parser.add_argument(
        "--max-minutes",
        type=float | None,  # type: ignore[arg-type]
        default=None,
        help="stop in time, the last validation and save included; without --trainer.max_steps "
        "the learning rate follows the clock, and runs are not reproducible step for step",
    )
    parser.add_argument("--preset", default=None, help="published or own size: sets --model.*")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the data")
    parser.add_class_arguments(LanguageModelConfig, "model", skip={"vocab_size"})
    parser.add_class_arguments(LanguageData, "data", skip={"seed"})
    parser.add_class_arguments(OptimOptions, "optim")
    parser.add_class_arguments(RunOptions, "keep")
    parser.add_class_arguments(TrainerOptions, "trainer")
    return parser


def parse(argv: list[str]) -> Namespace:
    """Options from shipped recipes, files, a run to resume, and the command line, in that order."""
    configs, rest, at = [], [], 0
    while at < len(argv):
        word = argv[at]
        if word == "--config" and at + 1 < len(argv):
            configs.append(str(recipe_path(argv[at + 1])))
            at += 1
        elif word.startswith("--config="):
            configs.append(str(recipe_path(word.partition("=")[2])))
        else:
            rest.append(word)
        at += 1
    parser = build_parser()
    name = _preset_name(rest)
    if name is not None and "--resume" in rest:
        raise ValueError("--resume takes the model from the run: leave out --preset")
    if name is not None:
        sizes = preset(name).to_dict()
        parser.set_defaults({f"model.{k}": v for k, v in sizes.items() if k != "vocab_size"})
    if "--resume" in rest and not {"-h", "--help"} & set(rest):
        run = Path(_parsed(parser, configs, rest).run)
        if not (run / "config.yaml").is_file():
            raise ValueError(f"nothing to resume: {run} holds no run (no config.yaml)")
        configs.insert(0, str(run / "config.yaml"))
    return _parsed(parser, configs, rest)


def _parsed(parser: ArgumentParser, configs: list[str], rest: list[str]) -> Namespace:
    words = [word for path in configs for word in ("--config", path)]
    try:
        return parser.parse_args([*words, *rest])
    except ArgumentError as error:
        text = " ".join(str(error).split())
    for word in rest:
        option = word.partition("=")[0]
        known = [o for a in parser._actions for o in a.option_strings]
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
            text += f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"{text}; longscan train language --help lists the options")


def _preset_name(words: list[str]) -> str | None:
    for at, word in enumerate(words):
        if word.startswith("--preset="):
            return word.partition("=")[2]
        if word == "--preset" and at + 1 < len(words):
            return words[at + 1]
    return None


def precision_for(accelerator: str) -> tuple[str, str]:
    """The default precision for a device, and why; the same on every machine of a kind."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "a GPU with bfloat16; states and gates stay float32"
        return "32-true", "this GPU has no bfloat16"
    return "32-true", "the default without a CUDA GPU; longscan doctor measures the alternative"


def _plain(config: Namespace) -> dict[str, Any]:
    options = config.as_dict()
    for key in ("config", "preset", "recipes", "resume", "run"):
        options.pop(key, None)
    return options


def check_resumable(run: Path, options: dict[str, Any]) -> None:
    """Refuse to go on with a run under options that would make it another run.

    The data check themselves, when their stream is set to where the run stopped.
    Raises: ValueError naming what differs.
    """
    before = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    # A setting that an older run did not know has its default.
    defaults = LanguageModelConfig(vocab_size=1).to_dict()
    changed = _differences({**defaults, **before["model"]}, {**defaults, **options["model"]})
    if changed:
        raise ValueError(
            f"{run} holds a model of another architecture: {'; '.join(changed)}. "
            "Resume without --model options, or train a new run under another --run"
        )
    key = "accumulate_grad_batches"
    now = options["trainer"][key]
    if before["trainer"][key] != now:
        raise ValueError(
            f"{run} was trained with {key} {before['trainer'][key]}, not {now}; resume with that, "
            "or train a new run under another --run"
        )


def _differences(before: dict, now: dict) -> list[str]:
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    return [f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in keys]


def check_folder(run: Path, options: dict[str, Any], resume: bool) -> Path | None:
    """Check that a run can start, or go on, in a folder; returns the checkpoint to start from.

    Raises: ValueError if a run is there already and not to be resumed, or is another run.
    """
    if resume:
        check_resumable(run, options)
        checkpoint = run / "last.ckpt"
        if checkpoint.exists():
            return checkpoint
        print(f"{run} has no checkpoint yet: starting at step 0", flush=True)
    # Other processes of the same run find what the first one has just written.
    elif rank_zero_only.rank == 0 and any((run / name).exists() for name in RUN_FILES):
        raise ValueError(
            f"{run} already holds a run: add --resume to go on with it, or choose another --run"
        )
    return None


def clear_run(run: Path) -> None:
    """Remove the files of an earlier run from a folder, and nothing else."""
    for name in RUN_FILES:
        (run / name).unlink(missing_ok=True)
    for folder in run.glob("last.ckpt.shards-*"):
        shutil.rmtree(folder)


def _write_start(run: Path, options: dict[str, Any], tokenizer: Any, resume: bool) -> None:
    """config.yaml and tokenizer.json. A resumed run must read its text with the same tokenizer."""
    kept = run / "tokenizer.json"
    fresh = run / ".tokenizer.json"
    run.mkdir(parents=True, exist_ok=True)
    tokenizer.save(fresh)
    try:
        if resume and kept.exists() and kept.read_bytes() != fresh.read_bytes():
            raise ValueError(
                f"the tokenizer of {run} differs from the one of the data now (has the text "
                "changed?); resume with the text it was trained on"
            )
        fresh.replace(kept)
    finally:
        fresh.unlink(missing_ok=True)
    save_text(yaml.safe_dump(options, sort_keys=False), run / "config.yaml")


def train(config: Namespace) -> RunKeeper:
    """Train as the options say; returns the keeper, which knows how the run ended.

    Raises: ValueError for options that cannot work, SaveError if the disk is full.
    """
    run = Path(config.run)
    max_steps, max_minutes = config.trainer.max_steps, config.max_minutes
    if max_steps < 0 and max_minutes is None:
        raise ValueError("say how long to train: --trainer.max_steps N or --max-minutes M")
    if max_minutes is not None and max_minutes <= 0:
        raise ValueError(f"--max-minutes must be above 0, not {max_minutes}")
    model_options = config.model.as_dict()
    LanguageModelConfig(vocab_size=256, **model_options)  # refused before any text is read
    settings = trainer_settings(config.trainer.as_dict(), config.seed)
    options = _plain(config)
    optim = OptimOptions(**config.optim.as_dict())
    keep = RunOptions(**config.keep.as_dict())
    checkpoint = check_folder(run, options, config.resume)

    data = LanguageData(**config.data.as_dict(), seed=config.seed)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(config.seed)
    vocab_size = data.tokenizer.vocab_size
    model = LanguageModel(LanguageModelConfig(vocab_size=vocab_size, **model_options))
    if rank_zero_only.rank == 0:
        _write_start(run, options, data.tokenizer, config.resume)

    keeper = RunKeeper(run, keep, max_steps=max_steps, max_minutes=max_minutes)
    precision, why = settings["precision"], "as asked"
    if precision is None:
        precision, why = precision_for(settings["accelerator"])
    settings["precision"] = precision
    # Lightning's greetings and advice on options that are set here.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = pl.Trainer(
        **settings,
        max_epochs=-1,
        callbacks=[keeper],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    if trainer.is_global_zero:
        n = model.num_parameters()
        where = trainer.strategy.root_device
        print(f"{config.model.pattern}: {n:,} parameters on {where}, {precision} ({why})")
        print(f"run folder {run}", flush=True)
    with keeper.signals(), warnings.catch_warnings():
        # Lightning 2.6 makes one leaf of torch 2.13's pytree in the old way; harmless.
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
        trainer.fit(LanguageTask(model, optim), datamodule=data, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        report(keeper, config)
    return keeper


def report(keeper: RunKeeper, config: Namespace) -> None:
    """Say how the run ended and what to do next."""
    name = shlex.quote(str(keeper.run))
    if keeper.ended is None:
        print(
            f"{name} is complete at step {keeper.step}: nothing left to do. To train on, resume "
            "with a larger --trainer.max_steps or --max-minutes"
        )
        return
    how = {"steps": "done", "time": f"stopped after {config.max_minutes} minutes"}
    how = how.get(keeper.ended, f"stopped by {keeper.ended}")
    print(f"{how} at step {keeper.step}, {keeper.tokens:,} tokens, {duration(keeper.seconds)}")
    if keeper.interrupted or (keeper.ended == "time" and not keeper.by_time):
        print(f"saved; go on with: longscan train language --run {name} --resume")
    else:
        print(f"saved; try: longscan generate {name} --prompt 'def '")


def main(argv: list[str]) -> int:
    """longscan train language ..."""
    if "--recipes" in argv:
        for name, path in recipes().items():
            first = path.read_text(encoding="utf-8").splitlines()[0]
            print(f"{name:20} {first.lstrip('# ')}")
        return 0
    return train(parse(argv)).exit_status
