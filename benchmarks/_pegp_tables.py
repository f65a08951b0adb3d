"""Tables of ``pegp_quality.py``, ``pegp_overhead.py``, ``pegp_drift.py`` and ``zero_shot.py``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

from _words import COSTS, NONE, Json, Stored, costs, counted, energy_words, grid, not_yet, origin, seeds_of, spread

QUALITY = ("pegp_quality.jsonl", "python benchmarks/pegp_quality.py")
OVERHEAD = ("pegp_overhead.json", "python benchmarks/pegp_overhead.py")
DRIFT = ("pegp_drift.json", "python benchmarks/pegp_drift.py")
ZERO_SHOT = ("zero_shot.json", "python benchmarks/zero_shot.py")
STREAMS: Mapping[str, str] = {
    "clinc": "CLINC, class-incremental",
    "reviews": "reviews, domain-incremental",
    "standard": "standard, task-incremental",
    "fashion": "Fashion-MNIST, task given",
}
OTHER_VIEWS: Mapping[str, str] = {"clinc": "AA, task given", "fashion": "AA, class-incremental, prototypes"}
"""The second way of reading the runs of a stream."""
ADAPTERS: Mapping[str, str] = {"lora": "LoRA", "adapter": "Adapter", "prefix": "Prefix", "prompt": "Prompt"}
VARIANTS: Mapping[str, str] = {
    "unprotected": "unprotected",
    "gradient": "gradient-only",
    "paper": "PEGP, paper",
    "strict": "PEGP, strict",
}
OTHERS: Mapping[tuple[str, str], str] = {
    ("linear", "baseline"): "all linear weights, unprotected",
    ("linear", "strict"): "all linear weights, PEGP, strict",
    ("osf", "baseline"): "OSF of PEFT, merged after every task",
    ("joint", "baseline"): "LoRA on all tasks at once",
}
FIGURE = ("lora", "adapter")
"""Adapters whose paper variant is that of the figure: the up matrix alone is protected."""

Row = tuple[str, str]


def rows_of(runs: Sequence[Json]) -> list[Row]:
    """Adapter and variant of every line of the table that has a run, in order."""
    present = {(run["adapter"], run["variant"]) for run in runs}
    order = [(a, v) for a in ADAPTERS for v in VARIANTS] + list(OTHERS)
    return [row for row in order if row in present]


def title(row: Row) -> list[str]:
    """Its first two cells."""
    if row in OTHERS:
        return [OTHERS[row], NONE]
    mark = " (figure)" if row[1] == "paper" and row[0] in FIGURE else ""
    return [ADAPTERS[row[0]], VARIANTS[row[1]] + mark]


def _lines(stored: Stored, phase: str) -> list[Json]:
    """Runs of one phase, failed ones too; of a run that was made twice the last."""
    return list({line["key"]: line for line in stored.lines(QUALITY[0]) if line["phase"] == phase}.values())


def finals(stored: Stored) -> list[Json]:
    """Finished runs on test data."""
    return [line for line in _lines(stored, "final") if "error" not in line]


def _about(stored: Stored) -> Json:
    return next(line for line in stored.lines(QUALITY[0]) if line["phase"] == "about")


def _of(runs: Sequence[Json], row: Row, stream: str) -> list[Json]:
    return [r for r in runs if (r["adapter"], r["variant"]) == row and r["stream"] == stream]


def _worst(runs: Sequence[Json], key: str, form: str) -> str:
    values = [r[key] for r in runs if r[key] is not None]
    return format(max(values), form) if values else NONE


def _final_of(runs: Sequence[Json], key: str, sign: bool = False, view: str = "metrics") -> str:
    return spread([r[view].get(key) for r in runs], sign=sign)


def _average(runs: Sequence[Json], seeds: int) -> str:
    """Final average accuracy; of fewer seeds than others with their number."""
    fewer = f" ({len(runs)})" if 0 < len(runs) < seeds else ""
    return _final_of(runs, "aa") + fewer


def quality(stored: Stored) -> str:
    """Final average accuracy of every method on every stream, and the worst leak."""
    runs = finals(stored)
    if not runs:
        return not_yet(QUALITY)
    streams = [s for s in STREAMS if any(r["stream"] == s for r in runs)]
    seeds = len({r["seed"] for r in runs})
    body = []
    for row in rows_of(runs):
        mine = [r for r in runs if (r["adapter"], r["variant"]) == row]
        cells = [_average(_of(runs, row, stream), seeds) for stream in streams]
        body.append([*title(row), *cells, _worst(mine, "leak", ".0e")])
    head = ("what trains", "guard", *(STREAMS[s] for s in streams), "worst leak")
    more = f"AA in percent. {_seeds(runs, _lines(stored, 'final'))}"
    return f"{grid(head, body, 2)}\n\n{origin(QUALITY, _about(stored)['machine'], more)}"


def _seeds(runs: Sequence[Json], all_runs: Sequence[Json]) -> str:
    """Which seeds stand behind a table, where there are fewer, and how many runs failed."""
    seeds = len({r["seed"] for r in runs})
    cells = [_of(runs, row, s) for row in rows_of(runs) for s in STREAMS]
    fewer = any(0 < len(cell) < seeds for cell in cells)
    partial = f"(n) behind an AA: n seeds stand behind it, not {seeds}. " if fewer else ""
    failed = sum("error" in r for r in all_runs)
    return f"{seeds_of(runs)}{partial}" + (f"{counted(failed, 'run')} failed and left out. " if failed else "")


def one_stream(stored: Stored, name: str) -> str:
    """Everything measured on one stream."""
    runs = [r for r in finals(stored) if r["stream"] == name]
    if not runs:
        return not_yet(QUALITY)
    seeds = len({r["seed"] for r in runs})
    body = []
    for row in rows_of(runs):
        mine = _of(runs, row, name)
        energy = sorted({r["energy"] for r in mine if r["energy"] is not None})
        body.append(
            [
                *title(row),
                "/".join(f"{rate:g}" for rate in sorted({r["learning_rate"] for r in mine})),
                "/".join(map(energy_words, energy)) or NONE,
                _average(mine, seeds),
                _final_of(mine, "bwt", sign=True),
                _final_of(mine, "learning_accuracy"),
                *([_final_of(mine, "aa", view="other_metrics")] if name in OTHER_VIEWS else []),
                _worst(mine, "leak", ".0e"),
                _worst(mine, "output_change", ".3f"),
                f"{statistics.fmean(r['seconds'] for r in mine):.0f}",
            ]
        )
    head = (
        "what trains",
        "guard",
        "learning rate",
        "energy",
        "AA",
        "BWT",
        "learning accuracy",
        *([OTHER_VIEWS[name]] if name in OTHER_VIEWS else []),
        "worst leak",
        "worst output change",
        "seconds a run",
    )
    size = _about(stored)["sizes"][name]
    tried, all_runs = ([r for r in _lines(stored, p) if r["stream"] == name] for p in ("search", "final"))
    failed = sum("error" in r for r in tried)
    more = (
        f"{size['train']} training rows and {size['test']} test rows a task, batch {size['batch']}. {len(tried)} runs "
        f"of the search{f' ({failed} failed)' if failed else ''} on validation rows of seed "
        f"{_about(stored)['search_seed']}. {_seeds(runs, all_runs)}"
    )
    return f"{grid(head, body, 2)}\n\n{origin(QUALITY, _about(stored)['machine'], more)}"


def overhead(stored: Stored) -> str:
    """What the strict guard costs a step and a task, for each kind of adapter."""
    data = stored.get(OVERHEAD[0])
    if data is None:
        return not_yet(OVERHEAD)
    body = [[ADAPTERS[r["adapter"]], r["mode"], *costs(r)] for r in data["rows"]]
    more = f"Energy {data['energy']:g}; features of {data['samples']} examples a task. "
    return f"{grid(('adapter', 'mode', *COSTS), body, 2)}\n\n{origin(OVERHEAD, data['machine'], more)}"


def drift(stored: Stored) -> str:
    """How far sentence vectors of an earlier task move, for each kind of adapter and guard."""
    data = stored.get(DRIFT[0])
    if data is None:
        return not_yet(DRIFT)
    body = [
        [
            r["adapter"],
            r["guard"],
            f"{r['drift']:.1e}",
            f"{r['cosine']:.4f}",
            f"{r['loss']:.3f}",
            NONE if r["leak"] is None else f"{r['leak']:.0e}",
            NONE if r["protected_share"] is None else f"{100 * r['protected_share']:.0f}",
        ]
        for r in data["rows"]
    ]
    head = ("adapter", "guard", "drift", "cosine to before", "loss of the new task", "leak", "protected, %")
    more = f"{data['steps']} steps of AdamW, weight decay 0.1. "
    return f"{grid(head, body, 2)}\n\n{origin(DRIFT, data['machine'], more)}"


def zero_shot(stored: Stored) -> str:
    """What a dual encoder still tells apart of classes that it never trains on, with and without the guard."""
    data = stored.get(ZERO_SHOT[0])
    if data is None or not data["runs"]:
        return not_yet(ZERO_SHOT)
    seeds = len({r["seed"] for r in data["runs"]})
    body = []
    for runs in _by_method(data["runs"]).values():
        fewer = f" ({len(runs)} of {seeds} seeds)" if len(runs) < seeds else ""
        body.append(
            [
                runs[0]["title"] + fewer,
                NONE if runs[0]["learning_rate"] is None else f"{runs[0]['learning_rate']:g}",
                *(spread([r["mtil"][key] for r in runs]) for key in ("transfer", "average", "last")),
                spread([r["reference"][0] for r in runs]),
                spread([r["reference"][-1] for r in runs]),
                spread([_lost(r) for r in runs], sign=True),
                _worst(runs, "leak", ".0e"),
            ]
        )
    head = (
        "method",
        "learning rate",
        "Transfer",
        "Average",
        "Last",
        "reference before",
        "reference at the end",
        "change",
        "worst leak",
    )
    size = data["sizes"]
    more = (
        f"Percent. {size['steps']} steps of {size['batch']} images and {size['test']} test rows a task; "
        f"{size['reference']} rows of the reference are guarded, {size['reference_test']} others scored. Energy "
        f"{energy_words(data['energy'])}. {counted(len(data['search']), 'run')} of the search on validation rows of "
        f"seed {data['search_seed']}. {seeds_of(data['runs'])}"
    )
    return f"{grid(head, body)}\n\n{origin(ZERO_SHOT, data['machine'], more)}"


def _by_method(runs: Sequence[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    return found


def _lost(run: Json) -> float:
    """Change of the reference's accuracy over the stream."""
    return float(run["reference"][-1] - run["reference"][0])


