"""Tables of the GORP quality benchmark: what stands in them is what the stored lines say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from gorp_lines import gorp_lines, gorp_step

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"cores": 2, "threads": 1, "processor": "x86_64", "versions": {"torch": "9.9.9"}}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A repository that holds the stored lines and nothing else."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in gorp_lines(MACHINE))
    (folder / "gorp_quality.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_gorp_with_two_views(tables: ModuleType, results: Path) -> None:
    lines = tables.TABLES["gorp-clinc10"](tables.Stored(results)).splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if line.startswith("| ")}
    seen, told = ["92.0 ± 2.0", "−10.0 ± 0.0", "90.0 ± 0.0"], ["95.0 ± 0.0", "−2.0 ± 0.0"]
    assert cells["| GORP, sound, rank 32"] == ["0.0005", "0.8", *seen, *told, "2e-07", "2.5", "12.0", "7 |"], (
        "the new version"
    )
    assert cells["| LoRA, sequential"][2] == "51.0 ± 1.4 (2)"
    assert cells["| GaLore, sequential, rank 32"] == ["–"] * 10 + ["– |"], "no run yet"
    assert cells["| OSF of PEFT, merged after every task"][0] == "–"
    assert len(cells) == 2 + 9, "head, rule, and every method"
    assert "600 training rows and 150 test rows a task, batch 32" in lines[-1]
    assert "2 runs of the search on validation rows of seed 100, on the first 5 tasks." in lines[-1]
    assert "(n) behind an AA: n seeds stand behind it, not 3." in lines[-1]
    assert "failed" not in lines[-1], "the failed one is of another stream"


def test_gorp_with_two_orders(tables: ModuleType, results: Path) -> None:
    lines = tables.TABLES["gorp-standard4"](tables.Stored(results)).splitlines()
    row = next(line for line in lines if line.startswith("| GORP, sound, rank 32 |"))
    assert row == "| GORP, sound, rank 32 | 0.0005 | 0.8 | 95.0 ± 0.0 | −2.0 ± 0.0 | – | – | 2e-07 | 2.5 | 12.0 | 7 |"
    assert "Settings were chosen on the first order and used for both. " in lines[-1]
    assert "1 run failed and left out." in lines[-1]
    assert "on the first" not in lines[-1].replace("on the first order", "")


@pytest.mark.parametrize(("lowered", "words"), [(0.0, "| reached: "), (0.05, "| **not reached**: ")])
def test_gorp_claim_tells_whether_the_target_is_reached(
    tables: ModuleType, results: Path, lowered: float, words: str
) -> None:
    path = results / "benchmarks" / "results" / "gorp_quality.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for view in line.get("views", {}).values():
            view["aa"] -= lowered
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert words in tables.claims(tables.Stored(results))


def test_gorp_tables_have_a_line_for_every_method(tables: ModuleType) -> None:
    from _gorp_tables import TITLES
    from gorp_methods import METHODS

    assert set(TITLES) == set(METHODS)


def test_gorp_step_tables(tables: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "gorp_step.json").write_text(json.dumps(gorp_step(MACHINE)), encoding="utf-8")
    stored = tables.Stored(tmp_path)
    step = tables.TABLES["gorp-step"](stored).splitlines()
    assert step[2] == "| 1024x1024 | 4 | 8 | 10 | 2.00 | 0.50 | 0.010 | 1.25 | 4.00 | 1.10 |"
    parts = tables.TABLES["gorp-parts"](stored).splitlines()
    assert parts[2] == "| 1024x1024 | 20.0 | 25 | 55 | 20 |"
    memory = tables.TABLES["gorp-memory"](stored).splitlines()
    assert memory[2] == "| adamw | 2.0 | 90 |"
    claims = tables.claims(stored)
    assert "on 1024x1024 | `python benchmarks/gorp_step.py` | `gorp_step.json` | held: 0.50 |" in claims
    assert "| **not held**: 1.50 |" in claims
