"""Numbers computed from an accuracy matrix, each with its formula.

Notation: ``a[t][j]`` is the score on task ``j`` after training task ``t`` (both from 0), ``b[j]`` the score of the
untouched base model (row 0 of the matrix), ``N`` the number of tasks learned so far. All numbers are in the unit of
the matrix (fractions of 1); ``None`` means the number is not defined (one task only, a joint run, a cell that was not
measured).

Published tools use one name for different numbers. ``definition=`` selects whose:

- ``growthring``: the formulas of the functions below with their defaults.
- ``avalanche`` (``StreamForgetting``, ``StreamBWT``, ``StreamForwardTransfer`` in
  ``avalanche/evaluation/metrics/forgetting_bwt.py`` and ``forward_transfer.py``): forgetting is the score right after
  a task was learned minus the last score; BWT is its negative; FWT as here, against the first evaluation, made before
  training. ``StreamAccuracy`` averages over examples, so give ``test_sizes`` when test sets differ in size.
- ``mammoth`` (``utils/metrics.py``): forgetting takes the best over *all* rows, the last included, so no task counts
  below zero. Its training loop stores the tasks seen so far and the one to come; every other cell is padded with 0.
  BWT and FWT as here, FWT against its results before training.
- ``gem`` (Lopez-Paz and Ranzato 2017, section 2): ACC, BWT and FWT as here, ``b`` being the scores at initialisation;
  the paper has no forgetting, so it is ``None``. The script released with the paper divides BWT and FWT by ``N``, not
  by ``N - 1``; the paper is followed.

Learning accuracy has one definition everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from growthring.errors import ConfigError, DataError, nearest

from .matrix import AccuracyMatrix

__all__ = [
    "DEFINITIONS",
    "Metrics",
    "average",
    "average_accuracy",
    "average_curve",
    "backward_transfer",
    "forgetting",
    "forgetting_by_task",
    "forward_transfer",
    "last",
    "learning_accuracy",
    "metrics",
    "transfer",
]

DEFINITIONS: tuple[str, ...] = ("growthring", "avalanche", "mammoth", "gem")
"""Names accepted by ``metrics(..., definition=)``."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """The five headline numbers of a stream, in fractions; ``None`` where undefined.

    Attributes:
        aa: Average accuracy at the end (:func:`average_accuracy`).
        bwt: Backward transfer (:func:`backward_transfer`); negative means forgetting.
        fwt: Forward transfer, zero-shot (:func:`forward_transfer`).
        forgetting: Mean drop from the best earlier score (:func:`forgetting`).
        learning_accuracy: Mean score right after learning (:func:`learning_accuracy`).
    """

    aa: float | None
    bwt: float | None
    fwt: float | None
    forgetting: float | None
    learning_accuracy: float | None

    def to_dict(self) -> dict[str, float | None]:
        """The numbers under the keys of ``results.json``."""
        return asdict(self)


def metrics(
    matrix: AccuracyMatrix, definition: str = "growthring", *, test_sizes: Sequence[int] | None = None
) -> Metrics:
    """Compute the five headline numbers.

    Args:
        matrix: The accuracy matrix; of a stream under way, the tasks learned so far are scored.
        definition: One of :data:`DEFINITIONS`; see the top of this module for what differs.
        test_sizes: Number of test examples of each of the ``T`` tasks; used by ``avalanche`` only, whose stream
            accuracy weighs every example alike. Default: every task alike.

    Returns:
        The numbers. For a joint run all but ``aa`` are ``None``.

    Raises:
        ConfigError: For an unknown definition, or ``test_sizes`` with a definition that does not use them.
        DataError: When ``test_sizes`` does not give one positive number a task.
    """
    if definition not in DEFINITIONS:
        raise ConfigError(f"unknown definition {definition!r} of the metrics: {nearest(definition, DEFINITIONS)}")
    if test_sizes is not None and definition != "avalanche":
        raise ConfigError(f"test_sizes is used by definition='avalanche' only, not by {definition!r}")
    backward = backward_transfer(matrix)
    if definition == "growthring":
        lost = forgetting(matrix)
    elif definition == "avalanche":
        lost = None if backward is None else -backward
    elif definition == "mammoth":
        lost = _mammoth_forgetting(matrix)
    else:
        lost = None
    return Metrics(
        aa=average_accuracy(matrix, test_sizes=test_sizes),
        bwt=backward,
        fwt=forward_transfer(matrix),
        forgetting=lost,
        learning_accuracy=learning_accuracy(matrix),
    )


def average_accuracy(matrix: AccuracyMatrix, *, test_sizes: Sequence[int] | None = None) -> float | None:
    """Mean score over the tasks learned so far, at the end: ``AA = mean_{j<N} a[N-1][j]``.

    Args:
        matrix: The accuracy matrix. For a joint run the mean of its last row.
        test_sizes: Weights ``n_j`` of the ``T`` tasks: ``sum_j n_j a[N-1][j] / sum_j n_j``. Default: all alike.

    Returns:
        A fraction; ``None`` before any training or when a cell was not measured.

    Raises:
        DataError: When ``test_sizes`` does not give one positive number a task.
    """
    n = matrix.trained
    if n == 0:
        return None
    row = matrix.values[-1, :n]
    if test_sizes is None:
        return _mean(row)
    sizes = np.asarray(test_sizes, dtype=np.float64)
    if sizes.shape != (len(matrix.tasks),) or not (sizes > 0).all():
        raise DataError(f"test_sizes must hold one positive number for each of the {len(matrix.tasks)} tasks")
    return _mean(row * sizes[:n] * (n / sizes[:n].sum()))


def learning_accuracy(matrix: AccuracyMatrix) -> float | None:
    """Mean score on each task right after it was learned: ``LA = mean_{j<N} a[j][j]``.

    Returns:
        A fraction; ``None`` for a joint run, before any training, or when a cell was not measured.
    """
    return _mean(np.diagonal(_after(matrix)))


def backward_transfer(matrix: AccuracyMatrix) -> float | None:
    """Change of earlier tasks since they were learned: ``BWT = mean_{j<N-1} (a[N-1][j] - a[j][j])``.

    Returns:
        A signed fraction, negative when tasks were forgotten; ``None`` with fewer than two learned tasks.
    """
    a = _after(matrix)
    return _mean((a[-1] - np.diagonal(a))[:-1]) if len(a) > 1 else None


def forgetting_by_task(matrix: AccuracyMatrix, *, include_last: bool = False) -> list[float | None]:
    """Drop of each task from its best score: ``F_j = max_t a[t][j] - a[N-1][j]``.

    The maximum runs over ``t < N-1`` (Chaudhry et al. 2018), so that ``F_j`` is negative when a task ended better
    than it ever was, or over ``t <= N-1`` with ``include_last``, so that it never is. Rows before the task was
    learned count (a zero-shot score can be lost too); row 0, the untouched base, and cells not measured do not.

    Args:
        matrix: The accuracy matrix.
        include_last: Whether the maximum includes the last row.

    Returns:
        One signed fraction for each learned task but the last; empty with fewer than two learned tasks.
    """
    a = _after(matrix)
    earlier = a if include_last else a[:-1]
    drops: list[float | None] = []
    for j in range(len(a) - 1):
        measured = earlier[:, j][~np.isnan(earlier[:, j])]
        drops.append(_mean(measured.max(keepdims=True) - a[-1, j]) if len(measured) else None)
    return drops


def forgetting(matrix: AccuracyMatrix, *, include_last: bool = False) -> float | None:
    """Mean drop from the best earlier score: ``F = mean_{j<N-1} (max_{t<N-1} a[t][j] - a[N-1][j])``.

    Args:
        matrix: The accuracy matrix.
        include_last: Let the maximum run to the last row too (``t <= N-1``); see :func:`forgetting_by_task`.

    Returns:
        A signed fraction, positive when tasks were forgotten; ``None`` with fewer than two learned tasks.
    """
    drops = forgetting_by_task(matrix, include_last=include_last)
    return _mean(np.array([np.nan if d is None else d for d in drops]))


def forward_transfer(matrix: AccuracyMatrix) -> float | None:
    """Zero-shot gain of each task just before it is learned: ``FWT = mean_{0<j<N} (a[j-1][j] - b[j])``.

    Returns:
        A signed fraction; ``None`` with fewer than two learned tasks or when a cell above the diagonal was not
        measured.
    """
    a = _after(matrix)
    if len(a) < 2:
        return None
    return _mean(np.diagonal(a, offset=1) - matrix.values[0, 1 : len(a)])


def average_curve(matrix: AccuracyMatrix) -> float | None:
    """Average incremental accuracy: ``Abar = mean_{t<N} mean_{j<=t} a[t][j]``.

    Some tools print this number as "average accuracy": it is the mean of the curve, not its end.

    Returns:
        A fraction; ``None`` for a joint run or when a needed cell was not measured.
    """
    a = _after(matrix)
    return _mean(np.array([a[t, : t + 1].mean() for t in range(len(a))]))


def transfer(matrix: AccuracyMatrix) -> float | None:
    """MTIL's Transfer: zero-shot score of tasks to come, ``mean_{0<j<N} mean_{t<j} a[t][j]``.

    As in ZSCL (Zheng et al. 2023). Row 0 does not enter: it is the comparison, not a part.

    Returns:
        A fraction; ``None`` with fewer than two learned tasks or when a cell above the diagonal was not measured.
    """
    a = _after(matrix)
    return _mean(np.array([a[:j, j].mean() for j in range(1, len(a))]))


def average(matrix: AccuracyMatrix) -> float | None:
    """MTIL's Avg: the mean of all cells below row 0, ``mean_{t<N} mean_{j<N} a[t][j]`` (ZSCL, Zheng et al. 2023).

    Returns:
        A fraction; ``None`` for a joint run or when a cell was not measured.
    """
    return _mean(_after(matrix))


def last(matrix: AccuracyMatrix) -> float | None:
    """MTIL's Last: the mean of the last row, ``mean_{j<N} a[N-1][j]``; the same number as :func:`average_accuracy`."""
    return average_accuracy(matrix)


def _after(matrix: AccuracyMatrix) -> Array:
    """``a[t][j]`` as an ``(N, N)`` array, without row 0; empty for a joint run."""
    n = matrix.trained if matrix.sequential else 0
    return matrix.values[1 : n + 1, :n] if n else np.empty((0, 0))


def _mammoth_forgetting(matrix: AccuracyMatrix) -> float | None:
    a = _after(matrix)
    n = len(a)
    if n < 2:
        return None
    t, j = np.indices((n, n))
    stored = np.where((j <= t + 1) & ~np.isnan(a), a, 0.0)
    return _mean((stored.max(axis=0) - a[-1])[:-1])


def _mean(values: Array) -> float | None:
    """The mean, or ``None`` when there is nothing to average or a value is missing."""
    if values.size == 0:
        return None
    mean = float(np.mean(values))
    return None if np.isnan(mean) else mean
