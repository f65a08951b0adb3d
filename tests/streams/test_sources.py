from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from growthring.errors import DataError
from growthring.streams.sources import read_rows

ROWS = [("a cat sat", "animal"), ('said "hi",\nthen left', "person"), ("größer\u2028oder\tkleiner", "word")]
DICTS = [{"text": text, "label": label} for text, label in ROWS]


def read(source, text="text", label="label"):
    return read_rows(source, text=text, label=label, where="task 'x', train split")


def pairs(source, **columns):
    rows = read(source, **columns)
    return list(zip(rows.inputs, rows.labels, strict=True))


def table(delimiter=",", rows=ROWS):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text", "label"])
    writer.writerows((number, *row) for number, row in enumerate(rows))
    return out.getvalue().encode()


def json_lines(rows=DICTS):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def parquet(rows=DICTS):
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


CONTENT = {
    "csv": table(),
    "tsv": table("\t"),
    "jsonl": json_lines(),
    "ndjson": json_lines(),
    "json": json.dumps(DICTS).encode(),
    "parquet": parquet(),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", CONTENT)
def test_every_format_gives_the_same_rows(tmp_path, kind, packed):
    content = gzip.compress(CONTENT[kind]) if packed else CONTENT[kind]
    path = write(tmp_path / (f"train.{kind}" + (".gz" if packed else "")), content)
    assert pairs(path) == ROWS
    assert pairs(str(path)) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no litter


def test_compression_is_told_by_content_not_by_name(tmp_path):
    assert pairs(write(tmp_path / "a.csv", gzip.compress(CONTENT["csv"]))) == ROWS
    assert pairs(write(tmp_path / "a.CSV.GZ", CONTENT["csv"])) == ROWS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"text": [row[0] for row in ROWS], "label": [row[1] for row in ROWS], "n": 3}).encode(),
        json.dumps(ROWS).encode(),
        json_lines(),  # JSON lines under a wrong name
        b"\n\n".join(json.dumps(row).encode() for row in ROWS),
    ],
    ids=["columns", "pairs", "lines", "lines of pairs"],
)
def test_json_layouts(tmp_path, content):
    assert pairs(write(tmp_path / "a.json", content)) == ROWS


def test_byte_order_marks_empty_lines_and_utf16(tmp_path):
    assert pairs(write(tmp_path / "a.csv", codecs.BOM_UTF8 + CONTENT["csv"])) == ROWS
    assert pairs(write(tmp_path / "b.csv", CONTENT["csv"].decode().encode("utf-16"))) == ROWS
    spaced = codecs.BOM_UTF8 + b"\n \n" + CONTENT["jsonl"].replace(b"\n", b"\r\n\n") + b"\n\n"
    assert pairs(write(tmp_path / "c.jsonl", spaced)) == ROWS
    assert pairs(write(tmp_path / "d.csv", CONTENT["csv"] + b"\r\n\r\n")) == ROWS


def test_long_csv_fields_are_read_and_the_global_limit_is_put_back(tmp_path):
    before = csv.field_size_limit()
    long = [("x" * 300_000, "a")]
    assert pairs(write(tmp_path / "a.csv", table(rows=long))) == long
    assert csv.field_size_limit() == before


def test_python_rows():
    import torch

    class Map(torch.utils.data.Dataset):  # without IndexError at its end
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index % len(self.rows)]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    for source in (ROWS, DICTS, tuple(ROWS), iter(ROWS), [list(row) for row in ROWS], Map(ROWS), Map(DICTS), Stream()):
        assert pairs(source) == ROWS
    assert pairs({"text": [row[0] for row in ROWS], "label": [row[1] for row in ROWS]}) == ROWS
    assert pairs([{"q": "t", "y": "l"}], text="q", label="y") == [("t", "l")]


