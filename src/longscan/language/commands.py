"""longscan generate and longscan eval: a trained run, used from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def open_run(run: str, device: str = "auto") -> tuple[Any, Any]:
    """The model of a run folder on a device, and its tokenizer.

    Raises: ValueError if the folder holds no trained run.
    """
    import torch

    from longscan.language.tokenizer import load_tokenizer
    from longscan.models import LanguageModel

    folder = Path(run)
    missing = [
        name
        for name in ("config.json", "model.safetensors", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise ValueError(
            f"{folder} holds no trained run: {', '.join(missing)} not found; "
            "train one with: longscan train language --run " + str(folder)
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LanguageModel.load(folder).to(device).eval()
    return model, load_tokenizer(folder / "tokenizer.json")


def generate_main(argv: list[str]) -> int:
    """longscan generate RUN --prompt ..."""
    parser = argparse.ArgumentParser(
        prog="longscan generate",
        description="Continue a prompt with the model of a run, printed as it is made.",
    )
    add = parser.add_argument
    add("run", help="folder of a run")
    add("--prompt", default="", help="text to continue; - reads standard input")
    add("--max-new-tokens", type=int, default=256, help="tokens to add at most")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    add("--top-k", type=int, default=None, help="keep the k most likely tokens")
    add("--top-p", type=float, default=None, help="keep the likeliest tokens up to this mass")
    add("--min-p", type=float, default=None, help="drop tokens below this share of the likeliest")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: avoid what was said")
    add("--seed", type=int, default=None, help="the same seed gives the same text")
    add("--stop", action="append", default=[], help="end before this text; may be repeated")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    from longscan.language.generate import generate

    model, tokenizer = open_run(args.run, args.device)
    pieces = generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def eval_main(argv: list[str]) -> int:
    """longscan eval RUN --data ..."""
    parser = argparse.ArgumentParser(
        prog="longscan eval",
        description="Loss, perplexity and bits per byte of a run's model on text. The state is "
        "carried through each document: nothing is cut at the training length.",
    )
    add = parser.add_argument
    add("run", help="folder of a run")
    add("--data", default=None, help="text file, folder, .jsonl or .parquet (default: the run's)")
    add("--text-field", default="text", help="the field of JSONL or Parquet records with the text")
    add(
        "--split",
        choices=["train", "valid", "test", "all"],
        help="default: valid of the run's own data, all of what --data names",
    )
    add("--max-bytes", type=int, default=None, help="use the first documents up to this size")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)

    from longscan.language.corpus import open_corpus
    from longscan.language.evaluate import evaluate

    model, tokenizer = open_run(args.run, args.device)
    path, field = args.data, args.text_field
    split = args.split or ("valid" if path is None else "all")
    if path is None:
        path, field = _data_of(Path(args.run))
    corpus = open_corpus(path, field)
    first = first_documents(corpus.documents(split), args.max_bytes)
    live = sys.stderr.isatty()

    def show(p: Any) -> None:
        line = f"{p.n_tokens:,} tokens  loss {p.loss:.4f}  {p.tokens_per_second:,.0f} tok/s"
        print(f"\r{line}  ", end="", file=sys.stderr, flush=True)

    result = evaluate(model, tokenizer, first, progress=show if live else None)
    if live:
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)
    print(f"{corpus.source}, {split} split, {result.n_documents:,} documents")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.3f} per token")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    speed = result.n_tokens / max(result.seconds, 1e-9)
    print(
        f"{result.n_tokens:,} tokens, {result.n_bytes:,} bytes, {result.seconds:.1f} s, "
        f"{speed:,.0f} tok/s"
    )
    return 0


def first_documents(
    documents: Iterable[tuple[str, bytes]], max_bytes: int | None
) -> Iterator[bytes]:
    """The bytes of the first documents, whole, as many as fit in max_bytes (but at least one)."""
    total = 0
    for _, data in documents:
        if total and max_bytes is not None and total + len(data) > max_bytes:
            return
        total += len(data)
        yield data


def _data_of(run: Path) -> tuple[str | None, str]:
    import yaml

    config = run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{run} does not say what it was trained on; name a text with --data")
    options = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
    return options["path"], options["text_field"]
