"""longscan demo: train three minutes on this machine's Python library, and say how good that is."""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

RECIPE = "demo-cpu"  # the only place that holds the demo's mixer, size and settings
MARK = ".longscan-demo"  # a folder with this file may be overwritten by the next demo
VALID_BYTES = 2_000_000  # validation documents are used up to here, in the corpus' order


def compressors(data: bytes) -> dict[str, int]:
    """Bytes that general compressors make of `data`, container included, at their usual maximum."""
    import zstandard

    return {
        "xz -9": len(lzma.compress(data, preset=9)),
        "zstd -19": len(zstandard.ZstdCompressor(level=19).compress(data)),
    }


def table(rows: list[tuple[str, float, str]]) -> str:
    """Names, bits per byte and remarks, lowest bits first."""
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  bits per byte"]
    for name, bits, remark in sorted(rows, key=lambda r: r[1]):
        lines.append(f"{name:{width}}  {bits:13.3f}  {remark}".rstrip())
    return "\n".join(lines)


def _claim(run: Path) -> None:
    """Make the demo's folder, emptied of an earlier demo; anything else in it is left alone."""
    from longscan.language.train import clear_run

    if (run / MARK).exists():
        clear_run(run)
    elif run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} holds something other than a demo; choose another --run")
    run.mkdir(parents=True, exist_ok=True)
    (run / MARK).touch()


def main(argv: list[str]) -> int:
    """longscan demo"""
    parser = argparse.ArgumentParser(
        prog="longscan demo",
        description="Train a small model on the source of Python's standard library, compare its "
        "bits per byte on unseen files with xz and zstd, and let it write some Python. "
        "Other options go to longscan train language.",
    )
    add = parser.add_argument
    add("--run", default="runs/demo", help="folder of the run; an earlier demo there is replaced")
    add("--max-minutes", type=float, default=None, help="of training (default: the recipe's)")
    add("--max-valid-bytes", type=int, default=VALID_BYTES, help="validation text to compare on")
    add("--prompt", default="def read_lines(path):", help="what the sample continues")
    add("--max-new-tokens", type=int, default=200, help="length of the sample")
    args, more = parser.parse_known_args(argv)

    from longscan.language import train as training
    from longscan.language.commands import first_documents, open_run
    from longscan.language.corpus import open_corpus
    from longscan.language.evaluate import evaluate
    from longscan.language.generate import generate

    run = Path(args.run)
    options = ["--config", RECIPE, "--run", str(run), *more]
    if args.max_minutes is not None:
        options += ["--max-minutes", str(args.max_minutes)]
    config = training.parse(options)
    _claim(run)
    keeper = training.train(config)
    if keeper.interrupted:
        return keeper.exit_status

    model, tokenizer = open_run(args.run)
    corpus = open_corpus(config.data.path, config.data.text_field)
    documents = list(first_documents(corpus.documents("valid"), args.max_valid_bytes))
    text = b"".join(documents)
    print(f"\nvalidation: {corpus.source}, {len(documents)} unseen documents, {len(text):,} bytes")
    result = evaluate(model, tokenizer, documents)

    weights = (run / "model.safetensors").stat().st_size
    ours = f"longscan ({config.model.pattern})"
    rows = [(ours, result.bits_per_byte, f"with {weights:,} bytes of weights, not counted")]
    for name, size in compressors(text).items():
        rows.append((name, 8 * size / len(text), "learns from these bytes alone"))
    print(table(rows))
    print(
        f"The model read {keeper.tokens:,} tokens of other documents in "
        f"{keeper.seconds / 60:.1f} minutes. Its figure is what an arithmetic coder\n"
        f"driven by it would need, each document starting without context ({result.seconds:.1f} s "
        "to evaluate).\nThe compressors get all documents as one stream and knew nothing before."
    )
    print(f"loss curve: {run / 'loss.png'}")

    print(f"\na sample, seed 0, continuing {args.prompt!r}:\n")
    pieces = generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=0.7,
        top_p=0.95,
        seed=0,
    )
    sample = ""
    print(args.prompt, end="")
    for piece in pieces:
        sample += piece
        print(piece, end="", flush=True)
    print()
    numbers: dict[str, Any] = {
        "bits_per_byte": {name: bits for name, bits, _ in rows},
        "valid_bytes": len(text),
        "valid_documents": len(documents),
        "model_bytes": weights,
        "parameters": model.num_parameters(),
        "tokens": keeper.tokens,
        "steps": keeper.step,
        "train_seconds": keeper.seconds,
        "eval_seconds": result.seconds,
        "sample": args.prompt + sample,
    }
    from longscan.io import save_text

    save_text(json.dumps(numbers, indent=2) + "\n", run / "demo.json")
    return 0
