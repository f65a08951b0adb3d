"""The ID-OOD plane: where every method ends, the way there, and the frontier of the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import Figure, label, make_figure

__all__ = ["frontier_figure", "slots"]

_ROOM = 0.06  # of the range of accuracies, on each side
_LEAST = 2.0  # percentage points that an axis spans at least


def slots(results: Mapping[str, Any]) -> list[str]:
    """Names of the methods in the order of their colours."""
    return list(dict.fromkeys(row["name"] for row in results["settings"]))


def frontier_figure(results: Mapping[str, Any]) -> Figure:
    """OOD against ID accuracy: one line for each setting from its start to the trained model, and the frontier.

    The chosen setting of a method has a full line and a large mark with the standard deviation over seeds where it
    ends; other settings of a baseline are faint.
    """
    names = slots(results)
    rows = sorted(results["settings"], key=lambda row: not row["chosen"])
    traces = [_setting(row, names.index(row["name"])) for row in rows]
    across, up = (_span(rows, key) for key in ("id_test", "ood_mean"))
    if results.get("frontier"):
        traces.append(_frontier(results["frontier"], across))
    layout: Figure = {
        "height": 480,
        "margin": {"l": 60, "r": 24, "t": 16, "b": 52},
        "hovermode": "closest",
        "xaxis": {"range": across, "title": {"text": "accuracy in the domain (test), %"}},
        "yaxis": {"range": up, "title": {"text": "mean accuracy in other domains, %"}},
    }
    return make_figure(traces, layout)


def _setting(row: Mapping[str, Any], slot: int) -> Figure:
    curve, last = row["curve"], row["curve"][-1]
    setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
    ends = [place is last for place in curve]
    made: Figure = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [100 * place["id_test"] for place in curve],
        "y": [100 * place["ood_mean"] for place in curve],
        "name": label(row["title"]),
        "customdata": [[label(row["title"], 60), label(setting, 80), f"{place['alpha']:g}"] for place in curve],
        "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}, place %{customdata[2]}<br>"
        "in the domain %{x:.1f} %, elsewhere %{y:.1f} %<extra></extra>",
        "marker": {
            "size": [(13 if row["chosen"] else 8) if end else 5 for end in ends],
            "symbol": ["diamond" if end else "circle-open" for end in ends],
        },
        "meta": {"role": "line", "slot": slot},
    }
    if not row["chosen"]:
        return made | {"opacity": 0.4}
    for axis, key in (("error_x", "id_test_sd"), ("error_y", "ood_mean_sd")):
        spread = [100 * last[key] if end else 0.0 for end in ends]
        made[axis] = {"type": "data", "array": spread, "thickness": 1, "width": 3, "visible": any(spread)}
    return made


def _frontier(corners: Sequence[Sequence[float]], across: Sequence[float]) -> Figure:
    xs, ys = [100 * x for x, _ in corners], [100 * y for _, y in corners]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [min(across[0], xs[0]), *xs, max(across[1], xs[-1])],
        "y": [ys[0], *ys, ys[-1]],
        "line": {"dash": "dash"},
        "hoverinfo": "skip",
        "meta": {"role": "frontier"},
    }


def _span(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The range of an axis: every place, and the bars of chosen settings."""
    values = [place[key] for row in rows for place in row["curve"]]
    for last in (row["curve"][-1] for row in rows if row["chosen"]):
        values += [last[key] - last[f"{key}_sd"], last[key] + last[f"{key}_sd"]]
    low, high = 100 * min(values), 100 * max(values)
    room = max(_ROOM * (high - low), (_LEAST - (high - low)) / 2, 0.5)
    return [low - room, high + room]
