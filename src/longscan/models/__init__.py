"""Models, written once for every mixer."""

from longscan.models.bidirectional import Bidirectional
from longscan.models.block import Block, GatedMLP, LayerNorm, RMSNorm, build_mixer
from longscan.models.checkpoint import CheckpointError
from longscan.models.classifier import Classifier, ClassifierConfig
from longscan.models.config import LanguageModelConfig, StackConfig, parse_pattern
from longscan.models.language_model import LanguageModel
from longscan.models.presets import PRESETS, preset
from longscan.models.stack import Stack, parameter_groups

__all__ = [
    "PRESETS",
    "Bidirectional",
    "Block",
    "CheckpointError",
    "Classifier",
    "ClassifierConfig",
    "GatedMLP",
    "LanguageModel",
    "LanguageModelConfig",
    "LayerNorm",
    "RMSNorm",
    "Stack",
    "StackConfig",
    "build_mixer",
    "parameter_groups",
    "parse_pattern",
    "preset",
]
