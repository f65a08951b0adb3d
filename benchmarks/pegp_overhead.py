"""What PEGP costs for each kind of adapter: per step and per task, as a ratio to the same training without it.

As ``step_overhead.py``: a model of the shape of all-MiniLM-L6 with random weights, guarded and unguarded steps in turn
on the same model. Prefixes and prompts are measured in strict and in paper mode, whose conditions differ there. Those
of LoRA do not differ; those of adapters differ in the biases alone, which paper mode holds. Both are measured strict.

    python benchmarks/pegp_overhead.py    # writes benchmarks/results/pegp_overhead.json
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import growthring as gr
from _common import machine, store
from growthring.adapters import BottleneckConfig
from step_overhead import batch, compare, encoder

ENERGY, SAMPLES = 0.95, 256


def adapter(kind: str) -> PeftConfig:
    """The adapter of one row."""
    if kind == "lora":
        return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    if kind == "adapter":
        return BottleneckConfig(r=16, placement="both")
    tokens = PrefixTuningConfig if kind == "prefix" else PromptTuningConfig
    return tokens(task_type="FEATURE_EXTRACTION", num_virtual_tokens=8)


def measure(kind: str, mode: str, tokens: int, pairs: int) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    net = get_peft_model(encoder(), adapter(kind))
    net.train()
    data = [batch(16, tokens) for _ in range(SAMPLES // 16)]
    found = compare(net, gr.PEGP(energy=ENERGY, mode=mode, samples=SAMPLES, probes=0), data, pairs)
    return {"adapter": kind, "mode": mode, "batch_tokens": 16 * tokens, **found}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args()
    modes = (("lora", "strict"), ("adapter", "strict"), ("prefix", "strict"), ("prefix", "paper"))
    modes += (("prompt", "strict"), ("prompt", "paper"))
    rows = []
    for kind, mode in modes:
        for tokens in (32, 64):
            rows.append(measure(kind, mode, tokens, options.pairs))
            print(rows[-1], flush=True)
    print(store("pegp_overhead.json", {"machine": machine(), "energy": ENERGY, "samples": SAMPLES, "rows": rows}))


if __name__ == "__main__":
    main()
