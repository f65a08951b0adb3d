"""Parts of the page and of the tables that not every run has: other views, protected tensors, zero-shot figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from growthring.evaluation import AccuracyMatrix

from ._results import Results, matrix_of, task_names

Section = dict[str, Any]

CLASSIFIERS = {"head": "trained head", "prototype": "nearest class mean", "ridge": "ridge on random features"}
TOLD = {"classes seen": "nothing", "task": "the task"}
TREATMENTS = {
    "protected": "protected: moves only where earlier tasks do not look",
    "held": "held: keeps its value from the second task on",
    "frozen": "frozen: never trains",
    "free": "free: nothing keeps it",
}


def view_name(view: Mapping[str, Any]) -> str:
    """Short name of a view: ``"ridge"``, or ``"ridge, task told"``."""
    return f"{view.get('classifier')}, task told" if view.get("given") == "task" else str(view.get("classifier"))


def views_of(results: Results) -> list[Mapping[str, Any]]:
    """The views of a run that have figures, the main one first; empty if there is no other."""
    views = [view for view in results.get("views") or [] if view.get("matrix")]
    return views if len(views) > 1 else []


def told_average(results: Results) -> float | None:
    """Final average with the task told, by the classifier of the main view, where that is not the main view itself."""
    views = views_of(results)
    for view in views[1:]:
        if view.get("classifier") == views[0].get("classifier") and view.get("given") == "task":
            return _number(view["metrics"].get("aa"))
    return None


def view_rows(results: Results) -> list[Section]:
    """One row for each view, and its accuracy on every task in the end.

    Raises:
        DataError: When a view's matrix does not fit the tasks.
    """
    main = matrix_of(results)
    rows = []
    for view in views_of(results):
        matrix = AccuracyMatrix.from_list(task_names(results), main.rows, view["matrix"])
        rows.append(
            {
                "classifier": CLASSIFIERS.get(str(view.get("classifier")), str(view.get("classifier"))),
                "told": TOLD.get(str(view.get("given")), str(view.get("given"))),
                "name": view_name(view),
                "metrics": view["metrics"],
                "last": matrix.to_list()[-1],
            }
        )
    return rows


def site_groups(results: Results) -> list[Section]:
    """Trainable tensors that a guard treats alike, for the same reason, as one row; the unprotected ones last."""
    groups: dict[tuple[str, ...], Section] = {}
    for site in results.get("sites") or []:
        kinds = ", ".join(str(kind) for kind in site.get("kinds") or ())
        about = [str(site.get(key) or "") for key in ("guard", "treatment", "condition", "why", "cost")]
        group = groups.setdefault(
            (*about, kinds),
            {
                **dict(zip(("guard", "treatment", "condition", "why", "cost"), about, strict=True)),
                "words": TREATMENTS.get(about[1], about[1]),
                "kinds": kinds,
                "names": [],
                "numbers": 0,
            },
        )
        group["names"].append(str(site["name"]))
        group["numbers"] += math.prod(int(n) for n in site.get("shape") or ())
    order = list(TREATMENTS)
    return sorted(groups.values(), key=lambda g: order.index(g["treatment"]) if g["treatment"] in order else -1)


def optimizer_line(rows: Iterable[Mapping[str, Any]]) -> str:
    """How the optimizer treats tensors, in one line; empty if it does not say.

    Args:
        rows: As :meth:`growthring.ContinualTrainer.explain_optimizer` gives them, or ``optimizer`` of
            ``results.json``.
    """
    rows = list(rows)
    if not rows:
        return ""
    ranks = sorted({row["rank"] for row in rows if row["rank"] is not None})
    words = {"projected": f"projected (rank {', '.join(map(str, ranks))})", "adamw": "as AdamW", "frozen": "frozen"}
    counts = {one: sum(row["treatment"] == one for row in rows) for one in words}
    return "optimizer: " + ", ".join(f"{count} {words[one]}" for one, count in counts.items() if count)


def zero_shot(results: Results) -> list[tuple[str, float | None, str]]:
    """MTIL's figures and the reference's accuracy before and after the stream: name, fraction, what it says."""
    found = results.get("mtil") or {}
    rows = [
        ("Transfer", _number(found.get("transfer")), "mean accuracy on tasks that were still to come"),
        ("Avg", _number(found.get("average")), "mean over all tasks and all moments"),
        ("Last", _number(found.get("last")), "mean over all tasks in the end"),
    ]
    reference = results.get("reference") or []
    if reference:
        rows.append(("Reference, before", _number(reference[0]), "accuracy of the untouched model on the reference"))
        rows.append(("Reference, after", _number(reference[-1]), "accuracy on it after the whole stream"))
    return rows if found or reference else []


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
