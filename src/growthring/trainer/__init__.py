"""The trainer of a stream, on ``transformers.Trainer`` and ``accelerate``."""

from .continual import ContinualTrainer
from .result import RunResult

__all__ = ["ContinualTrainer", "RunResult"]
