"""The accuracy matrix of a stream: one row per moment, one column per task, seen or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from growthring.errors import DataError

__all__ = ["BASE_ROW", "AccuracyMatrix"]

BASE_ROW = "untouched"
"""Name of row 0: the base model before any training."""

Cells: TypeAlias = "Sequence[float | None] | NDArray[np.float64]"


class AccuracyMatrix:
    """Scores of every task at every task boundary.

    Row 0 is the untouched base model. In a sequential run row ``t + 1`` is the model after training task ``t``
    and carries that task's name; a joint run has the two rows ``untouched`` and ``joint``. A cell that was not
    measured is NaN in the array and ``None`` in lists and JSON.

    Args:
        tasks: Names of the ``T`` tasks in the order of the stream; unique.
        rows: Names of the ``R`` rows; unique. Default: ``untouched`` and then the task names, as many as ``values``
            has.
        values: ``R`` rows of ``T`` scores as fractions between 0 and 1 (``None`` or NaN where not measured). Default:
            none.

    Raises:
        DataError: When names repeat, a row has the wrong length, or a score is not a fraction.

    Example:
        >>> matrix = AccuracyMatrix(["trec", "bbc"])
        >>> matrix.append_row("untouched", [0.25, 0.5])
        >>> matrix.append_row("trec", [0.75, 0.5])
        >>> matrix.to_list()
        [[0.25, 0.5], [0.75, 0.5]]
    """

    def __init__(
        self, tasks: Sequence[str], rows: Sequence[str] | None = None, values: Sequence[Cells] | None = None
    ) -> None:
        if not tasks:
            raise DataError("an accuracy matrix needs at least one task; got none")
        self._tasks = tuple(tasks)
        _unique("task", self._tasks)
        if BASE_ROW in self._tasks:
            raise DataError(f"no task may be called {BASE_ROW!r}: row 0 has that name; rename the task")
        self._rows: list[str] = []
        self._values: list[NDArray[np.float64]] = []
        given = [] if values is None else list(values)
        if rows is None:
            names = (BASE_ROW, *self._tasks)
            if len(given) > len(names):
                raise DataError(f"{len(given)} rows for {len(self._tasks)} tasks: give the row names with rows=")
            rows = names[: len(given)]
        if len(rows) != len(given):
            raise DataError(f"{len(rows)} row names ({', '.join(rows)}) for {len(given)} rows of values")
        for name, row in zip(rows, given, strict=True):
            self.append_row(name, row)

    @classmethod
    def from_list(cls, tasks: Sequence[str], rows: Sequence[str], values: Sequence[Cells]) -> AccuracyMatrix:
        """Rebuild a matrix from what :meth:`to_list` gave (the ``rows`` and ``matrix`` of a ``results.json``)."""
        return cls(tasks, rows, values)

    def append_row(self, name: str, values: Cells) -> None:
        """Add one row below the others.

        Args:
            name: ``untouched`` for the base model, else the task just trained (or ``joint``).
            values: ``T`` fractions, one a task; ``None`` or NaN where not measured.

        Raises:
            DataError: When the name is taken, the length is not ``T``, a score is outside 0..1, or row 0 is a task's.
        """
        if not self._rows and name in self._tasks:
            raise DataError(
                f"row 0 is the untouched base, not task {name!r}: append {BASE_ROW!r} first (None where not measured)"
            )
        if name in self._rows:
            raise DataError(f"row {name!r} is already in the matrix; rows: {', '.join(self._rows)}")
        try:
            row = np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"row {name!r} must be a flat list of numbers or None: {error}") from error
        if len(row) != len(self._tasks):
            raise DataError(f"row {name!r} has {len(row)} values for {len(self._tasks)} tasks")
        for task, value in zip(self._tasks, row, strict=True):
            if not np.isnan(value) and not 0.0 <= value <= 1.0:
                hint = "; scores are fractions: divide percent by 100" if 1.0 < value <= 100.0 else ""
                raise DataError(f"row {name!r}, task {task!r}: {value:g} is not between 0 and 1{hint}")
        row.flags.writeable = False
        self._rows.append(name)
        self._values.append(row)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the ``T`` columns."""
        return self._tasks

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the ``R`` rows."""
        return tuple(self._rows)

    @property
    def values(self) -> NDArray[np.float64]:
        """All cells as a new ``(R, T)`` float64 array of fractions, NaN where not measured."""
        return np.stack(self._values) if self._values else np.empty((0, len(self._tasks)))

    @property
    def sequential(self) -> bool:
        """Whether the rows below the base follow the stream: task 0, task 1, ... (false for a joint run)."""
        return tuple(self._rows[1:]) == self._tasks[: max(len(self._rows) - 1, 0)]

    @property
    def trained(self) -> int:
        """Number of tasks learned so far, ``N``: the rows below the base, or every task for a joint run."""
        below = max(len(self._rows) - 1, 0)
        return below if self.sequential else len(self._tasks)

    def to_list(self) -> list[list[float | None]]:
        """All cells as nested lists for JSON: fractions, ``None`` where not measured."""
        return [[None if np.isnan(v) else float(v) for v in row] for row in self._values]

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        return (self.tasks, self.rows, self.to_list()) == (other.tasks, other.rows, other.to_list())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AccuracyMatrix({len(self._rows)} rows x {len(self._tasks)} tasks, rows={self._rows})"


def _unique(what: str, names: Sequence[str]) -> None:
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise DataError(f"{what} names must differ; repeated: {', '.join(repeated)}")
