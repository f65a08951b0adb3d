from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from growthring.errors import ConfigError, DataError
from growthring.streams import Examples, Task
from growthring.streams._splits import carve, sample

TRAIN = [(f"train text {i}", "ab"[i % 2]) for i in range(20)]
TEST = [(f"test text {i}", "ab"[i % 2]) for i in range(6)]


def test_normal_task():
    task = Task("x", TRAIN, TEST, label_texts={"b": "the letter b"})
    assert (len(task.train), len(task.test), task.validation) == (20, 6, None)
    assert task.train.texts[3] == "train text 3"
    assert task.train.labels[3] == "b"
    assert task.labels == ("a", "b")
    assert task.label_texts == {"a": "a", "b": "the letter b"}
    assert task.train.counts() == {"a": 10, "b": 10}
    assert list(task.splits()) == ["train", "test"]
    with pytest.raises(AttributeError):
        task.name = "y"  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(task))
    assert (again.name, again.train, again.labels) == (task.name, task.train, task.labels)
    assert Task("x", task.train, task.test).train == task.train


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([10, 2, 1], ("1", "2", "10")),
        ([True, False, True], ("False", "True")),
        ([1.0, 2.0, 1.0], ("1", "2")),
        ([" pos", "neg ", "pos"], ("neg", "pos")),
        (["b", "a", "B"], ("B", "a", "b")),
    ],
)
def test_labels_become_strings(values, labels):
    rows = [(f"text {i}", value) for i, value in enumerate(values)]
    assert Task("x", rows, [("other", values[0])]).labels == labels
    shuffled = Task("x", rows[::-1], [("other", values[0])])
    assert shuffled.labels == labels


def test_numpy_and_torch_labels():
    import numpy as np
    import torch

    rows = [("p", np.int64(1)), ("q", torch.tensor(0)), ("r", np.str_("2")), ("s", np.bool_(True))]
    assert Task("x", rows, [("t", 0)]).train.labels == ["1", "0", "2", "True"]
    with pytest.raises(DataError, match=r"row 0: the label is a Tensor of shape \(2,\), not one class"):
        Task("x", [("p", torch.ones(2))], TEST)


def test_class_label_names_keep_their_order_and_only_labels_that_occur():
    import datasets

    label = datasets.ClassLabel(names=["zero", "never", "one"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})

    def data(texts, labels):
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    task = Task("x", data(["p", "q"], [2, 0]), data(["r"], [2]))
    assert task.labels == ("zero", "one")
    assert task.train.labels == ["one", "zero"]
    assert Task("x", [("p", "one"), ("q", "two")], data(["r"], [2])).labels == ("one", "two")
    with pytest.raises(DataError, match=r"test split, row 1: the label is -1.*held back"):
        Task("x", data(["p", "q"], [2, 0]), data(["r", "s"], [0, -1]))
    plain = datasets.Dataset.from_dict({"text": ["p", "q"], "label": [0, 1]})
    assert Task("x", plain, plain.select([0]).map(lambda row: {"text": "new"})).labels == ("0", "1")


def test_given_labels_fix_the_order_and_allow_labels_that_train_lacks():
    task = Task("x", TRAIN, [("t", "c")], labels=["b", "c", "a"])
    assert task.labels == ("b", "c", "a")
    assert list(task.label_texts) == ["b", "c", "a"]
    assert Task("x", [("p", 0), ("q", 1)], [("r", 1)], labels=[1, 0]).labels == ("1", "0")


def test_label_texts():
    assert Task("x", [("p", "very_good"), ("q", "_")], [("r", "_")]).label_texts == {
        "_": "_",
        "very_good": "very good",
    }
    for texts, message in (
        ({"c": "see"}, r"no label 'c'; allowed: a, b"),
        ({"a": " "}, r"label_texts\['a'\] is ' '"),
        ({"a": "b"}, r"'a' and 'b' have the same label text 'b'"),
    ):
        with pytest.raises(DataError, match=message):
            Task("x", TRAIN, TEST, label_texts=texts)


