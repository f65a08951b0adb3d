"""Labelled rows that are only ever scored: a domain that nothing is trained on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from growthring.errors import ConfigError, DataError, nearest
from growthring.streams._checks import as_images, as_label, as_text, check_name, each
from growthring.streams._splits import Examples, same_text, sample
from growthring.streams.images import is_image
from growthring.streams.sources import read_rows
from growthring.streams.task import Task

__all__ = ["EvaluationSet"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class EvaluationSet:
    """Labelled texts or images under one name, with a test split alone; immutable.

    Args:
        name: Name of the set; unique among those scored together, and a file name (no slashes).
        rows: Rows as :class:`Task` takes them: pairs, dicts, columns, a data set, a file or a folder of images.
        text: Name of the text column. Default ``"text"``.
        image: Name of the image column, which makes the inputs images. Default ``None``.
        label: Name of the label column. Default ``"label"``.

    Attributes:
        name: As given.
        test: The :class:`Examples`.

    Raises:
        DataError: There are no rows, or an input or a label is missing or unreadable; with the row.
        ConfigError: The name cannot name a file, or both ``text`` and ``image`` are given.
    """

    name: str
    test: Examples

    def __init__(
        self, name: str, rows: Any, *, text: str = "text", image: str | None = None, label: str = "label"
    ) -> None:
        check_name(name, "set")
        if image is not None and text != "text":
            raise ConfigError(f"set {name!r}: text={text!r} and image={image!r}; its inputs are one or the other")
        where = f"evaluation set {name!r}"
        if isinstance(rows, Examples):
            made = rows
            if not len(made):
                raise DataError(f"{where} is empty. Give it at least one row.")
        else:
            found = read_rows(rows, text=text, label=label, where=where, image=image)
            if not found.labels:
                raise DataError(f"{found.where} is empty. Give it at least one row.")
            images = image is not None or is_image(found.inputs[0])
            inputs = as_images(found.inputs, found.where) if images else each(
                found.inputs, as_text, found.where, "Fill in the text or remove the row"
            )  # fmt: skip
            tell = partial(as_label, names=found.names)
            made = Examples(inputs, each(found.labels, tell, found.where, "Give the row one label or remove it"))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "test", made)

    @property
    def modality(self) -> Literal["text", "image"]:
        """What the inputs are."""
        return self.test.modality

    def limit(self, rows: int, seed: int = 0) -> EvaluationSet:
        """At most so many rows, stratified by label; the same rows on every machine.

        Raises:
            ConfigError: ``rows`` is below 1.
        """
        if rows < 1:
            raise ConfigError(f"set {self.name!r}: rows={rows}; at least 1 is needed")
        return EvaluationSet(self.name, sample(self.test, rows, seed, f"{self.name}/test"))

    def check(self, task: Task) -> None:
        """Make sure that the set can be scored by a model of ``task``, and measures something else than its rows.

        Raises:
            DataError: It holds texts and the task images (or the other way round), a label that the task does not
                have, or more than half of its inputs are rows of the task.

        Warns:
            UserWarning: Some of its inputs are rows of the task.
        """
        if self.modality != task.modality:
            raise DataError(
                f"evaluation set {self.name!r} holds {self.modality}s and task {task.name!r} {task.modality}s; one "
                "model reads one kind"
            )
        unknown = [(row, label) for row, label in enumerate(self.test.labels) if label not in set(task.labels)]
        if unknown:
            row, label = unknown[0]
            many = f" ({len(unknown)} such rows)" if len(unknown) > 1 else ""
            raise DataError(
                f"evaluation set {self.name!r}, row {row}: the label {label!r} is none of task {task.name!r}{many}; "
                f"{nearest(label, task.labels)} Rename labels, or remove rows of classes that the task does not have."
            )
        keys = [same_text(key) for key in self.test.keys]
        shared: dict[str, int] = {}
        for split, examples in task.splits().items():
            known = {same_text(key) for key in examples.keys}
            shared[split] = sum(key in known for key in keys)
        split, count = max(shared.items(), key=lambda item: item[1])
        if 2 * count > len(keys):
            raise DataError(
                f"evaluation set {self.name!r}: {count} of its {len(keys)} {self.modality}s are {split} rows of task "
                f"{task.name!r}. It is not another domain; give rows that the task does not hold."
            )
        if count:
            found = ", ".join(f"{number} of {name}" for name, number in shared.items() if number)
            warnings.warn(
                f"evaluation set {self.name!r}: of its {len(keys)} {self.modality}s some are rows of task "
                f"{task.name!r} too ({found}). Remove them: what was trained on is not out of distribution.",
                UserWarning,
                stacklevel=2,
            )

    @classmethod
    def of(cls, item: Task | EvaluationSet) -> EvaluationSet:
        """The test split of a task, or the set itself.

        Raises:
            ConfigError: It is neither.
        """
        if isinstance(item, EvaluationSet):
            return item
        if isinstance(item, Task):
            return cls(item.name, item.test)
        raise ConfigError(f"an evaluation set or a task is needed, got {type(item).__name__}")

    def __len__(self) -> int:
        return len(self.test)

    def __repr__(self) -> str:
        return f"EvaluationSet({self.name!r}, {len(self.test)} {self.modality}s)"
