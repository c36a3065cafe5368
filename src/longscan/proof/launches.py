"""Which kernels ran, and which entries of the launch tables they used."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from longscan.proof.kernels import KERNELS


class _Table(dict):
    """A launch table that tells its watchers which entries were looked up."""

    watchers: list[set]

    def _used(self, key: Any) -> None:
        for used in self.watchers:
            used.add(key)

    def __getitem__(self, key: Any) -> Any:
        self._used(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            self._used(key)
        return super().get(key, default)

    def _searched(self, items: Iterable) -> Iterator:
        # A search that ends here has chosen this entry.
        for key, item in zip(super().keys(), items, strict=True):
            try:
                yield item
            except GeneratorExit:
                self._used(key)
                raise

    def __iter__(self) -> Iterator:
        return self._searched(super().keys())

    def keys(self) -> Any:
        return self._searched(super().keys())

    def values(self) -> Any:
        return self._searched(super().values())

    def items(self) -> Any:
        return self._searched(super().items())


class Launches:
    """What a stretch of code launched.

    count: launches of longscan's kernels; names: of the kernels; used: for each table, as
    "module.TABLE", the keys that were looked up.
    """

    def __init__(self, dry: bool = False) -> None:
        """dry: kernels are counted but not run."""
        self.count, self.dry = 0, dry
        self.names: set[str] = set()
        self.used: dict[str, set] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what happens in here, in launchers that are imported already."""
        if find_spec("triton") is None:
            yield
            return
        base = import_module("triton.runtime.jit").KernelInterface
        plain = base.__getitem__

        def item(kernel: Any, grid: Any) -> Any:
            launch = plain(kernel, grid)
            if not kernel.fn.__module__.startswith("longscan.kernels"):
                return launch
            self.count += 1
            self.names.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")
            return (lambda *args, **more: None) if self.dry else launch

        kept = []
        for module, name, table in tables():
            if isinstance(table, _Table):
                watched = table
            else:
                watched = _Table(table)
                watched.watchers = []
                kept.append((module, name, table))
                setattr(module, name, watched)
            used = self.used.setdefault(f"{module.__name__}.{name}", set())
            watched.watchers = [*watched.watchers, used]
        base.__getitem__ = item
        try:
            yield
        finally:
            base.__getitem__ = plain
            for module, name, table in kept:
                setattr(module, name, table)


def tables(launcher: str | None = None) -> list[tuple[Any, str, dict]]:
    """(module, name, table) of the launch tables of the launchers imported so far."""
    found = []
    for path, module in list(sys.modules.items()):
        if not path.startswith("longscan.ops._") or not path.endswith("_fused"):
            continue
        if launcher is not None and path != f"longscan.ops._{launcher}_fused":
            continue
        for name, value in list(vars(module).items()):
            if "LAUNCHES" in name and isinstance(value, dict):
                found.append((module, name, value))
    return found


def unused(kernel: str, used: dict[str, set]) -> dict[str, list]:
    """Entries of the kernel's launch tables that no case looked up."""
    launcher = KERNELS[kernel].module or kernel
    import_module(f"longscan.ops._{launcher}_fused")
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": left
        for module, name, table in tables(launcher)
        if (left := [k for k in table if k not in used.get(f"{module.__name__}.{name}", ())])
    }
