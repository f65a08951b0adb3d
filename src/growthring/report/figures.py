"""Plotly figures as JSON-ready dictionaries, without colours: the page paints them light or dark.

Every text that came from data passes through :func:`label`, because plotly reads its labels as a little HTML.
``meta`` of a trace says how the page paints it: ``heat`` by the common scale, ``number`` by its cell, ``line`` by its
slot, ``ring`` by its place, ``free`` as room left.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from . import _format as fmt
from ._results import Results, certificates_of, matrix_of, task_names, title_of

__all__ = ["capacity", "curves", "final_by_method", "free_share_by_kind", "make_figure", "matrix_heat"]

Figure: TypeAlias = dict[str, Any]
Cells: TypeAlias = Sequence[Sequence[float | None]]

NAME_LIMIT = 22
KIND_NAMES = {
    "lora_A": "LoRA A",
    "lora_B": "LoRA B",
    "largo_A": "LARGO A",
    "largo_B": "LARGO B",
    "adapter_down": "Adapter down",
    "adapter_up": "Adapter up",
    "prefix_key": "Prefix keys",
    "prefix_value": "Prefix values",
    "prompt_key": "Prompts (right)",
    "prompt_value": "Prompts (left)",
    "ia3": "IA3 scales",
    "linear": "Linear weights",
}


def label(text: object, limit: int = NAME_LIMIT) -> str:
    """``text`` shortened, and escaped for plotly's labels, which are a little HTML with TeX between dollar signs."""
    return html.escape(fmt.shorten(str(text), limit), quote=False).replace("$", "&#36;")


def matrix_heat(results: Results) -> Figure:
    """Heat map of the accuracy matrix: rows are moments, columns tasks, one colour scale from 0 to 100."""
    matrix = matrix_of(results)
    rows = [row_name(row, matrix.sequential) for row in matrix.rows]
    figure = _heat(matrix.to_list(), rows, matrix.tasks)
    if matrix.sequential:
        figure["layout"]["shapes"] = [
            {"type": "rect", "x0": t - 0.5, "x1": t + 0.5, "y0": t + 0.5, "y1": t + 1.5, "line": {"width": 2}}
            for t in range(matrix.trained)
        ]
    return figure


def row_name(row: str, sequential: bool) -> str:
    """What a row of the matrix is called on the page."""
    if row == "untouched":
        return "untouched"
    return f"after {row}" if sequential else row


def final_by_method(many: Sequence[Results]) -> Figure:
    """Heat map of the last row of every method: what each of them knows in the end."""
    return _heat([matrix_of(r).to_list()[-1] for r in many], [title_of(r) for r in many], task_names(many[0]), 30)


def curves(results: Results) -> Figure:
    """Accuracy over time, one line a task; the mark of a task is filled from the moment it was learned."""
    matrix = matrix_of(results)
    moments = [row_name(row, matrix.sequential) for row in matrix.rows]
    traces: list[Figure] = []
    for j, task in enumerate(matrix.tasks):
        values = [row[j] for row in matrix.to_list()]
        learned = [i > j if matrix.sequential else i > 0 for i in range(len(values))]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(len(values))),
                "y": [None if v is None else 100 * v for v in values],
                "name": label(task),
                "text": [label(task, 60)] * len(values),
                "customdata": [label(m, 60) for m in moments],
                "hovertemplate": "%{text}<br>%{customdata}: %{y:.1f} %<extra></extra>",
                "marker": {
                    "size": 8 if len(matrix.tasks) <= 8 else 6,
                    "symbol": ["circle" if known else "circle-open" for known in learned],
                },
                "meta": {"role": "line", "slot": j},
            }
        )
    layout: Figure = {
        "height": 380,
        "margin": {"l": 52, "r": 24, "t": 16, "b": 40},
        "xaxis": _ticks([label(row, 16) for row in matrix.rows], [-0.25, len(moments) - 0.75], -1),
        "yaxis": {"range": [-2, 102], "title": {"text": "accuracy, %"}, "tickvals": [0, 20, 40, 60, 80, 100]},
    }
    return make_figure(traces, layout)


def free_share_by_kind(results: Results) -> dict[str, list[tuple[str, float]]]:
    """Share of dimensions still free after each certificate, by kind of site: ``{kind: [(task, share), ...]}``."""
    sums: dict[str, dict[str, list[int]]] = {}  # kind -> task -> [free, all]; several guards of one task add up
    for certificate in certificates_of(results):
        for site in certificate.get("sites") or []:
            total = sums.setdefault(str(site["kind"]), {}).setdefault(str(certificate["task"]), [0, 0])
            total[0] += int(site["free"])
            total[1] += int(site["dim"])
    return {
        kind: [(task, free / dim if dim else 0.0) for task, (free, dim) in tasks.items()]
        for kind, tasks in sums.items()
    }


