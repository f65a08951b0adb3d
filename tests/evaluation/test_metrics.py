from __future__ import annotations

import pytest

from growthring.errors import ConfigError, DataError
from growthring.evaluation import (
    DEFINITIONS,
    AccuracyMatrix,
    Metrics,
    average,
    average_accuracy,
    average_curve,
    forgetting,
    forgetting_by_task,
    last,
    metrics,
    transfer,
)


def matrix_of(*percent, tasks="abcd", rows=None):
    values = [[None if v is None else v / 100 for v in row] for row in percent]
    return AccuracyMatrix(list(tasks[: len(percent[0])]), rows, values)


BASE = (20, 30, 40)
HAND = matrix_of(BASE, (80, 35, 45), (70, 85, 50), (65, 80, 90))


def approx(**values):
    return pytest.approx({key: value / 100 for key, value in values.items()})


def test_hand_computed_three_by_three():
    # AA  = (65 + 80 + 90) / 3            = 78.33
    # LA  = (80 + 85 + 90) / 3            = 85
    # BWT = ((65-80) + (80-85)) / 2       = -10
    # F   = ((80-65) + (85-80)) / 2       = 10
    # FWT = ((35-30) + (50-40)) / 2       = 7.5
    expected = approx(aa=235 / 3, learning_accuracy=85, bwt=-10, forgetting=10, fwt=7.5)
    assert metrics(HAND).to_dict() == expected


def test_without_cells_above_the_diagonal_only_forward_transfer_is_lost():
    matrix = matrix_of(BASE, (80, None, None), (70, 85, None), (65, 80, 90))
    got = metrics(matrix)
    assert got.fwt is None
    assert (got.aa, got.bwt, got.forgetting) == pytest.approx((2.35 / 3, -0.10, 0.10))
    assert transfer(matrix) is None
    assert average(matrix) is None


def test_curve_and_mtil_numbers():
    # Abar = (80 + (70+85)/2 + (65+80+90)/3) / 3 = (80 + 77.5 + 78.3333) / 3
    assert average_curve(HAND) == pytest.approx((0.80 + 0.775 + 2.35 / 3) / 3)
    # Transfer = (35 + (45+50)/2) / 2 = 41.25: row 0 does not enter
    assert transfer(HAND) == pytest.approx(0.4125)
    # Avg = all nine cells below row 0 = 600 / 9
    assert average(HAND) == pytest.approx(6.0 / 9)
    assert last(HAND) == pytest.approx(2.35 / 3)


def test_both_ranges_of_the_maximum():
    # Task a ends at its best (70 after 60): F_a = 60-70 = -10 without the last row, 0 with it.
    # Task b peaked zero-shot (90 before it was learned) and ended at 80: F_b = 10 either way.
    matrix = matrix_of((0, 0, 0), (60, 90, 0), (60, 85, 0), (70, 80, 50))
    assert forgetting_by_task(matrix) == pytest.approx([-0.10, 0.10])
    assert forgetting_by_task(matrix, include_last=True) == pytest.approx([0.0, 0.10])
    assert forgetting(matrix) == pytest.approx(0.0)
    assert forgetting(matrix, include_last=True) == pytest.approx(0.05)


def test_named_definitions_differ_where_the_tools_do():
    # Column c: 90 two tasks before it is learned, 50 just before, 60 when learned, 55 at the end.
    # Column a: 60 when learned, 80 later, 70 at the end.   Column b: 85 learned, 84, then 88 at the end.
    matrix = matrix_of((10, 10, 10, 10), (60, 20, 90, 20), (80, 85, 50, 20), (75, 84, 60, 20), (70, 88, 55, 95))
    # growthring: max of earlier rows - last = (80-70) + (85-88) + (90-55) = 42 -> 14
    # avalanche: right after learning - last = (60-70) + (85-88) + (60-55) = -8 -> -8/3; BWT is its negative
    # mammoth: rows t >= j-1 with the last, rest 0 = (80-70) + (88-88) + (60-55) = 15 -> 5
    assert metrics(matrix).forgetting == pytest.approx(0.14)
    assert metrics(matrix, "avalanche").forgetting == pytest.approx(-0.08 / 3)
    assert metrics(matrix, "mammoth").forgetting == pytest.approx(0.05)
    assert metrics(matrix, "gem").forgetting is None
    # FWT = ((20-10) + (50-10) + (20-10)) / 3 = 20 under every name; AA = (70+88+55+95)/4 = 77; LA = (60+85+60+95)/4 =
    # 75
    for definition in DEFINITIONS:
        got = metrics(matrix, definition)
        assert got.bwt == pytest.approx(0.08 / 3)
        assert (got.aa, got.fwt, got.learning_accuracy) == pytest.approx((0.77, 0.20, 0.75))


def test_mammoth_pads_missing_cells_with_zero():
    matrix = matrix_of(BASE, (80, None, None), (None, 85, None), (65, 80, 90))
    assert metrics(matrix, "mammoth").forgetting == pytest.approx(0.10)


def test_avalanche_weighs_examples():
    # (65*100 + 80*100 + 90*200) / 400 = 81.25
    assert metrics(HAND, "avalanche", test_sizes=[100, 100, 200]).aa == pytest.approx(0.8125)
    assert average_accuracy(HAND, test_sizes=[7, 7, 7]) == pytest.approx(2.35 / 3)
    with pytest.raises(ConfigError, match="avalanche"):
        metrics(HAND, test_sizes=[1, 1, 1])
    with pytest.raises(DataError, match="each of the 3 tasks"):
        metrics(HAND, "avalanche", test_sizes=[1, 1])


def test_a_stream_under_way_scores_the_learned_tasks():
    matrix = matrix_of(BASE, (80, 35, 45), (70, 85, 50))
    # AA = (70+85)/2, LA = (80+85)/2, BWT = 70-80, F = 80-70, FWT = 35-30
    assert metrics(matrix).to_dict() == approx(aa=77.5, learning_accuracy=82.5, bwt=-10, forgetting=10, fwt=5)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_undefined_numbers_are_none(definition):
    nothing = Metrics(None, None, None, None, None)
    assert metrics(AccuracyMatrix(["a", "b"]), definition) == nothing
    assert metrics(matrix_of(BASE), definition) == nothing
    one = metrics(matrix_of((20,), (80,)), definition)
    assert one == Metrics(aa=0.8, bwt=None, fwt=None, forgetting=None, learning_accuracy=0.8)
    joint = metrics(matrix_of(BASE, (60, 70, 80), rows=["untouched", "joint"]), definition)
    assert joint == Metrics(pytest.approx(0.7), None, None, None, None)


def test_missing_last_cell_is_none_not_a_smaller_mean():
    matrix = matrix_of(BASE, (80, 35, 45), (70, 85, 50), (65, None, 90))
    got = metrics(matrix)
    assert (got.aa, got.bwt, got.forgetting) == (None, None, None)
    assert forgetting_by_task(matrix) == [pytest.approx(0.15), None]


def test_unknown_definition_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mammoth'"):
        metrics(HAND, "mamoth")
