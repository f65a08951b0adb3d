from __future__ import annotations

import hashlib

import numpy as np
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


REPEATS = r"1 of 5 classes come in more than one task \('a' in 'one', 'two'\)"


@pytest.mark.parametrize("scenario", ["class", "online-class"])
def test_classes_in_class_incremental_scenarios(scenario):
    with pytest.warns(UserWarning, match=REPEATS) as caught:
        stream = TaskStream(tasks(), scenario=scenario)
    assert caught[0].filename == __file__
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
    with pytest.warns(UserWarning, match=REPEATS):
        repeats = TaskStream(tasks(), seed=1, scenario="class")
    others = [
        TaskStream(tasks(), seed=2),
        repeats,
        base.order([1, 0, 2]),
        TaskStream(changed, seed=1),
        TaskStream(relabelled, seed=1),
        TaskStream([item.limit(test=3) for item in tasks()], seed=1),
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 7


# ------------------------------------------------------------------------- modality, online pass, reference, repeats


def pictures(name, classes, *, first=0):
    made = [(np.full((2, 3), first + i, np.uint8), classes[i % len(classes)]) for i in range(12)]
    return Task(name, made, [(np.full((3, 2), first + i, np.uint8), label) for i, label in enumerate(classes)])


def test_what_a_scenario_means():
    made = [task("one", "ab"), task("two", "cd")]
    for scenario, growing, once in (("task", 0, 0), ("class", 1, 0), ("online-class", 1, 1)):
        stream = TaskStream(made, scenario=scenario)
        assert (stream.class_incremental, stream.online) == (bool(growing), bool(once))
        assert stream.modality == "text"
        assert stream.reference is None
    domain = TaskStream([task("one", "ab"), task("two", "ab")], scenario="domain")
    assert (domain.class_incremental, domain.online) == (False, False)


def test_the_order_of_the_pass_is_the_streams_and_no_one_elses():
    made = [task("one", "ab", rows=20), task("two", "cd", rows=20)]
    stream = TaskStream(made, scenario="online-class", seed=4)
    order = stream.pass_order(1)
    assert sorted(order) == list(range(len(stream[1].train)))
    assert order not in (sorted(order), sorted(order)[::-1])
    assert order == stream.pass_order(1) == stream.pass_order(-1)
    assert order != stream.pass_order(0)
    assert len({stream[1].train.labels[row] for row in order[:10]}) == 2  # classes are mixed
    turned = TaskStream(made[::-1], scenario="online-class", seed=4)
    assert turned.pass_order(0) == order
    other = TaskStream(made, scenario="online-class", seed=5)
    assert [other[1].train.texts[row] for row in other.pass_order(1)] != [stream[1].train.texts[row] for row in order]
    backwards = Task("two", list(made[1].train)[::-1], made[1].test)
    again = TaskStream([made[0], backwards], scenario="online-class", seed=4)
    assert [again[1].train.texts[row] for row in again.pass_order(1)] == [stream[1].train.texts[row] for row in order]
    texts = [stream[1].train.texts[row] for row in order]
    assert texts == sorted(texts, key=lambda text: hashlib.sha256(f"4\0two/pass\0{text}".encode()).digest())
    with pytest.raises(IndexError):
        stream.pass_order(2)


def test_equal_inputs_have_their_places_in_the_pass():
    same = Task("one", [("again", "a")] * 5 + [("else", "b"), ("more", "b"), ("and a", "a")], [("t", "a")])
    stream = TaskStream([same, task("two", "cd")], scenario="online-class")
    assert sorted(stream.pass_order(0)) == list(range(len(stream[0].train)))


def test_the_seed_of_an_online_stream_is_part_of_its_fingerprint():
    own = [("own a", "a"), ("own b", "b")]
    made = [task("one", "ab", validation=own), task("two", "cd", validation=[("c", "c"), ("d", "d")])]
    prints = {
        (s, seed): TaskStream(made, scenario=s, seed=seed).fingerprint()
        for s in ("class", "online-class")
        for seed in (0, 1)
    }
    assert prints["class", 0] == prints["class", 1]
    assert len(set(prints.values())) == 3


def test_fingerprints_of_text_streams_are_those_of_earlier_versions():
    made = [task("one", "ab"), task("two", "cd", labels=["d", "c"], label_texts={"c": "sea"})]
    assert TaskStream(made, seed=1).fingerprint() == EARLIER


EARLIER = "1c701a54ba77d3cbcbef594b85d3fc92dacc45c013137416e2f387a775d8276b"


def test_a_stream_has_one_modality():
    images = [pictures("one", "ab"), pictures("two", "cd", first=50)]
    stream = TaskStream(images, scenario="online-class")
    assert stream.modality == "image"
    assert sorted(stream.pass_order(0)) == list(range(len(stream[0].train)))
    assert stream.encode(1, "test") == [2, 3]
    with pytest.raises(DataError, match=r"task 'one' holds images and task 'three' holds texts.*two streams"):
        TaskStream([*images, task("three", "ef")])
    with pytest.raises(DataError, match=r"task 'one' holds images and task 'known' holds texts"):
        TaskStream(images, reference=task("known", "ef"))


def test_the_reference_stands_beside_the_tasks():
    made, known = [task("one", "ab"), task("two", "cd")], task("known", ["a", "z"])
    stream = TaskStream(made, scenario="class", reference=known)
    assert stream.reference is known
    assert known.validation is None  # nothing is carved: it is not trained on
    assert [item.name for item in stream] == ["one", "two"]
    assert [entry.key for entry in stream.classes] == ["a", "b", "c", "d"]
    assert known.encode("test") == [0, 0, 1, 1]
    plain = TaskStream(made, scenario="class")
    assert stream.fingerprint() != plain.fingerprint()
    assert stream.order([1, 0]).reference is known
    other = TaskStream(made, scenario="class", reference=known.limit(train=4))
    assert other.fingerprint() != stream.fingerprint()
    whole = known.carve_validation()  # as a task it would be divided alike
    beside = TaskStream(made, scenario="task", reference=whole).fingerprint()
    assert beside != TaskStream([*made, whole], scenario="task").fingerprint()
    with pytest.raises(DataError, match=r"the reference has the name of task 1, 'TWO'"):
        TaskStream(made, reference=task("TWO", "ab"))
    with pytest.raises(DataError, match=r"reference is list, not a Task or None"):
        TaskStream(made, reference=[known])  # type: ignore[arg-type]


def test_repeated_classes_are_named_once():
    made = [task("one", "abcde"), task("two", "abcdf"), task("three", "ag")]
    with pytest.warns(
        UserWarning, match=r"4 of 7 classes .*\('a' in 'one', 'two', 'three'; 'b' .*; and 1 more\)"
    ) as seen:
        stream = TaskStream(made, scenario="class")
    assert len(seen) == 1
    assert stream.order([2, 1, 0]).class_incremental  # said once: a new order says it no more
    TaskStream(made)  # with the task known, equal labels are different classes
    TaskStream([task("one", "ab"), task("two", "ab")], scenario="domain")
