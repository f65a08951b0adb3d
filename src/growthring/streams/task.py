"""One task of a stream: labelled texts or images in train, test and (given or carved) validation splits.

Everything is checked up front, before anything is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from growthring.errors import ConfigError, DataError, nearest
from growthring.streams._checks import (
    as_images,
    as_label,
    as_text,
    check_counts,
    check_labels,
    check_name,
    each,
    given_labels,
    number_first,
    warn_of_file_names,
    warn_of_overlap,
    words_of_labels,
)
from growthring.streams._splits import Examples, carve, sample
from growthring.streams.images import is_image
from growthring.streams.sources import Rows, read_rows

if TYPE_CHECKING:
    import os

__all__ = ["SPLITS", "Task"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Task:
    """Labelled texts or images under one name, checked when the object is made; immutable.

    Each split may be a list (or any iterable) of ``{"text": ..., "label": ...}`` dicts or ``(text, label)`` pairs, a
    dict of two equally long columns, a ``datasets.Dataset``, a torch ``Dataset`` of dicts or pairs, or the path of a
    ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, each also with ``.gz``. With images also the path
    of a folder that holds one folder a class.

    The inputs are images if ``image`` names their column, or if the first training row is an array, a tensor, a PIL
    image or a ``pathlib.Path``. An image is a uint8 numpy array ``(height, width)`` or ``(height, width, 3)``, a uint8
    torch tensor ``(height, width)`` or ``(3, height, width)``, a PIL image, the path or the bytes of an image file
    (read with Pillow: ``pip install growthring[image]``), or an ``Image`` column of ``datasets``. Every image is read
    once when the task is made, to check it and to hash its pixels; arrays are not copied, files and columns on disk
    stay there. A relative path counts from the folder of the file that lists it, else from the current one.

    Labels become strings: integers with ``ClassLabel`` features by their names, other integers and booleans by
    ``str``, strings without white space around them.

    Args:
        name: Name of the task; unique in a stream, and a file name (no slashes).
        train: Training rows.
        test: Test rows. They are measured on, never used for any choice.
        validation: Rows for choices. ``None``: :class:`TaskStream` carves them out of ``train``.
        text: Name of the text column. Default ``"text"``.
        image: Name of the image column, which makes the inputs images; for pairs any name will do. Default ``None``.
        label: Name of the label column. Default ``"label"``.
        labels: The labels in the order wanted. Default: those of ``train``, in ``ClassLabel`` order if there is one,
            else sorted (numbers by value). Give it to allow a label that has test rows but no training rows.
        label_texts: What a label means in words, for heads that compare inputs with label texts; for labels left out,
            the label itself with ``_`` read as a blank.

    Attributes:
        name: As given.
        labels: Tuple of label strings; a label's place in it is its index in the task.
        label_texts: Dict from each label to its words, in the order of ``labels``.
        train: Training :class:`Examples`.
        validation: Validation :class:`Examples` or ``None``.
        test: Test :class:`Examples`.

    Raises:
        DataError: A split is empty or unreadable, a column, an input or a label is missing, an image is not of 8 bits
            or cannot be decoded, a label is unknown, or a test label never appears in train. The message names task,
            split, row (0-based) and fix.
        ConfigError: The name cannot name a file, both ``text`` and ``image`` are given, or Pillow is needed and not
            installed.

    Warns:
        UserWarning: Only one class; or an input stands in two splits (images: the same pixels).
    """

    name: str
    labels: tuple[str, ...]
    label_texts: dict[str, str]
    train: Examples
    validation: Examples | None
    test: Examples

    def __init__(
        self,
        name: str,
        train: Any,
        test: Any,
        validation: Any = None,
        *,
        text: str = "text",
        image: str | None = None,
        label: str = "label",
        labels: Sequence[str] | None = None,
        label_texts: Mapping[str, str] | None = None,
    ) -> None:
        check_name(name)
        if image is not None and not (isinstance(image, str) and image):
            raise ConfigError(f"task {name!r}: image={image!r}; give the name of the image column, or None for texts")
        if image is not None and text != "text":
            raise ConfigError(f"task {name!r}: text={text!r} and image={image!r}; its inputs are one or the other")
        splits: dict[str, Examples] = {}
        places: dict[str, str] = {}
        class_names: list[str] = []
        for split, source in (("train", train), ("validation", validation), ("test", test)):
            if source is None and split == "validation":
                continue
            where = f"task {name!r}, {split} split"
            if source is None:
                raise DataError(f"{where}: there is none (None). A task needs train and test rows.")
            rows = _rows_of(source, text=text, label=label, where=where, image=image)
            if not rows.labels:
                raise DataError(f"{rows.where} is empty. Give it at least one row.")
            if split == "train" and image is None:
                image = text if is_image(rows.inputs[0]) else None
                warn_of_file_names(rows)
            places[split] = rows.where
            fix = "Fill in the text or remove the row"
            splits[split] = Examples(
                as_images(rows.inputs, rows.where)
                if image is not None
                else each(rows.inputs, as_text, rows.where, fix),
                each(
                    rows.labels,
                    partial(as_label, names=rows.names),
                    rows.where,
                    "Give the row one label or remove it",
                ),
            )
            class_names = class_names or list(rows.names or ())
        found = set(splits["train"].labels)
        if labels is None:
            named = found <= set(class_names)
            order = [entry for entry in class_names if entry in found] if named else sorted(found, key=number_first)
        else:
            order = given_labels(name, labels)
        for split, examples in splits.items():
            check_labels(examples, order, places[split], given=labels is not None)
        if len(found) == 1:
            warnings.warn(
                f"task {name!r}: all {len(splits['train'])} training rows have the label {order[0]!r}; there is "
                f"nothing to tell apart. Check that label={label!r} is the right column.",
                UserWarning,
                stacklevel=2,
            )
        warn_of_overlap(name, splits)
        self._set(name, tuple(order), words_of_labels(name, order, label_texts), splits)

    def _set(self, name: str, labels: tuple[str, ...], texts: dict[str, str], splits: Mapping[str, Examples]) -> None:
        values = {"name": name, "labels": labels, "label_texts": texts}
        for attribute, value in {**values, **{split: splits.get(split) for split in SPLITS}}.items():
            object.__setattr__(self, attribute, value)

    def _with(self, **splits: Examples) -> Task:
        """Return this task with other splits, which are subsets of the checked ones."""
        new = object.__new__(Task)
        new._set(self.name, self.labels, self.label_texts, {**self.splits(), **splits})
        return new

    @classmethod
    def from_folder(
        cls,
        name: str,
        train_dir: str | os.PathLike[str],
        test_dir: str | os.PathLike[str],
        validation_dir: str | os.PathLike[str] | None = None,
        *,
        labels: Sequence[str] | None = None,
        label_texts: Mapping[str, str] | None = None,
    ) -> Task:
        """Make an image task of folders that hold one folder a class, named as the class.

        Args:
            name: Name of the task.
            train_dir: Folder of the training images; class folders may hold further folders.
            test_dir: Folder of the test images, with the same class folders or some of them.
            validation_dir: Folder of the validation images. ``None``: as in :class:`Task`.
            labels: As in :class:`Task`.
            label_texts: As in :class:`Task`.

        Raises:
            DataError: A folder is not there, holds images beside the class folders or a class without images, or an
                image cannot be read.
            ConfigError: As in :class:`Task`.

        Warns:
            UserWarning: Files are left out because their names do not end as image files do; or as in :class:`Task`.
        """
        folders = [None if folder is None else Path(folder) for folder in (train_dir, test_dir, validation_dir)]
        for split, folder in zip(("train", "test", "validation"), folders, strict=True):
            if folder is not None and not folder.is_dir():
                kind = "is a file" if folder.exists() else "is not there"
                raise DataError(
                    f"task {name!r}, {split} split: the folder {str(folder)!r} {kind}. Give the folder that holds one "
                    f"folder a class; files are read with Task(name, train, test, image=...)."
                )
        return cls(name, *folders, image="image", labels=labels, label_texts=label_texts)

    @classmethod
    def from_hub(
        cls,
        name: str,
        path: str,
        *,
        config: str | None = None,
        splits: Mapping[str, str] | None = None,
        text: str = "text",
        image: str | None = None,
        label: str = "label",
        labels: Sequence[str] | None = None,
        label_texts: Mapping[str, str] | None = None,
    ) -> Task:
        """Load a data set of the Hugging Face hub (or anything else ``datasets.load_dataset`` opens without code).

        Args:
            name: Name of the task.
            path: Hub name, for example ``"SetFit/sst2"``.
            config: Configuration of the data set, if it has several.
            splits: Which split of the data set is ``"train"``, ``"test"`` and (optional) ``"validation"``; slices such
                as ``"train[:2000]"`` are allowed. Default ``{"train": "train", "test": "test"}``.
            text: Name of the text column.
            image: Name of the image column, which makes the inputs images.
            label: Name of the label column.
            labels: As in :class:`Task`.
            label_texts: As in :class:`Task`.

        Raises:
            DataError: The data set, configuration or split cannot be loaded, or its rows fail the checks.
            ConfigError: ``splits`` has an unknown key or lacks train or test.
        """
        splits = {"train": "train", "test": "test"} if splits is None else splits
        for key in splits:
            if key not in SPLITS:
                raise ConfigError(f"task {name!r}: splits has the key {key!r}; {nearest(str(key), SPLITS)}")
        for key in ("train", "test"):
            if key not in splits:
                raise ConfigError(f"task {name!r}: splits does not say which split is {key!r}; add {key!r}: ...")
        from datasets import load_dataset

        loaded: dict[str, Any] = {}
        for key, split in splits.items():
            try:
                loaded[key] = load_dataset(path, config, split=split)
            except (OSError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"task {name!r}, {key} split: datasets.load_dataset({path!r}, {config!r}, split={split!r}) "
                    f"failed: {type(error).__name__}: {error}. Check path, config and splits, and the network "
                    f"connection (HF_HUB_OFFLINE must not be set); local files are read with Task(name, train, test)."
                ) from error
        return cls(
            name,
            loaded["train"],
            loaded["test"],
            loaded.get("validation"),
            text=text,
            image=image,
            label=label,
            labels=labels,
            label_texts=label_texts,
        )

    @property
    def modality(self) -> Literal["text", "image"]:
        """What the inputs of the task are."""
        return self.train.modality

    def splits(self) -> dict[str, Examples]:
        """Return the splits that are there, by name, in the order train, validation, test."""
        return {split: getattr(self, split) for split in SPLITS if getattr(self, split) is not None}

    def encode(self, split: str) -> list[int]:
        """Return the place in :attr:`labels` of each example's label.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            ConfigError: There is no such split.
        """
        if split not in self.splits():
            raise ConfigError(f"task {self.name!r}: no split {split!r}; {nearest(str(split), self.splits())}")
        places = {label: place for place, label in enumerate(self.labels)}
        return [places[label] for label in self.splits()[split].labels]

    def carve_validation(self, fraction: float = 0.1, seed: int = 0, *, rows: int | None = None) -> Task:
        """Split validation rows off train, stratified by label, at least one a label when possible.

        Rows with the same input stay on one side. The test split has no part in it.

        Args:
            fraction: Share of the training rows, between 0 and 1. Default 0.1.
            seed: Chooses the rows; the same rows on every machine and in any order of the file.
            rows: Number of rows, in place of ``fraction``.

        Returns:
            A task with a validation split; this one, if it has one.

        Raises:
            ConfigError: ``fraction`` or ``rows`` or ``seed`` is out of range.
            DataError: No label has two different training inputs.
        """
        if self.validation is not None:
            return self
        if not 0 < fraction < 1:
            raise ConfigError(f"validation fraction must be between 0 and 1, got {fraction!r}")
        check_counts(seed, validation=rows)
        count = round(fraction * len(self.train)) if rows is None else rows
        kept, carved = carve(self.train, count, seed, f"{self.name}/validation")
        if not len(carved):
            raise DataError(
                f"task {self.name!r}, train split: no label has two different {self.modality}s, so no validation "
                f"rows can be split off {len(self.train)} rows. Add training rows or pass validation=..."
            )
        return self._with(train=kept, validation=carved)

    def limit(
        self, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0
    ) -> Task:
        """Draw smaller splits, stratified by label; a split that is small enough stays as it is.

        Args:
            train: Largest number of training rows; ``None`` for all.
            validation: Largest number of validation rows. If the task has none, this many are carved out of train.
            test: Largest number of test rows.
            seed: Chooses the rows; the same rows on every machine and in any order of the file.

        Returns:
            A task with the same name and labels.

        Raises:
            ConfigError: A number is not positive, or ``train`` is less than the number of labels in train.
        """
        check_counts(seed, train=train, validation=validation, test=test)
        task = self
        if validation is not None and task.validation is None:
            task = task.carve_validation(seed=seed, rows=validation)
        limits = {"train": train, "validation": validation, "test": test}
        smaller = {}
        for split, examples in task.splits().items():
            count = limits[split]
            if count is None:
                continue
            classes = len(set(examples.labels))
            if split == "train" and count < classes:
                raise ConfigError(
                    f"task {self.name!r}: {count} training rows cannot hold its {classes} labels; ask for at least "
                    f"train={classes}"
                )
            smaller[split] = sample(examples, count, seed, f"{self.name}/{split}")
        return task._with(**smaller)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split}={len(examples)}" for split, examples in self.splits().items())
        kind = "" if self.modality == "text" else " of images"
        return f"Task({self.name!r}, {len(self.labels)} labels{kind}, {sizes})"


def _rows_of(source: Any, *, text: str, label: str, where: str, image: str | None) -> Rows:
    """Read any source; the examples of another task are taken as they are."""
    if isinstance(source, Examples):
        return Rows(source.inputs, source.labels, None, where)
    return read_rows(source, text=text, label=label, where=where, image=image)
