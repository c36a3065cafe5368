"""longscan: linear-time sequence models, one scan from the recurrence to a served model."""

__version__ = "0.1.0"
