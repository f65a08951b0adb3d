from __future__ import annotations

import pytest
from rich.console import Console

from growthring.errors import ConfigError, DataError
from growthring.report import matrix_table, summary_table


def lines(table):
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def cells(table, start):
    (line,) = [line for line in lines(table) if line.startswith(f"│ {start}")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_summary_has_one_decimal_and_signs(pegp, joint):
    table = summary_table([pegp, joint])
    assert cells(table, "PEGP") == ["PEGP", "78.3", "85.0", "-10.0", "10.0", "+7.5", "2 min 05 s", "3.0e-07"]
    assert cells(table, "Joint") == ["Joint", "80.0", "—", "—", "—", "—", "2 min 05 s", "—"]


def test_matrix_has_a_line_for_each_moment(pegp):
    table = matrix_table(pegp)
    assert cells(table, "untouched") == ["untouched", "20.0", "30.0", "40.0"]
    assert cells(table, "spam") == ["spam", "65.0", "80.0", "90.0"]


def test_names_are_text_not_markup(make):
    results = make(["[red]a[/red]", "[/nothing]"], None, [[0.1, None]], title="[bold]m")
    assert "[red]a[/red]" in "\n".join(lines(matrix_table(results)))
    assert cells(matrix_table(results), "untouched") == ["untouched", "10.0", "—"]
    assert cells(summary_table([results]), "[bold]m")[0] == "[bold]m"


def test_unusable_results_are_refused(pegp):
    with pytest.raises(ConfigError, match="no results"):
        summary_table([])
    del pegp["matrix"]
    with pytest.raises(DataError, match=r"results 0 \(pegp\): missing matrix"):
        matrix_table(pegp)
