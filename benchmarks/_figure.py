"""The figure of README and docs as SVG text: what each method knew right after learning, and at the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT, TOP, ROW = 880, 345, 40, 92, 34
# A panel of its own colour: readable on light and on dark pages.
PANEL, INK, PALE, PLAIN, GUARDED, BOUND = "#fbfbf8", "#22272e", "#6b737c", "#c2572b", "#1f6f5c", "#4a5f8a"


def figure(data: Mapping[str, Any] | None, command: str) -> str:
    """The chart of the demo over its seeds.

    Args:
        data: What ``demo_seeds.json`` holds, or ``None``.
        command: What to run where there is nothing.
    """
    runs = list((data or {}).get("runs", []))
    if not runs:
        return _page(110, "Demo: not measured yet", [_text(24, 62, f"not measured yet: run {command}", 15)])
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["name"], []).append(run)
    base = statistics.fmean(statistics.fmean(run["matrix"][0]) for run in runs)
    values = [run["metrics"]["aa"] for run in runs] + [base]
    values += [run["metrics"]["learning_accuracy"] for run in runs if run["metrics"]["learning_accuracy"] is not None]
    low, high = _round(min(values), down=True), _round(max(values), down=False)

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    bottom = TOP + ROW * len(groups)
    parts = [
        _text(24, 32, "Mean accuracy over all tasks of the demo, in %", 17, weight="600"),
        _legend(24, 56),
    ]
    for tick in _ticks(low, high):
        parts.append(_line(x(tick), TOP - 8, x(tick), bottom, "#e3e4df", 1))
        parts.append(_text(x(tick), bottom + 20, f"{100 * tick:.0f}", 12, anchor="middle", fill=PALE))
    parts.append(_line(x(base), TOP - 8, x(base), bottom, PALE, 1.5, dash="4 4"))
    parts.append(_text(x(base), TOP - 14, "untouched model", 12, anchor="middle", fill=PALE))
    for number, group in enumerate(groups.values()):
        parts += _row(group, TOP + ROW * number + ROW / 2, x)
    seeds = len({run["seed"] for run in runs})
    foot = f"{seeds} seeds; the bar through a dot is ± one sample standard deviation" if seeds > 1 else "one seed"
    parts.append(_text(WIDTH - RIGHT, bottom + 38, foot, 12, anchor="end", fill=PALE))
    return _page(bottom + 54, "Mean accuracy of every method of the demo, after learning and at the end", parts)


def _row(group: Sequence[Mapping[str, Any]], y: float, x: Any) -> list[str]:
    """One method: a ring for what was learned, a dot for what is left, the line between is what was lost."""
    final = [run["metrics"]["aa"] for run in group]
    learned = [v for run in group if (v := run["metrics"]["learning_accuracy"]) is not None]
    colour = GUARDED if any(run["certificates"] for run in group) else PLAIN if learned else BOUND
    mean = statistics.fmean(final)
    parts = [_text(LEFT - 58, y + 5, group[0]["title"], 14, anchor="end")]
    parts.append(_text(LEFT - 16, y + 5, f"{100 * mean:.1f}", 14, anchor="end", fill=colour, weight="600"))
    if learned:
        start = statistics.fmean(learned)
        parts.append(_line(x(start), y, x(mean), y, colour, 3, opacity=0.35))
        parts.append(
            f'<circle cx="{x(start):.1f}" cy="{y:g}" r="5" fill="{PANEL}" stroke="{colour}" stroke-width="2"/>'
        )
    if len(final) > 1:
        half = statistics.stdev(final)
        parts.append(_line(x(mean - half), y, x(mean + half), y, colour, 1.5))
        parts += [_line(x(mean + s * half), y - 5, x(mean + s * half), y + 5, colour, 1.5) for s in (-1, 1)]
    parts.append(f'<circle cx="{x(mean):.1f}" cy="{y:g}" r="6" fill="{colour}"/>')
    return parts


def _legend(left: float, y: float) -> str:
    ring = f'<circle cx="{left + 6:g}" cy="{y - 4:g}" r="5" fill="{PANEL}" stroke="{INK}" stroke-width="2"/>'
    dot = f'<circle cx="{left + 270:g}" cy="{y - 4:g}" r="6" fill="{INK}"/>'
    words = _text(left + 18, y, "each task right after it was learned", 13) + _text(left + 283, y, "at the end", 13)
    kinds = ((PLAIN, "unguarded", 390), (GUARDED, "guarded", 496), (BOUND, "all tasks at once", 590))
    boxes = "".join(
        f'<rect x="{left + at:g}" y="{y - 10:g}" width="11" height="11" fill="{colour}"/>'
        + _text(left + at + 17, y, word, 13)
        for colour, word, at in kinds
    )
    return ring + dot + words + boxes


def _round(value: float, *, down: bool) -> float:
    """To the next five points outwards, with some air."""
    steps = (value - 0.01) * 20 if down else (value + 0.01) * 20
    edge = int(steps // 1) if down else int(-(-steps // 1))
    return max(0, min(20, edge)) / 20


def _ticks(low: float, high: float) -> list[float]:
    step = 5 if high - low <= 0.4 else 10
    return [v / 100 for v in range(0, 101, step) if low - 1e-9 <= v / 100 <= high + 1e-9]


def _text(
    x: float, y: float, words: str, size: int, *, anchor: str = "start", fill: str = INK, weight: str = "400"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float, *, dash: str = "", opacity: float = 1
) -> str:
    more = f' stroke-dasharray="{dash}"' if dash else ""
    more += f' stroke-opacity="{opacity:g}"' if opacity != 1 else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:g}" x2="{x2:.1f}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"{more}/>'
    )


def _page(height: float, title: str, parts: Sequence[str]) -> str:
    lines = "\n".join(parts)
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    panel = f'x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" fill="{PANEL}" stroke="#d7d9d2"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif">\n<title>{escape(title)}</title>\n<rect {panel}/>\n{lines}\n</svg>\n'
    )
