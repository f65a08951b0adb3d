from __future__ import annotations

import numpy as np
import pytest

from growthring.errors import DataError
from growthring.evaluation import accuracy, balanced_accuracy, confusion, macro_f1

# true:      a a a b b   ("c" and "d" are never true, "c" is predicted once)
# predicted: a a b b c
COUNTS = confusion(list("aaabb"), list("aabbc"), list("abcd"))


def test_counts_have_true_rows_and_predicted_columns():
    assert COUNTS.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion([2, 0], [2, 1], 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_scores_by_hand():
    assert accuracy(COUNTS) == pytest.approx(3 / 5)
    # recalls: a 2/3, b 1/2; c and d have no test example
    assert balanced_accuracy(COUNTS) == pytest.approx((2 / 3 + 1 / 2) / 2)
    # F1: a 2*2/(3+2) = 0.8, b 2*1/(2+2) = 0.5; c and d left out
    assert macro_f1(COUNTS) == pytest.approx(0.65)


def test_perfect_and_all_wrong():
    assert macro_f1(confusion([0, 1], [0, 1], 2)) == 1.0
    wrong = confusion([0, 1], [1, 0], 2)
    assert (accuracy(wrong), macro_f1(wrong), balanced_accuracy(wrong)) == (0.0, 0.0, 0.0)


def test_order_of_the_examples_does_not_matter():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    order = rng.permutation(200)
    shuffled = confusion(true[order].tolist(), predicted[order].tolist(), 5)
    assert (confusion(true.tolist(), predicted.tolist(), 5) == shuffled).all()


@pytest.mark.parametrize("score", [accuracy, balanced_accuracy, macro_f1])
def test_an_empty_test_set_has_no_score(score):
    with pytest.raises(DataError, match="no examples"):
        score(confusion([], [], 3))


@pytest.mark.parametrize(
    ("true", "predicted", "classes", "message"),
    [
        ([0], [0, 1], 2, "1 true classes for 2 predictions"),
        ([0, 5], [0, 1], 2, "example 1: true class 5"),
        ([0, 1], [0, -1], 2, "example 1: predicted class -1"),
        ([0], [0], ["a", "a"], "must differ"),
    ],
)
def test_bad_input_is_refused_with_a_reason(true, predicted, classes, message):
    with pytest.raises(DataError, match=message):
        confusion(true, predicted, classes)
