"""The checks that a task's name, inputs and labels pass before anything is trained on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from growthring.errors import ConfigError, DataError, GrowthringError, nearest
from growthring.streams._splits import Examples, same_text
from growthring.streams.images import Images, pixel_hash, read_image
from growthring.streams.sources import IMAGE_ENDINGS, Rows

__all__ = [
    "as_images",
    "as_label",
    "as_text",
    "check_counts",
    "check_labels",
    "check_name",
    "each",
    "given_labels",
    "number_first",
    "warn_of_file_names",
    "warn_of_overlap",
    "words_of_labels",
]

_SHOWN = 40  # characters of a value that an error message shows


def check_name(name: Any, what: str = "task") -> None:
    """Raise unless ``name`` is a plain string that can name a file; ``what`` says of what it is the name."""
    if not isinstance(name, str) or not name.strip() or name != name.strip():
        raise ConfigError(f"a {what} name must be a string without white space around it, got {name!r}")
    if name in (".", "..") or any(mark in '/\\:*?"<>|' or not mark.isprintable() for mark in name):
        raise ConfigError(
            f"{what} name {name!r}: it becomes a file name; use letters, digits, blank, '-', '_' and '.'"
        )


def check_counts(seed: Any, **counts: int | None) -> None:
    """Raise unless the seed is an integer and every count a positive number or ``None``."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed must be an integer, got {seed!r}")
    for split, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"{split} must be a number of rows, 1 or more, or None for all; got {count!r}")


def each(values: Sequence[Any], read: Callable[[Any], str], where: str, fix: str) -> list[str]:
    """Apply ``read`` to every value; raise one error that names the first bad row and counts the others."""
    good, bad = [], []
    for row, value in enumerate(values):
        try:
            good.append(read(value))
        except GrowthringError:
            raise  # not this row's fault
        except ValueError as error:
            bad.append((row, error))
    if bad:
        rows = ", ".join(str(row) for row, _ in bad[1:6]) + (", ..." if len(bad) > 6 else "")
        others = f" ({len(bad) - 1} more bad rows: {rows})" if len(bad) > 1 else ""
        raise DataError(f"{where}, row {bad[0][0]}: {bad[0][1]}{others}. {fix}.")
    return good


def as_text(value: Any) -> str:
    """Return a text as it is; raise ``ValueError`` with the reason if it is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"the text is missing ({value})")
    if not isinstance(value, str):
        raise ValueError(f"the text is of type {type(value).__name__} ({repr(value)[:_SHOWN]}), not a string")
    if not value.strip():
        raise ValueError(f"the text is empty ({value[:_SHOWN]!r})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds half a character (a lone surrogate at position {error.start})") from None
    return str(value)


def as_images(values: Sequence[Any], where: str) -> Images:
    """Read every image once, to check it and to hash its pixels, and keep what it was given as."""
    if isinstance(values, Images):  # of another task
        return values
    hashes = each(values, lambda value: pixel_hash(read_image(value)), where, "Mend the image or remove the row")
    return Images(values, hashes)


def as_label(value: Any, names: Sequence[str] | None) -> str:
    """Return a label as a string, integers by ``names``; raise ``ValueError`` with the reason if it is none."""
    if not isinstance(value, str) and hasattr(value, "item"):  # numpy and torch numbers
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            shape = tuple(getattr(value, "shape", ()))
            raise ValueError(f"the label is a {type(value).__name__} of shape {shape}, not one class") from None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"the label is missing ({value})")
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"the label {value!r} is a fractional number, not a class")
        value = int(value)  # integers that went through a float column
    if isinstance(value, int):
        if names is None or isinstance(value, bool):
            return str(value)
        if value == -1:
            raise ValueError(
                "the label is -1, which datasets writes where labels are held back; this split cannot be scored, "
                "take another one"
            )
        if not 0 <= value < len(names):
            raise ValueError(f"the label {value} is outside the {len(names)} names of its ClassLabel feature")
        return names[value]
    if not isinstance(value, str):
        raise ValueError(f"the label is of type {type(value).__name__} ({repr(value)[:_SHOWN]}), not one class")
    if not value.strip():
        raise ValueError(f"the label is empty ({value!r})")
    return value.strip()


def number_first(label: str) -> tuple[bool, int, str]:
    """Sort key: numbers by value, then words."""
    try:
        return (False, int(label), label)
    except ValueError:
        return (True, 0, label)


def given_labels(name: str, labels: Sequence[Any]) -> list[str]:
    """Return the user's list of labels as strings; raise if it is empty or repeats one."""
    where = f"task {name!r}, labels="
    if isinstance(labels, str):
        raise DataError(f"{where}{labels!r} is one string; give a list of labels.")
    order = each(list(labels), lambda value: as_label(value, None), where, "Give a list of label names")
    if not order:
        raise DataError(f"{where} is empty. Leave it out to take the labels of train.")
    twice = sorted({label for label in order if order.count(label) > 1})
    if twice:
        raise DataError(f"{where} names {twice[0]!r} twice. Remove one.")
    return order


