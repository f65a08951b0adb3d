"""Scores of one test set, all from one table of counts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from growthring.errors import DataError

__all__ = ["accuracy", "balanced_accuracy", "confusion", "macro_f1"]

Counts = NDArray[np.int64]


def confusion(true: Sequence[Hashable], predicted: Sequence[Hashable], classes: int | Sequence[Hashable]) -> Counts:
    """Count how often each true class was predicted as each class.

    Args:
        true: True class of each of the ``n`` examples.
        predicted: Predicted class of each example.
        classes: The ``C`` classes in the order of the table, or their number when classes are ``0..C-1``.

    Returns:
        ``(C, C)`` int64 counts; row: true class, column: predicted class. The entries sum to ``n``.

    Raises:
        DataError: When the two lists differ in length or hold a class that is not in ``classes``.
    """
    names: Sequence[Hashable] = range(classes) if isinstance(classes, int) else classes
    index = {name: i for i, name in enumerate(names)}
    if len(index) != len(names):
        raise DataError(f"classes must differ: {len(names)} given, {len(index)} distinct")
    if len(true) != len(predicted):
        raise DataError(f"{len(true)} true classes for {len(predicted)} predictions")
    counts = np.zeros((len(index), len(index)), dtype=np.int64)
    for row, (t, p) in enumerate(zip(true, predicted, strict=True)):
        try:
            counts[index[t], index[p]] += 1
        except KeyError as error:
            side = "true" if t not in index else "predicted"
            raise DataError(f"example {row}: {side} class {error.args[0]!r} is not among the classes") from None
    return counts


def accuracy(counts: Counts) -> float:
    """Share of examples predicted right: ``sum_c n_cc / n``.

    Args:
        counts: ``(C, C)`` counts from :func:`confusion`.

    Returns:
        A fraction.

    Raises:
        DataError: When there are no examples.
    """
    return float(np.trace(counts) / _total(counts))


def balanced_accuracy(counts: Counts) -> float:
    """Mean recall over the classes: ``mean_c n_cc / n_c.``; classes without a test example are left out of the mean.

    Args:
        counts: ``(C, C)`` counts from :func:`confusion`.

    Returns:
        A fraction.

    Raises:
        DataError: When there are no examples.
    """
    _total(counts)
    support = counts.sum(axis=1)
    present = support > 0
    return float((np.diagonal(counts)[present] / support[present]).mean())


def macro_f1(counts: Counts) -> float:
    """Mean F1 over the classes: ``F1_c = 2 n_cc / (n_c. + n_.c)``, the harmonic mean of precision and recall.

    Classes without a test example are left out of the mean. A wrong prediction of such a class still costs: it lowers
    the recall of the true class. (scikit-learn instead averages in a zero for a class that was predicted but never
    true.)

    Args:
        counts: ``(C, C)`` counts from :func:`confusion`.

    Returns:
        A fraction.

    Raises:
        DataError: When there are no examples.
    """
    _total(counts)
    support = counts.sum(axis=1)
    present = support > 0
    sizes = (support + counts.sum(axis=0))[present]
    return float((2.0 * np.diagonal(counts)[present] / sizes).mean())


def _total(counts: Counts) -> int:
    total = int(counts.sum())
    if total == 0:
        raise DataError("no examples were counted: a score of an empty test set is not defined")
    return total
