"""Read the rows of one split from whatever the user has: lists, Hugging Face or torch data sets, files.

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
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growthring.errors import DataError, nearest

__all__ = ["Rows", "read_rows"]

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
ROW_FORMS = '{"text": ..., "label": ...} dicts or (text, label) pairs'
_MAX_FIELD = 2**31 - 1  # the largest that csv takes on every platform


@dataclass(frozen=True)
class Rows:
    """Two columns as they were found, not yet checked.

    Attributes:
        texts: Raw value of the text column, one a row.
        labels: Raw value of the label column, one a row.
        names: Names of integer labels, if the source carries them (``ClassLabel`` of a ``datasets`` object).
        where: What to call this source in an error message.
    """

    texts: list[Any]
    labels: list[Any]
    names: list[str] | None
    where: str


def read_rows(source: Any, *, text: str, label: str, where: str) -> Rows:
    """Read the text and the label column of ``source``.

    Args:
        source: List (or any iterable) of dicts or pairs, dict of two columns, ``datasets.Dataset``, torch ``Dataset``
            of dicts or pairs, or the path of a jsonl, json, csv, tsv or parquet file, gzip'd or not.
        text: Name of the text column; not used for pairs.
        label: Name of the label column; not used for pairs.
        where: Beginning of every error message, for example ``"task 'trec', train split"``.

    Returns:
        The two columns.

    Raises:
        DataError: The source cannot be read or lacks a column.
    """
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source), text, label, where)
    if isinstance(source, Mapping):
        return _from_columns(source, text, label, where)
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return _from_datasets(source, text, label, where)
    return _from_iterable(_iterate(source, where), text, label, where)


# ---------------------------------------------------------------------------------------------------- Python objects


def _need(columns: Iterable[Any], text: str, label: str, where: str, hint: str = "") -> None:
    """Raise unless both columns are there."""
    names = [str(column) for column in columns]
    for keyword, wanted in (("text", text), ("label", label)):
        if wanted not in names:
            others = [name for name in names if name != (label if keyword == "text" else text)]
            near = nearest(wanted, others)
            raise DataError(
                f"{where}: there is no {keyword} column {wanted!r}{'; ' + near if near.startswith('did') else '.'} "
                f"The columns are {', '.join(map(repr, names)) or 'none'}. "
                f"Say which one it is with {keyword}=...{hint}"
            )


def _iterate(source: Any, where: str) -> Iterator[Any]:
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not hasattr(source, "__iter__"):
        return (source[i] for i in range(len(source)))  # a map-style torch data set need not raise IndexError
    if isinstance(source, bytes | bytearray) or not hasattr(source, "__iter__"):
        raise DataError(
            f"{where}: cannot read rows from {type(source).__name__}. Give a list of {ROW_FORMS}, a datasets.Dataset, "
            f"a torch Dataset, or the path of a {', '.join(FORMATS)} file."
        )
    return iter(source)


def _from_iterable(rows: Iterator[Any], text: str, label: str, where: str) -> Rows:
    texts, labels = [], []
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            if text not in row or label not in row:
                _need(row, text, label, f"{where}, row {number}")
            texts.append(row[text])
            labels.append(row[label])
        elif isinstance(row, Sequence) and not isinstance(row, str | bytes) and len(row) == 2:
            texts.append(row[0])
            labels.append(row[1])
        else:
            got = type(row).__name__
            if isinstance(row, Sequence) and not isinstance(row, str | bytes):
                got += f" of {len(row)} items"
            raise DataError(f"{where}, row {number}: got a {got}; rows must be {ROW_FORMS}.")
    return Rows(texts, labels, None, where)


def _from_columns(columns: Mapping[Any, Any], text: str, label: str, where: str) -> Rows:
    for split, value in columns.items():
        rows = isinstance(value, list) and value and isinstance(value[0], Mapping)
        if rows or hasattr(value, "column_names"):
            raise DataError(
                f"{where}: this holds whole splits ({', '.join(repr(str(key)) for key in columns)}), not one. "
                f"Give one of them, for example data[{split!r}]; a file needs one split to itself."
            )
    _need(columns, text, label, where)
    pair = []
    for name in (text, label):
        value = columns[name]
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
            raise DataError(
                f"{where}: column {name!r} is {type(value).__name__}, not a list. "
                f"Give a list of {ROW_FORMS} or a dict of two equally long lists."
            )
        pair.append(list(value))
    if len(pair[0]) != len(pair[1]):
        raise DataError(
            f"{where}: column {text!r} has {len(pair[0])} values and column {label!r} has {len(pair[1])}; "
            f"from row {min(map(len, pair))} on a partner is missing. Make them equally long."
        )
    return Rows(pair[0], pair[1], None, where)


def _from_datasets(data: Any, text: str, label: str, where: str) -> Rows:
    if data.column_names is not None:
        _need(data.column_names, text, label, where)
    names = getattr((data.features or {}).get(label), "names", None)
    if hasattr(data, "__len__"):
        plain = data.with_format(None)  # a torch or numpy format would hand out tensors
        return Rows(list(plain[text]), list(plain[label]), names, where)
    rows = _from_iterable(iter(data), text, label, where)
    return Rows(rows.texts, rows.labels, names, where)


# ------------------------------------------------------------------------------------------------------------- files


def _from_file(path: Path, text: str, label: str, where: str) -> Rows:
    where = f"{where} ({path})"
    kind = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    kind = kind.lower().lstrip(".")
    kind = "jsonl" if kind == "ndjson" else kind
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))[:8]
        raise DataError(
            f"{where}: this is a folder (it holds {', '.join(files) or 'nothing'}). Name a file; a folder written by "
            f"datasets is read with datasets.load_from_disk(path), a hub data set with Task.from_hub(name, path)."
        )
    if not path.exists():
        beside = [file.name for file in path.parent.iterdir() if file.is_file()] if path.parent.is_dir() else []
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
        return _parquet(raw, text, label, where)
    content = _decode(raw, where)
    if kind in ("csv", "tsv"):
        return _table(content, "," if kind == "csv" else "\t", text, label, where)
    if kind == "jsonl":
        return _from_iterable(_json_lines(content, where), text, label, where)
    return _json(content, text, label, where)


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


def _json(content: str, text: str, label: str, where: str) -> Rows:
    try:
        value = _parse(content)
    except (ValueError, RecursionError) as error:
        lines = [line for line in content.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].strip().endswith(("}", "]")):  # JSON lines under the name of .json
            return _from_iterable(_json_lines(content, where), text, label, where)
        raise DataError(f"{where}: this is not JSON ({error}). Check that the file is whole.") from None
    if isinstance(value, Mapping) and text in value and isinstance(value[text], str):
        value = [value]  # a single row
    if isinstance(value, Mapping):
        return _from_columns(value, text, label, where)
    if isinstance(value, list):
        return _from_iterable(iter(value), text, label, where)
    raise DataError(f"{where}: got a JSON {type(value).__name__}; it must be a list of rows or a dict of columns.")


def _table(content: str, delimiter: str, text: str, label: str, where: str) -> Rows:
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
        raise DataError(f"{where}: the file is empty. It needs a header line ({text}{delimiter}{label}) and rows.")
    header = [name.strip() for name in rows[0]]
    hint = ""
    if len(header) == 1:
        other = next((mark for mark in (";", "\t", ",", "|") if mark != delimiter and mark in header[0]), None)
        hint = f" The header has no {delimiter!r} but has {other!r}: is that the separator?" if other else ""
    elif len(header) == 2:
        hint = " Or has the file no header line? Then add one."
    _need(header, text, label, where, hint)
    for name in (text, label):
        if header.count(name) > 1:
            raise DataError(f"{where}: the header names column {name!r} twice. Rename one of them.")
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise DataError(
                f"{where}, row {number}: {len(row)} fields, but the header has {len(header)}. "
                f"Put a text that holds {delimiter!r} in double quotes."
            )
    at_text, at_label = header.index(text), header.index(label)
    return Rows([row[at_text] for row in rows[1:]], [row[at_label] for row in rows[1:]], None, where)


def _parquet(raw: bytes, text: str, label: str, where: str) -> Rows:
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(io.BytesIO(raw))
        _need(file.schema_arrow.names, text, label, where)
        table = file.read(columns=[text, label])
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{where}: this is not a readable parquet file ({error}). Check that it is whole.") from None
    try:  # the names of integer labels, if datasets wrote the file
        info = json.loads((table.schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        names = None
    return Rows(table.column(text).to_pylist(), table.column(label).to_pylist(), names, where)
