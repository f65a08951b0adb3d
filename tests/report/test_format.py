from __future__ import annotations

import math

import pytest

from growthring.report import _format as fmt


@pytest.mark.parametrize("show", [fmt.percent, fmt.points, fmt.small, fmt.duration])
@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_nothing_is_an_em_dash(show, nothing):
    assert show(nothing) == "—"


def test_numbers_by_hand():
    assert [fmt.percent(v) for v in (0, 0.78333, 1, -0.0001)] == ["0.0", "78.3", "100.0", "0.0"]
    assert [fmt.points(v) for v in (0.075, -0.1, -0.0004, 0)] == ["+7.5", "−10.0", "0.0", "0.0"]
    assert [fmt.small(v) for v in (0, 3.24e-7, -2e-12, 0.0142, 12.3, 640, 2e6)] == [
        "0",
        "3.2×10⁻⁷",
        "-2.0×10⁻¹²",
        "0.014",
        "12",
        "640",
        "2.0×10⁶",
    ]
    assert [fmt.duration(s) for s in (8.34, 59.96, 125, 3720)] == ["8.3 s", "1 min 00 s", "2 min 05 s", "1 h 02 min"]
    assert fmt.shorten("abcdef", 4) == "abc…"
    assert fmt.shorten("abcd", 4) == "abcd"
