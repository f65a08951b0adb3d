from __future__ import annotations

import numpy as np
import pytest

import growthring as gr
from growthring.errors import ConfigError, DataError
from growthring.streams import EvaluationSet

TRAIN = [(f"text {i}", "yes" if i % 2 else "no") for i in range(20)]
TEST = [(f"other {i}", "yes" if i % 2 else "no") for i in range(6)]


@pytest.fixture
def task():
    return gr.Task("answers", TRAIN, TEST)


def test_rows_come_from_anything_a_task_takes(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,yes\nb,no\n")
    for rows in ([("a", "yes"), ("b", "no")], {"text": ["a", "b"], "label": ["yes", "no"]}, str(file)):
        made = EvaluationSet("far", rows)
        assert (made.test.texts, made.test.labels, len(made), made.modality) == (["a", "b"], ["yes", "no"], 2, "text")
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    assert EvaluationSet("far", [(image, "yes")]).modality == "image"


def test_bad_rows_are_named():
    with pytest.raises(DataError, match="evaluation set 'far' is empty"):
        EvaluationSet("far", [])
    with pytest.raises(DataError, match="row 1"):
        EvaluationSet("far", [("a", "yes"), ("", "no")])
    with pytest.raises(ConfigError, match="file name"):
        EvaluationSet("a/b", [("a", "yes")])
    with pytest.raises(ConfigError, match="one or the other"):
        EvaluationSet("far", [("a", "yes")], text="t", image="i")


def test_a_limit_is_stratified_and_repeatable():
    made = EvaluationSet("far", [(f"t{i}", "yes" if i < 16 else "no") for i in range(20)])
    assert made.limit(5, seed=3).test.counts() == {"no": 1, "yes": 4}
    assert made.limit(5, seed=3).test == made.limit(5, seed=3).test
    assert made.limit(5, seed=3).test != made.limit(5, seed=4).test
    with pytest.raises(ConfigError, match="rows=0"):
        made.limit(0)


def test_labels_of_another_task_are_refused(task):
    EvaluationSet("far", [("x", "yes")]).check(task)  # a class without rows is fine
    with pytest.raises(DataError, match=r"row 1: the label 'yess' is none of task 'answers' \(2 such rows\); did you"):
        EvaluationSet("far", [("x", "no"), ("y", "yess"), ("z", "yess")]).check(task)


def test_images_are_no_texts(task):
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="holds images and task 'answers' texts"):
        EvaluationSet("far", [(image, "yes")]).check(task)


@pytest.mark.parametrize(("rows", "split"), [(TEST, "test"), (TRAIN, "train")])
def test_the_tasks_own_rows_are_no_other_domain(task, rows, split):
    with pytest.raises(DataError, match=f"{len(rows)} of its {len(rows)} texts are {split} rows of task 'answers'"):
        EvaluationSet("far", [(f" {text} ", label) for text, label in rows]).check(task)


def test_a_few_shared_rows_are_a_warning(task):
    rows = [*TRAIN[:2], ("new", "yes"), ("newer", "no"), ("newest", "no")]
    with pytest.warns(UserWarning, match="of its 5 texts some are rows of task 'answers' too \\(2 of train\\)"):
        EvaluationSet("far", rows).check(task)


def test_of_a_task_its_test_rows_are_taken(task):
    assert EvaluationSet.of(task).test is task.test
    assert repr(EvaluationSet.of(task)) == "EvaluationSet('answers', 6 texts)"
    with pytest.raises(ConfigError, match="got list"):
        EvaluationSet.of([])
