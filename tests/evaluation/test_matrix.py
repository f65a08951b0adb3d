from __future__ import annotations

import json

import numpy as np
import pytest

from growthring.errors import DataError
from growthring.evaluation import AccuracyMatrix


def test_rows_are_appended_and_round_trip_through_json():
    matrix = AccuracyMatrix(["a", "b"])
    assert len(matrix) == 0
    assert matrix.values.shape == (0, 2)
    matrix.append_row("untouched", [0.25, None])
    matrix.append_row("a", np.array([0.75, np.nan]))
    text = json.dumps({"rows": matrix.rows, "matrix": matrix.to_list()}, allow_nan=False)
    stored = json.loads(text)
    assert stored == {"rows": ["untouched", "a"], "matrix": [[0.25, None], [0.75, None]]}
    again = AccuracyMatrix.from_list(["a", "b"], stored["rows"], stored["matrix"])
    assert again == matrix
    assert np.isnan(again.values[1, 1])
    assert again != AccuracyMatrix(["a", "b"], ["untouched"], [[0.25, None]])


def test_default_row_names_and_trained_tasks():
    matrix = AccuracyMatrix(["a", "b"], values=[[0, 0], [1, 0]])
    assert matrix.rows == ("untouched", "a")
    assert matrix.sequential
    assert matrix.trained == 1
    joint = AccuracyMatrix(["a", "b"], ["untouched", "joint"], [[0, 0], [1, 1]])
    assert not joint.sequential
    assert joint.trained == 2
    assert AccuracyMatrix(["a"]).trained == 0


def test_values_cannot_be_changed_behind_the_matrix():
    matrix = AccuracyMatrix(["a"], values=[[0.5]])
    matrix.values[0, 0] = 0.9
    assert matrix.to_list() == [[0.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one task"),
        ((["a", "a"],), "repeated: a"),
        ((["untouched"],), "rename the task"),
        ((["a", "b"], ["untouched"], [[0.1]]), "1 values for 2 tasks"),
        ((["a"], ["untouched", "untouched"], [[0.1], [0.2]]), "already in the matrix"),
        ((["a"], ["a"], [[0.1]]), "row 0 is the untouched base"),
        ((["a"], ["untouched"], []), "1 row names"),
        ((["a"], None, [[0.1]] * 3), "give the row names"),
        ((["a"], None, [[83.0]]), "divide percent by 100"),
        ((["a"], None, [[-0.1]]), "not between 0 and 1"),
        ((["a"], None, [[float("inf")]]), "not between 0 and 1"),
        ((["a"], None, [["x"]]), "flat list of numbers"),
        ((["a"], None, [[[0.1]]]), "flat list of numbers"),
    ],
)
def test_bad_input_is_refused_with_a_reason(arguments, message):
    with pytest.raises(DataError, match=message):
        AccuracyMatrix(*arguments)
