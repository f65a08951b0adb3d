"""The trainer of a stream, on ``transformers.Trainer`` and ``accelerate``."""

from .align import align_projections
from .analytic import PrototypeClassifier, RidgeClassifier
from .continual import ContinualTrainer
from .result import RunResult, View
from .vision import ImagePreprocessor

__all__ = [
    "ContinualTrainer",
    "ImagePreprocessor",
    "PrototypeClassifier",
    "RidgeClassifier",
    "RunResult",
    "View",
    "align_projections",
]
