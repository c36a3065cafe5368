"""longscan: linear-time sequence models, one scan from the recurrence to a served model.

ops        the recurrences, each a function (inputs, state) -> (outputs, state)
mixers     the architectures' layers, by name in the registry
models     language models made of any pattern of mixers
algebra    segment maps: what chunks, segments and shards of a sequence have in common
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives. Loaded on first use, so that `import longscan` stays light.
_HOME = {
    "State": "longscan.state",
    "SegmentMap": "longscan.algebra",
    "compose": "longscan.algebra",
    "decay": "longscan.ops.decay",
    "delta": "longscan.ops.delta",
    "selective": "longscan.ops.selective",
    "attention": "longscan.ops.attention",
    "conv": "longscan.ops.conv",
    "backend_of": "longscan.ops.dispatch",
    "linear_cross_entropy": "longscan.ops.loss",
    "Mixer": "longscan.mixers.base",
    "Entry": "longscan.registry",
    "register": "longscan.registry",
    "mixer_class": "longscan.registry",
    "names": "longscan.registry",
    "LanguageModel": "longscan.models.language_model",
    "LanguageModelConfig": "longscan.models.config",
    "preset": "longscan.models.presets",
    "from_pretrained": "longscan.pretrained.models",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from longscan.algebra import SegmentMap, compose
    from longscan.mixers.base import Mixer
    from longscan.models.config import LanguageModelConfig
    from longscan.models.language_model import LanguageModel
    from longscan.models.presets import preset
    from longscan.ops.attention import attention
    from longscan.ops.conv import conv
    from longscan.ops.decay import decay
    from longscan.ops.delta import delta
    from longscan.ops.dispatch import backend_of
    from longscan.ops.loss import linear_cross_entropy
    from longscan.ops.selective import selective
    from longscan.pretrained.models import from_pretrained
    from longscan.registry import Entry, mixer_class, names, register
    from longscan.state import State


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longscan' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
