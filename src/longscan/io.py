"""Files written whole or not at all: a full disk or a kill never costs an earlier checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor


class SaveError(OSError):
    """Writing failed; whatever stood at the path before is untouched."""


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` beside `path`, sync it to disk, then rename it over `path`.

    Raises: SaveError, with the path and the cause, leaving any earlier file as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers make files only their owner can read
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not isinstance(error, OSError) and not full:
            raise
        hint = "the disk is full; free some space" if full else "check the path and permissions"
        raise SaveError(
            f"could not write {path}: {error} ({hint}). Any earlier file there is intact."
        ) from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    write_atomically(path, lambda tmp: save_file(dict(tensors), tmp, metadata))


def save_text(text: str, path: str | Path) -> None:
    """Write UTF-8 text, atomically."""
    write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))
