"""Reading ``results.json`` dictionaries: what must be there, and what is derived from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from growthring.errors import ConfigError, DataError
from growthring.evaluation import AccuracyMatrix

Results: TypeAlias = Mapping[str, Any]

REQUIRED = ("method", "tasks", "rows", "matrix", "metrics")


def as_list(results: Sequence[Results] | Results) -> list[Results]:
    """One or several results as a list, each checked for the keys without which nothing can be shown.

    Raises:
        ConfigError: When there are none.
        DataError: When a key is missing.
    """
    many = [results] if isinstance(results, Mapping) else list(results)
    if not many:
        raise ConfigError("no results to report: give at least one results.json")
    for number, one in enumerate(many):
        absent = [key for key in REQUIRED if key not in one]
        if absent:
            raise DataError(f"results {number} ({one.get('method', 'no method')}): missing {', '.join(absent)}")
    return many


LEAK_LIMIT = 1e-5
"""Where a certificate does not judge itself, a larger share of an update inside the protected space breaks it."""


def promise_kept(certificate: Mapping[str, Any]) -> bool | None:
    """Whether a certificate's guarantee held: the guard's own judgement, else the leak against 1e-5.

    Returns:
        ``None`` when nothing was protected yet, the leak was not measured, or nothing was bounded.
    """
    leak, judged = certificate.get("leak"), certificate.get("kept")
    if leak is None:
        return bool(judged) if certificate.get("deviations") and judged is not None else None
    return bool(leak <= LEAK_LIMIT) if judged is None else bool(judged)


def title_of(results: Results) -> str:
    """The human name of the method."""
    return str(results.get("title") or results["method"])


def task_names(results: Results) -> list[str]:
    """Names of the tasks in the order of the stream."""
    return [str(task["name"]) for task in results["tasks"]]


def matrix_of(results: Results) -> AccuracyMatrix:
    """The accuracy matrix of a run."""
    return AccuracyMatrix.from_list(task_names(results), [str(r) for r in results["rows"]], results["matrix"])


def certificates_of(results: Results) -> list[Mapping[str, Any]]:
    """The certificates of a run, one a guard and task; empty for an unguarded method."""
    return list(results.get("certificates") or [])


def worst(results: Results, key: str) -> float | None:
    """The largest ``leak`` or ``output_change`` of all certificates; ``None`` when none was measured."""
    values = [float(c[key]) for c in certificates_of(results) if c.get(key) is not None]
    if any(math.isnan(value) for value in values):
        return math.nan  # never let a broken measurement pass for a small one
    return max(values, default=None)


def total_seconds(results: Results) -> float | None:
    """Wall time of the whole run in seconds."""
    seconds = (results.get("timings") or {}).get("total_seconds")
    return None if seconds is None else float(seconds)