def pegp_claims(stored: Stored) -> list[tuple[str, tuple[str, str], str | None]]:
    """Rows for the page of claims."""
    runs = finals(stored)

    def leaks(variant: str) -> str | None:
        found = [r["leak"] for r in runs if r["variant"] == variant and r["leak"] is not None]
        if not found:
            return None
        return f"{min(found):.0e} to {max(found):.0e} in {len(found)} runs"

    kept = [r["kept"] for r in runs if r["variant"] == "strict" and r["kept"] is not None]
    searched = sum(line["phase"] == "search" for line in stored.lines(QUALITY[0]))
    steps = (stored.get(OVERHEAD[0]) or {}).get("rows", [])
    strict = [r["step_overhead"] for r in steps if r["mode"] == "strict"]
    enough = [r["task_steps_for_5_percent"] for r in steps if r["mode"] == "strict"]
    lost = {
        name: spread([_lost(r) for r in found], sign=True)
        for name, found in _by_method((stored.get(ZERO_SHOT[0]) or {}).get("runs", [])).items()
    }
    drifts = (stored.get(DRIFT[0]) or {}).get("rows", [])
    moved = {r["guard"]: r["drift"] for r in drifts if r["adapter"] == "Prefix"}
    least = min((moved[g] for g in moved if g.startswith("strict")), default=None)
    return [
        (
            "Strict PEGP keeps its promise for LoRA, adapters, prefixes and prompts",
            QUALITY,
            f"{sum(kept)} of {len(kept)} runs; leak {leaks('strict')}" if kept else None,
        ),
        ("Projecting gradients alone leaks under AdamW", QUALITY, leaks("gradient")),
        (
            "The settings of the PEGP tables were chosen on validation data only",
            QUALITY,
            f"{searched} runs of the search" if searched else None,
        ),
        (
            "Strict PEGP adds at most 3 % to a step of any adapter",
            OVERHEAD,
            f"worst {100 * max(strict):.1f} %" if strict else None,
        ),
        (
            "Strict PEGP consolidates in at most 5 % of the training time of a task that is long enough",
            OVERHEAD,
            f"from {min(enough)} to {max(enough)} steps on" if enough else None,
        ),
        (
            "The paper's condition for prefixes does not keep old outputs; the strict one can",
            DRIFT,
            f"{moved['paper, energy 0.9']:.2f} against {moved['strict, energy 0.9']:.2f} at energy 0.9, "
            f"{least:.2f} at best; unguarded {moved['unguarded']:.2f}"
            if moved
            else None,
        ),
        (
            "The zero-shot guard keeps the accuracy on classes that a dual encoder never trains on",
            ZERO_SHOT,
            f"LoRA: {lost['lora-zero-shot']} points; {lost['lora-pegp']} without the reference; "
            f"{lost['lora']} unguarded"
            if {"lora", "lora-pegp", "lora-zero-shot"} <= set(lost)
            else None,
        ),
    ]


PEGP_TABLES: dict[str, Callable[[Stored], str]] = {
    "pegp-quality": quality,
    **{f"pegp-{name}": functools.partial(one_stream, name=name) for name in STREAMS},
    "pegp-overhead": overhead,
    "pegp-drift": drift,
    "zero-shot": zero_shot,
}
