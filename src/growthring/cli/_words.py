"""What the numbers of several runs say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growthring.report import promise_kept

__all__ = ["sentences"]


def sentences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Plain sentences computed from results, one a run and then the comparison.

    Args:
        results: The contents of several ``results.json`` over one stream.
    """
    told = [_one(run) for run in results]
    joint = [run for run in results if run["metrics"].get("bwt") is None]
    plain = [run for run in results if run["metrics"].get("bwt") is not None and not run["certificates"]]
    guarded = [run for run in results if run["metrics"].get("bwt") is not None and run["certificates"]]
    if plain and guarded:
        best_plain, best_guarded = max(plain, key=_aa), max(guarded, key=_aa)
        gap = _aa(best_guarded) - _aa(best_plain)
        told.append(
            f"The best guarded run ({best_guarded['title']}) ends {_compared(gap)} the best unguarded one "
            f"({best_plain['title']})."
        )
    if joint and (plain or guarded):
        bound, best = max(joint, key=_aa), max(plain + guarded, key=_aa)
        gap = _aa(bound) - _aa(best)
        told.append(
            f"Joint training, which sees all tasks at once, ends {_compared(gap)} the best run that learned them one "
            f"by one ({best['title']})."
        )
    return told


def _aa(run: Mapping[str, Any]) -> float:
    return float(run["metrics"]["aa"])


def _one(run: Mapping[str, Any]) -> str:
    start = f"{run['title']} ends at {100 * _aa(run):.1f} % on average"
    change = run["metrics"].get("bwt")
    if change is None:
        return f"{start}, having seen all tasks at once."
    drops = _drops(run)
    lost, where = min(drops, default=(0.0, ""))
    if round(change, 3) < 0:
        middle = f"it forgot {_points(-change)} of what it had learned on earlier tasks"
    elif round(change, 3) > 0:
        middle = f"its earlier tasks gained {_points(change)}"
    else:
        middle = "its earlier tasks ended where they were"
    worst = ""
    if round(lost, 3) < 0:
        worst = f", most on {where}" if round(change, 3) < 0 else f", though {where} lost"
        worst += f" ({100 * lost:.1f})"
    return f"{start}; {middle}{worst}.{_promise(run)}"


def _drops(run: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Change of each task but the last, from when it was learned to the end."""
    matrix, names = run["matrix"], [task["name"] for task in run["tasks"]]
    return [(matrix[-1][i] - matrix[i + 1][i], name) for i, name in enumerate(names[:-1])]


def _promise(run: Mapping[str, Any]) -> str:
    leaks = [c["leak"] for c in run["certificates"] if c.get("leak") is not None]
    if not leaks:
        return ""
    worst = max(leaks)
    if all(promise_kept(c) is not False for c in run["certificates"] if c.get("leak") is not None):
        return f" Its promise held: at most {worst:.1e} of any update touched a protected direction."
    return f" Its promise broke: {worst:.1e} of an update touched protected directions, more than rounding explains."


def _compared(gap: float) -> str:
    return f"{_points(abs(gap))} {'above' if gap > 0 else 'below'}" if round(gap, 3) else "level with"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"
