"""``benchmarks/tables.py``: what stands in README and docs is what the stored JSON says."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from gorp_lines import gorp_lines, gorp_step
from robust_lines import largo_step, robust_lines

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"cores": 2, "threads": 1, "processor": "x86_64", "versions": {"torch": "9.9.9"}}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def run(name: str, seed: int, last: float, *, guarded: bool = False, joint: bool = False) -> dict[str, Any]:
    """A run as ``demo_seeds.py`` stores it."""
    leak = 2e-7 * (seed + 1) if guarded else None
    certificate = {"leak": leak, "energy": 0.96, "output_change": 0.01 * (seed + 1), "free": 30, "dims": 40, "held": 7}
    defined = {"bwt": -0.1, "fwt": 0.05, "forgetting": 0.1, "learning_accuracy": 0.9}
    return {
        "name": name,
        "method": name,
        "title": f"Title of {name}",
        "seed": seed,
        "rows": ["untouched", "a", "b"],
        "matrix": [[0.2, 0.4], [0.8, 0.5], [last, last]],
        "metrics": {"aa": last, **(dict.fromkeys(defined) if joint else defined)},
        "timings": {"total_seconds": 10.0 + seed},
        "tasks": [{"name": "a"}, {"name": "b"}],
        "config": {},
        "worst_leak": leak,
        "certificates": [certificate] if guarded else [],
    }


def quality() -> list[dict[str, Any]]:
    """Lines as ``pegp_quality.py`` appends them; the last is of a setting that diverged."""
    sizes = {"train": 225, "validation": 75, "test": 80, "epochs": 1, "batch": 16, "length": 20}
    lines: list[dict[str, Any]] = [
        {
            "phase": "about",
            "sizes": dict.fromkeys(("clinc", "reviews", "standard", "fashion"), sizes),
            "search_seed": 100,
            "machine": MACHINE,
        }
    ]

    def add(phase: str, seed: int, stream: str, adapter: str, variant: str, **measured: Any) -> None:
        guarded = variant in ("strict", "gradient", "paper")
        place = {"stream": stream, "adapter": adapter, "variant": variant}
        setting = {"learning_rate": 0.002, "energy": 0.9 if guarded else None}
        key = json.dumps([phase, seed, place])
        lines.append({**place, **setting, "phase": phase, "seed": seed, "key": key, "seconds": 9.0, **measured})

    for stream in ("clinc", "fashion"):
        for adapter, variant, aa, leak in (
            ("lora", "unprotected", 0.5, 0.9),
            ("lora", "gradient", 0.6, 0.03),
            ("lora", "paper", 0.65, 2e-7),
            ("lora", "strict", 0.7, 3e-7),
            ("prefix", "paper", 0.6, 4e-7),
            ("linear", "baseline", 0.75, None),
        ):
            add("search", 100, stream, adapter, variant, validation_aa=aa)
            for seed in range(3):
                metrics = {"aa": aa + 0.02 * seed, "bwt": -0.1, "learning_accuracy": 0.9, "forgetting": 0.1}
                measured: dict[str, Any] = {"metrics": metrics, "other_metrics": {**metrics, "aa": 0.25}}
                measured |= {"leak": leak, "kept": None if leak is None else variant in ("strict", "paper")}
                measured["output_change"] = None if leak is None else 0.125
                add("final", seed, stream, adapter, variant, **measured)
    add("final", 0, "reviews", "lora", "strict", error="NumericalError: the loss is nan")
    return lines


def zero_shot() -> dict[str, Any]:
    """What ``zero_shot.py`` stores."""
    runs = [
        {
            "method": name,
            "title": f"Title of {name}",
            "seed": seed,
            "learning_rate": rate,
            "mtil": {"transfer": 0.8, "average": 0.7, "last": end + 0.02 * seed},
            "matrix": [],
            "reference": [0.9, 0.1, end],
            "leak": leak and leak * (seed + 1),
            "kept": None if leak is None else True,
            "seconds": 9.0,
        }
        for seed in range(3)
        for name, rate, end, leak in (
            ("untouched", None, 0.9, None),
            ("lora", 1e-3, 0.5, None),
            ("lora-pegp", 1e-3, 0.7, 2e-7),
            ("lora-zero-shot", 3e-3, 0.88, 1e-7),
        )
    ]
    tried = [{"method": "lora", "seed": 100, "learning_rate": 1e-3, "validation_last": 0.5, "seconds": 9.0}]
    sizes = {"train": 192, "validation": 80, "test": 100, "reference": 96, "reference_test": 160}
    return {
        "machine": MACHINE,
        "sizes": {**sizes, "steps": 12, "batch": 16},
        "energy": {"lora_A": 0.99},
        "search_seed": 100,
        "reference": [],
        "tasks": [],
        "search": tried,
        "runs": runs,
    }


def stored() -> dict[str, Any]:
    """One file of each kind, as the scripts write them."""
    runs = [
        *(run("sequential-lora-usual", seed, 0.70 + 0.02 * seed) for seed in range(3)),
        *(run("pegp", seed, 0.80, guarded=True) for seed in range(3)),
        run("joint", 0, 0.9, joint=True),
    ]
    setting = {"method": "pegp", "learning_rate": 3e-3, "energy": {"lora_A": 0.95, "lora_B": 0.9}}
    score = {"validation_aa": 0.75, "validation_learning_accuracy": 0.8, "seconds": 5.0}
    tried = [{**setting, **score}, {**setting, "learning_rate": 1e-3, **score, "validation_aa": 0.5}]
    tried.append({"method": "joint", "learning_rate": 2e-3, **score, "validation_learning_accuracy": None})
    chosen = {"pegp": {k: setting[k] for k in ("learning_rate", "energy")}, "joint": {"learning_rate": 2e-3}}
    finder = {"shape": [384, 384], "rank": 8, "method": "warm", "milliseconds": 0.5}
    growth = {"dim": 384, "moment_and_growth_ms": 20.0, "svd_ms": 200.0, "svd_over_this": 10.0}
    step = {
        "adapter": "lora",
        "energy": 0.95,
        "batch_tokens": 512,
        "protected_share": 0.3,
        "plain_step_ms": 100.0,
        "guarded_step_ms": 102.0,
        "step_overhead": 0.021,
        "consolidation_seconds": 0.4,
        "consolidation_in_steps": 4.0,
        "task_steps_for_5_percent": 80,
    }
    return {
        "demo_seeds.json": {"machine": MACHINE, "runs": runs},
        "demo_sweep.json": {"machine": MACHINE, "seed": 100, "sizes": {}, "runs": tried, "chosen": chosen},
        "subspace_kernels.json": {
            "machine": MACHINE,
            "range_finders": [{**finder, "svd_over_this": 40.0, "energy_over_optimum": 0.999}],
            "bank": {"full_rank": {"loop_ms": 80.0, "bank_ms": 40.0}, "lora": {"loop_ms": 4.0, "bank_ms": 1.0}},
            "growth": [growth],
        },
        "step_overhead.json": {
            "machine": MACHINE,
            "rows": [step, {**step, "adapter": "linear", "batch_tokens": 1024}],
        },
        "pegp_quality.jsonl": quality(),
        "gorp_quality.jsonl": gorp_lines(MACHINE),
        "gorp_step.json": gorp_step(MACHINE),
        "robust_quality.jsonl": robust_lines(MACHINE),
        "largo_step.json": largo_step(MACHINE),
        "pegp_drift.json": {
            "machine": MACHINE,
            "steps": 200,
            "rows": [
                {
                    "adapter": "Prefix",
                    "guard": guard,
                    "drift": moved,
                    "cosine": 1 - moved / 2,
                    "loss": 0.5,
                    "leak": None if guard == "unguarded" else 2e-7,
                    "protected_share": None if guard == "unguarded" else 0.4,
                }
                for guard, moved in (("unguarded", 0.4), ("paper, energy 0.9", 0.3), ("strict, energy 0.9", 0.05))
            ],
        },
        "pegp_overhead.json": {
            "machine": MACHINE,
            "energy": 0.95,
            "samples": 256,
            "rows": [
                {**step, "mode": "strict"},
                {**step, "adapter": "prefix", "mode": "strict", "task_steps_for_5_percent": 160},
                {**step, "adapter": "prompt", "mode": "paper", "step_overhead": 0.5, "task_steps_for_5_percent": 7},
            ],
        },
        "zero_shot.json": zero_shot(),
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the pages, with results of every kind."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name, value in stored().items():
        lines = value if isinstance(value, list) else [value]
        (results / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_pages_of_this_repository_are_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0, "run python benchmarks/tables.py"


def test_check_sees_what_is_stale_and_writing_settles_it(tables: ModuleType, repository: Path) -> None:
    root = ["--root", str(repository)]
    before = (repository / "README.md").read_text(encoding="utf-8")
    assert tables.main(["--check", *root]) == 1
    assert (repository / "README.md").read_text(encoding="utf-8") == before, "a check writes nothing"
    assert tables.main(root) == 0
    first = {p: p.read_bytes() for p in repository.rglob("*") if p.is_file()}
    assert tables.main(["--check", *root]) == 0
    assert tables.main(root) == 0
    assert {p: p.read_bytes() for p in repository.rglob("*") if p.is_file()} == first
    readme = repository / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("72.0 ± 2.0", "99.0 ± 0.0"), encoding="utf-8")
    assert tables.main(["--check", *root]) == 1
    assert tables.main(root) == 0
    assert readme.read_bytes() == first[readme]


def test_words_around_a_table_stay(tables: ModuleType, repository: Path) -> None:
    def outside(text: str) -> str:
        return tables.REGION.sub("", text)

    before = outside((repository / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    tables.main(["--root", str(repository)])
    assert outside((repository / "docs" / "benchmarks.md").read_text(encoding="utf-8")) == before


def test_demo_table(tables: ModuleType, repository: Path) -> None:
    lines = tables.demo(tables.Stored(repository)).splitlines()
    cells = ["72.0 ± 2.0", "90.0 ± 0.0", "−10.0 ± 0.0", "+10.0 ± 0.0", "+5.0 ± 0.0", "–", "11"]
    assert lines[2] == f"| Title of sequential-lora-usual | {' | '.join(cells)} |"
    assert lines[3].endswith("| 6e-07 | 11 |"), "the worst leak over the seeds"
    assert lines[4] == "| Title of joint | 90.0 | – | – | – | – | – | 10 |", "what is not defined is a dash"
    assert "seeds 0, 1, 2" in lines[-1]
    assert "`python benchmarks/demo_seeds.py`" in lines[-1]
    assert "2 cores, 1 thread, x86_64; torch 9.9.9" in lines[-1]


def test_sweep_marks_what_was_chosen(tables: ModuleType, repository: Path) -> None:
    text = tables.sweep(tables.Stored(repository))
    marked = [line for line in text.splitlines() if "**best**" in line]
    assert [line.split(" | ")[2] for line in marked] == ["**0.003**", "**0.002**"]
    assert "| pegp | lora_A 0.95, lora_B 0.9 | 0.001 | 50.0 | 80.0 |  |" in text
    assert "other settings" not in text


def test_sweep_says_when_the_demo_uses_other_settings(tables: ModuleType, repository: Path) -> None:
    packaged = repository / "src" / "growthring" / "recipes" / "demo_settings.json"
    packaged.parent.mkdir(parents=True)
    packaged.write_text(json.dumps({"joint": {"learning_rate": 5e-3}}), encoding="utf-8")
    assert "other settings for joint" in tables.sweep(tables.Stored(repository))


def test_claims_follow_the_files(tables: ModuleType, repository: Path) -> None:
    text = tables.claims(tables.Stored(repository))
    assert "| worst 6e-07 in 3 runs |" in text
    assert text.count("worst 2.1 %") == 3
    assert "| 6 of 6 runs; leak 3e-07 to 3e-07 in 6 runs |" in text
    assert "| 3e-02 to 3e-02 in 6 runs |" in text, "what projecting gradients alone leaks"
    assert "| 12 runs of the search |" in text
    assert "| from 80 to 160 steps on |" in text, "consolidation, in strict mode"
    assert "| LoRA: −2.0 ± 0.0 points; −20.0 ± 0.0 without the reference; −40.0 ± 0.0 unguarded |" in text
    assert "not measured yet" not in text


def test_pegp_overview(tables: ModuleType, repository: Path) -> None:
    lines = tables.TABLES["pegp-quality"](tables.Stored(repository)).splitlines()
    assert lines[0] == (
        "| what trains | guard | CLINC, class-incremental | Fashion-MNIST, task given | worst leak |"
    ), "a stream without a finished run has no column"
    assert lines[2] == "| LoRA | unprotected | 52.0 ± 2.0 | 52.0 ± 2.0 | 9e-01 |"
    assert lines[4].startswith("| LoRA | PEGP, paper (figure) |"), "the reading of the paper is named"
    assert lines[6].startswith("| Prefix | PEGP, paper | 62.0")
    assert lines[7] == "| all linear weights, unprotected | – | 77.0 ± 2.0 | 77.0 ± 2.0 | – |"
    assert "seeds 0, 1, 2" in lines[-1]
    assert "behind an AA" not in lines[-1]
    assert "1 run failed and left out" in lines[-1], "that of the stream without a column"


def test_pegp_stream(tables: ModuleType, repository: Path) -> None:
    lines = tables.TABLES["pegp-clinc"](tables.Stored(repository)).splitlines()
    cells = ["0.002", "0.9", "72.0 ± 2.0", "−10.0 ± 0.0", "90.0 ± 0.0", "25.0 ± 0.0", "3e-07", "0.125", "9"]
    assert lines[5] == f"| LoRA | PEGP, strict | {' | '.join(cells)} |"
    assert "225 training rows and 80 test rows a task" in lines[-1]
    assert "6 runs of the search on validation rows of seed 100" in lines[-1]
    assert "not measured yet" in tables.TABLES["pegp-reviews"](tables.Stored(repository)), "a failed run is no result"


def test_pegp_drift(tables: ModuleType, repository: Path) -> None:
    stored = tables.Stored(repository)
    lines = tables.TABLES["pegp-drift"](stored).splitlines()
    assert lines[2:5] == [
        "| Prefix | unguarded | 4.0e-01 | 0.8000 | 0.500 | – | – |",
        "| Prefix | paper, energy 0.9 | 3.0e-01 | 0.8500 | 0.500 | 2e-07 | 40 |",
        "| Prefix | strict, energy 0.9 | 5.0e-02 | 0.9750 | 0.500 | 2e-07 | 40 |",
    ]
    assert "0.30 against 0.05 at energy 0.9, 0.05 at best; unguarded 0.40" in tables.claims(stored)


def quality_without(repository: Path, dropped: Callable[[dict[str, Any]], bool], *more: dict[str, Any]) -> None:
    """Take lines out of the stored quality runs, and add some."""
    path = repository / "benchmarks" / "results" / "pegp_quality.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [r for r in lines if not (r["phase"] == "final" and dropped(r))] + list(more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(("first", "cell"), [(1, "70.0 (1)"), (2, "71.0 ± 1.4 (2)")])
def test_pegp_tables_say_when_seeds_are_missing(tables: ModuleType, repository: Path, first: int, cell: str) -> None:
    quality_without(repository, lambda r: r["variant"] == "strict" and r["seed"] >= first)
    stored = tables.Stored(repository)
    text = tables.TABLES["pegp-quality"](stored)
    assert f"| LoRA | PEGP, strict | {cell} | {cell} | 3e-07 |" in text
    assert "| LoRA | PEGP, paper (figure) | 67.0 ± 2.0 | 67.0 ± 2.0 |" in text, "all of its seeds"
    assert "(n) behind an AA: n seeds stand behind it, not 3." in text
    text = tables.TABLES["pegp-clinc"](stored)
    assert f"| LoRA | PEGP, strict | 0.002 | 0.9 | {cell} |" in text
    assert "not 3." in text


def test_pegp_tables_count_failed_runs(tables: ModuleType, repository: Path) -> None:
    assert "failed" not in tables.TABLES["pegp-clinc"](tables.Stored(repository)), (
        "the failed one is of another stream"
    )
    at = {"stream": "clinc", "adapter": "lora", "variant": "unprotected", "seed": 1}
    ended = {**at, "phase": "final", "key": "a", "error": "NumericalError: the loss is nan"}
    tried = {**at, "phase": "search", "key": "b", "error": "NumericalError: the loss is nan"}
    quality_without(repository, lambda r: {k: r[k] for k in at} == at, ended, tried)
    text = tables.TABLES["pegp-clinc"](tables.Stored(repository))
    assert "52.0 ± 2.8 (2)" in text
    assert "7 runs of the search (1 failed)" in text
    assert "1 run failed and left out." in text
    assert "2 runs failed and left out." in tables.TABLES["pegp-quality"](tables.Stored(repository))
    again = {**at, "phase": "final", "key": "a", "learning_rate": 0.002, "energy": None, "seconds": 9.0}
    metrics = {"aa": 0.52, "bwt": -0.1, "learning_accuracy": 0.9, "forgetting": 0.1}
    again |= {"metrics": metrics, "other_metrics": metrics, "leak": 0.9, "kept": False, "output_change": 0.125}
    quality_without(repository, lambda r: False, again)
    text = tables.TABLES["pegp-clinc"](tables.Stored(repository))
    assert "52.0 ± 2.0 |" in text
    assert "left out" not in text, "run again, it ended"


def test_zero_shot(tables: ModuleType, repository: Path) -> None:
    lines = tables.TABLES["zero-shot"](tables.Stored(repository)).splitlines()
    three = "80.0 ± 0.0 | 70.0 ± 0.0"
    assert lines[2] == (
        f"| Title of untouched | – | {three} | 92.0 ± 2.0 | 90.0 ± 0.0 | 90.0 ± 0.0 | +0.0 ± 0.0 | – |"
    )
    assert lines[5] == (
        f"| Title of lora-zero-shot | 0.003 | {three} | 90.0 ± 2.0 | 90.0 ± 0.0 | 88.0 ± 0.0 | −2.0 ± 0.0 | 3e-07 |"
    )
    assert "1 run of the search on validation rows of seed 100" in lines[-1]
    assert "12 steps of 16 images and 100 test rows a task; 96 rows of the reference" in lines[-1]


def test_zero_shot_says_when_seeds_are_missing(tables: ModuleType, repository: Path) -> None:
    path = repository / "benchmarks" / "results" / "zero_shot.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["runs"] = [r for r in data["runs"] if (r["method"], r["seed"]) != ("lora", 2)]
    path.write_text(json.dumps(data), encoding="utf-8")
    text = tables.TABLES["zero-shot"](tables.Stored(repository))
    assert "| Title of lora (2 of 3 seeds) |" in text
    assert text.count("of 3 seeds") == 1
    path.write_text(json.dumps({**data, "runs": []}), encoding="utf-8")
    assert "not measured yet" in tables.TABLES["zero-shot"](tables.Stored(repository)), "the search is no result"


@pytest.mark.parametrize(
    "name",
    [
        "demo_seeds.json",
        "demo_sweep.json",
        "subspace_kernels.json",
        "step_overhead.json",
        "pegp_quality.jsonl",
        "pegp_overhead.json",
        "pegp_drift.json",
        "zero_shot.json",
        "gorp_quality.jsonl",
        "gorp_step.json",
        "robust_quality.jsonl",
        "largo_step.json",
    ],
)
def test_what_is_not_measured_says_how(tables: ModuleType, repository: Path, name: str) -> None:
    (repository / "benchmarks" / "results" / name).unlink()
    tables.main(["--root", str(repository)])
    script = name.split(".")[0] + ".py"
    page = (repository / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"*not measured yet: run `python benchmarks/{script}`*" in page
    assert "not measured yet" in tables.claims(tables.Stored(repository))


@pytest.mark.parametrize(
    "text", ["<!-- table: demmo -->\n<!-- end -->\n", "<!-- table: demo -->\nno end\n", "<!-- table: demo -->"]
)
def test_a_broken_region_is_an_error(tables: ModuleType, repository: Path, text: str) -> None:
    (repository / "docs" / "index.md").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.md"):
        tables.main(["--check", "--root", str(repository)])


@pytest.mark.parametrize("measured", [True, False])
def test_figure_is_svg_that_loads_nothing(tables: ModuleType, repository: Path, measured: bool) -> None:
    if not measured:
        (repository / "benchmarks" / "results" / "demo_seeds.json").unlink()
    tables.main(["--root", str(repository)])
    text = (repository / tables.FIGURE).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "href" not in text
    assert "url(" not in text
    assert ("72.0" in words and "Title of pegp" in words) is measured
    assert any("not measured yet" in (word or "") for word in words) is not measured
