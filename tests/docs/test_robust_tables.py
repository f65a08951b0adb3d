"""Tables of the robustness benchmark: what stands in them is what the stored lines say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from robust_lines import largo_step, robust_lines

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"cores": 2, "threads": 1, "processor": "x86_64", "versions": {"torch": "9.9.9"}}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A repository that holds the stored figures and nothing else."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in robust_lines(MACHINE))
    (folder / "robust_quality.jsonl").write_text(text, encoding="utf-8")
    (folder / "largo_step.json").write_text(json.dumps(largo_step(MACHINE)), encoding="utf-8")
    return tmp_path


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_points_stand_above_and_below_the_frontier(tables: ModuleType, results: Path) -> None:
    text = tables.TABLES["robust-sentiment"](tables.Stored(results))
    found = cells(text)
    chosen = ["0.001", "0.3", "75.0 ± 0.0", "47.0 ± 0.0", "+2.0", "3 of 3", "52.0 ± 0.0", "42.0 ± 0.0", "2.0 ± 0.0"]
    assert found["LARGO-P, principal"] == chosen
    assert found["LARGO-F, principal"][4:6] == ["−1.0", "0 of 3"]
    assert found["LARGO-D, principal"][4:6] == ["+1.0", "1 of 3"], "the mean is above, two seeds are not"
    assert found["LoRA"][:4] == ["0.001", "–", "70.0 ± 0.0", "50.0 ± 0.0"], "validation rows chose this rate"
    assert found["LoRA, WiSE 0.5"][4] == "−10.0"
    assert found["untouched, linear probe"][2:4] == ["60.0 ± 0.0", "60.0 ± 0.0"]
    assert found["FTP"][:3] == ["–", "–", "–"], "no finished run"
    assert "A development bench." in text
    assert "12 runs of the search on validation rows of seed 100" in text


def test_failed_runs_are_counted(tables: ModuleType, results: Path) -> None:
    assert "1 run failed and left out" in tables.TABLES["robust-topics"](tables.Stored(results))


def test_verdicts(tables: ModuleType, results: Path) -> None:
    found = cells(tables.TABLES["robust-verdicts"](tables.Stored(results)))
    assert found["LARGO-P, principal"][:3] == ["yes (+2.0; 3 of 3 seeds)", "yes (+2.0; 3 of 3 seeds)", "–"]
    assert found["LARGO-F, principal"][0] == "**no** (−1.0; 0 of 3 seeds)"
    assert found["LARGO-D, principal"][0] == "**not every seed** (+1.0; 1 of 3 seeds)"
    assert found["LARGO-P, principal"][3] == "48.5", "(50 + 47) / 2"


def test_costs_and_their_limits(tables: ModuleType, results: Path) -> None:
    stored = tables.Stored(results)
    assert "| MiniLM-L6 | product, radius | 1024 | 100.0 | 104.0 | +4.0 | 5.00 | 6.00 |" in tables.TABLES[
        "largo-step"
    ](stored)
    assert "| 768×768 | 0.300 | 0.020 | 0.004 |" in tables.TABLES["largo-svd"](stored)
    claims = cells(tables.claims(stored))
    assert claims["a LARGO step in delta form costs at most 10 % over LoRA's"][2] == "reached: +8.0 % (MiniLM-L6)"
    assert claims["a LARGO step in product form costs at most 3 % over LoRA's"][2].startswith("**not reached**")


def test_nothing_measured_says_how_to(tables: ModuleType, tmp_path: Path) -> None:
    stored = tables.Stored(tmp_path)
    for name in ("robust-emoji", "robust-verdicts", "largo-step", "largo-svd"):
        assert "not measured yet: run `python benchmarks/" in tables.TABLES[name](stored)
