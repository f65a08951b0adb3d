from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from growthring.errors import ConfigError, DataError, GuardError
from growthring.evaluation import RobustPoint, SealedSets, effective_robustness, frontier


def point(x, y, **more):
    return RobustPoint("lora", 0, 0.5, x, {"a": y - 0.1, "b": y + 0.1}, **more)


def test_the_mean_counts_every_domain_alike():
    made = RobustPoint("lora", 1, 0.9, 0.8, {"small": 0.2, "large": 0.6})
    assert made.ood_mean == pytest.approx(0.4)
    assert RobustPoint("lora", 1, 0.9).ood_mean is None
    assert RobustPoint.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(("what", "value"), [("id_test", 90.0), ("alpha", 1.5), ("id_validation", -0.1)])
def test_a_point_holds_fractions(what, value):
    with pytest.raises(DataError, match=f"{what}={value}"):
        RobustPoint(**{"method": "m", "seed": 0, "id_validation": 0.5, what: value})
    with pytest.raises(DataError, match=r"tweets=nan"):
        RobustPoint("m", 0, 0.5, 0.5, {"tweets": float("nan")})


def test_the_frontier_is_the_upper_hull_by_hand():
    # (.5, .8) is the top; (.7, .75) lies above the line to (.9, .5); (.6, .7) below; (.4, .6) left of the top
    baseline = frontier([(0.9, 0.5), (0.6, 0.7), (0.5, 0.8), (0.4, 0.6), (0.7, 0.75), (0.9, 0.3)])
    assert baseline.corners == ((0.5, 0.8), (0.7, 0.75), (0.9, 0.5))
    assert baseline.height(0.0) == baseline.height(0.5) == 0.8
    assert baseline.height(0.6) == pytest.approx(0.775)
    assert baseline.height(0.8) == pytest.approx(0.625)
    assert baseline.height(0.9) == baseline.height(1.0) == 0.5
    assert effective_robustness(point(0.8, 0.7), baseline) == pytest.approx(0.075)
    assert effective_robustness((0.8, 0.5), baseline) == pytest.approx(-0.125)
    assert effective_robustness((0.95, 0.6), baseline) == pytest.approx(0.1)


def test_frontiers_of_few_points():
    assert frontier([(0.5, 0.5)]).corners == ((0.5, 0.5),)
    assert frontier([(0.5, 0.5), (0.5, 0.5)]).height(0.9) == 0.5
    assert frontier([(0.4, 0.5), (0.6, 0.5)]).corners == ((0.6, 0.5),)  # level: the right one is no worse anywhere
    assert frontier([(0.5, 0.4), (0.5, 0.7)]).corners == ((0.5, 0.7),)
    assert frontier([(0.4, 0.4), (0.6, 0.6)]).corners == ((0.6, 0.6),)
    on_a_line = frontier([(0.4, 0.6), (0.5, 0.5), (0.6, 0.4)])
    assert on_a_line.height(0.55) == pytest.approx(0.45)


def test_the_frontier_is_above_every_mixture_and_touched_by_its_points():
    draw = random.Random(3)
    for _ in range(50):
        points = [(draw.random(), draw.random()) for _ in range(draw.randint(1, 12))]
        baseline = frontier(points)
        heights = [baseline.height(x / 200) for x in range(201)]
        assert all(b <= a + 1e-12 for a, b in pairwise(heights))  # monotone
        for a in points:
            assert a[1] <= baseline.height(a[0]) + 1e-12
            for b in points:
                p = draw.random()
                assert p * a[1] + (1 - p) * b[1] <= baseline.height(p * a[0] + (1 - p) * b[0]) + 1e-12
        assert set(baseline.corners) <= set(points)


def test_a_point_on_the_frontier_is_not_above_it():
    baseline = frontier([(0.1, 0.7), (0.4, 0.6), (0.7, 0.1)])
    rounding = 0.1 + 0.2 + 0.3 - 1e-17  # a mean over seeds may be a last digit off
    assert rounding > 0.6
    assert effective_robustness((0.4, rounding), baseline) == 0.0
    assert effective_robustness((0.4, 0.6 + 1e-9), baseline) > 0


def test_points_without_what_a_frontier_needs():
    with pytest.raises(DataError, match="at least one baseline point"):
        frontier([])
    with pytest.raises(DataError, match="id_test and ood are needed"):
        frontier([RobustPoint("lora", 0, 0.5, 0.5)])
    with pytest.raises(DataError, match="not finite"):
        effective_robustness((float("nan"), 0.5), frontier([(0.5, 0.5)]))


# --- under seal ------------------------------------------------------------------------------------------------------


def explode():
    raise AssertionError("an OOD set was touched before the end")


def test_nothing_is_loaded_before_the_choices_are_written(tmp_path):
    sealed = SealedSets({"tweets": explode}, tmp_path / "choices.json")
    assert sealed.names == ("tweets",)
    with pytest.raises(GuardError, match="choices are not written"):
        sealed.open()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "choices.json").write_text("{}")
    sealed.check()
    with pytest.raises(AssertionError, match="touched"):  # the negative control: opening does load
        sealed.open()


def test_sets_are_opened_once(tmp_path):
    opened = []
    (tmp_path / "choices.json").write_text('{"lora": 0.001}')
    sealed = SealedSets({"a": lambda: opened.append("a") or 1, "b": lambda: 2}, tmp_path / "choices.json")
    assert sealed.open() == {"a": 1, "b": 2}
    with pytest.raises(GuardError, match="opened already"):
        sealed.open()
    assert opened == ["a"]
    assert json.loads((tmp_path / "opened.json").read_text())["sets"] == ["a", "b"]


def test_other_choices_after_opening_are_refused(tmp_path):
    choices = tmp_path / "choices.json"
    choices.write_text('{"lora": 0.001}')
    SealedSets({"a": lambda: 1}, choices).open()
    SealedSets({"a": lambda: 1}, choices).open()  # the same choices: an interrupted run goes on
    choices.write_text('{"lora": 0.003}')
    with pytest.raises(GuardError, match="not what they were when the sets were opened"):
        SealedSets({"a": explode}, choices).open()
    (tmp_path / "opened.json").write_text("torn")
    with pytest.raises(GuardError, match="cannot be read"):
        SealedSets({"a": explode}, choices).check()


def test_sealed_sets_are_loaders(tmp_path):
    with pytest.raises(ConfigError, match="there is none"):
        SealedSets({}, tmp_path / "choices.json")
    with pytest.raises(ConfigError, match="'a': list is no loader"):
        SealedSets({"a": [("text", "label")]}, tmp_path / "choices.json")
