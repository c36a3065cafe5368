"""What crossed the edge of a shard in a stretch of a model that will be computed again.

Under activation checkpointing a block runs twice. What entered it the first time is kept (a state
and a few tokens, small beside activations), so that the second time nothing is sent. Keys and
values, which are large, are gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")


class Tape:
    """Records of what entered, in order; on `replay` they are handed out again."""

    def __init__(self) -> None:
        self._kept: list | None = None
        self._at: int | None = None

    def through(self, make: Callable[[], T]) -> T:
        """make(), or what it gave when this stretch ran for the first time."""
        if self._at is not None:
            assert self._kept is not None
            value, self._at = self._kept[self._at], self._at + 1
            return value
        value = make()
        if self._kept is not None:
            self._kept.append(value)
        return value

    @property
    def replaying(self) -> bool:
        """Whether this is a second run."""
        return self._at is not None

    def twice(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts for the two runs of a stretch, as `torch.utils.checkpoint` asks for them."""
        kept: list = []
        return self._set(kept, None), self._again(kept)

    @contextmanager
    def _set(self, kept: list, at: int | None) -> Iterator[None]:
        before = self._kept, self._at
        self._kept, self._at = kept, at
        try:
            yield
        finally:
            self._kept, self._at = before

    def _again(self, kept: list) -> AbstractContextManager:
        return _Reusable(lambda: self._set(kept, 0))


class _Reusable(AbstractContextManager):
    """A context that can be entered any number of times."""

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        self._make, self._open = make, []

    def __enter__(self):
        self._open.append(self._make())
        return self._open[-1].__enter__()

    def __exit__(self, *problem):
        return self._open.pop().__exit__(*problem)
