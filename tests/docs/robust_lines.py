"""What the benchmarks of robustness and of LARGO's cost store."""

from __future__ import annotations

import json
from typing import Any

READINGS = ("largo-f", "largo-f-minor", "largo-p", "largo-p-activation", "largo-d")


def robust_lines(machine: dict[str, Any]) -> list[dict[str, Any]]:
    """LoRA at two learning rates, LARGO-P above its frontier, the other readings below, a search, and a failed run.

    LoRA's points, as (ID, OOD), are (0.6, 0.6) at the start, (0.7, 0.5), and (0.8, 0.4) at the larger rate: the hull
    falls by one point a point.
    """
    sizes = {"train": 80, "validation": 40, "test": 80, "epochs": 2, "batch": 16, "length": 32}
    about: dict[str, Any] = {"phase": "about", "sizes": dict.fromkeys(("sentiment", "topics", "emoji"), sizes)}
    about |= {"search_seed": 100, "machine": machine, "development": ["sentiment", "topics"]}
    lines = [about]

    def add(phase: str, stream: str, method: str, seed: int, rate: float, **measured: Any) -> None:
        place = {
            "stream": stream,
            "method": method,
            "learning_rate": rate,
            "energy": 0.3 if "largo" in method else None,
        }
        key = json.dumps([phase, seed, place])
        lines.append({**place, "phase": phase, "seed": seed, "key": key, "seconds": 1.0, **measured})

    def point(inside: float, outside: float, alpha: float = 1.0) -> dict[str, Any]:
        ood = {"near": outside + 0.05, "far": outside - 0.05}
        return {"alpha": alpha, "id_validation": 0.5, "id_test": inside, "ood": ood, "deviation": 2.0}

    for stream in ("sentiment", "topics"):
        for method in ("lora", *READINGS):
            add("search", stream, method, 100, 1e-3, validation_aa=0.7)
            add("search", stream, method, 100, 3e-3, validation_aa=0.6)
        for seed in range(3):
            start = [point(0.6, 0.6, 0.0)] if stream == "sentiment" else []
            add("final", stream, "lora", seed, 1e-3, points=[*start, point(0.65, 0.45, 0.5), point(0.7, 0.5)])
            add("final", stream, "lora", seed, 3e-3, points=[point(0.8, 0.4)])
            for method in READINGS:
                height = 0.02 if method == "largo-p" else 0.05 if (method, seed) == ("largo-d", 0) else -0.01
                add("final", stream, method, seed, 1e-3, points=[point(0.75, 0.45 + height)])
    add("final", "topics", "milora", 0, 1e-3, error="NumericalError: the loss is nan")
    return lines


def largo_step(machine: dict[str, Any]) -> dict[str, Any]:
    """Every variant on one shape; the product form is too slow."""
    variants = {"delta": 0.05, "delta, radius": 0.08, "product": 0.01, "product, radius": 0.04}
    base = {"shape": "MiniLM-L6", "batch_tokens": 1024, "lora_step_ms": 100.0, "lora_bytes": 5_000_000}
    steps = [
        {**base, "variant": name, "overhead": over, "step_ms": 100 * (1 + over), "bytes": 6_000_000}
        for name, over in variants.items()
    ]
    svd = [{"shape": [768, 768], "exact_seconds": 0.3, "randomised_seconds": 0.02, "cached_seconds": 0.004}]
    return {"machine": machine, "steps": steps, "svd": svd}
