from __future__ import annotations

import os

import pytest

from growthring.errors import DataError
from growthring.streams import ASSETS, DEMO_ASSETS, Task, asset_cache, demo, demo_encoder_path, demo_stream

# Rows of the whole pools: train, validation, test, classes.
POOLS = {
    "trec": (3426, 605, 1344, 6),
    "bbc": (1351, 238, 530, 5),
    "sms": (2845, 502, 1116, 2),
    "movie": (6401, 1130, 2510, 2),
    "newsgroups": (9571, 1689, 7520, 20),
}


def in_cache() -> bool:
    return all((asset_cache() / f"{name}-{ASSETS[name].version}" / "manifest.json").is_file() for name in DEMO_ASSETS)


needs_assets = pytest.mark.skipif(
    not os.environ.get("GROWTHRING_ASSETS") and not in_cache(),
    reason="the demo's assets (157 MB) are not in the cache; run the demo once or set GROWTHRING_ASSETS",
)


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def test_readers(tmp_path):
    trec = write(tmp_path / "q.txt", "NUM:date When was it ?\r\n\nHUM:ind Who : him ?\n")
    assert demo._trec(trec) == [("When was it ?", "NUM"), ("Who : him ?", "HUM")]
    sms = write(tmp_path / "s.csv", ',spam,text\n0,0,"a, ""b""\nc"\n1,1,win\n')
    assert demo._sms(sms) == [('a, "b"\nc', "ham"), ("win", "spam")]
    movie = write(tmp_path / "m.txt", "id\tsentiment\ttext\r\n1\t2.5\tgood\r\n2\t-0.4\tmeh\r\n3\t-3\tbad\tfilm\r\n")
    assert demo._movie(movie) == [("good", "pos"), ("bad\tfilm", "neg")]
    tab = write(tmp_path / "n.tab", 'Category\tText\nd\tstring\nclass\t\n\na.b\tsome "text\n\nc.d\tmore\n')
    assert demo._tab(tab) == [('some "text', "a.b"), ("more", "c.d")]
    write(tmp_path / "bbc/tech/1.txt", "it cost £5", "latin-1")
    write(tmp_path / "bbc/sports/1.txt", "£6 “ok”", "cp1252")
    assert demo._folders(tmp_path / "bbc") == [("£6 “ok”", "sports"), ("it cost £5", "tech")]


def test_broken_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"q.txt: line 2 is not 'CLASS:subclass question'"):
        demo._trec(write(tmp_path / "q.txt", "NUM:date When ?\nnothing\n"))
    with pytest.raises(DataError, match=r"m.txt: line 2 is not id, rating and text"):
        demo._movie(write(tmp_path / "m.txt", "id\tsentiment\ttext\n1 2.5 good\n"))
    with pytest.raises(DataError, match=r"n.tab: line 1 is not the header"):
        demo._tab(write(tmp_path / "n.tab", "<html>\n"))


def test_tidy_drops_near_copies_and_contradictions():
    pairs = [("Win 50 now!", "s"), ("win 77  NOW", "s"), ("hm", "h"), ("HM.", "s"), ("...", "h"), ("a&amp;b", "h")]
    assert list(demo._tidy(pairs)) == [("Win 50 now!", "s"), ("a&b", "h")]
    assert len(demo._tidy([("x" * 5000, "a")]).texts[0]) == 2000
    assert len(demo._tidy([("x" * 2000 + "y", "a"), ("x" * 2000 + "z", "a")])) == 1


def test_a_published_test_file_stays_whole():
    pool, test = demo._tidy([("a one", "p"), ("b", "q"), ("c", "q")]), demo._tidy([("A, one", "p"), ("d", "q")])
    train, kept = demo._pools("x", pool, test)
    assert kept == test
    assert list(train) == [("b", "q"), ("c", "q")]


@needs_assets
def test_the_real_demo_stream():
    whole = demo_stream(seed=0, train=None, validation=None, test=None)
    assert [task.name for task in whole] == ["trec", "bbc", "sms", "movie", "newsgroups"]
    sizes = {t.name: (len(t.train), len(t.validation or ()), len(t.test), len(t.labels)) for t in whole}
    assert sizes == POOLS
    for task in whole:
        assert task.validation is not None
        keys = {split: [demo._key(text) for text in examples.texts] for split, examples in task.splits().items()}
        together = [key for split in keys.values() for key in split]
        assert len(set(together)) == len(together)  # no text twice, within or across splits
        for examples in task.splits().values():
            assert set(examples.labels) == set(task.labels)
        assert all(words != label for label, words in task.label_texts.items() if task.name == "trec")

    zero, again, one = demo_stream(seed=0), demo_stream(seed=0), demo_stream(seed=1)
    assert zero.fingerprint() == again.fingerprint() != one.fingerprint()
    for task, other, pool in zip(zero, one, whole, strict=True):
        assert [len(examples) for examples in task.splits().values()] == [600, 200, 500]
        assert set(task.train.labels) == set(task.labels)
        assert inside(task, pool)
        assert inside(other, pool)  # a seed never moves a row from one pool to another
        assert task.train != other.train


def inside(task: Task, pool: Task) -> bool:
    pools = pool.splits()
    return all(set(examples.texts) <= set(pools[split].texts) for split, examples in task.splits().items())


@needs_assets
def test_the_real_encoder_folder():
    names = {path.name for path in demo_encoder_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= names