def check_labels(examples: Examples, order: list[str], where: str, *, given: bool) -> None:
    """Raise if a row has a label outside ``order``: the user's list if ``given``, else the labels of train."""
    known = set(order)
    unknown = [row for row, label in enumerate(examples.labels) if label not in known]
    if not unknown:
        return
    label = examples.labels[unknown[0]]
    many = f" ({len(unknown)} such rows)" if len(unknown) > 1 else ""
    near = nearest(label, order)
    if not given:
        raise DataError(
            f"{where}, row {unknown[0]}: the label {label!r} never appears in train{many}; {near} Add training rows "
            f"with it, remove these rows, or pass labels=[...] with it in the list if that is meant."
        )
    number = (
        ""
        if not label.isdigit()
        else (" Integer labels are read as text: pass labels=['0', '1', ...] and their meaning in label_texts.")
    )
    raise DataError(
        f"{where}, row {unknown[0]}: the label {label!r} is not in labels={order}{many}; {near} "
        f"Mend the row or add the label.{number}"
    )


def words_of_labels(name: str, order: list[str], given: Mapping[str, str] | None) -> dict[str, str]:
    """Return each label's words: the given ones, else the label with ``_`` read as a blank; raise if two are equal."""
    given = {str(label): words for label, words in (given or {}).items()}
    for label, words in given.items():
        if label not in order:
            raise DataError(f"task {name!r}, label_texts: there is no label {label!r}; {nearest(label, order)}")
        if not isinstance(words, str) or not words.strip():
            raise DataError(f"task {name!r}, label_texts[{label!r}] is {words!r}. Say in words what the label means.")
    texts = {label: given.get(label, label.replace("_", " ").strip() or label).strip() for label in order}
    seen: dict[str, str] = {}
    for label, words in texts.items():
        if words in seen:
            raise DataError(
                f"task {name!r}: the labels {seen[words]!r} and {label!r} have the same label text {words!r} and "
                f"could not be told apart. Give each its own in label_texts."
            )
        seen[words] = label
    return texts


def warn_of_file_names(rows: Rows) -> None:
    """Warn if every text is the name of an image file: the images are meant then, and would not be read."""
    if all(isinstance(text, str) and text.strip().lower().endswith(IMAGE_ENDINGS) for text in rows.inputs):
        warnings.warn(
            f"{rows.where}: every text is the name of an image file (first: {rows.inputs[0]!r}). They are read as "
            f"texts; if the images are meant, pass image=... with the name of the column.",
            UserWarning,
            stacklevel=3,
        )


def warn_of_overlap(name: str, splits: Mapping[str, Examples]) -> None:
    """Warn if an input stands in two splits: what is measured on the second is then partly remembered."""
    found = []
    keys = {split: [same_text(key) for key in examples.keys] for split, examples in splits.items()}
    for first, second in (("train", "test"), ("validation", "test"), ("train", "validation")):
        known = set(keys.get(first, ()))
        rows = [row for row, key in enumerate(keys.get(second, ())) if key in known]
        if rows:
            what = f"{splits[second].modality}s"
            found.append(
                f"{len(rows)} of {len(keys[second])} {second} {what} are also in {first} (first: row {rows[0]})"
            )
    if found:
        warnings.warn(
            f"task {name!r}: {'; '.join(found)}. Scores will be too high: remove these rows from one split.",
            UserWarning,
            stacklevel=3,
        )
