"""Scoring a model on a stream: the same answer for any batch size and any order of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from growthring.errors import ConfigError, nearest
from growthring.evaluation import AccuracyMatrix, accuracy, confusion, macro_f1
from growthring.guards.batches import evaluating
from growthring.streams import TaskStream

from .classifier import TextClassifier
from .data import Collator, EncodedSplit, evaluation_batches
from .logs import Bars, RunLog

__all__ = ["Scorer", "Tables"]


class Scorer:
    """Predicts and scores the splits of a stream.

    Args:
        model: The classifier.
        stream: The stream.
        data: Token ids of every split of every task.
        collate: Makes batches.
        batch_size: Examples at once.
    """

    def __init__(
        self,
        model: TextClassifier,
        stream: TaskStream,
        data: Sequence[Mapping[str, EncodedSplit]],
        collate: Collator,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"eval_batch_size={batch_size}: it must be at least 1")
        self._model, self._stream, self._data = model, stream, data
        self._collate, self._batch_size = collate, batch_size

    def predict(self, task_index: int, split: str, seen: int, batch_size: int | None = None) -> list[int]:
        """Predicted class ids of one split, in the order of its examples; ``seen`` tasks have been learned.

        Raises:
            ConfigError: There is no such split.
        """
        if split not in self._data[task_index]:
            raise ConfigError(f"no split {split!r}; {nearest(str(split), self._data[task_index])}")
        data = self._data[task_index][split]
        device = self._model.allowed.device
        candidates = torch.tensor(self._stream.candidates(task_index, seen), device=device)
        predicted = [0] * len(data)
        with evaluating(self._model):
            for rows, batch in evaluation_batches(data, batch_size or self._batch_size, self._collate):
                logits = self._model(batch["input_ids"].to(device), batch["attention_mask"].to(device))["logits"]
                best = candidates[logits[:, candidates].argmax(-1)]
                for row, label in zip(rows, best.tolist(), strict=True):
                    predicted[row] = label
        return predicted

    def score(self, task_index: int, split: str, seen: int) -> tuple[float, float]:
        """Accuracy and macro F1 of one split."""
        true = self._data[task_index][split].labels
        counts = confusion(true, self.predict(task_index, split, seen), len(self._stream.classes))
        return accuracy(counts), macro_f1(counts)


class Tables:
    """Accuracy and macro F1 of every task at every task boundary, for each split that is scored.

    Args:
        tasks: Names of the tasks.
        splits: Splits to score.
    """

    def __init__(self, tasks: Sequence[str], splits: Sequence[str]) -> None:
        self._tasks, self._splits = tasks, splits
        self._accuracy = {split: AccuracyMatrix(tasks) for split in splits}
        self._macro_f1 = {split: AccuracyMatrix(tasks) for split in splits}

    def accuracy(self, split: str) -> AccuracyMatrix:
        """Accuracies on a split; without rows if it is not scored."""
        return self._accuracy.get(split, AccuracyMatrix(self._tasks))

    def macro_f1(self, split: str) -> AccuracyMatrix:
        """Macro F1 on a split; without rows if it is not scored."""
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
            accuracies, f1s = [], []
            for index in range(len(self._tasks)):
                correct, f1 = scorer.score(index, split, seen)
                accuracies.append(correct)
                f1s.append(f1)
                bars.step()
            self._accuracy[split].append_row(name, accuracies)
            self._macro_f1[split].append_row(name, f1s)
            log.write("row", split=split, row=name, accuracy=accuracies, macro_f1=f1s)
            log.scalars({f"{split}/{t}": a for t, a in zip(self._tasks, accuracies, strict=True)}, step)
