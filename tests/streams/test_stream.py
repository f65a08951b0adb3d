from __future__ import annotations

import pytest

from growthring.errors import ConfigError, DataError
from growthring.streams import ClassEntry, Task, TaskStream


def task(name, classes, *, rows=12, **settings):
    made = [(f"{name} {label} {i}", label) for label in classes for i in range(rows)]
    test = [(f"{name} test {label} {i}", label) for label in classes for i in range(2)]
    return Task(name, made, test, **settings)


def tasks():
    return [task("one", ["a", "b"]), task("two", ["c", "a"]), task("three", ["d", "e"])]


def test_a_stream_is_a_sequence_with_validation_splits():
    given = tasks()
    stream = TaskStream(given, validation_fraction=0.25, seed=3, name="s")
    assert len(stream) == 3
    assert [item.name for item in stream] == ["one", "two", "three"]
    assert stream[1].name == stream["two"].name == "two"
    assert stream[-1].name == "three"
    assert stream.index("three") == 2
    for before, after in zip(given, stream, strict=True):
        assert after.validation is not None
        assert after.validation.counts() == dict.fromkeys(sorted(before.labels), 3)
        assert sorted([*after.train, *after.validation]) == sorted(before.train)
        assert after.test == before.test
    other = TaskStream(given, validation_fraction=0.25, seed=4)
    assert other[0].validation != stream[0].validation
    with pytest.raises(ConfigError, match=r"no task 'tow'; did you mean 'two'"):
        stream.index("tow")


def test_a_given_validation_split_is_kept():
    own = [("own a", "a"), ("own b", "b")]
    stream = TaskStream([task("one", ["a", "b"], validation=own), task("two", ["a", "b"])])
    assert stream[0].validation is not None
    assert list(stream[0].validation) == own
    assert len(stream[0].train) == 24


def test_classes_in_scenario_task():
    stream = TaskStream(tasks())
    assert [entry.key for entry in stream.classes] == ["one/a", "one/b", "two/a", "two/c", "three/d", "three/e"]
    assert stream.classes[2] == ClassEntry("two/a", "a", "a", (1,))
    assert [stream.class_ids(index) for index in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert stream.class_ids(-1) == [4, 5]
    assert stream.encode(1, "test") == [3, 3, 2, 2]
    for seen in range(4):
        assert stream.candidates(1, seen) == [2, 3]


def test_classes_in_scenario_class():
    stream = TaskStream(tasks(), scenario="class")
    assert [entry.key for entry in stream.classes] == ["a", "b", "c", "d", "e"]
    assert stream.classes[0] == ClassEntry("a", "a", "a", (0, 1))
    assert [stream.class_ids(index) for index in range(3)] == [[0, 1], [0, 2], [3, 4]]
    assert stream.encode(1, "test") == [2, 2, 0, 0]
    assert stream.candidates(0, 0) == [0, 1]
    assert stream.candidates(0, 2) == [0, 1, 2]
    assert stream.candidates(2, 1) == [0, 1, 2, 3, 4]  # not yet learned: the label space it will have
    assert stream.candidates(-1, 0) == [0, 1, 2, 3, 4]


def test_classes_in_scenario_domain():
    stream = TaskStream([task("one", ["a", "b"]), task("two", ["b", "a"], labels=["b", "a"])], scenario="domain")
    assert [entry.key for entry in stream.classes] == ["a", "b"]
    assert stream.classes[0].tasks == (0, 1)
    assert stream.class_ids(1) == [1, 0]
    assert stream.encode(1, "test") == [1, 1, 0, 0]
    assert stream.candidates(0, 2) == [0, 1]
    with pytest.raises(
        DataError, match=r"task 'two' differs from 'one': missing \['b'\], extra \['c'\].*scenario='class'"
    ):
        TaskStream(tasks(), scenario="domain")


def test_encode_covers_every_split_and_refuses_others():
    stream = TaskStream(tasks())
    for index, item in enumerate(stream):
        for split, examples in item.splits().items():
            found = [stream.classes[number].label for number in stream.encode(index, split)]
            assert found == examples.labels
    with pytest.raises(ConfigError, match=r"no split 'valid'; did you mean 'validation'"):
        stream.encode(0, "valid")


def test_shared_labels_must_mean_one_thing():
    one, two = task("one", ["a", "b"], label_texts={"a": "apple"}), task("two", ["a", "c"], label_texts={"a": "ant"})
    with pytest.raises(DataError, match=r"label 'a' means 'apple' in task 'one' and 'ant' in task 'two'"):
        TaskStream([one, two], scenario="class")
    assert len(TaskStream([one, two]).classes) == 4
    twin = task("three", ["d", "e"], label_texts={"d": "apple"})
    with pytest.raises(DataError, match=r"classes 'a' and 'd' have the same label text 'apple'.*task 'three'"):
        TaskStream([one, twin], scenario="class")


def test_bad_streams():
    with pytest.raises(DataError, match=r"has no tasks"):
        TaskStream([])
    with pytest.raises(DataError, match=r"tasks 0 and 2 are both named 'One'"):
        TaskStream([task("one", "ab"), task("two", "ab"), task("One", "ab")])
    with pytest.raises(DataError, match=r"item 1 is dict, not a Task"):
        TaskStream([task("one", "ab"), {}])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"no scenario 'tasks'; did you mean 'task'"):
        TaskStream(tasks(), scenario="tasks")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"between 0 and 1"):
        TaskStream(tasks(), validation_fraction=1)
    with pytest.raises(ConfigError, match=r"seed must be an integer"):
        TaskStream(tasks(), seed="a")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"one task, 'one': there is nothing to forget"):
        TaskStream([task("one", "ab")])


def test_order_keeps_the_splits():
    stream = TaskStream(tasks(), seed=9)
    turned = stream.order(["three", "one", "two"])
    assert [item.name for item in turned] == ["three", "one", "two"]
    assert turned["one"] is stream["one"]
    assert [item.name for item in stream.order([2, 0, 1])] == ["three", "one", "two"]
    fresh = TaskStream(tasks()[::-1], seed=9)
    assert fresh["one"].validation == stream["one"].validation
    for wrong in (["one", "two"], ["one", "one", "two"], [0, 1, 3], [0, 1, -1]):
        with pytest.raises(ConfigError, match="each of its 3 tasks once"):
            stream.order(wrong)
    with pytest.raises(ConfigError, match=r"did you mean 'three'"):
        stream.order(["one", "two", "tree"])


def test_fingerprint_changes_with_anything_that_matters():
    base = TaskStream(tasks(), seed=1)
    assert base.fingerprint() == TaskStream(tasks(), seed=1, name="other").fingerprint()
    assert len(base.fingerprint()) == 64
    changed = tasks()
    changed[1] = task("two", ["c", "a"], label_texts={"a": "ant"})
    relabelled = tasks()
    relabelled[0] = task("one", ["a", "b"], labels=["b", "a"])
    others = [
        TaskStream(tasks(), seed=2),
        TaskStream(tasks(), seed=1, scenario="class"),
        base.order([1, 0, 2]),
        TaskStream(changed, seed=1),
        TaskStream(relabelled, seed=1),
        TaskStream([item.limit(test=3) for item in tasks()], seed=1),
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 7
