"""Words and cells of the tables: what every table in the docs is put together from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NONE = "–"

Json = Mapping[str, Any]


class Stored:
    """The JSON files of one repository.

    Args:
        root: The repository.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "benchmarks" / "results"
        settings = root / "src" / "growthring" / "recipes" / "demo_settings.json"
        self.settings: Json = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}

    def lines(self, name: str) -> list[Json]:
        """The lines of a file that is appended to, or none."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def get(self, name: str) -> Json | None:
        """What a file holds, or ``None`` where there is none."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, the others numbers."""
    line = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, line, *rows))


def not_yet(source: tuple[str, str]) -> str:
    """What stands where nothing was measured."""
    return f"*not measured yet: run `{source[1]}`*"


def origin(source: tuple[str, str], machine: Json, more: str = "") -> str:
    """The line under a table: command, file, machine."""
    name, command = source
    torch = machine.get("versions", {}).get("torch", "of unknown version")
    size = f"{counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}"
    return (
        f"{more}Command: `{command}`. Stored: `benchmarks/results/{name}`. "
        f"Machine: {size}, {machine['processor']}; torch {torch}."
    )


def counted(number: int, what: str) -> str:
    """``2 cores``, ``1 core``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def spread(values: Sequence[float | None], scale: float = 100.0, sign: bool = False, digits: int = 1) -> str:
    """Mean ± sample standard deviation; the number alone for one value, a dash for none."""
    known = [scale * v for v in values if v is not None]
    if not known:
        return NONE
    mean = f"{statistics.fmean(known):{'+' if sign else ''}.{digits}f}".replace("-", "−")
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def energy_words(energy: Any) -> str:
    """An energy setting in a cell."""
    if isinstance(energy, Mapping):
        return ", ".join(f"{kind} {value:g}" for kind, value in energy.items())
    return NONE if energy is None else f"{energy:g}" if isinstance(energy, int | float) else str(energy)


def seeds_of(runs: Sequence[Json]) -> str:
    """Which seeds stand behind a table."""
    found = sorted({run["seed"] for run in runs})
    if len(found) == 1:
        return f"One seed ({found[0]}), so no spread. "
    return f"Mean ± sample standard deviation over seeds {', '.join(map(str, found))}. "


COSTS = (
    "tokens a batch",
    "protected, %",
    "plain step, ms",
    "guarded step, ms",
    "overhead, %",
    "consolidation, s",
    "steps a task for 5 %",
)
"""Heads of what :func:`costs` gives."""


def costs(row: Json) -> list[str]:
    """Cells of what a guard costs a step and a task."""
    return [
        str(row["batch_tokens"]),
        f"{100 * row['protected_share']:.0f}",
        f"{row['plain_step_ms']:.1f}",
        f"{row['guarded_step_ms']:.1f}",
        f"{100 * row['step_overhead']:+.1f}".replace("-", "−"),
        f"{row['consolidation_seconds']:.2f}",
        str(row["task_steps_for_5_percent"]),
    ]
