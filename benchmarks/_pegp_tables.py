"""Tables of ``pegp_quality.py``, ``pegp_overhead.py`` and ``pegp_drift.py``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

from _words import NONE, Json, Stored, energy_words, grid, not_yet, origin, seeds_of, spread

QUALITY = ("pegp_quality.jsonl", "python benchmarks/pegp_quality.py")
OVERHEAD = ("pegp_overhead.json", "python benchmarks/pegp_overhead.py")
DRIFT = ("pegp_drift.json", "python benchmarks/pegp_drift.py")
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


def finals(stored: Stored) -> list[Json]:
    """Finished runs on test data; of a run that was made twice the last."""
    found = {line["key"]: line for line in stored.lines(QUALITY[0]) if line["phase"] == "final"}
    return [line for line in found.values() if "error" not in line]


def _about(stored: Stored) -> Json:
    return next(line for line in stored.lines(QUALITY[0]) if line["phase"] == "about")


def _of(runs: Sequence[Json], row: Row, stream: str) -> list[Json]:
    return [r for r in runs if (r["adapter"], r["variant"]) == row and r["stream"] == stream]


def _worst(runs: Sequence[Json], key: str, form: str) -> str:
    values = [r[key] for r in runs if r[key] is not None]
    return format(max(values), form) if values else NONE


def _final_of(runs: Sequence[Json], key: str, sign: bool = False, view: str = "metrics") -> str:
    return spread([r[view].get(key) for r in runs], sign=sign)


def quality(stored: Stored) -> str:
    """Final average accuracy of every method on every stream, and the worst leak."""
    runs = finals(stored)
    if not runs:
        return not_yet(QUALITY)
    streams = [s for s in STREAMS if any(r["stream"] == s for r in runs)]
    body = []
    for row in rows_of(runs):
        mine = [r for r in runs if (r["adapter"], r["variant"]) == row]
        cells = [_final_of(_of(runs, row, stream), "aa") for stream in streams]
        body.append([*title(row), *cells, _worst(mine, "leak", ".0e")])
    head = ("what trains", "guard", *(STREAMS[s] for s in streams), "worst leak")
    more = f"AA in percent. {_seeds(runs)}"
    return f"{grid(head, body, 2)}\n\n{origin(QUALITY, _about(stored)['machine'], more)}"


def _seeds(runs: Sequence[Json]) -> str:
    counts = {len(_of(runs, row, s)) for row in rows_of(runs) for s in STREAMS} - {0}
    partial = "Cells without ± have one seed so far. " if len(counts) > 1 and 1 in counts else ""
    return seeds_of(runs) + partial


def one_stream(stored: Stored, name: str) -> str:
    """Everything measured on one stream."""
    runs = [r for r in finals(stored) if r["stream"] == name]
    if not runs:
        return not_yet(QUALITY)
    body = []
    for row in rows_of(runs):
        mine = _of(runs, row, name)
        energy = sorted({r["energy"] for r in mine if r["energy"] is not None})
        body.append(
            [
                *title(row),
                "/".join(f"{rate:g}" for rate in sorted({r["learning_rate"] for r in mine})),
                "/".join(map(energy_words, energy)) or NONE,
                _final_of(mine, "aa"),
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
    tried = sum(line["phase"] == "search" and line["stream"] == name for line in stored.lines(QUALITY[0]))
    more = (
        f"{size['train']} training rows and {size['test']} test rows a task, batch {size['batch']}. {tried} runs of "
        f"the search on validation rows of seed {_about(stored)['search_seed']}. {_seeds(runs)}"
    )
    return f"{grid(head, body, 2)}\n\n{origin(QUALITY, _about(stored)['machine'], more)}"


def overhead(stored: Stored) -> str:
    """What the strict guard costs a step and a task, for each kind of adapter."""
    data = stored.get(OVERHEAD[0])
    if data is None:
        return not_yet(OVERHEAD)
    body = [
        [
            ADAPTERS[r["adapter"]],
            r["mode"],
            str(r["batch_tokens"]),
            f"{100 * r['protected_share']:.0f}",
            f"{r['plain_step_ms']:.1f}",
            f"{r['guarded_step_ms']:.1f}",
            f"{100 * r['step_overhead']:+.1f}".replace("-", "−"),
            f"{r['consolidation_seconds']:.2f}",
            str(r["task_steps_for_5_percent"]),
        ]
        for r in data["rows"]
    ]
    head = (
        "adapter",
        "mode",
        "tokens a batch",
        "protected, %",
        "plain step, ms",
        "guarded step, ms",
        "overhead, %",
        "consolidation, s",
        "steps a task for 5 %",
    )
    more = f"Energy {data['energy']:g}; features of {data['samples']} examples a task. "
    return f"{grid(head, body, 2)}\n\n{origin(OVERHEAD, data['machine'], more)}"


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
            "The paper's condition for prefixes does not keep old outputs; the strict one can",
            DRIFT,
            f"{moved['paper, energy 0.9']:.2f} against {moved['strict, energy 0.9']:.2f} at energy 0.9, "
            f"{least:.2f} at best; unguarded {moved['unguarded']:.2f}"
            if moved
            else None,
        ),
    ]


PEGP_TABLES: dict[str, Callable[[Stored], str]] = {
    "pegp-quality": quality,
    **{f"pegp-{name}": functools.partial(one_stream, name=name) for name in STREAMS},
    "pegp-overhead": overhead,
    "pegp-drift": drift,
}
