"""Choose the demo's learning rates and energies on validation data, every method with a grid of its own.

Runs are those of the demo, with another learning rate or energy; the score is the final average accuracy over the
*validation* splits. Test splits are never scored here, and the seed differs from those on which results are reported.
Finished settings are kept, so the sweep can be stopped and started again.

    python benchmarks/demo_sweep.py            # writes benchmarks/results/demo_sweep.json
    python benchmarks/demo_sweep.py --choose   # writes the best settings where the demo reads them
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from _common import load, machine, store
from growthring import recipes
from growthring._io import write_json
from growthring.recipes.demo import demo_settings
from growthring.streams import TaskStream

NAME = "demo_sweep.json"
SIZES = {
    "train_rows": 480,
    "validation_rows": 150,
    "test_rows": 200,
    "batch_size": 16,
    "max_length": 48,
    "epochs": 1,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup": 0.1,
}
SHORTER = {"train_rows": 400, "test_rows": 120}
"""What the demo has less of, so that its six runs end within six minutes on two cores."""
LORA_RATES = (3e-4, 1e-3, 2e-3, 4e-3)
LINEAR_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
LORA_ENERGIES: tuple[dict[str, float], ...] = (
    {"lora_A": 0.95, "lora_B": 0.9},
    {"lora_A": 0.9, "lora_B": 0.7},
    {"lora_A": 0.8, "lora_B": 0.5},
)
LINEAR_ENERGIES = (0.9, 0.8, 0.7, 0.5)


def grid() -> list[dict[str, Any]]:
    """Every setting of every method."""
    settings: list[dict[str, Any]] = []
    settings += [{"method": "sequential-lora", "learning_rate": lr} for lr in LORA_RATES]
    settings += [{"method": "sequential-linear", "learning_rate": lr} for lr in LINEAR_RATES]
    settings += [{"method": "joint", "learning_rate": lr} for lr in LORA_RATES]
    for lr, energy in itertools.product(LORA_RATES[1:], LORA_ENERGIES):
        settings.append({"method": "pegp", "learning_rate": lr, "energy": energy})
    for lr, energy in itertools.product(LINEAR_RATES[2:], LINEAR_ENERGIES):
        settings.append({"method": "pegp-linear", "learning_rate": lr, "energy": energy})
    return settings


def score(setting: dict[str, Any], seed: int, threads: int, stream: TaskStream) -> dict[str, Any]:
    """Train one setting and score it on validation data."""
    own = {k: v for k, v in setting.items() if k != "method"}
    settings = {**demo_settings(), **SIZES, setting["method"]: own}
    config = dict(recipes.demo_runs(seed, settings, threads=threads))[setting["method"]]
    trainer = recipes.build(config, stream=stream, evaluate_test=False, evaluate_validation=True)
    result = trainer.fit()
    assert result.validation is not None
    rows = [[v or 0.0 for v in row] for row in result.validation.to_list()]
    learned = sum(rows[i + 1][i] for i in range(len(rows) - 1)) / len(rows[0])
    return {
        **setting,
        "validation_aa": sum(rows[-1]) / len(rows[-1]),
        "validation_learning_accuracy": None if setting["method"] == "joint" else learned,
        "seconds": result.timings["total_seconds"],
    }


def choose(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The best setting of each method; for sequential LoRA also the one that learns the task at hand best."""
    best: dict[str, Any] = {}
    for run in runs:
        if run["method"] not in best or run["validation_aa"] > best[run["method"]]["validation_aa"]:
            best[run["method"]] = run
    sequential = [r for r in runs if r["method"] == "sequential-lora"]
    if sequential:
        best["sequential-lora-usual"] = max(sequential, key=lambda r: r["validation_learning_accuracy"])
    kept = ("learning_rate", "energy")
    return {name: {k: run[k] for k in kept if k in run} for name, run in best.items()}


def main() -> None:
    """Run what is missing, or write the choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--choose", action="store_true")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = load(NAME).get("runs", [])
    if options.choose:
        write_json(Path(recipes.__file__).parent / "demo_settings.json", {**SIZES, **SHORTER, **choose(runs)})
        return
    done = [{k: r[k] for k in ("method", "learning_rate", "energy") if k in r} for r in runs]
    stream = recipes.build_stream(dict(recipes.demo_runs(options.seed, {**demo_settings(), **SIZES}))["joint"])
    for setting in grid():
        if setting in done:
            continue
        runs.append(score(setting, options.seed, options.threads, stream))
        print(runs[-1], flush=True)
        store(NAME, {"sizes": SIZES, "seed": options.seed, "machine": machine(), "runs": runs, "chosen": choose(runs)})


if __name__ == "__main__":
    main()
