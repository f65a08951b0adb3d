"""The trainer of a stream, on ``transformers.Trainer`` and ``accelerate``."""

from .align import align_projections
from .analytic import PrototypeClassifier, RidgeClassifier
from .continual import ContinualTrainer
from .probe import LinearProbe, fit_linear_probe
from .result import RunResult, View
from .robust import RobustTrainer
from .vision import ImagePreprocessor

__all__ = [
    "ContinualTrainer",
    "ImagePreprocessor",
    "LinearProbe",
    "PrototypeClassifier",
    "RidgeClassifier",
    "RobustTrainer",
    "RunResult",
    "View",
    "align_projections",
    "fit_linear_probe",
]
