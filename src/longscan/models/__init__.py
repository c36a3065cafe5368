"""Models, written once for every mixer."""

from longscan.models.block import Block, RMSNorm, SwiGLU, build_mixer
from longscan.models.checkpoint import CheckpointError
from longscan.models.config import LanguageModelConfig, parse_pattern
from longscan.models.language_model import LanguageModel
from longscan.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Block",
    "CheckpointError",
    "LanguageModel",
    "LanguageModelConfig",
    "RMSNorm",
    "SwiGLU",
    "build_mixer",
    "parse_pattern",
    "preset",
]
