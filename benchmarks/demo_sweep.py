"""Choose the demo's learning rates and energies on validation data, every method with a grid of its own.

Scores are the final average accuracy over the *validation* splits; test splits are never opened here. The seed differs
from those on which results are reported. Finished settings are kept, so the sweep can be stopped and started again.

    python benchmarks/demo_sweep.py            # writes benchmarks/results/demo_sweep.json
    python benchmarks/demo_sweep.py --choose   # writes the best settings where the demo reads them
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainingArguments

import growthring as gr
from _common import load, machine, store
from growthring.streams import demo_encoder_path, demo_stream

NAME = "demo_sweep.json"
SIZES = {"train_rows": 480, "validation_rows": 150, "test_rows": 200, "batch_size": 16, "epochs": 1, "max_length": 48}
LORA_RATES = (3e-4, 1e-3, 2e-3, 4e-3)
LINEAR_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
LORA_ENERGIES: tuple[dict[str, float], ...] = (
    {"lora_A": 0.99, "lora_B": 0.97},
    {"lora_A": 0.95, "lora_B": 0.9},
    {"lora_A": 0.9, "lora_B": 0.7},
    {"lora_A": 0.8, "lora_B": 0.5},
)
LINEAR_ENERGIES = (0.95, 0.9, 0.8, 0.7)


def grid() -> list[dict[str, Any]]:
    """Every setting of every method."""
    settings: list[dict[str, Any]] = []
    settings += [{"method": "sequential-lora", "learning_rate": lr} for lr in LORA_RATES]
    settings += [{"method": "sequential-linear", "learning_rate": lr} for lr in LINEAR_RATES]
    settings += [{"method": "joint", "learning_rate": lr} for lr in LORA_RATES]
    for lr, energy in itertools.product(LORA_RATES[1:], LORA_ENERGIES):
        settings.append({"method": "pegp", "learning_rate": lr, "energy": energy})
    for lr, energy in itertools.product(LINEAR_RATES[1:], LINEAR_ENERGIES):
        settings.append({"method": "pegp-linear", "learning_rate": lr, "energy": energy})
    return settings


def score(setting: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one setting and score it on validation data."""
    stream = demo_stream(seed=seed, train=SIZES["train_rows"], validation=SIZES["validation_rows"], test=20)
    linear = setting["method"].endswith("linear")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            learning_rate=setting["learning_rate"],
            per_device_train_batch_size=SIZES["batch_size"],
            num_train_epochs=SIZES["epochs"],
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            max_grad_norm=1.0,
            report_to=[],
        )
        result = gr.ContinualTrainer(
            demo_encoder_path(),
            stream,
            adapter="linear" if linear else LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            guards=[gr.PEGP(energy=setting["energy"])] if "energy" in setting else [],
            args=args,
            joint=setting["method"] == "joint",
            max_length=SIZES["max_length"],
            seed=seed,
            method=setting["method"],
            evaluate_test=False,
            evaluate_validation=True,
        ).fit()
    assert result.validation is not None
    last = result.validation.to_list()[-1]
    rows = result.validation.to_list()[1:]
    learned = None if setting["method"] == "joint" else sum(row[i] for i, row in enumerate(rows)) / len(rows)  # type: ignore[misc]
    return {
        **setting,
        "validation_aa": sum(v for v in last if v is not None) / len(last),
        "validation_learning_accuracy": learned,
        "seconds": result.timings["total_seconds"],
    }


def choose(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The best setting of each method; for sequential LoRA also the one best for the task at hand."""
    best: dict[str, Any] = {}
    for run in runs:
        if run["method"] not in best or run["validation_aa"] > best[run["method"]]["validation_aa"]:
            best[run["method"]] = run
    sequential = [r for r in runs if r["method"] == "sequential-lora"]
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
    torch.set_num_threads(options.threads)
    stored = load(NAME)
    runs: list[dict[str, Any]] = stored.get("runs", [])
    if options.choose:
        from pathlib import Path

        import growthring.recipes as recipes
        from growthring._io import write_json

        target = Path(recipes.__file__).parent / "demo_settings.json"
        write_json(target, {**SIZES, **choose(runs)})
        return
    done = [{k: r[k] for k in ("method", "learning_rate", "energy") if k in r} for r in runs]
    for setting in grid():
        if setting in done:
            continue
        runs.append(score(setting, options.seed))
        print(runs[-1], flush=True)
        store(NAME, {"sizes": SIZES, "seed": options.seed, "machine": machine(), "runs": runs, "chosen": choose(runs)})


if __name__ == "__main__":
    main()
