"""The longscan command: a table of commands, each imported only when it runs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

# words of the command -> (module:function taking the remaining arguments, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "train language": ("longscan.language.train:main", "train a language model on text"),
    "generate": ("longscan.language.commands:generate_main", "stream text from a trained run"),
    "eval": ("longscan.language.commands:eval_main", "loss and bits per byte of a trained run"),
    "demo": ("longscan.language.demo:main", "train three minutes, compare with xz and zstd"),
    "verify": ("longscan.verify:main", "check mixers, or GPU kernels, on this machine"),
    "doctor": ("longscan.doctor:main", "what is installed here, and what would run"),
    "bench cpu": ("longscan.bench.cpu:main", "time our layers beside transformers on a CPU"),
    "bench gpu": ("longscan.bench.gpu:main", "time our kernels beside others on a GPU"),
    "bench parallel": ("longscan.bench.parallel:main", "time one sequence on several GPUs"),
    "bench scaling": ("longscan.bench.scaling:main", "simulate one sequence on many devices"),
    "claims": ("longscan.claims.run:main", "run the small experiment behind a paper's claim"),
    "docs": ("longscan.docs:main", "write the pages of the mixers"),
}

# top-level module -> the extra that brings it
EXTRAS = {
    "lightning": "train",
    "jsonargparse": "train",
    "tokenizers": "train",
    "matplotlib": "train",
    "pyarrow": "train",
    "zstandard": "train",
    "yaml": "train",
    "transformers": "bench",
    "mambapy": "bench",
    "psutil": "bench",
}


def usage() -> str:
    """The text of longscan --help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {words:{width}}  {text}" for words, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: longscan [--traceback] COMMAND ...",
            "",
            *lines,
            "",
            "longscan COMMAND --help says more; --traceback shows where an error came from;",
            "longscan --version prints the version.",
        ]
    )


def _resolve(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command that args begin with, and what follows it; ValueError if there is none."""
    for n in (2, 1):
        words = " ".join(args[:n])
        if words in COMMANDS:
            return words, list(args[n:])
    first = args[0]
    seconds = [words.split()[1] for words in COMMANDS if words.startswith(first + " ")]
    if seconds:
        given = args[1] if len(args) > 1 else None
        if given is None or given.startswith("-"):
            raise ValueError(f"longscan {first} what? choose: {', '.join(seconds)}")
        near = difflib.get_close_matches(given, seconds, n=1, cutoff=0.4)
        hint = f"did you mean {first} {near[0]}?" if near else f"choose: {', '.join(seconds)}"
        raise ValueError(f"unknown command {first + ' ' + given!r}; {hint}")
    near = difflib.get_close_matches(first, [w.split()[0] for w in COMMANDS], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "longscan --help lists the commands"
    raise ValueError(f"unknown command {first!r}; {hint}")


def load(target: str) -> Callable[[list[str]], int | None]:
    """The function behind "module:function".

    Raises: ModuleNotFoundError.
    """
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0 done, 1 failed, 2 not understood, 130 Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in args[:1]
    if traceback:
        args = args[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] == "--version":
        from longscan import __version__

        print(f"longscan {__version__}")
        return 0
    try:
        words, rest = _resolve(args)
    except ValueError as error:
        print(f"longscan: {error}", file=sys.stderr)
        return 2
    try:
        return load(COMMANDS[words][0])(rest) or 0
    except ImportError as error:
        missing = (getattr(error, "name", None) or "").split(".")[0]
        if traceback or not (missing in EXTRAS or "pip install" in str(error)):
            raise
        text = str(error)
        if missing in EXTRAS:
            text = f"{missing} is not installed; pip install 'longscan[{EXTRAS[missing]}]'"
        print(f"longscan {words}: {text}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        # What is wrong with the input or the disk is said in the message; anything else is a bug
        # and keeps its traceback.
        if traceback:
            raise
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader (head, less) went away: nothing to say
            return 1
        print(f"longscan {words}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nlongscan {words}: interrupted", file=sys.stderr)
        return 130
