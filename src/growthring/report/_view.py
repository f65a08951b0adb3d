"""From results to what the template shows: words, rows and figures, no markup."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from growthring.evaluation import forgetting_by_task

from . import _format as fmt
from . import figures as draw
from ._results import (
    LEAK_LIMIT,
    Results,
    certificates_of,
    matrix_of,
    promise_kept,
    task_names,
    title_of,
    total_seconds,
    worst,
)
from ._sections import CLASSIFIERS, optimizer_line, site_groups, told_average, view_rows, views_of, zero_shot

View: TypeAlias = dict[str, Any]

METRICS = ("aa", "learning_accuracy", "bwt", "forgetting", "fwt")


def page_view(many: Sequence[Results]) -> tuple[View, dict[str, draw.Figure]]:
    """Everything the template needs, and the figures by the id of their place."""
    figures: dict[str, draw.Figure] = {}
    first = many[0]
    number, featured = _featured(many)
    methods = [_method_view(number, one, figures) for number, one in enumerate(many, start=1)]
    comparable = len(many) > 1 and all(task_names(one) == task_names(first) for one in many)
    if comparable:
        figures["final"] = draw.final_by_method(many)
    name = str(first.get("name") or "") if len(many) == 1 else ""
    summary = [_summary_row(number, one) for number, one in enumerate(many, start=1)]
    view = {
        "heading": _heading(many),
        "title": f"{name} \u00b7 growthring report" if name else "growthring report",
        "facts": _facts(many, comparable),
        "featured": _why_featured(number, featured) if len(many) > 1 else None,
        "headline": _cards(featured),
        "summary": summary,
        "told": any(row["told"] is not None for row in summary),
        "stream": [_task_row(task) for task in first["tasks"]],
        "comparable": comparable,
        "methods": methods,
        "leak_limit": LEAK_LIMIT,
        "version": first.get("growthring_version"),
    }
    return view, figures


def _featured(many: Sequence[Results]) -> tuple[int, Results]:
    """The run of the headline cards and its number: the best guarded one, else the best that learned task by task."""

    def key(pair: tuple[int, Results]) -> tuple[bool, bool, float]:
        aa = pair[1]["metrics"].get("aa")
        return bool(certificates_of(pair[1])), matrix_of(pair[1]).sequential, -1.0 if aa is None else float(aa)

    return max(enumerate(many, start=1), key=key)


def _why_featured(number: int, one: Results) -> View:
    kind = "guarded method" if certificates_of(one) else "method that learned one task after another"
    kind = kind if matrix_of(one).sequential else "method"
    return {"title": title_of(one), "number": number, "reason": f"The {kind} with the highest final average."}


def _heading(many: Sequence[Results]) -> str:
    tasks = len(many[0]["tasks"])
    stream = "one task" if tasks == 1 else f"{tasks} tasks in a row"
    return f"{title_of(many[0])} on {stream}" if len(many) == 1 else f"{len(many)} methods on {stream}"


def _facts(many: Sequence[Results], comparable: bool) -> list[tuple[str, str]]:
    first = many[0]
    facts = [("Run", str(first["name"]))] if first.get("name") and len(many) == 1 else []
    if len(many) == 1 or comparable:
        names = ", ".join(task_names(first))
        facts.append(("Tasks", names if len(names) <= 160 else str(len(first["tasks"]))))
    if first.get("scenario"):
        facts.append(("Scenario", f"{first['scenario']}-incremental"))
    classifiers = {str(views[0].get("classifier")) for one in many if (views := views_of(one))}
    if classifiers - {"head"}:
        facts.append(("Classifier", ", ".join(CLASSIFIERS.get(name, name) for name in sorted(classifiers))))
    seeds = sorted({str(one["seed"]) for one in many if one.get("seed") is not None})
    if seeds:
        facts.append(("Seed" if len(seeds) == 1 else "Seeds", ", ".join(seeds)))
    return facts


def _task_row(task: Mapping[str, Any]) -> View:
    sizes = {key: task.get(key) for key in ("train", "validation", "test")}
    return {"name": str(task["name"]), "labels": len(task.get("labels") or []) or None, **sizes}


def _summary_row(number: int, one: Results) -> View:
    row: View = {key: one["metrics"].get(key) for key in METRICS}
    return row | {
        "title": title_of(one),
        "number": number,
        "seconds": total_seconds(one),
        "leak": worst(one, "leak"),
        "told": told_average(one),
    }


def _cards(one: Results) -> list[View]:
    """The headline: ``label``, ``value``, ``unit``, ``note`` and, for the verdict, ``tone`` (good, bad or plain)."""
    metrics = one["metrics"]
    bwt = metrics.get("bwt")
    cards = [
        _card("Final average", fmt.percent(metrics.get("aa")), "%", "mean accuracy over all tasks, at the end"),
        _card(
            "Learning accuracy",
            fmt.percent(metrics.get("learning_accuracy")),
            "%",
            "mean accuracy on each task right after it was learned",
        ),
        _card("Backward transfer", fmt.points(bwt), "points", _backward_words(bwt)),
    ]
    return [*cards, _worst_forgotten(one), _verdict(one)]


def _card(label: str, value: str, unit: str, note: str, tone: str = "plain", name: bool = False) -> View:
    return {
        "label": label,
        "value": value,
        "unit": "" if value == fmt.DASH else unit,
        "note": note,
        "tone": tone,
        "name": name,
    }


def _backward_words(bwt: float | None) -> str:
    if bwt is None or fmt.missing(bwt):
        return "needs two tasks learned one after the other"
    shown = round(100 * bwt, 1)
    if shown == 0:
        return "earlier tasks ended where they were"
    return "earlier tasks lost this much on average" if shown < 0 else "earlier tasks gained this much on average"


def _worst_forgotten(one: Results) -> View:
    matrix = matrix_of(one)
    drops = [(d, task) for d, task in zip(forgetting_by_task(matrix), matrix.tasks, strict=False) if d is not None]
    if not drops:
        return _card("Most forgotten task", fmt.DASH, "", "needs two tasks learned one after the other")
    drop, task = max(drops, key=lambda pair: pair[0])
    if round(100 * drop, 1) <= 0:
        return _card(
            "Most forgotten task", "none", "", "every earlier task ended at its best score or above", name=True
        )
    return _card(
        "Most forgotten task", fmt.shorten(task, 40), "", f"{fmt.points(-drop)} points from its best score", name=True
    )


def _verdict(one: Results) -> View:
    label = "Certificate"
    certificates = certificates_of(one)
    if not certificates:
        return _card(label, "no promise", "", "no guard was active: nothing protects earlier tasks", name=True)
    leak, change = worst(one, "leak"), worst(one, "output_change")
    unmeasured = sum(bool(c.get("protected_tasks")) and c.get("leak") is None for c in certificates)
    if leak is None and not unmeasured:
        return _bounds(label, certificates)
    kept = all(promise_kept(c) is not False for c in certificates if c.get("leak") is not None)
    if kept and any(promise_kept(c) is False for c in certificates):
        return _bounds(label, certificates)
    if leak is None or (unmeasured and kept):
        note = f"the leak of {unmeasured} of {len(certificates)} certificates was not measured"
        return _card(label, "not fully measured", "", note, name=True)
    moved = f" Outputs on earlier inputs moved by at most {fmt.small(change)} of their size." if change else ""
    if kept:
        note = f"at most {fmt.small(leak)} of any update touched a protected direction.{moved}"
        return _card(label, "promise kept", "", note, tone="good", name=True)
    note = f"{fmt.small(leak)} of an update touched protected directions, more than rounding explains.{moved}"
    return _card(label, "promise broken", "", note, tone="bad", name=True)


def _bounds(label: str, certificates: Sequence[Mapping[str, Any]]) -> View:
    """Of guards that keep layers near the pretrained model, when no other one has a promise to report."""
    judged = [promise_kept(c) for c in certificates if c.get("deviations")]
    if False in judged:
        note = "layers ended farther from the pretrained model than their bounds allow"
        return _card(label, "promise broken", "", note, tone="bad", name=True)
    if True in judged:
        note = "every layer is as near to the pretrained model as its bound says"
        return _card(label, "promise kept", "", note, tone="good", name=True)
    if judged:
        return _card(label, "no promise", "", "how far layers moved was measured, not bounded", name=True)
    return _card(label, "nothing to protect yet", "", "the promise starts with the second task", name=True)


def _method_view(number: int, one: Results, figures: dict[str, draw.Figure]) -> View:
    matrix = matrix_of(one)
    figures[f"heat-{number}"] = draw.matrix_heat(one)
    if len(matrix.rows) > 1:
        figures[f"curves-{number}"] = draw.curves(one)
    shares = draw.free_share_by_kind(one)
    if shares:
        figures[f"capacity-{number}"] = draw.capacity(one)
    rows = [draw.row_name(row, matrix.sequential) for row in matrix.rows]
    return {
        "number": number,
        "title": title_of(one),
        "method": str(one["method"]),
        "tasks": matrix.tasks,
        "sequential": matrix.sequential,
        "cards": _cards(one),
        "tables": [
            (name, list(zip(rows, one[key], strict=False)))
            for name, key in (
                ("Accuracy", "matrix"),
                ("Macro F1", "macro_f1"),
                ("Validation accuracy", "validation_matrix"),
            )
            if one.get(key)
        ],
        "has_curves": len(matrix.rows) > 1,
        "views": view_rows(one),
        "zero_shot": zero_shot(one),
        "sites": site_groups(one),
        "optimizer": optimizer_line(one.get("optimizer") or ()),
        "certificates": [_certificate_view(certificate) for certificate in certificates_of(one)],
        "capacity": _capacity_rows(shares),
        "kinds": [draw.KIND_NAMES.get(kind, kind) for kind in shares],
        "timings": (one.get("timings") or {}).get("tasks") or [],
        "extra_times": _extra_times((one.get("timings") or {}).get("tasks") or []),
        "total_seconds": total_seconds(one),
        "versions": sorted((one.get("versions") or {}).items()),
        "seeds": sorted((one.get("seeds") or {}).items()),
        "config": json.dumps(one["config"], indent=2, ensure_ascii=False, default=str) if one.get("config") else None,
    }


def _extra_times(timings: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Columns of the table of times that some runs have: key and heading."""
    known = {"prepare_seconds": "Preparation", "tune_seconds": "Trials", "classifier_seconds": "Classifiers"}
    return [(key, heading) for key, heading in known.items() if any(key in timing for timing in timings)]


def _certificate_view(certificate: Mapping[str, Any]) -> View:
    leak = certificate.get("leak")
    keys = ("guard", "protected_tasks", "energy", "free", "dims", "output_change", "probes", "held")
    view: View = {key: certificate.get(key) for key in keys}
    if not view["dims"]:  # a guard that protects nothing by itself has no energy either
        view |= dict.fromkeys(("energy", "free", "dims"))
    return view | {
        "task": str(certificate["task"]),
        "leak": leak,
        "tone": {None: "plain", True: "good", False: "bad"}[promise_kept(certificate)],
        "sites": [dict(site) for site in certificate.get("sites") or []],
        "deviations": [dict(one) for one in certificate.get("deviations") or []],
        "notes": [str(note) for note in certificate.get("notes") or []],
    }


def _capacity_rows(shares: Mapping[str, Sequence[tuple[str, float]]]) -> list[tuple[str, list[float | None]]]:
    """One row a task for the table beside the rings: the free share of each kind."""
    longest = max(shares.values(), key=len, default=[])
    return [
        (task, [steps[i][1] if i < len(steps) else None for steps in shares.values()])
        for i, (task, _) in enumerate(longest)
    ]
