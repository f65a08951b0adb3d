"""Scoring a model on a stream: the same answer for any batch size and any order of the examples.

One pass of the encoder over a split serves every classifier and every view. A view says which classifier answers, and
what it is told: the classes seen so far, or the task of the example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from growthring.errors import ConfigError, nearest
from growthring.evaluation import AccuracyMatrix, accuracy, confusion, macro_f1
from growthring.guards.batches import evaluating
from growthring.streams import TaskStream

from .analytic import AnalyticClassifier, check_classifiers, held_out, make_classifiers
from .classifier import StreamClassifier
from .data import Collator, EncodedSplit, evaluation_batches, inputs_of
from .logs import Bars, RunLog
from .result import View

__all__ = ["Asked", "Given", "Scorer", "Tables", "givens"]

Given = Literal["classes seen", "task"]


class Asked(NamedTuple):
    """One way to read a run: the classifier, and what it is told about an example."""

    classifier: str
    given: Given


def givens(stream: TaskStream) -> tuple[Given, ...]:
    """What classifiers are told, the scenario's own rule first.

    A task-incremental stream tells the task. A domain-incremental one has the same classes in every task, and tells
    nothing. A class-incremental one tells nothing, and its task-incremental accuracy is read off beside.
    """
    if stream.scenario == "task":
        return ("task",)
    return ("classes seen", "task") if stream.class_incremental else ("classes seen",)


class Scorer:
    """Predicts and scores the splits of a stream.

    Args:
        model: The model.
        stream: The stream.
        data: Every split of every task.
        collate: Makes batches.
        batch_size: Examples at once.
        classifiers: Who answers; the first one fills the main matrix. ``"head"`` is the trained head.
        seed: Seed of the classifiers that are not trained.

    Raises:
        ConfigError: On a batch size below 1, or classifiers that do not exist.
    """

    def __init__(
        self,
        model: StreamClassifier,
        stream: TaskStream,
        data: Sequence[Mapping[str, EncodedSplit]],
        collate: Collator,
        batch_size: int,
        classifiers: Sequence[str] = ("head",),
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"eval_batch_size={batch_size}: it must be at least 1")
        self._model, self._stream, self._data = model, stream, data
        self._collate, self._batch_size = collate, batch_size
        self._classifiers, self._seed = check_classifiers(classifiers), seed
        self.analytic: dict[str, AnalyticClassifier] = {}
        """The classifiers that are not trained, by name; made when the first features come."""
        self.views = tuple(Asked(name, given) for given in givens(stream) for name in self._classifiers)
        """Every view; the first is that of the main matrix."""

    def predict(
        self,
        task_index: int,
        split: str,
        seen: int,
        batch_size: int | None = None,
        classifier: str | None = None,
        given: str | None = None,
    ) -> list[int]:
        """Predicted class ids of one split, in the order of its examples; ``seen`` tasks have been learned.

        Raises:
            ConfigError: There is no such split or view, or the classifier has seen no class of the task.
        """
        if split not in self._data[task_index]:
            raise ConfigError(f"no split {split!r}; {nearest(str(split), self._data[task_index])}")
        main = self.views[0]
        for what, value, known in (
            ("classifier", classifier, {view.classifier for view in self.views}),
            ("given", given, {view.given for view in self.views}),
        ):
            if value is not None and value not in known:
                raise ConfigError(f"{what}={value!r}: {nearest(str(value), known)} in this run")
        view = Asked(classifier or main.classifier, given or main.given)  # type: ignore[arg-type]
        found = self._predict(task_index, split, seen, [view], batch_size)[view]
        if found is None:
            raise ConfigError(
                f"the classifier {view.classifier!r} has learned no class of {self._stream[task_index].name!r} yet"
            )
        return found

    def scores(self, task_index: int, split: str, seen: int) -> dict[Asked, tuple[float, float] | None]:
        """Accuracy and macro F1 of one split in every view.

        ``None`` where the classifier has learned none of the task's classes, and so cannot name them.
        """
        true, classes = self._data[task_index][split].labels, len(self._stream.classes)
        found: dict[Asked, tuple[float, float] | None] = {}
        for view, predicted in self._predict(task_index, split, seen, self.views).items():
            counts = None if predicted is None else confusion(true, predicted, classes)
            found[view] = None if counts is None else (accuracy(counts), macro_f1(counts))
        return found

    def main_score(self, task_index: int, split: str, seen: int) -> float:
        """Accuracy of one split in the main view."""
        found = self.scores(task_index, split, seen)[self.views[0]]
        return found[0] if found is not None else 0.0

    @property
    def learns(self) -> bool:
        """Whether any classifier learns from features when a task ends."""
        return any(name != "head" for name in self._classifiers)

    def learn(self, task_index: int) -> dict[str, dict[str, float]]:
        """Let the analytic classifiers learn a task: one pass over its training rows, the encoder as in evaluation.

        Returns:
            What each of them chose, by its name.
        """
        if not self.learns:
            return {}
        data = self._data[task_index]["train"]
        labels = torch.tensor(data.labels)
        held = held_out(self._stream[task_index].splits()["train"].keys)
        with evaluating(self._model):
            for rows, features in self._features(data):
                if not self.analytic:
                    sizes = (features.shape[1], len(self._stream.classes))
                    self.analytic = make_classifiers(self._classifiers, *sizes, self._seed)
                for classifier in self.analytic.values():
                    classifier.update(features, labels[rows], held[rows])
        return {name: classifier.describe() for name, classifier in self.analytic.items()}

    def _predict(
        self, task_index: int, split: str, seen: int, views: Sequence[Asked], batch_size: int | None = None
    ) -> dict[Asked, list[int] | None]:
        asked = {view: self._candidates(task_index, seen, view) for view in views}
        data = self._data[task_index][split]
        predicted: dict[Asked, list[int] | None] = {
            view: [0] * len(data) if candidates else None for view, candidates in asked.items()
        }
        if not any(asked.values()):
            return predicted
        with evaluating(self._model):
            for rows, features in self._features(data, batch_size):
                scores: dict[str, Tensor] = {}
                for view, candidates in asked.items():
                    answers = predicted[view]
                    if answers is None:
                        continue
                    if view.classifier not in scores:
                        scores[view.classifier] = self._scores(view.classifier, features)
                    among = torch.tensor(candidates)
                    best = among[scores[view.classifier][:, among].argmax(-1)]
                    for row, label in zip(rows, best.tolist(), strict=True):
                        answers[row] = label
        return predicted

    def _features(self, data: EncodedSplit, batch_size: int | None = None) -> Iterator[tuple[list[int], Tensor]]:
        device = self._model.allowed.device
        for rows, batch in evaluation_batches(data, batch_size or self._batch_size, self._collate):
            yield rows, self._model.embed(**inputs_of(batch, device))

    def _scores(self, classifier: str, features: Tensor) -> Tensor:
        if classifier == "head":
            return self._model.logits(features).cpu()
        return self.analytic[classifier].scores(features)

    def _candidates(self, task_index: int, seen: int, view: Asked) -> list[int]:
        """The classes that compete; none if the classifier has learned no class of the task."""
        own = self._stream.class_ids(task_index)
        among = own if view.given == "task" else self._stream.candidates(task_index, seen)
        if view.classifier == "head":
            return among
        classifier = self.analytic.get(view.classifier)
        return classifier.knows(among) if classifier is not None and classifier.knows(own) else []


class Tables:
    """Accuracy of every task at every boundary, for each view and split that is scored; macro F1 of the main view.

    Args:
        tasks: Names of the tasks.
        splits: Splits to score.
        views: The views, the main one first.
    """

    def __init__(self, tasks: Sequence[str], splits: Sequence[str], views: Sequence[Asked]) -> None:
        self._tasks, self._splits, self._views = tasks, splits, tuple(views)
        self._accuracy = {(split, view): AccuracyMatrix(tasks) for split in splits for view in views}
        self._macro_f1 = {split: AccuracyMatrix(tasks) for split in splits}

    def accuracy(self, split: str, view: Asked | None = None) -> AccuracyMatrix:
        """Accuracies on a split, in the main view or another; without rows if it is not scored."""
        return self._accuracy.get((split, view or self._views[0]), AccuracyMatrix(self._tasks))

    def views(self) -> list[View]:
        """Every view with its matrices, the main one first."""
        validated = "validation" in self._splits
        return [
            View(*view, self.accuracy("test", view), self.accuracy("validation", view) if validated else None)
            for view in self._views
        ]

    def macro_f1(self, split: str) -> AccuracyMatrix:
        """Macro F1 on a split in the main view; without rows if it is not scored."""
        return self._macro_f1.get(split, AccuracyMatrix(self._tasks))

    def add_row(self, name: str, seen: int, scorer: Scorer, log: RunLog, bars: Bars, step: int) -> None:
        """Score every task, seen or not, and write the row to the log.

        Args:
            name: Name of the row.
            seen: Tasks learned so far.
            scorer: Scores.
            log: The run's log.
            bars: Progress bars.
            step: Optimizer steps taken so far.
        """
        for split in self._splits:
            bars.task(f"{name}: scoring", len(self._tasks))
            cells = []
            for index in range(len(self._tasks)):
                cells.append(scorer.scores(index, split, seen))
                bars.step()
            for number, view in enumerate(self._views):
                row = [cell[view] for cell in cells]
                accuracies = [None if found is None else found[0] for found in row]
                self._accuracy[split, view].append_row(name, accuracies)
                if number:
                    log.write("view", split=split, row=name, **view._asdict(), accuracy=accuracies)
                    continue
                f1s = [None if found is None else found[1] for found in row]
                self._macro_f1[split].append_row(name, f1s)
                log.write("row", split=split, row=name, accuracy=accuracies, macro_f1=f1s)
                known = {task: a for task, a in zip(self._tasks, accuracies, strict=True) if a is not None}
                log.scalars({f"{split}/{task}": a for task, a in known.items()}, step)
