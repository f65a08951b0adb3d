"""What a run gives back."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growthring._io import write_json
from growthring.errors import ConfigError
from growthring.evaluation import AccuracyMatrix, Metrics, metrics
from growthring.guards import Certificate

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FORMAT_VERSION", "RunResult", "View", "versions"]

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


@dataclass(frozen=True)
class View:
    """One way to read a run: which classifier answers, and what it is told about an example.

    Attributes:
        classifier: ``"head"`` (the trained head), ``"prototype"`` or ``"ridge"``.
        given: ``"classes seen"``: all classes of the tasks learned so far compete, the task is unknown. ``"task"``:
            the task is known and its classes compete.
        matrix: Accuracy on the test splits, rows and columns as those of the main matrix. A cell is not measured
            where the classifier has learned no class of the task.
        validation: The same on the validation splits, where it was asked for.
    """

    classifier: str
    given: str
    matrix: AccuracyMatrix
    validation: AccuracyMatrix | None = None

    @property
    def metrics(self) -> Metrics | None:
        """The five headline numbers of the test matrix; ``None`` if the test splits were not scored."""
        return metrics(self.matrix) if len(self.matrix) else None

    def to_dict(self) -> dict[str, Any]:
        """The view as plain values for JSON."""
        found = self.metrics
        return {
            "classifier": self.classifier,
            "given": self.given,
            "matrix": self.matrix.to_list(),
            "metrics": found.to_dict() if found else {},
            "validation_matrix": self.validation.to_list() if self.validation is not None else None,
        }


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
        reference: Accuracy on the stream's reference in every row of the matrix; ``None`` without a reference.
        mtil: Transfer, average and last as MTIL defines them, where classes are scored by their names, untrained ones
            too; ``None`` otherwise.
        notes: Sentences a reader should see.
        views: Every way in which this run was read; the first is that of ``matrix``.
        sites: What each guard does with every trainable tensor, as it said before training: rows of its ``explain``.
        optimizer: How the optimizer treats every parameter, as it said before training: rows of its ``explain``; empty
            for an optimizer that does not say.
        full_rank: Linear layers of the base model whose weights trained themselves, beside an adapter.
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
    reference: list[float] | None = None
    mtil: dict[str, float | None] | None = None
    views: list[View] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    optimizer: list[dict[str, Any]] = field(default_factory=list)
    full_rank: list[str] = field(default_factory=list)

    def view(self, classifier: str = "head", given: str | None = None) -> View:
        """One view of the run.

        Args:
            classifier: Who answers.
            given: ``"classes seen"`` or ``"task"``; default: as the scenario says.

        Raises:
            ConfigError: The run was not read so.
        """
        for one in self.views:
            if one.classifier == classifier and given in (None, one.given):
                return one
        known = ", ".join(f"({one.classifier!r}, {one.given!r})" for one in self.views) or "none"
        raise ConfigError(f"this run has no view ({classifier!r}, {given!r}); views: {known}")

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
            "views": [view.to_dict() for view in self.views],
            "sites": self.sites,
            "optimizer": self.optimizer,
            "full_rank": self.full_rank,
            "certificates": [c.to_dict() for c in self.certificates],
            "timings": self.timings,
            "versions": versions(),
            "seeds": self.seeds,
            "notes": self.notes,
            "reference": self.reference,
            "mtil": self.mtil,
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
