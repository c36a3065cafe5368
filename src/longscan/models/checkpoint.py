"""A model as a folder: config.json and model.safetensors, and clear words when they do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longscan.io import save_tensors, save_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1


class CheckpointError(ValueError):
    """A folder does not hold the model asked for, or holds it damaged."""


def save_checkpoint(
    folder: str | Path, architecture: str, config: Mapping[str, Any], module: nn.Module
) -> None:
    """Write config.json and model.safetensors, each whole or not at all.

    Raises: longscan.io.SaveError, leaving earlier files as they were.
    """
    folder = Path(folder)
    tensors = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
    # Weights first: they are what a full disk stops, and then the old pair is still whole.
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    data = {"architecture": architecture, "format": FORMAT, **config}
    save_text(json.dumps(data, indent=2) + "\n", folder / CONFIG)


def read_config(folder: str | Path, architecture: str) -> dict[str, Any]:
    """The config in a folder written by `save_checkpoint`.

    Raises: CheckpointError if there is none, or it is of another architecture or format.
    """
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no checkpoint: there is no {path.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a checkpoint's config")
    found = data.pop("architecture", None)
    if found != architecture:
        # Hugging Face writes a list under another key; naming it helps.
        found = found or ", ".join(data.get("architectures") or []) or "an unknown architecture"
        raise CheckpointError(
            f"{folder} holds a checkpoint of {found}, not of {architecture}; checkpoints of other "
            "libraries must be converted first"
        )
    written = data.pop("format", None)
    if written != FORMAT:
        raise CheckpointError(
            f"{path} has format {written!r}, and this longscan reads format {FORMAT}; "
            "use the version that wrote it, or a newer one"
        )
    return data


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module's parameters and buffers, all of them or none.

    Raises: CheckpointError naming what is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    wrong = [
        f"{k} (here {list(own[k].shape)}, there {list(tensors[k].shape)})"
        for k in own
        if k in tensors and own[k].shape != tensors[k].shape
    ]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", [k for k in own if k not in tensors]),
            ("unexpected", [k for k in tensors if k not in own]),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit this model. {'; '.join(problems)}")
    with torch.no_grad():
        for k, v in own.items():
            v.copy_(tensors[k])


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors in a folder written by `save_checkpoint`.

    Raises: CheckpointError if the file is absent or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    try:
        return load_file(str(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no weights: there is no {path.name}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


__all__ = ["CheckpointError", "load_weights", "read_config", "read_weights", "save_checkpoint"]
