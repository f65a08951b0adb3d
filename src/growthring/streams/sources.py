"""Read the rows of one split from whatever the user has: lists, Hugging Face or torch data sets, files, folders.

Nothing is checked here beyond the shape (the columns are there, a file can be read); :class:`growthring.streams.Task`
checks the values. Files are read in place with the standard library (parquet: ``pyarrow``): no cache, no network.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from growthring.errors import DataError, nearest
from growthring.streams.images import Cell

__all__ = ["IMAGE_ENDINGS", "Rows", "read_rows"]

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ROW_FORMS = '{"text": ..., "label": ...} dicts or (text, label) pairs'
_MAX_FIELD = 2**31 - 1  # the largest that csv takes on every platform


@dataclass(frozen=True)
class Rows:
    """Two columns as they were found, not yet checked.

    Attributes:
        inputs: Raw value of the text or image column, one a row.
        labels: Raw value of the label column, one a row.
        names: Names of integer labels, if the source carries them (``ClassLabel`` of a ``datasets`` object).
        where: What to call this source in an error message.
    """

    inputs: Sequence[Any]
    labels: list[Any]
    names: list[str] | None
    where: str


@dataclass(frozen=True)
class _Want:
    """The two columns that are looked for, and what the first one is called: ``"text"`` or ``"image"``."""

    kind: str
    input: str
    label: str
    where: str

    @property
    def forms(self) -> str:
        return ROW_FORMS.replace("text", self.kind)

    def need(self, columns: Iterable[Any], where: str | None = None, hint: str = "") -> None:
        """Raise unless both columns are there."""
        names = [str(column) for column in columns]
        for keyword, wanted, other in ((self.kind, self.input, self.label), ("label", self.label, self.input)):
            if wanted not in names:
                near = nearest(wanted, [name for name in names if name != other])
                if keyword == "text" and "image" in names:
                    hint = " If the inputs are images: image='image'." + hint
                raise DataError(
                    f"{where or self.where}: there is no {keyword} column {wanted!r}"
                    f"{'; ' + near if near.startswith('did') else '.'} "
                    f"The columns are {', '.join(map(repr, names)) or 'none'}. "
                    f"Say which one it is with {keyword}=...{hint}"
                )


def read_rows(source: Any, *, text: str, label: str, where: str, image: str | None = None) -> Rows:
    """Read the input and the label column of ``source``.

    Args:
        source: List (or any iterable) of dicts or pairs, dict of two columns, ``datasets.Dataset``, torch ``Dataset``
            of dicts or pairs, the path of a jsonl, json, csv, tsv or parquet file, gzip'd or not, or, for images, the
            path of a folder that holds one folder a class.
        text: Name of the text column; not used for pairs.
        label: Name of the label column; not used for pairs.
        where: Beginning of every error message, for example ``"task 'trec', train split"``.
        image: Name of the image column, which is then read in place of the text column.

    Returns:
        The two columns. Images of a ``datasets.Dataset`` are :class:`~growthring.streams.images.Cell` objects; the
        paths of images in a file are relative to its folder.

    Raises:
        DataError: The source cannot be read or lacks a column.
    """
    want = _Want("text" if image is None else "image", text if image is None else image, label, where)
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(source), want)
    if isinstance(source, Mapping):
        return _from_columns(source, want)
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return _from_datasets(source, want)
    return _from_iterable(_iterate(source, want), want)


# ---------------------------------------------------------------------------------------------------- Python objects


def _iterate(source: Any, want: _Want) -> Iterator[Any]:
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not hasattr(source, "__iter__"):
        return (source[i] for i in range(len(source)))  # a map-style torch data set need not raise IndexError
    if isinstance(source, bytes | bytearray) or not hasattr(source, "__iter__"):
        raise DataError(
            f"{want.where}: cannot read rows from {type(source).__name__}. Give a list of {want.forms}, a "
            f"datasets.Dataset, a torch Dataset, or the path of a {', '.join(FORMATS)} file."
        )
    return iter(source)


def _from_iterable(rows: Iterator[Any], want: _Want) -> Rows:
    inputs, labels = [], []
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            if want.input not in row or want.label not in row:
                want.need(row, f"{want.where}, row {number}")
            inputs.append(row[want.input])
            labels.append(row[want.label])
        elif isinstance(row, Sequence) and not isinstance(row, str | bytes) and len(row) == 2:
            inputs.append(row[0])
            labels.append(row[1])
        else:
            got = type(row).__name__
            if isinstance(row, Sequence) and not isinstance(row, str | bytes):
                got += f" of {len(row)} items"
            tip = ' Two arrays are given as {"image": images, "label": labels}.' if hasattr(row, "shape") else ""
            raise DataError(f"{want.where}, row {number}: got a {got}; rows must be {want.forms}.{tip}")
    return Rows(inputs, labels, None, want.where)


def _from_columns(columns: Mapping[Any, Any], want: _Want) -> Rows:
    where = want.where
    for split, value in columns.items():
        rows = isinstance(value, list) and value and isinstance(value[0], Mapping)
        if rows or hasattr(value, "column_names"):
            raise DataError(
                f"{where}: this holds whole splits ({', '.join(repr(str(key)) for key in columns)}), not one. "
                f"Give one of them, for example data[{split!r}]; a file needs one split to itself."
            )
    want.need(columns)
    pair = []
    for name in (want.input, want.label):
        value = columns[name]
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
            raise DataError(
                f"{where}: column {name!r} is {type(value).__name__}, not a list. "
                f"Give a list of {want.forms} or a dict of two equally long lists."
            )
        pair.append(list(value))
    if len(pair[0]) != len(pair[1]):
        raise DataError(
            f"{where}: column {want.input!r} has {len(pair[0])} values and column {want.label!r} has {len(pair[1])}; "
            f"from row {min(map(len, pair))} on a partner is missing. Make them equally long."
        )
    return Rows(pair[0], pair[1], None, where)


def _from_datasets(data: Any, want: _Want) -> Rows:
    if data.column_names is not None:
        want.need(data.column_names)
    features = data.features or {}
    names = getattr(features.get(want.label), "names", None)
    if hasattr(data, "__len__"):
        plain = data.with_format(None)  # a torch or numpy format would hand out tensors
        inputs = list(plain[want.input]) if want.kind == "text" else _cells(plain, features.get(want.input), want)
        return Rows(inputs, list(plain[want.label]), names, want.where)
    if want.kind == "image" and type(features.get(want.input)).__name__ == "Image":
        data = data.cast_column(want.input, type(features[want.input])(decode=False))  # keep the encoded bytes
    rows = _from_iterable(iter(data), want)
    return Rows(rows.inputs, rows.labels, names, want.where)


def _cells(data: Any, feature: Any, want: _Want) -> list[Any]:
    """Return a reference to each image of a column: the pixels stay on disk."""
    column = data.select_columns([want.input])
    if type(feature).__name__ not in ("Image", "Value", "dict"):
        column = column.with_format("numpy")  # pixels stored as nested lists
    return [Cell(column, row, want.input) for row in range(len(data))]


# ------------------------------------------------------------------------------------------------------------- files


def _from_path(path: Path, want: _Want) -> Rows:
    rows = _from_folder(path, want) if want.kind == "image" and path.is_dir() else _from_file(path, want)
    if want.kind == "image" and not path.is_dir():  # the images lie where the list of them lies
        inputs = [str(path.parent / value) if isinstance(value, str) and value else value for value in rows.inputs]
        rows = Rows(inputs, rows.labels, rows.names, rows.where)
    return rows


def _from_folder(folder: Path, want: _Want) -> Rows:
    """Read a folder that holds one folder a class, each with image files at any depth."""
    where = f"{want.where} ({folder})"
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    stray = [entry.name for entry in entries if entry.suffix.lower() in IMAGE_ENDINGS and entry.is_file()]
    if stray or not classes:
        found = f"{len(stray)} image files ({stray[0]!r}, ...)" if stray else f"{len(entries)} files and no folder"
        raise DataError(
            f"{where}: it must hold one folder a class, named as the class, with the images in it; it holds {found}."
        )
    inputs: list[Any] = []
    labels: list[Any] = []
    others: list[Path] = []
    for entry in classes:
        walk = os.walk(entry, onerror=partial(_refuse_folder, where=where))
        files = [Path(root, name) for root, _, names in walk for name in names if not name.startswith(".")]
        images = sorted(file for file in files if file.suffix.lower() in IMAGE_ENDINGS)
        if not images:
            raise DataError(
                f"{where}: the folder of class {entry.name!r} holds no image file (endings: "
                f"{', '.join(IMAGE_ENDINGS)}). Add images or remove the folder."
            )
        others += [file for file in files if file.suffix.lower() not in IMAGE_ENDINGS]
        inputs += images
        labels += [entry.name] * len(images)
    if others:
        warnings.warn(
            f"{where}: {len(others)} files are left out because their names do not end as image files do (first: "
            f"{min(others)}). Accepted: {', '.join(IMAGE_ENDINGS)}.",
            UserWarning,
            stacklevel=6,  # the caller of Task
        )
    return Rows(inputs, labels, None, where)


def _refuse_folder(error: OSError, where: str) -> None:
    raise DataError(f"{where}: the folder {error.filename!r} cannot be read ({error.strerror}). Mend its permissions.")


def _from_file(path: Path, want: _Want) -> Rows:
    where = f"{want.where} ({path})"
    want = replace(want, where=where)
    kind = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    kind = kind.lower().lstrip(".")
    kind = "jsonl" if kind == "ndjson" else kind
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))[:8]
        raise DataError(
            f"{where}: this is a folder (it holds {', '.join(files) or 'nothing'}). Name a file; a folder written by "
            f"datasets is read with datasets.load_from_disk(path), a hub data set with Task.from_hub(name, path), a "
            f"folder of images with Task.from_folder(name, train_dir, test_dir)."
        )
    if not path.exists():
        entries = path.parent.iterdir() if path.parent.is_dir() else ()
        beside = [entry.name for entry in entries if entry.is_file() or want.kind == "image"]
        tip = f"{nearest(path.name, beside)} " if beside and len(beside) <= 50 else ""
        raise DataError(f"{where}: there is no such file. {tip}A hub data set is read with Task.from_hub(name, path).")
    if kind not in FORMATS:
        raise DataError(
            f"{where}: cannot tell the format from the name. Accepted endings: "
            f"{', '.join('.' + form for form in FORMATS)}, each also with .gz."
        )
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":  # by content: names lie
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{where}: cannot be read ({error}). Check that the file is whole; download it again."
        ) from None
    if kind == "parquet":
        return _parquet(raw, want)
    content = _decode(raw, where)
    if kind in ("csv", "tsv"):
        return _table(content, "," if kind == "csv" else "\t", want)
    if kind == "jsonl":
        return _from_iterable(_json_lines(content, where), want)
    return _json(content, want)


def _decode(raw: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one; anything else is not guessed at."""
    try:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}: line {line} is not {error.encoding} text (byte 0x{raw[error.start]:02x} at offset "
            f"{error.start}). Save the file as UTF-8; if it is Latin-1: iconv -f latin1 -t utf-8 OLD > NEW."
        ) from None


