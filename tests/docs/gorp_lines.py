"""What the benchmarks of GORP store: lines of its quality, and the step."""

from __future__ import annotations

import json
from typing import Any


def gorp_lines(machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of one method in an older and a newer version, of one with two seeds, and one that failed."""
    sizes = {"train": 600, "validation": 150, "test": 150, "epochs": 1, "batch": 32, "length": 24}
    about = {"phase": "about", "sizes": dict.fromkeys(("clinc10", "standard4", "standard4-reversed"), sizes)}
    lines: list[dict[str, Any]] = [{**about, "search_tasks": {"clinc10": 5}, "search_seed": 100, "machine": machine}]

    def add(phase: str, seed: int, stream: str, method: str, fixed: str = "new", **measured: Any) -> None:
        energy = 0.8 if method.startswith("gorp") else None
        place = {"stream": stream, "method": method, "fixed": fixed, "learning_rate": 0.0005, "energy": energy}
        key = json.dumps([phase, seed, place])
        lines.append({**place, "phase": phase, "seed": seed, "key": key, "seconds": 9.0, **measured})

    costs = {"state_bytes": 2_500_000, "guard_bytes": 0, "cpu_seconds": 7.0, "kept": None, "leak": None}
    for method, fixed, aa, seeds in (
        ("gorp", "old", 0.1, 3),
        ("gorp", "new", 0.9, 3),
        ("sequential-lora", "new", 0.5, 2),
    ):
        leak = {"leak": 2e-7, "kept": True, "guard_bytes": 12_000_000} if method == "gorp" else {}
        for stream in ("clinc10", "standard4"):
            add("search", 100, stream, method, fixed, validation_aa=aa)
            for seed in range(seeds):
                seen = {"aa": aa + 0.02 * seed, "bwt": -0.1, "learning_accuracy": 0.9, "forgetting": 0.1}
                views = {"classes seen": seen, "task": {**seen, "aa": aa + 0.05, "bwt": -0.02}}
                add("final", seed, stream, method, fixed, views=views, **{**costs, **leak})
    add("final", 0, "standard4", "osf", error="NumericalError: the loss is nan")
    return lines


def gorp_step(machine: dict[str, Any]) -> dict[str, Any]:
    """Every case of ``benchmarks/gorp_step.py``; on the encoder a limit is broken."""
    seconds = {"gorp": 2e-3, "adamw": 4e-3, "galore-torch": 0.2, "products": 1.6e-3, "floor": 5e-4}
    ratio = {"adamw": 0.5, "galore-torch": 0.01, "products": 1.25, "floor": 4.0}
    case = {
        "matrices": 4,
        "rank": 8,
        "refresh": 10,
        "seconds": {**seconds, "gorp with memory": 2.2e-3},
        "ratio": ratio,
        "gigabytes_a_second_of_the_floor": 20.0,
    }
    names = ["1024x1024", "4096x1024"]
    cases = {f"{name}{more}": case for more in ("", ", T=200", ", r=128") for name in names}
    cases["encoder"] = {**case, "ratio": {**ratio, "adamw": 1.5}}
    runs = {"nothing": {"state_bytes": 0, "peak_bytes": 10_000_000}}
    runs["adamw"] = {"state_bytes": 2_000_000, "peak_bytes": 100_000_000}
    memory = {"layers": 6, "width": 2048, "weights_bytes": 1, "steps": 12, "runs": runs}
    return {"cases": cases, "memory": memory, "machine": machine}
