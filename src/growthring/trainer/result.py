"""What a run gives back."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growthring._io import write_json
from growthring.evaluation import AccuracyMatrix, metrics
from growthring.guards import Certificate

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FORMAT_VERSION", "RunResult", "versions"]

FORMAT_VERSION = 1


def versions() -> dict[str, str]:
    """Versions of Python and of what a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("growthring", "torch", "transformers", "peft", "accelerate", "datasets", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class RunResult:
    """A finished run of one method over one stream.

    Attributes:
        name: Name of the run.
        method: Name of the method.
        title: The method in words.
        scenario: Scenario of the stream.
        seed: Seed of everything.
        tasks: Name, labels and sizes of the splits of every task.
        matrix: Accuracy on every task's test split, row 0 before any training.
        macro_f1: Macro F1 in the same places.
        validation: Accuracy on the validation splits, where it was asked for.
        certificates: One for each guard and task.
        timings: Seconds, total and per task.
        config: The resolved configuration.
        seeds: What was seeded with what.
        folder: The run folder, if one was written.
    """

    name: str
    method: str
    title: str
    scenario: str
    seed: int
    tasks: list[dict[str, Any]]
    matrix: AccuracyMatrix
    macro_f1: AccuracyMatrix
    validation: AccuracyMatrix | None
    certificates: list[Certificate]
    timings: dict[str, Any]
    config: dict[str, Any]
    seeds: dict[str, int]
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        return {
            "format_version": FORMAT_VERSION,
            "growthring_version": versions()["growthring"],
            "name": self.name,
            "method": self.method,
            "title": self.title,
            "scenario": self.scenario,
            "seed": self.seed,
            "tasks": self.tasks,
            "rows": list(self.matrix.rows),
            "matrix": self.matrix.to_list(),
            "macro_f1": self.macro_f1.to_list(),
            "validation_matrix": self.validation.to_list() if self.validation is not None else None,
            "metrics": metrics(self.matrix).to_dict() if len(self.matrix) else {},
            "certificates": [c.to_dict() for c in self.certificates],
            "timings": self.timings,
            "versions": versions(),
            "seeds": self.seeds,
            "notes": self.notes,
            "config": self.config,
        }

    def save(self, path: str | Path) -> Path:
        """Write ``results.json``."""
        return write_json(path, self.to_dict())

    def summary(self) -> Table:
        """A table for the terminal: ``rich.print(result.summary())``."""
        from growthring.report import summary_table

        return summary_table([self.to_dict()])

    def report(self, path: str | Path) -> Path:
        """Write the self-contained HTML page."""
        from growthring.report import write_report

        return write_report(self.to_dict(), path)