def _parse(content: str) -> Any:
    return json.loads(content)


def _json_lines(content: str, where: str) -> Iterator[Any]:
    # Not splitlines(): it also splits at U+2028 and the like, which JSON allows inside strings.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _parse(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: line {number} is not JSON ({error}). Mend or remove that line.") from None


def _json(content: str, want: _Want) -> Rows:
    where = want.where
    try:
        value = _parse(content)
    except (ValueError, RecursionError) as error:
        lines = [line for line in content.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].strip().endswith(("}", "]")):  # JSON lines under the name of .json
            return _from_iterable(_json_lines(content, where), want)
        raise DataError(f"{where}: this is not JSON ({error}). Check that the file is whole.") from None
    if isinstance(value, Mapping) and isinstance(value.get(want.input), str):
        value = [value]  # a single row
    if isinstance(value, Mapping):
        return _from_columns(value, want)
    if isinstance(value, list):
        return _from_iterable(iter(value), want)
    raise DataError(f"{where}: got a JSON {type(value).__name__}; it must be a list of rows or a dict of columns.")


def _table(content: str, delimiter: str, want: _Want) -> Rows:
    where = want.where
    old_limit = csv.field_size_limit(_MAX_FIELD)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(
            f"{where}: line {reader.line_num}: {error}. A field that holds a quote, a line break or the separator "
            f'must stand in double quotes, with each quote in it doubled ("").'
        ) from None
    finally:
        csv.field_size_limit(old_limit)
    if not rows:
        line = f"{want.input}{delimiter}{want.label}"
        raise DataError(f"{where}: the file is empty. It needs a header line ({line}) and rows.")
    header = [name.strip() for name in rows[0]]
    hint = ""
    if len(header) == 1:
        other = next((mark for mark in (";", "\t", ",", "|") if mark != delimiter and mark in header[0]), None)
        hint = f" The header has no {delimiter!r} but has {other!r}: is that the separator?" if other else ""
    elif len(header) == 2:
        hint = " Or has the file no header line? Then add one."
    want.need(header, hint=hint)
    for name in (want.input, want.label):
        if header.count(name) > 1:
            raise DataError(f"{where}: the header names column {name!r} twice. Rename one of them.")
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise DataError(
                f"{where}, row {number}: {len(row)} fields, but the header has {len(header)}. "
                f"Put a text that holds {delimiter!r} in double quotes."
            )
    at_input, at_label = header.index(want.input), header.index(want.label)
    return Rows([row[at_input] for row in rows[1:]], [row[at_label] for row in rows[1:]], None, where)


def _parquet(raw: bytes, want: _Want) -> Rows:
    where = want.where
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(io.BytesIO(raw))
        want.need(file.schema_arrow.names)
        table = file.read(columns=[want.input, want.label])
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{where}: this is not a readable parquet file ({error}). Check that it is whole.") from None
    try:  # the names of integer labels, if datasets wrote the file
        info = json.loads((table.schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][want.label]["names"]
    except (KeyError, TypeError, ValueError):
        names = None
    return Rows(table.column(want.input).to_pylist(), table.column(want.label).to_pylist(), names, where)
