"""Tables and the figure of README and docs, made from the stored JSON; nothing in them is typed by hand.

A region between ``<!-- table: NAME -->`` and ``<!-- end -->`` is replaced by the table of that name. What was not
measured yet says so, with the command that measures it.

    python benchmarks/tables.py            # writes README.md, docs/**/*.md and docs/assets/demo.svg
    python benchmarks/tables.py --check    # writes nothing; exits 1 when a file is stale
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _figure import figure
from _gorp_tables import GORP_TABLES, gorp_claims
from _pegp_tables import PEGP_TABLES, pegp_claims
from _robust_tables import ROBUST_TABLES, robust_claims
from _step_tables import STEP_TABLES, step_claims
from _words import COSTS, NONE, Json, Stored, costs, energy_words, grid, not_yet, origin, seeds_of, spread

ROOT = Path(__file__).resolve().parents[1]
FIGURE = "docs/assets/demo.svg"
DEMO = ("demo_seeds.json", "python benchmarks/demo_seeds.py")
SWEEP = ("demo_sweep.json", "python benchmarks/demo_sweep.py")
KERNELS = ("subspace_kernels.json", "python benchmarks/subspace_kernels.py")
OVERHEAD = ("step_overhead.json", "python benchmarks/step_overhead.py")
REGION = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def by_name(runs: Sequence[Json]) -> dict[str, list[Json]]:
    """Runs of one setting over the seeds, in order of first appearance."""
    found: dict[str, list[Json]] = {}
    for run in runs:
        found.setdefault(run["name"], []).append(run)
    return found


# --- the tables -----------------------------------------------------------------------------------------------------


def demo(stored: Stored) -> str:
    """The demo's methods side by side."""
    data = stored.get(DEMO[0])
    if data is None:
        return not_yet(DEMO)
    keys = (("aa", False), ("learning_accuracy", False), ("bwt", True), ("forgetting", True), ("fwt", True))
    rows = []
    for runs in by_name(data["runs"]).values():
        cells = [spread([r["metrics"].get(key) for r in runs], sign=sign) for key, sign in keys]
        leaks = [r["worst_leak"] for r in runs if r["worst_leak"] is not None]
        seconds = statistics.fmean(r["timings"]["total_seconds"] for r in runs)
        rows.append([runs[0]["title"], *cells, f"{max(leaks):.0e}" if leaks else NONE, f"{seconds:.0f}"])
    head = ("method", "AA", "learning accuracy", "BWT", "forgetting", "FWT", "worst leak", "seconds a run")
    return f"{grid(head, rows)}\n\n{origin(DEMO, data['machine'], 'Percent points. ' + seeds_of(data['runs']))}"


def demo_tasks(stored: Stored) -> str:
    """Accuracy on each task at the end of the stream, and before it."""
    data = stored.get(DEMO[0])
    if data is None:
        return not_yet(DEMO)
    groups = by_name(data["runs"])
    first = next(iter(groups.values()))
    names = [task["name"] for task in first[0]["tasks"]]

    def line(title: str, runs: Sequence[Json], row: int) -> list[str]:
        return [title, *(spread([r["matrix"][row][i] for r in runs]) for i in range(len(names)))]

    rows = [line("untouched model", first, 0), *(line(runs[0]["title"], runs, -1) for runs in groups.values())]
    more = "Accuracy in percent after the last task. " + seeds_of(data["runs"])
    return f"{grid(['method', *names], rows)}\n\n{origin(DEMO, data['machine'], more)}"


def demo_certificates(stored: Stored) -> str:
    """What the certificates of the guarded runs say."""
    data = stored.get(DEMO[0])
    if data is None:
        return not_yet(DEMO)
    rows = []
    for runs in by_name(data["runs"]).values():
        if not any(run["certificates"] for run in runs):
            continue
        papers = [c for run in runs for c in run["certificates"]]
        changes = [c["output_change"] for c in papers if c["output_change"] is not None]
        ends = [run["certificates"][-1] for run in runs if run["certificates"]]
        rows.append(
            [
                runs[0]["title"],
                f"{max(r['worst_leak'] for r in runs):.0e}",
                f"{100 * min(c['energy'] for c in papers):.1f}",
                f"{max(changes):.3f}" if changes else NONE,
                spread([c["free"] / c["dims"] for c in ends]),
                f"{max(c['held'] for c in papers)}",
            ]
        )
    if not rows:
        return "*the stored runs have no guarded method*"
    head = (
        "method",
        "worst leak",
        "least captured energy, %",
        "worst output change",
        "free at the end, %",
        "tensors held",
    )
    return f"{grid(head, rows)}\n\n{origin(DEMO, data['machine'], seeds_of(data['runs']))}"


