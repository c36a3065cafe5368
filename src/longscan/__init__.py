"""longscan: linear-time sequence models, one scan from the recurrence to a served model.

ops        the recurrences, each a function (inputs, state) -> (outputs, state)
mixers     the architectures' layers, by name in the registry
models     language models and classifiers made of any pattern of mixers
nn         the same mixers with the face of torch.nn.LSTM
algebra    segment maps: what chunks, segments and shards of a sequence have in common
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module it comes from. Loaded on first use, so that `import longscan` is light.
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
    "Stack": "longscan.models.stack",
    "StackConfig": "longscan.models.config",
    "LanguageModel": "longscan.models.language_model",
    "LanguageModelConfig": "longscan.models.config",
    "Classifier": "longscan.models.classifier",
    "ClassifierConfig": "longscan.models.classifier",
    "Bidirectional": "longscan.models.bidirectional",
    "preset": "longscan.models.presets",
    "from_pretrained": "longscan.pretrained.models",
    "check_causal": "longscan.verify",
    "nn": "longscan",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from longscan import nn
    from longscan.algebra import SegmentMap, compose
    from longscan.mixers.base import Mixer
    from longscan.models.bidirectional import Bidirectional
    from longscan.models.classifier import Classifier, ClassifierConfig
    from longscan.models.config import LanguageModelConfig, StackConfig
    from longscan.models.language_model import LanguageModel
    from longscan.models.presets import preset
    from longscan.models.stack import Stack
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
    from longscan.verify import check_causal


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longscan' has no attribute {name!r}")
    home = _HOME[name]
    if home == __name__:  # a module of this package
        return importlib.import_module(f"{home}.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
