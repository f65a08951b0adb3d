"""The accuracy matrix and everything computed from it."""

from __future__ import annotations

from .matrix import BASE_ROW, AccuracyMatrix
from .metrics import (
    DEFINITIONS,
    Metrics,
    average,
    average_accuracy,
    average_curve,
    backward_transfer,
    forgetting,
    forgetting_by_task,
    forward_transfer,
    last,
    learning_accuracy,
    metrics,
    transfer,
)
from .robustness import Frontier, RobustPoint, effective_robustness, frontier
from .scores import accuracy, balanced_accuracy, confusion, macro_f1
from .sealed import SealedSets

__all__ = [
    "BASE_ROW",
    "DEFINITIONS",
    "AccuracyMatrix",
    "Frontier",
    "Metrics",
    "RobustPoint",
    "SealedSets",
    "accuracy",
    "average",
    "average_accuracy",
    "average_curve",
    "backward_transfer",
    "balanced_accuracy",
    "confusion",
    "effective_robustness",
    "forgetting",
    "forgetting_by_task",
    "forward_transfer",
    "frontier",
    "last",
    "learning_accuracy",
    "macro_f1",
    "metrics",
    "transfer",
]