def sweep(stored: Stored) -> str:
    """Every setting that was tried for the demo, on validation data."""
    data = stored.get(SWEEP[0])
    if data is None:
        return not_yet(SWEEP)
    marks: dict[str, str] = {}
    for name, setting in data["chosen"].items():
        key = json.dumps([name.removesuffix("-usual"), setting], sort_keys=True)
        label = "usual" if name.endswith("-usual") else "best"
        marks[key] = f"{marks[key]}, {label}" if key in marks else label
    rows = []
    for run in data["runs"]:
        setting = {k: run[k] for k in ("learning_rate", "energy") if k in run}
        mark = marks.get(json.dumps([run["method"], setting], sort_keys=True), "")
        rate, energy = f"{run['learning_rate']:g}", energy_words(run.get("energy"))
        score = spread([run["validation_aa"]])
        cells = [run["method"], energy, rate, score, spread([run["validation_learning_accuracy"]]), mark]
        rows.append([f"**{cell}**" if mark else cell for cell in cells])
    head = ("method", "energy", "learning rate", "validation AA", "validation learning accuracy", "chosen")
    more = (
        f"Percent, seed {data['seed']}; test data were not opened. *best*: highest validation AA of the method. "
        "*usual*: sequential LoRA at the rate that learns each task best. "
    )
    return f"{grid(head, rows, 2)}\n\n{origin(SWEEP, data['machine'], more)}{_differs(stored, data['chosen'])}"


def _differs(stored: Stored, chosen: Json) -> str:
    """A sentence when the packaged demo does not use what this sweep chose."""
    packaged = stored.settings
    other = [
        name
        for name, setting in chosen.items()
        if name in packaged and not _same(setting, {k: packaged[name].get(k) for k in setting})
    ]
    if not other:
        return ""
    return (
        f" The packaged demo uses other settings for {', '.join(other)} (`python benchmarks/demo_sweep.py --choose`)."
    )


def _same(one: Json, other: Json) -> bool:
    """Equal settings; an energy for linear weights may be written with or without its kind."""

    def plain(value: Any) -> Any:
        return value["linear"] if isinstance(value, Mapping) and set(value) == {"linear"} else value

    return {k: plain(v) for k, v in one.items()} == {k: plain(v) for k, v in other.items()}


def kernels(stored: Stored) -> str:
    """Subspace kernels against the full SVD."""
    data = stored.get(KERNELS[0])
    if data is None:
        return not_yet(KERNELS)
    ranges = [
        [
            f"{r['shape'][0]}×{r['shape'][1]}",
            r["method"],
            str(r["rank"]),
            f"{r['milliseconds']:.1f}",
            f"{r['svd_over_this']:.0f}×",
            f"{100 * r['energy_over_optimum']:.2f}",
        ]
        for r in data["range_finders"]
    ]
    head = ("matrix", "range finder", "rank", "ms", "full SVD takes", "energy, % of the optimum")
    names = {"full_rank": "768×768 updates", "lora": "8×768 updates"}
    banks = [
        [names.get(k, k), f"{v['loop_ms']:.1f}", f"{v['bank_ms']:.1f}", f"{v['loop_ms'] / v['bank_ms']:.1f}×"]
        for k, v in data["bank"].items()
    ]
    growths = [
        [str(r["dim"]), f"{r['moment_and_growth_ms']:.0f}", f"{r['svd_ms']:.0f}", f"{r['svd_over_this']:.1f}×"]
        for r in data["growth"]
    ]
    return "\n\n".join(
        (
            "Range of a matrix with slowly decaying singular values:",
            grid(head, ranges, 2),
            "Forty sites projected one after another, and as one bank:",
            grid(("sites", "loop, ms", "bank, ms", "loop takes"), banks),
            "Second moment and growth to energy 0.95, against an SVD of the same 8,192 rows:",
            grid(("dimension", "moment and growth, ms", "SVD, ms", "SVD takes"), growths),
            origin(KERNELS, data["machine"]),
        )
    )


def overhead(stored: Stored) -> str:
    """What PEGP costs a step and a task."""
    data = stored.get(OVERHEAD[0])
    if data is None:
        return not_yet(OVERHEAD)
    rows = [[r["adapter"], energy_words(r["energy"]), *costs(r)] for r in data["rows"]]
    more = "*steps a task for 5 %*: a task of so many steps spends 5 % of its time on consolidation. "
    return f"{grid(('adapter', 'energy', *COSTS), rows)}\n\n{origin(OVERHEAD, data['machine'], more)}"


