"""What the quality benchmarks share: jobs, the file of finished runs, the search for settings, and the worker pool."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from _common import machine

SEARCH_SEED = 100
"""Seed of the rows that settings are chosen on; it is not among those reported."""

Cell = Any
"""One place in a table: a frozen dataclass of strings, one of which is ``stream``."""
Measure = Callable[["Job"], dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """Rows a task, and what a training step sees.

    Attributes:
        train: Training rows a task.
        validation: Validation rows a task.
        test: Test rows a task.
        epochs: Passes over the training rows.
        batch: Rows a step.
        length: Tokens kept of a text; for images the side in pixels.
    """

    train: int
    validation: int
    test: int
    epochs: int
    batch: int
    length: int


@dataclass(frozen=True)
class Setting:
    """What the search chooses."""

    learning_rate: float
    energy: float | None = None


@dataclass(frozen=True)
class Job:
    """One run."""

    phase: str  # "search" or "final"
    cell: Cell
    seed: int
    setting: Setting

    @property
    def key(self) -> str:
        """What tells the run from every other."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def training_arguments(job: Job, size: Size) -> TrainingArguments:
    """One task's training: AdamW where nothing else is said, a cosine, a tenth of the steps to warm up."""
    return TrainingArguments(
        output_dir=tempfile.gettempdir(),
        learning_rate=job.setting.learning_rate,
        per_device_train_batch_size=size.batch,
        num_train_epochs=size.epochs,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=job.seed,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )


def headlines(view: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a view that the tables show."""
    return {k: view["metrics"][k] for k in ("aa", "bwt", "learning_accuracy", "forgetting")}


def validation_accuracy(fitted: Any, classifier: str, given: str) -> float:
    """Mean accuracy of a finished trainer over the validation splits of all tasks."""
    scores = []
    for index in range(len(fitted.stream)):
        true = fitted.stream.encode(index, "validation")
        answers = fitted.predict(index, "validation", classifier=classifier, given=given)
        scores.append(sum(t == a for t, a in zip(true, answers, strict=True)) / len(true))
    return sum(scores) / len(scores)


# --- what is done and what is next -------------------------------------------------------------------------------


class Book:
    """The results file: one JSON line per run, only ever appended to.

    Args:
        path: The file.
        sizes: Sizes of the streams; a file made with others is refused.
        retry: Run again what failed.
        about: More for its first line.
    """

    def __init__(self, path: Path, sizes: Mapping[str, Size], retry: bool = False, **about: Any) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        plain = {name: dataclasses.asdict(size) for name, size in sizes.items()}
        first = next((line for line in self.lines if line["phase"] == "about"), None)
        if first is not None and first["sizes"] != plain:
            raise SystemExit(f"{path} was made with other sizes of the streams: give --fresh, or another --out")
        if first is None:
            self.add({"phase": "about", "sizes": plain, "search_seed": SEARCH_SEED, "machine": machine(), **about})
        self.done = {r["key"]: r for r in self.lines if "key" in r and not (retry and "error" in r)}

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def finish(self, job: Job, measured: dict[str, Any]) -> None:
        """Append a finished run."""
        run = dataclasses.asdict(job)
        self.done[job.key] = {**run.pop("cell"), **run.pop("setting"), **run, **measured, "key": job.key}
        self.add(self.done[job.key])

    def of(self, cell: Cell, phase: str) -> list[dict[str, Any]]:
        """Finished runs of a cell that did not fail."""
        own = dataclasses.asdict(cell)
        found = [r for r in self.done.values() if r["phase"] == phase and all(r[k] == v for k, v in own.items())]
        return [r for r in found if "error" not in r]

    def choice(self, cell: Cell) -> Setting | None:
        """The best setting on validation data; what final runs were made with stays."""
        runs = self.of(cell, "final") or sorted(
            self.of(cell, "search"), key=lambda r: (r["validation_aa"], r["energy"] or 0.0, -r["learning_rate"])
        )
        return Setting(runs[-1]["learning_rate"], runs[-1]["energy"]) if runs else None

    def scores(self, cell: Cell) -> dict[Setting, float]:
        """Validation accuracy of the settings that were tried; a run that failed scores below all others."""
        own = dataclasses.asdict(cell)
        tried = [r for r in self.done.values() if r["phase"] == "search" and all(r[k] == v for k, v in own.items())]
        return {Setting(r["learning_rate"], r["energy"]): r.get("validation_aa", -1.0) for r in tried}


def next_setting(
    rates: Sequence[float], energies: Sequence[float | None], scores: Mapping[Setting, float]
) -> Setting | None:
    """What the search tries next: first every energy at the middle rate, then lower or higher rates while these help.

    Args:
        rates: Learning rates in rising order.
        energies: Energies; ``(None,)`` where there is none to choose.
        scores: Validation accuracy of the settings tried so far.

    Returns:
        A setting, or ``None`` when the search is over.
    """
    middle = len(rates) // 2
    starts = [Setting(rates[middle], energy) for energy in energies]
    for start in starts:
        if start not in scores:
            return start
    energy = max(starts, key=scores.__getitem__).energy
    for direction in (-1, 1):
        place, best = middle, scores[Setting(rates[middle], energy)]
        while 0 <= place + direction < len(rates):
            tried = Setting(rates[place + direction], energy)
            if tried not in scores:
                return tried
            if scores[tried] <= best:
                break
            place, best = place + direction, scores[tried]
        if place != middle:  # lower rates were better, so higher ones need not be tried
            return None
    return None


def search_jobs(
    cells: Iterable[Cell], book: Book, following: Callable[[Cell, Mapping[Setting, float]], Setting | None]
) -> list[Job]:
    """The next setting of every cell whose search is not over. Where the choice was used already, it is."""
    open_cells = [cell for cell in cells if not book.of(cell, "final")]
    found = [(cell, following(cell, book.scores(cell))) for cell in open_cells]
    return [Job("search", cell, SEARCH_SEED, setting) for cell, setting in found if setting is not None]


def final_jobs(
    cells: Iterable[Cell], seeds: Sequence[int], book: Book, chosen_on: Callable[[Cell], Cell] = lambda cell: cell
) -> list[Job]:
    """The first seed of every cell, then the second of every cell, and so on; ``chosen_on`` says whose setting."""
    chosen = {cell: book.choice(chosen_on(cell)) for cell in cells}
    jobs = [Job("final", cell, seed, setting) for seed in seeds for cell, setting in chosen.items() if setting]
    return [job for job in jobs if job.key not in book.done]


# --- running ----------------------------------------------------------------------------------------------------


def work(jobs: Sequence[Job], book: Book, measure: Measure, pool: ProcessPoolExecutor, deadline: float) -> bool:
    """Run jobs, as many at a time as there are workers; returns whether there was time for all."""
    running: dict[Future[dict[str, Any]], Job] = {}
    longest = 0.0
    workers: int = pool._max_workers  # type: ignore[attr-defined]

    def collect(wanted: int) -> None:
        nonlocal longest
        while len(running) > wanted:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, measured = running.pop(future), future.result()
                book.finish(job, measured)
                longest = max(longest, measured["seconds"])
                shown = {k: v for k, v in measured.items() if not k.startswith(("matrix", "matrices"))}
                print(job.cell, job.seed, dataclasses.astuple(job.setting), shown, flush=True)

    for job in jobs:
        collect(workers - 1)
        if time.monotonic() + longest > deadline:
            collect(0)
            return False
        running[pool.submit(measure, job)] = job
    collect(0)
    return True