BAD = {
    "empty": ({"train": []}, r"^task 'x', train split is empty"),
    "none": ({"test": None}, r"^task 'x', test split: there is none"),
    "no validation rows": ({"validation": []}, r"^task 'x', validation split is empty"),
    "column": ({"label": "lab"}, r"train split, row 0: there is no label column 'lab'"),
    "none text": ({"test": [("p", "a"), (None, "a")]}, r"test split, row 1: the text is missing \(None\)"),
    "nan text": ({"test": [(float("nan"), "a")]}, r"test split, row 0: the text is missing"),
    "blank text": ({"test": [("p", "a"), (" \t\n", "a")]}, r"row 1: the text is empty .*Fill in the text or remove"),
    "number text": ({"test": [(3, "a")]}, r"row 0: the text is of type int \(3\), not a string"),
    "half character": ({"test": [("\ud800", "a")]}, r"row 0: the text holds half a character"),
    "none label": ({"validation": [("p", None)]}, r"validation split, row 0: the label is missing"),
    "blank label": ({"test": [("p", " ")]}, r"row 0: the label is empty"),
    "nan label": ({"test": [("p", float("nan"))]}, r"row 0: the label is missing"),
    "fraction": ({"test": [("p", 0.5)]}, r"row 0: the label 0.5 is a fractional number"),
    "many labels": ({"test": [("p", ["a", "b"])]}, r"row 0: the label is of type list"),
    "unknown": ({"test": [("p", "a"), ("q", "abc")], "labels": ["a", "b", "ab"]}, r"row 1: .*'abc' is not in labels"),
    "integers": ({"train": [("p", 0), ("q", 1)], "labels": ["no", "yes"]}, r"'0' is not in labels.*labels=\['0', '1'"),
    "unseen": (
        {"test": [("p", "b"), ("q", "c"), ("r", "c")]},
        r"row 1: the label 'c' never appears in train \(2 such",
    ),
    "one string": ({"labels": "ab"}, r"'ab' is one string"),
    "no labels": ({"labels": []}, r"labels= is empty"),
    "twice": ({"labels": ["a", "b", "a"]}, r"names 'a' twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_named_with_task_split_row_and_fix(case):
    changed, message = BAD[case]
    rows = [{"text": text, "label": label} for text, label in TRAIN]
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        Task("x", **{"train": rows, "test": TEST, **changed})
    assert str(caught.value).startswith("task 'x'")
    assert str(caught.value).endswith((".", "meant."))


def test_near_label_is_offered_and_bad_rows_are_counted():
    with pytest.raises(DataError, match=r"did you mean 'spam'\?"):
        Task("x", [("p", "spam"), ("q", "ham")], [("r", "spm")])
    with pytest.raises(DataError, match=r"row 17: .*\(2 more bad rows: 18, 19\)"):
        Task("x", TRAIN[:17] + [(None, "a")] * 3, TEST)


@pytest.mark.parametrize("name", ["", " x", "a/b", "a\\b", "..", "a\nb", 3, None])
def test_bad_names(name):
    with pytest.raises(ConfigError, match="task name"):
        Task(name, TRAIN, TEST)


def test_one_class_warns():
    with pytest.warns(UserWarning, match=r"all 2 training rows have the label 'a'.*label='label' is the right column"):
        Task("x", [("p", "a"), ("q", "a")], [("r", "a")])


def test_texts_in_two_splits_warn_with_counts():
    test = [("new", "a"), ("train  text 4\n", "a"), ("train text 5", "b")]
    with pytest.warns(UserWarning, match=r"2 of 3 test texts are also in train \(first: row 1\)\. .*remove") as caught:
        Task("x", TRAIN, test)
    assert caught[0].filename == __file__
    with pytest.warns(
        UserWarning, match=r"6 of 6 test texts are also in validation .*; 1 of 7 validation .* in train"
    ):
        Task("x", TRAIN, TEST, [*TEST, TRAIN[0]])


# ------------------------------------------------------------------------------------------------- drawing of rows


def rows(counts, prefix="t"):
    return [(f"{prefix} {label} {i}", label) for label, count in counts.items() for i in range(count)]


def examples(counts):
    made = rows(counts)
    return Examples([text for text, _ in made], [label for _, label in made])


def test_sample_is_stratified_and_keeps_every_label():
    data = examples({"a": 900, "b": 90, "c": 10})
    assert sample(data, 100, 0, "x").counts() == {"a": 90, "b": 9, "c": 1}
    assert sample(data, 20, 0, "x").counts()["c"] == 1
    assert len(sample(data, 20, 0, "x")) == 20
    assert len(sample(data, 2, 0, "x")) == 2
    assert sample(data, 1000, 0, "x") == data
    assert sample(data, 50, 0, "x") == sample(data, 50, 0, "x")
    assert sample(data, 50, 0, "x") != sample(data, 50, 1, "x")
    assert sample(data, 50, 0, "x") != sample(data, 50, 0, "y")


@pytest.mark.parametrize("count", range(1, 40))
def test_sample_gives_the_exact_number(count):
    data = examples({"a": 17, "b": 1, "c": 2, "d": 12, "e": 7})
    chosen = sample(data, count, 3, "x")
    assert len(chosen) == min(count, 39)
    assert len(set(chosen.texts)) == len(chosen)
    if count >= 5:
        assert set(chosen.labels) == set("abcde")


def test_draws_do_not_depend_on_row_order():
    data = examples({"a": 30, "b": 12})
    turned = data.take(range(len(data) - 1, -1, -1))
    assert set(sample(data, 9, 0, "x").texts) == set(sample(turned, 9, 0, "x").texts)
    assert set(carve(data, 9, 0, "x")[1].texts) == set(carve(turned, 9, 0, "x")[1].texts)


def test_carve_divides_and_leaves_every_label_in_train():
    data = examples({"a": 50, "b": 5, "c": 2, "d": 1})
    kept, carved = carve(data, 6, 0, "x")
    assert sorted([*kept, *carved]) == sorted(data)
    assert not set(kept.texts) & set(carved.texts)
    assert set(kept.labels) == set("abcd")
    assert set(carved.labels) == set("abc")  # d has one row, which train needs
    assert len(carved) == 6


def test_carve_keeps_equal_texts_on_one_side():
    repeated = [("same", "a")] * 5 + [("same  ", "a")] + rows({"a": 4, "b": 6}) + [("both", "a"), ("both", "b")]
    data = Examples([text for text, _ in repeated], [label for _, label in repeated])
    for seed in range(20):
        kept, carved = carve(data, 6, seed, "x")
        assert not {" ".join(text.split()) for text in kept.texts} & {" ".join(text.split()) for text in carved.texts}
        assert "both" not in carved.texts
        assert set(carved.labels) == {"a", "b"}


def test_carve_of_texts_that_all_repeat():
    data = Examples(["p"] * 5 + ["q"] * 5 + ["r"] * 5, ["a"] * 15)
    kept, carved = carve(data, 1, 0, "x")
    assert (len(kept), len(carved)) == (10, 5)


def test_limit():
    task = Task("x", rows({"a": 60, "b": 40}), rows({"a": 30, "b": 10}, "u"), rows({"a": 9, "b": 9}, "v"))
    small = task.limit(train=10, validation=4, test=8, seed=1)
    assert small.train.counts() == {"a": 6, "b": 4}
    assert small.validation is not None
    assert small.validation.counts() == {"a": 2, "b": 2}
    assert small.test.counts() == {"a": 6, "b": 2}
    assert small.labels == task.labels
    assert task.limit(train=10, seed=1).train == small.train
    assert task.limit(train=10, seed=2).train != small.train
    assert task.limit(train=1000).train == task.train
    assert task.limit().test == task.test
    for wrong in ({"train": 0}, {"test": -1}, {"validation": 2.5}, {"train": True}, {"seed": "0"}):
        with pytest.raises(ConfigError, match="must be"):
            task.limit(**wrong)
    with pytest.raises(ConfigError, match=r"1 training rows cannot hold its 2 labels"):
        task.limit(train=1)


def test_limit_carves_validation_before_it_limits_train():
    task = Task("x", rows({"a": 60, "b": 40}), TEST).limit(train=10, validation=10)
    assert task.validation is not None
    assert (len(task.train), len(task.validation)) == (10, 10)
    assert not set(task.train.texts) & set(task.validation.texts)


def test_carve_validation():
    task = Task("x", rows({"a": 60, "b": 40}), TEST)
    carved = task.carve_validation(0.2, 5)
    assert carved.validation is not None
    assert carved.validation.counts() == {"a": 12, "b": 8}
    assert carved.test == task.test
    assert carved.carve_validation(0.5, 6) is carved
    for wrong in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            task.carve_validation(wrong)
    with pytest.raises(DataError, match=r"no label has two different texts.*validation="):
        Task("x", [("p", "a"), ("q", "b")], TEST).carve_validation()


def test_the_same_rows_are_drawn_in_every_process():
    code = (
        "import sys, types; m = types.ModuleType('growthring'); m.__path__ = [PATH]; sys.modules['growthring'] = m;"
        "from growthring.streams._splits import *;"
        "e = Examples([f't{i}' for i in range(40)], ['ab'[i % 2] for i in range(40)]);"
        "print(sample(e, 6, 0, 'x').texts, carve(e, 4, 0, 'x')[1].texts)"
    )
    # Without the rest of the package, which takes seconds to import.
    code = code.replace("PATH", repr(str(Path(sys.modules["growthring.streams"].__file__ or "").parents[1])))
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for salt in ("1", "2")
    }
    data = Examples([f"t{i}" for i in range(40)], ["ab"[i % 2] for i in range(40)])
    here = f"{sample(data, 6, 0, 'x').texts} {carve(data, 4, 0, 'x')[1].texts}"
    assert said == {here}
    assert here == EXPECTED  # written down: a change of the draw would change every published split


EXPECTED = "['t2', 't19', 't22', 't35', 't38', 't39'] ['t2', 't19', 't38', 't39']"


# ------------------------------------------------------------------------------------------------------------- hub


def test_from_hub_asks_for_the_splits_and_never_for_remote_code(monkeypatch):
    import datasets

    calls = []

    def load(path, config, *, split):
        calls.append((path, config, split))
        return datasets.Dataset.from_dict({"s": [f"{split} {i}" for i in range(4)], "y": [0, 1, 0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Task.from_hub("x", "u/d", text="s", label="y", label_texts={"0": "no", "1": "yes"})
    assert calls == [("u/d", None, "train"), ("u/d", None, "test")]
    assert task.test.texts[0] == "test 0"
    assert task.label_texts == {"0": "no", "1": "yes"}
    splits = {"train": "train[:9]", "validation": "train[9:]", "test": "validation"}
    task = Task.from_hub("x", "u/d", config="c", splits=splits, text="s", label="y")
    assert calls[2:] == [("u/d", "c", "train[:9]"), ("u/d", "c", "train[9:]"), ("u/d", "c", "validation")]
    assert task.validation is not None
    assert task.validation.texts[0] == "train[9:] 0"


def test_from_hub_errors(monkeypatch):
    import datasets

    def load(path, config, *, split):
        raise ConnectionError("cannot reach the hub.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"task 'x', train split: .*'u/d'.*cannot reach the hub.*local files"):
        Task.from_hub("x", "u/d")
    with pytest.raises(ConfigError, match=r"key 'tests'; did you mean 'test'"):
        Task.from_hub("x", "u/d", splits={"train": "train", "tests": "test"})
    with pytest.raises(ConfigError, match=r"which split is 'test'"):
        Task.from_hub("x", "u/d", splits={"train": "train"})


def test_good_data_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Task("x", TRAIN, TEST).limit(4, 2, 2)
