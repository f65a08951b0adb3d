"""What PEGP costs: per step and per task, as a ratio to the same training without it, in one run.

The model has the shape of all-MiniLM-L6 (random weights: their values change no cost). Guarded and unguarded
steps alternate on the same model, so that a drifting machine hits both alike. Ranks of the bases are those that the
energies below need on token ids with the skew of text; they are stored beside the ratios.

    python benchmarks/step_overhead.py    # writes benchmarks/results/step_overhead.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

import growthring as gr
from _common import machine, store
from growthring.trainer.models import freeze_all_but

VOCABULARY = 30522


def encoder() -> BertModel:
    """An encoder of the demo's shape."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertModel(config, add_pooling_layer=False)


def model(kind: str) -> nn.Module:
    """The encoder with the adapter ``kind``."""
    plain = encoder()
    if kind == "lora":
        return get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    freeze_all_but(plain, "linear")
    return plain


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random token ids with the skew of real text: few words make up most of it."""
    ids = (torch.rand(rows, tokens).pow(6) * (VOCABULARY - 1)).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, torch.Tensor], guard: gr.PEGP | None
) -> float:
    """One training step; returns its seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    net(**data).last_hidden_state.mean(1).square().mean().backward()
    if guard is not None:
        guard.before_step()
    optimizer.step()
    if guard is not None:
        guard.after_step()
    return time.perf_counter() - start


def compare(net: nn.Module, guard: gr.PEGP, data: list[dict[str, torch.Tensor]], pairs: int) -> dict[str, Any]:
    """What ``guard`` adds to a step of ``net`` and to a task; guarded and unguarded steps alternate."""
    guard.attach(net)
    guard.begin_task()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    for item in data[:3]:
        step(net, optimizer, item, guard)
    start = time.perf_counter()
    certificate = guard.consolidate(net, data)
    consolidation = time.perf_counter() - start
    guard.begin_task()
    plain, guarded = [], []
    for number in range(pairs):
        plain.append(step(net, optimizer, data[number % len(data)], None))
        guarded.append(step(net, optimizer, data[number % len(data)], guard))
    return {
        "protected_share": 1 - certificate.free / certificate.dims,
        "plain_step_ms": statistics.median(plain) * 1e3,
        "guarded_step_ms": statistics.median(guarded) * 1e3,
        "step_overhead": statistics.median(g / p for p, g in zip(plain, guarded, strict=True)) - 1,
        "consolidation_seconds": consolidation,
        "consolidation_in_steps": consolidation / statistics.median(plain),
        "task_steps_for_5_percent": round(20 * consolidation / statistics.median(plain)),
    }


def measure(kind: str, energy: float, tokens: int, pairs: int) -> dict[str, Any]:
    """Overhead of one setting."""
    torch.manual_seed(0)
    net = model(kind)
    data = [batch(16, tokens) for _ in range(16)]
    found = compare(net, gr.PEGP(energy=energy, probes=0), data, pairs)
    return {"adapter": kind, "energy": energy, "batch_tokens": 16 * tokens, **found}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args()
    rows = [
        measure(kind, energy, tokens, options.pairs)
        for kind, energies in (("lora", (0.95, 0.8)), ("linear", (0.9, 0.7)))
        for energy in energies
        for tokens in (32, 64)
    ]
    print(store("step_overhead.json", {"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
