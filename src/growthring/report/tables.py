"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from . import _format as fmt
from ._results import Results, as_list, certificates_of, matrix_of, promise_kept, title_of, total_seconds, worst
from ._sections import view_name, views_of

__all__ = ["matrix_table", "summary_table"]


def matrix_table(results: Results) -> Table:
    """The accuracy matrix of one run, in percent.

    Args:
        results: The contents of a ``results.json``.

    Returns:
        A table with one line per row of the matrix (``untouched``, then after each task) and one column per task. The
        cell of the task just learned is bold, cells of tasks still to come are dim.

    Raises:
        DataError: When ``results`` lacks a key or holds an impossible matrix.
    """
    (results,) = as_list(results)
    matrix = matrix_of(results)
    table = Table(title=Text(f"{title_of(results)}: accuracy in %"), title_justify="left")
    table.add_column("after", no_wrap=True)
    for task in matrix.tasks:
        table.add_column(Text(task), justify="right")
    for number, (row, values) in enumerate(zip(matrix.rows, matrix.to_list(), strict=True)):
        learned = number if matrix.sequential else (len(values) if number else 0)
        cells = []
        for j, value in enumerate(values):
            style = "bold" if matrix.sequential and j == learned - 1 else "dim" if j >= learned else ""
            cells.append(Text(fmt.percent(value), style=style))
        table.add_row(Text(row), *cells)
    return table


def summary_table(results: Sequence[Results]) -> Table:
    """Methods side by side, in percent.

    Args:
        results: The contents of one or several ``results.json``.

    Returns:
        A table with one line per method: final average (AA), learning accuracy (LA), backward transfer (BWT),
        forgetting, forward transfer (FWT), wall time and the worst leak of any certificate. What is not defined is an
        em dash. Below a method that was scored in several views stands a line for each of them, the main one too: the
        classifier, and whether it was told the task.

    Raises:
        ConfigError: When ``results`` is empty.
        DataError: When one of them lacks a key.
    """
    table = Table(title="Summary, in %", title_justify="left")
    table.add_column("method")
    for name in ("AA", "LA", "BWT", "forgetting", "FWT", "time", "leak"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in as_list(results):
        metrics = one["metrics"]
        leak = worst(one, "leak")
        broken = any(promise_kept(c) is False for c in certificates_of(one))
        table.add_row(
            Text(title_of(one)),
            Text(fmt.percent(metrics.get("aa")), style="bold"),
            fmt.percent(metrics.get("learning_accuracy")),
            _signed(metrics.get("bwt")),
            fmt.percent(metrics.get("forgetting")),
            _signed(metrics.get("fwt")),
            fmt.duration(total_seconds(one)),
            Text(
                fmt.DASH if leak is None else f"{leak:.1e}",
                style="" if leak is None else "red" if broken else "green",
            ),
        )
        for view in views_of(one):
            found = view["metrics"]
            table.add_row(
                Text(f"  {view_name(view)}", style="dim"),
                fmt.percent(found.get("aa")),
                fmt.percent(found.get("learning_accuracy")),
                _signed(found.get("bwt")),
                fmt.percent(found.get("forgetting")),
                _signed(found.get("fwt")),
            )
    return table


def _signed(fraction: float | None) -> str:
    return fmt.points(fraction).replace(fmt.MINUS, "-")  # terminals with small character sets have no true minus
