"""Plain text as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable

from longscan import registry

ARXIV = re.compile(r"\d{4}\.\d{4,5}")


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to what is not in `backticks`."""
    parts = text.split("`")
    return "`".join(change(p) if i % 2 == 0 else p for i, p in enumerate(parts))


def prose(text: str) -> str:
    """Plain text as Markdown: nothing is emphasis or HTML by accident, arXiv ids are links."""
    text = _outside_code(text, lambda p: re.sub(r"([*<|])", r"\\\1", p))
    text = _outside_code(
        text,
        lambda p: re.sub(
            rf"(arXiv )?\b({ARXIV.pattern})\b", r"[arXiv \2](https://arxiv.org/abs/\2)", p
        ),
    )
    pages = {registry.mixer_class(n).__name__: n for n in registry.names()}
    return re.sub(
        r"`(\w+)`", lambda m: f"[{m[0]}]({pages[m[1]]}.md)" if m[1] in pages else m[0], text
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
