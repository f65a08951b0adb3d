"""What LARGO costs beside LoRA: per step, in memory, and once for the singular vectors; ratios in one run.

Models have the shapes of all-MiniLM-L6 and of a ViT-B block stack, with random weights (values change no cost). Each
variant and LoRA of the same rank on the same layers step in turns, each on a copy of the same model, so that a
drifting machine hits both alike; a ratio is the median over pairs of steps. The step is the whole training step:
forward, backward, guard, optimizer.

    python benchmarks/largo_step.py    # writes benchmarks/results/largo_step.json
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

import growthring as gr
from _common import machine, store
from growthring.adapters import LargoConfig

RANK = 8
SHAPES: Mapping[str, dict[str, Any]] = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "ViT-B": {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""The second has four of ViT-B's twelve blocks: a ratio needs no more."""
LINEAR = ["query", "key", "value", "dense"]


def variants() -> dict[str, tuple[dict[str, Any], gr.Guard | None]]:
    """Settings of the adapter, and what regulates it."""
    return {
        "delta": ({"form": "delta"}, None),
        "delta, radius": ({"form": "delta"}, gr.Radius()),
        "delta, directional": ({"form": "delta"}, gr.Directional()),
        "residual, radius": ({"form": "residual"}, gr.Radius()),
        "product": ({"form": "product"}, None),
        "product, radius": ({"form": "product"}, gr.Radius()),
    }


def step(net: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, guard: gr.Guard | None) -> float:
    """One training step; returns its seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    net(input_ids=ids).last_hidden_state.square().mean().backward()
    if guard is not None:
        guard.before_step()
    optimizer.step()
    if guard is not None:
        guard.after_step()
    return time.perf_counter() - start


def ready(base: nn.Module, config: PeftConfig, guard: gr.Guard | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the base with its adapter, bound to its guard."""
    net = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    if guard is not None:
        guard.attach(net)
        guard.begin_task()
        guard.bind(optimizer)
    return net, optimizer


def held(net: nn.Module, base: nn.Module, optimizer: torch.optim.Optimizer, guard: gr.Guard | None) -> int:
    """Bytes that training holds beyond the base model: parameters, their gradients, buffers, states."""

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, Mapping):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
    own = size([*base.parameters(), *base.buffers()])
    return size(tensors) - own + size(optimizer.state) + (size(guard.state_dict()) if guard is not None else 0)


def compare(shape: str, rows: int, tokens: int, pairs: int) -> list[dict[str, Any]]:
    """Every variant beside LoRA on one shape."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(vocab_size=1000, **SHAPES[shape]), add_pooling_layer=False)
    ids = torch.randint(0, 1000, (rows, tokens))
    lora = ready(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR), None)
    found = []
    for name, (settings, guard) in variants().items():
        net, optimizer = ready(base, LargoConfig(r=RANK, target_modules=LINEAR, **settings), guard)
        for _ in range(3):
            step(*lora, ids, None)
            step(net, optimizer, ids, guard)
        plain, ours = [], []
        for _ in range(pairs):
            plain.append(step(*lora, ids, None))
            ours.append(step(net, optimizer, ids, guard))
        found.append(
            {
                "shape": shape,
                "batch_tokens": rows * tokens,
                "variant": name,
                "lora_step_ms": statistics.median(plain) * 1e3,
                "step_ms": statistics.median(ours) * 1e3,
                "overhead": statistics.median(o / p for o, p in zip(ours, plain, strict=True)) - 1,
                "bytes": held(net, base, optimizer, guard),
                "lora_bytes": held(lora[0], base, lora[1], None),
            }
        )
        print(found[-1], flush=True)
    return found


def decompositions() -> list[dict[str, Any]]:
    """Seconds for the factors of one layer: exact, randomised, and read from the cache."""
    found = []
    for shape in ((768, 768), (3072, 768), (4096, 1024)):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(shape[1], shape[0]))
        row: dict[str, Any] = {"shape": list(shape)}
        with tempfile.TemporaryDirectory() as folder:
            for name, cache, settings in (
                ("exact", "off", {}),
                ("randomised", "off", {"svd_iterations": 4}),
                ("filling", folder, {}),
                ("cached", folder, {}),
            ):
                os.environ["GROWTHRING_CACHE"] = cache
                config = LargoConfig(r=RANK, target_modules=["0"], **settings)  # type: ignore[arg-type]
                start = time.perf_counter()
                get_peft_model(copy.deepcopy(layer), config)
                row[f"{name}_seconds"] = time.perf_counter() - start
        found.append(row)
        print(row, flush=True)
    return found


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GROWTHRING_CACHE"] = folder
        steps = [row for shape in SHAPES for row in compare(shape, 16, 64, asked.pairs)]
    path: Path = store("largo_step.json", {"machine": machine(), "steps": steps, "svd": decompositions()})
    print(path)


if __name__ == "__main__":
    main()
