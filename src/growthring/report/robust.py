"""Tables and the page of a robustness sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from growthring._io import write_text
from growthring.errors import DataError

from . import _format as fmt
from .figures import NAME_LIMIT, to_json
from .page import environment, plotly
from .robust_figure import frontier_figure, slots

__all__ = ["render_robust_report", "robust_table", "write_robust_report"]

Results = Mapping[str, Any]

_REQUIRED = ("task", "domains", "seeds", "choices", "frontier", "settings")


def robust_table(results: Results) -> Table:
    """Methods side by side, each with its chosen setting: accuracies in percent.

    Args:
        results: What :func:`growthring.recipes.run_robust` returns.

    Returns:
        A table with one line a method: accuracy on the validation and the test rows of the task, the mean over other
        domains, what lies above the frontier (percentage points), ``||W - W0||_F``, time, and each domain: last, since
        a narrow terminal cuts off what stands there.

    Raises:
        DataError: A key is missing.
    """
    _check(results)
    domains = [domain["name"] for domain in results["domains"]]
    table = Table(title=Text(f"{results['task']['name']}: accuracy in %"), title_justify="left")
    table.add_column("method", min_width=12)
    for name in ("ID val", "ID test", "OOD mean", "above", "deviation", "time", *domains):
        table.add_column(Text(fmt.shorten(name, NAME_LIMIT)), justify="right", no_wrap=True)
    several = len(results["seeds"]) > 1
    for row in _chosen(results):
        place = row["curve"][-1]
        above = place["effective_robustness"]
        table.add_row(
            Text(row["title"]),
            fmt.percent(place["id_validation"]),
            _with_spread(place["id_test"], place["id_test_sd"], several),
            Text(_with_spread(place["ood_mean"], place["ood_mean_sd"], several), style="bold"),
            Text(fmt.points(above).replace(fmt.MINUS, "-"), style="green" if (above or 0) > 0 else ""),
            fmt.small(place["deviation"]),
            fmt.duration(place["seconds"]),
            *(fmt.percent(place["ood"][name]) for name in domains),
        )
    return table


def write_robust_report(results: Results, path: str | Path) -> Path:
    """Write the page of a sweep to a file, atomically; it fetches nothing, as that of a run.

    Args:
        results: What :func:`growthring.recipes.run_robust` returns.
        path: Where to write, usually ``report.html``.

    Raises:
        DataError: A key is missing.
    """
    return write_text(path, render_robust_report(results))


def render_robust_report(results: Results) -> str:
    """The page as text; see :func:`write_robust_report`."""
    _check(results)
    figures = {"frontier": frontier_figure(results)}
    view = _view(results)
    template = environment().get_template("robust.html.j2")
    return template.render(**view, figure_data=Markup(to_json(figures)), plotly=Markup(plotly()))


def _check(results: Results) -> None:
    absent = [key for key in _REQUIRED if key not in results]
    if results.get("kind") != "robust" or absent:
        raise DataError(f"these are no results of a robustness sweep: missing {', '.join(absent) or 'kind: robust'}")
    if not results["settings"]:
        raise DataError("these results of a robustness sweep hold no settings: nothing was trained")


def _chosen(results: Results) -> list[Mapping[str, Any]]:
    return [row for row in results["settings"] if row["chosen"]]


def _with_spread(value: float, spread: float, several: bool) -> str:
    return f"{fmt.percent(value)} \u00b1 {fmt.percent(spread)}" if several else fmt.percent(value)


def _view(results: Results) -> dict[str, Any]:
    """Everything that the template shows."""
    task, chosen, seeds = results["task"], _chosen(results), results["seeds"]
    titles = {row["name"]: row["title"] for row in results["settings"]}
    several = len(seeds) > 1
    rows = [_row(row, several) for row in chosen]
    domains = [domain["name"] for domain in results["domains"]]
    return {
        "title": f"{task['name']} \u00b7 growthring report",
        "heading": f"{len(chosen)} {'methods' if len(chosen) > 1 else 'method'} on {task['name']}, and beyond it",
        "facts": [
            ("Model", Path(str(results.get("model", ""))).name or str(results.get("model", ""))),
            ("Trained on", task["name"]),
            ("Other domains", ", ".join(domains)),
            ("Seeds", ", ".join(map(str, seeds))),
        ],
        "cards": _cards(chosen),
        "domains": domains,
        "rows": rows,
        "several": several,
        "start": _start(chosen),
        "legend": [titles[name] for name in slots(results)],
        "baselines": [titles[name] for name in results.get("frontier_of", ()) if name in titles],
        "has_frontier": bool(results["frontier"]),
        "curves": [
            {"title": row["title"], "setting": _setting(row), "chosen": row["chosen"], "places": row["curve"]}
            for row in results["settings"]
        ],
        "choices": [
            {
                "title": titles[choice["name"]],
                "tried": [
                    {"setting": _words(one["setting"]), "score": one["id_validation"], "chosen": i == choice["index"]}
                    for i, one in enumerate(choice["tried"])
                ],
            }
            for choice in results["choices"]
            if len(choice["tried"]) > 1
        ],
        "search_seed": results.get("search_seed"),
        "sizes": [("train", task.get("train")), ("validation", task.get("validation")), ("test", task.get("test"))]
        + [(domain["name"], domain["rows"]) for domain in results["domains"]],
        "versions": list((results.get("versions") or {}).items()),
        "config": json.dumps(results.get("config", {}), indent=2, ensure_ascii=False),
        "version": results.get("growthring_version"),
    }


def _row(row: Mapping[str, Any], several: bool) -> dict[str, Any]:
    place = row["curve"][-1]
    above = place["effective_robustness"]
    return {
        **place,
        "title": row["title"],
        "method": row["method"],
        "baseline": row["baseline"],
        "setting": _setting(row),
        "trained": f"{row['trained']:,}",
        "test": _with_spread(place["id_test"], place["id_test_sd"], several),
        "mean": _with_spread(place["ood_mean"], place["ood_mean_sd"], several),
        "tone": "good" if above is not None and above > 0 else "",
    }


def _start(chosen: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The untouched model with the head that the first method starts from, if that was scored."""
    first = chosen[0]["curve"][0]
    return first if first["alpha"] == 0 else None


def _cards(chosen: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def best(key: str, among: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return max(among, key=lambda row: row["curve"][-1][key])

    inside, outside = best("id_test", chosen), best("ood_mean", chosen)
    made = [
        _card("Best in the domain", inside["curve"][-1]["id_test"], inside["title"]),
        _card("Best in other domains", outside["curve"][-1]["ood_mean"], outside["title"]),
    ]
    others = [r for r in chosen if not r["baseline"] and r["curve"][-1]["effective_robustness"] is not None]
    if others:
        above = best("effective_robustness", others)
        value = above["curve"][-1]["effective_robustness"]
        made.append(
            {
                "label": "Highest above the frontier" if value > 0 else "Nearest to the frontier",
                "value": fmt.points(value),
                "unit": "points",
                "note": above["title"] if value > 0 else f"{above['title']}: no trained model lies above it",
                "tone": "",
                "name": False,
            }
        )
    return made


def _card(label: str, value: float, note: str) -> dict[str, Any]:
    return {"label": label, "value": fmt.percent(value), "unit": "%", "note": note, "tone": "", "name": False}


def _setting(row: Mapping[str, Any]) -> str:
    return _words(row["setting"])


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())