def claims(stored: Stored) -> str:
    """Claim, command, file, and what the file says."""
    runs = (stored.get(DEMO[0]) or {}).get("runs", [])
    guarded = [r for r in runs if r["worst_leak"] is not None]
    groups = by_name(runs)
    usual, pegp = groups.get("sequential-lora-usual", []), groups.get("pegp", [])
    steps = (stored.get(OVERHEAD[0]) or {}).get("rows", [])
    tried = (stored.get(SWEEP[0]) or {}).get("runs", [])
    speed = (stored.get(KERNELS[0]) or {}).get("range_finders", [])

    def worst(kind: str) -> str | None:
        found = [r["step_overhead"] for r in steps if r["adapter"] == kind]
        return f"worst {100 * max(found):.1f} %" if found else None

    def change(found: Sequence[Json]) -> str | None:
        return f"BWT {spread([r['metrics'].get('bwt') for r in found], sign=True)}" if found else None

    rows = (
        (
            "No update leaks more than 1e-5 of its norm into what is protected (float32, AdamW)",
            DEMO,
            f"worst {max(r['worst_leak'] for r in guarded):.0e} in {len(guarded)} runs" if guarded else None,
        ),
        ("Sequential LoRA at a usual learning rate forgets (negative BWT)", DEMO, change(usual)),
        ("PEGP on LoRA forgets less (BWT nearer to zero, or above it)", DEMO, change(pegp)),
        ("Settings were chosen on validation data only", SWEEP, f"{len(tried)} settings" if tried else None),
        ("PEGP adds at most 3 % to a LoRA step", OVERHEAD, worst("lora")),
        ("PEGP adds at most 10 % to a step on linear weights, 1,024 tokens a batch or more", OVERHEAD, _wide(steps)),
        (
            "Range finders are faster than a full SVD",
            KERNELS,
            f"{min(r['svd_over_this'] for r in speed):.1f}× to {max(r['svd_over_this'] for r in speed):.0f}×"
            if speed
            else None,
        ),
    )
    every = (*rows, *pegp_claims(stored), *gorp_claims(stored), *step_claims(stored), *robust_claims(stored))
    body = [
        [claim, f"`{command}`", f"`{name}`", measured or "not measured yet"]
        for claim, (name, command), measured in every
    ]
    return grid(("claim or limit", "command", "stored JSON", "measured"), body, 4)


def _wide(steps: Sequence[Json]) -> str | None:
    found = [r["step_overhead"] for r in steps if r["adapter"] == "linear" and r["batch_tokens"] >= 1024]
    return f"worst {100 * max(found):.1f} %" if found else None


TABLES: dict[str, Callable[[Stored], str]] = {
    "demo": demo,
    "demo-tasks": demo_tasks,
    "demo-certificates": demo_certificates,
    "sweep": sweep,
    "kernels": kernels,
    "overhead": overhead,
    "claims": claims,
    **PEGP_TABLES,
    **GORP_TABLES,
    **ROBUST_TABLES,
    **STEP_TABLES,
}


# --- files ----------------------------------------------------------------------------------------------------------


def render(text: str, stored: Stored, where: str) -> str:
    """``text`` with every region filled.

    Raises:
        ValueError: For an unknown table or a region that does not end.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES or "<!-- table:" in match["body"]:
            problem = "does not end" if name in TABLES else f"is unknown; there are {', '.join(TABLES)}"
            raise ValueError(f"{where}: the table {name!r} {problem}")
        return f"{match[1]}\n{TABLES[name](stored)}\n\n{match['end']}"

    filled, count = REGION.subn(fill, text)
    if count != text.count("<!-- table:"):
        raise ValueError(f"{where}: a table region does not end with <!-- end -->")
    return filled


def outputs(root: Path) -> Iterator[tuple[Path, str]]:
    """Every file that is made from JSON, with what it should hold."""
    stored = Stored(root)
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        if path.is_file():
            yield path, render(path.read_text(encoding="utf-8"), stored, str(path.relative_to(root)))
    yield root / FIGURE, figure(stored.get(DEMO[0]), DEMO[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository; default: this one")
    options = parser.parse_args(arguments)
    stale = [
        (path, text)
        for path, text in outputs(options.root)
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        print(f"{'stale' if options.check else 'wrote'}: {path.relative_to(options.root)}")
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
