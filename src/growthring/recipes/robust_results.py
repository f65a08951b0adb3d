"""From scored models to what a robustness sweep says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growthring.evaluation import Frontier, RobustPoint, effective_robustness, frontier

from .robust_config import Candidate, RobustConfig

if TYPE_CHECKING:
    from growthring.streams import EvaluationSet, Task

__all__ = ["FORMAT_VERSION", "summarise"]

FORMAT_VERSION = 1

Scored = Sequence[tuple[Candidate, Sequence[RobustPoint]]]


def summarise(
    config: RobustConfig,
    task: Task,
    sets: Mapping[str, EvaluationSet],
    scored: Scored,
    choices: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What ``results.json`` of a sweep holds.

    Args:
        config: The sweep.
        task: The task that was trained on.
        sets: The other domains.
        scored: For every training its candidate and its points, one for each place between start and end.
        choices: What was chosen for each method.

    Returns:
        Plain values: ``settings`` has a row for every method and setting, its means and standard deviations over
        seeds at every ``alpha``, and how far each lies above the frontier; ``points`` every single model.
    """
    from growthring.trainer.result import versions

    rows = [_setting(config, choices, candidate, list(several)) for candidate, several in _by_candidate(scored)]
    baseline = _frontier(rows)
    for row in rows:
        for place in row["curve"]:
            above = None
            if baseline is not None:
                above = effective_robustness((place["id_test"], place["ood_mean"]), baseline)
            place["effective_robustness"] = above
    return {
        "format_version": FORMAT_VERSION,
        "growthring_version": versions()["growthring"],
        "kind": "robust",
        "model": config.model,
        "task": {"name": task.name, "labels": list(task.labels), **{s: len(r) for s, r in task.splits().items()}},
        "domains": [{"name": name, "rows": len(loaded)} for name, loaded in sets.items()],
        "seeds": list(config.seeds),
        "search_seed": config.search_seed,
        "choices": [dict(choice) for choice in choices],
        "frontier": [list(corner) for corner in baseline.corners] if baseline is not None else None,
        "frontier_of": list(config.frontier),
        "settings": rows,
        "points": [
            {"name": config.methods[candidate.entry].key, **point.to_dict()}
            for candidate, points in scored
            for point in points
        ],
        "versions": versions(),
        "config": config.resolved(),
    }


def _by_candidate(scored: Scored) -> list[tuple[Candidate, list[Sequence[RobustPoint]]]]:
    """The trainings of each candidate, all seeds together."""
    found: dict[int, tuple[Candidate, list[Sequence[RobustPoint]]]] = {}
    for candidate, points in scored:
        found.setdefault(id(candidate), (candidate, []))[1].append(points)
    return list(found.values())


def _setting(
    config: RobustConfig,
    choices: Sequence[Mapping[str, Any]],
    candidate: Candidate,
    seeds: Sequence[Sequence[RobustPoint]],
) -> dict[str, Any]:
    entry, choice = config.methods[candidate.entry], choices[candidate.entry]
    curve = [_mean(list(points)) for points in zip(*seeds, strict=True)]
    return {
        "name": entry.key,
        "method": entry.method,
        "title": candidate.config.title,
        "setting": candidate.chosen,
        "chosen": candidate.chosen == choice["chosen"],
        "baseline": entry.key in config.frontier,
        "trained": seeds[0][-1].trained,
        "curve": curve,
    }


def _mean(points: Sequence[RobustPoint]) -> dict[str, Any]:
    """Means over seeds at one place, and the standard deviation of the accuracies (of a sample; 0 for one seed)."""
    tests = [_known(p.id_test) for p in points]
    means = [_known(p.ood_mean) for p in points]
    deviations = [p.deviation for p in points if p.deviation is not None]
    return {
        "alpha": points[0].alpha,
        "id_validation": _average(p.id_validation for p in points),
        "id_test": _average(tests),
        "id_test_sd": _spread(tests),
        "ood": {name: _average(p.ood[name] for p in points) for name in points[0].ood},
        "ood_mean": _average(means),
        "ood_mean_sd": _spread(means),
        "deviation": _average(deviations) if len(deviations) == len(points) else None,
        "seconds": _average(p.seconds for p in points),
    }


def _frontier(rows: Sequence[Mapping[str, Any]]) -> Frontier | None:
    """That of the baselines' means over seeds: every setting, every place on its curve."""
    places = [(p["id_test"], p["ood_mean"]) for row in rows if row["baseline"] for p in row["curve"]]
    return frontier(places) if places else None


def _average(values: Iterable[float]) -> float:
    several = list(values)
    return math.fsum(several) / len(several)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _known(value: float | None) -> float:
    assert value is not None  # every point of a sweep is scored everywhere
    return value