def capacity(results: Results) -> Figure:
    """The rings: one bar for each kind of site, all its dimensions, with a segment for each task and the free rest."""
    shares = free_share_by_kind(results)
    kinds = list(shares)
    names = [label(KIND_NAMES.get(kind, kind)) for kind in kinds]
    traces: list[Figure] = []
    for number in range(max(len(steps) for steps in shares.values())):
        taken, tasks = [], []
        for kind in kinds:
            steps = shares[kind]
            before = steps[number - 1][1] if 0 < number <= len(steps) else 1.0
            now = steps[number] if number < len(steps) else ("", before)
            taken.append(max(before - now[1], 0.0) * 100)
            tasks.append(now[0])
        bar = _bar(taken, names, {"role": "ring", "slot": number})
        bar |= {"text": [label(t, 14) for t in tasks], "customdata": [label(t, 60) for t in tasks]}
        bar["hovertemplate"] = "%{customdata}: %{x:.1f} % of the dimensions<extra></extra>"
        traces.append(bar)
    free = _bar([shares[kind][-1][1] * 100 for kind in kinds], names, {"role": "free"})
    free |= {"text": ["free"] * len(kinds), "hovertemplate": "free: %{x:.1f} % of the dimensions<extra></extra>"}
    layout: Figure = {
        "barmode": "stack",
        "bargap": 0.35,
        "height": 92 + 56 * len(kinds),
        "margin": {"l": 20, "r": 20, "t": 8, "b": 48},
        "xaxis": {
            "range": [0, 100],
            "title": {"text": "share of all dimensions, %"},
            "tickvals": [0, 20, 40, 60, 80, 100],
        },
        "yaxis": {"automargin": True, "autorange": "reversed", "ticklen": 8},
        "uniformtext": {"minsize": 11, "mode": "hide"},
    }
    return make_figure([*traces, free], layout)


def to_json(figures: Mapping[str, Figure]) -> str:
    """Figures as JSON that can stand inside a ``<script>`` element: no ``<``, ``>`` or ``&`` is left in it."""
    text = json.dumps(figures, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _heat(values: Cells, rows: Sequence[str], columns: Sequence[str], row_limit: int = NAME_LIMIT) -> Figure:
    trace: Figure = {
        "type": "heatmap",
        "z": [[None if v is None else 100 * v for v in row] for row in values],
        "zmin": 0,
        "zmax": 100,
        "text": [[fmt.percent(v) for v in row] for row in values],
        "customdata": [[f"{label(row, 60)}<br>{label(column, 60)}" for column in columns] for row in rows],
        "hovertemplate": "%{customdata}: %{text} %<extra></extra>",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickvals": [0, 50, 100], "ypad": 0},
        "meta": {"role": "heat"},
    }
    cells = [(j, i, v) for i, row in enumerate(values) for j, v in enumerate(row)]
    numbers: Figure = {  # a trace of its own: the page gives every number the ink that is legible on its cell
        "type": "scatter",
        "mode": "text",
        "x": [j for j, _, _ in cells],
        "y": [i for _, i, _ in cells],
        "text": [fmt.percent(v) for _, _, v in cells],
        "customdata": [None if v is None else v for _, _, v in cells],
        "hoverinfo": "skip",
        "meta": {"role": "number"},
    }
    layout: Figure = {
        "height": 96 + 36 * max(len(rows), 2) + (70 if max(map(len, columns)) > 8 and len(columns) > 5 else 0),
        "margin": {"l": 20, "r": 10, "t": 30, "b": 16},
        "xaxis": _ticks([label(c, 18) for c in columns], [-0.5, len(columns) - 0.5], 1) | {"side": "top"},
        "yaxis": _ticks([label(r, row_limit) for r in rows], [len(rows) - 0.5, -0.5]),
    }
    return make_figure([trace, numbers], layout)


def _ticks(names: Sequence[str], span: list[float], turn: int = 0) -> Figure:
    """An axis of places rather than names, so that names which look alike when shortened stay apart.

    ``turn`` is the side to which crowded labels turn, so that they end at their tick and stay inside the figure.
    """
    return {
        "autotickangles": [0, 35 * turn, 60 * turn, 90 * turn],
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": list(names),
        "range": span,
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
    }


def _bar(lengths: list[float], names: list[str], meta: Figure) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "x": lengths,
        "y": names,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "meta": meta,
    }


def make_figure(traces: list[Figure], layout: Figure) -> Figure:
    """Let plotly check every property, then give plain lists and dictionaries without the default template."""
    import plotly.graph_objects as go  # slow to import, so only when a page is written

    checked = go.Figure(data=traces, layout={"showlegend": False, "dragmode": False, **layout})
    figure: Figure = json.loads(checked.to_json())
    figure["layout"].pop("template", None)
    return figure