def test_datasets_objects_with_class_names_and_formats(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    for source in (data, data.with_format("torch"), data.to_iterable_dataset()):
        rows = read(source)
        assert (rows.inputs, rows.labels, rows.names) == (["a", "b"], [1, 0], ["no", "yes"])
    path = tmp_path / "a.parquet"
    data.to_parquet(str(path))
    assert read(path).names == ["no", "yes"]
    with pytest.raises(DataError, match=r"no label column 'lable'; did you mean 'label'"):
        read(data, label="lable")
    with pytest.raises(DataError, match=r"holds whole splits \('train', 'test'\).*data\['train'\]"):
        read(datasets.DatasetDict(train=data, test=data))


BAD_FILES = {
    "column": ("a.csv", b"text,lable\na,b\n", r"no label column 'label'; did you mean 'lable'.*label=\.\.\."),
    "no header": ("a.csv", b"good,pos\nbad,neg\n", r"no text column 'text'.*no header line"),
    "separator": ("a.csv", b"text;label\na;b\n", r"no ',' but has ';'"),
    "fields": ("a.csv", b"text,label\na,b\nc,d,e\n", r"row 1: 3 fields, but the header has 2"),
    "quote": ("a.csv", b'text,label\n"a,b\n', r"line 2: .*double quotes"),
    "twice": ("a.csv", b"text,label,text\na,b,c\n", r"names column 'text' twice"),
    "no bytes": ("a.csv", b"", r"file is empty.*header line"),
    "encoding": ("a.csv", b"text,label\nd\xe9j\xe0,b\n", r"line 2 is not utf-8 text \(byte 0xe9.*iconv"),
    "not gz": ("a.csv.gz", b"\x1f\x8bnothing", r"cannot be read.*whole"),
    "cut gz": ("a.csv.gz", gzip.compress(CONTENT["csv"])[:-9], r"cannot be read.*whole"),
    "json line": ("a.jsonl", b'{"text":"a","label":"b"}\n\n{"text":\n', r"line 3 is not JSON"),
    "deep json": ("a.json", b"[" * 200_000, r"not JSON"),
    "json": ("a.json", b'[{"text": "a"', r"not JSON"),
    "json value": ("a.json", b"3", r"got a JSON int"),
    "json row": ("a.jsonl", b'{"text":"a","label":"b"}\n{"text":"a"}\n', r"row 1: there is no label column"),
    "json splits": ("a.json", b'{"train": [{"text": "a"}], "test": []}', r"whole splits \('train', 'test'\)"),
    "json lengths": ("a.json", b'{"text": ["a", "b"], "label": ["c"]}', r"from row 1 on a partner is missing"),
    "json string": ("a.json", b'{"text": ["a"], "label": "c"}', r"column 'label' is str, not a list"),
    "parquet": ("a.parquet", b"PAR1 and no more", r"not a readable parquet file"),
    "parquet column": ("a.parquet", parquet([{"text": "a", "labels": "b"}]), r"did you mean 'labels'"),
    "ending": ("a.xlsx", b"", r"Accepted endings: .jsonl, .json, .csv, .tsv, .parquet, each also with .gz"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_with_place_and_fix(tmp_path, case):
    name, content, message = BAD_FILES[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"(?s)^task 'x', train split.*{message}") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    write(tmp_path / "train.csv", b"")
    with pytest.raises(DataError, match=r"no such file. did you mean 'train.csv'.*Task.from_hub"):
        read(tmp_path / "trian.csv")
    with pytest.raises(DataError, match=r"no such file. A hub data set is read with Task.from_hub"):
        read("user/some-hub-data")
    with pytest.raises(DataError, match=r"is a folder \(it holds train.csv\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (7, r"cannot read rows from int"),
        (b"text", r"cannot read rows from bytes"),
        ([("a", "b"), "c"], r"row 1: got a str; rows must be"),
        ([("a", "b", "c")], r"row 0: got a tuple of 3 items"),
        ([DICTS[0], {"txt": "a", "label": "b"}], r"row 1: there is no text column 'text'; did you mean 'txt'"),
        ({"label": ["a"]}, r"no text column 'text'\. The columns are 'label'"),
    ],
)
def test_bad_python_rows(source, message):
    with pytest.raises(DataError, match=message):
        read(source)


def test_import_is_light():
    code = (
        "import sys, growthring.streams; print(sorted({'torch', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    # The package above may import them; only this one is asked about.
    code = (
        "import sys, types; m = types.ModuleType('growthring'); m.__path__ = [PATH]; sys.modules['growthring'] = m; "
        + code
    )
    root = Path(sys.modules["growthring.streams"].__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code.replace("PATH", repr(str(root)))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
