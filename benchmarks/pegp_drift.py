"""How far old outputs drift: every paradigm of PEGP, both modes, on the demo's real encoder and two of its tasks.

The adapter learns the first task freely. Then it learns the second for 200 AdamW steps with weight decay 0.1, once
without a guard and once under each guard, from the same start. What counts are the sentence vectors of 64 test rows
of the first task: ``max |new - old| / max |old|``, and their mean cosine to the old ones.

    python benchmarks/pegp_drift.py    # writes benchmarks/results/pegp_drift.json
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import growthring as gr
from _common import load, machine, store
from growthring.adapters import BottleneckConfig
from growthring.streams import demo_encoder_path, demo_stream

ADAPTERS: dict[str, tuple[PeftConfig, float]] = {
    "LoRA": (LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"), 1e-3),
    "Adapter": (BottleneckConfig(r=16, placement="both"), 1e-3),
    "IA3": (
        IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        1e-2,
    ),
    "Prefix": (PrefixTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=10), 1e-2),
    "Prompt": (PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=10), 3e-2),
}
GUARDS: dict[str, dict[str, Any] | None] = {
    "unguarded": None,
    "paper, energy 0.9": {"energy": 0.9, "mode": "paper"},
    "strict, energy 0.9": {"energy": 0.9},
    "strict, energy 1": {"energy": 1.0},
}


class Similarity(nn.Module):
    """An encoder that answers with unit sentence vectors, real tokens averaged."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(batch, d)``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = hidden[:, -input_ids.shape[1] :]  # prompts stand in front
        mask = attention_mask.unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def train(
    model: nn.Module, batches: list[dict[str, Tensor]], goals: Tensor, rate: float, guard: gr.PEGP | None
) -> float:
    """One pass of AdamW over the batches; returns the last ten losses' mean."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.1)
    losses = []
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        optimizer.zero_grad()
        loss = F.cross_entropy(model(**inputs) @ goals.T * 20, batch["labels"])
        loss.backward()
        if guard is not None:
            guard.before_step()
        optimizer.step()
        if guard is not None:
            guard.after_step()
        losses.append(float(loss))
    return sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    options = parser.parse_args()
    folder = demo_encoder_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = demo_stream(0)

    def encode(texts: list[str]) -> dict[str, Tensor]:
        made = tokenizer(texts, padding=True, truncation=True, max_length=options.tokens, return_tensors="pt")
        return {key: made[key] for key in ("input_ids", "attention_mask")}

    def batches(index: int, count: int) -> list[dict[str, Tensor]]:
        task, generator = stream[index], torch.Generator().manual_seed(index)
        rows = [torch.randint(len(task.train), (8,), generator=generator).tolist() for _ in range(count)]
        labels = [task.labels.index(label) for label in task.train.labels]
        return [
            encode([task.train.texts[i] for i in chosen]) | {"labels": torch.tensor([labels[i] for i in chosen])}
            for chosen in rows
        ]

    plain = Similarity(AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    with torch.no_grad():
        goals = [plain(**encode([task.label_texts[label] for label in task.labels])) for task in stream][:2]
    first, second = batches(0, 60), batches(1, options.steps)
    probe = encode(list(stream[0].test.texts[:64]))
    rows = [r for r in load("pegp_drift.json").get("rows", []) if r["adapter"] not in options.adapters]
    for name, (config, rate) in ((name, ADAPTERS[name]) for name in options.adapters):
        torch.manual_seed(0)
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        start = Similarity(get_peft_model(encoder, copy.deepcopy(config)))
        train(start, first, goals[0], rate, None)
        for title, settings in GUARDS.items():
            if name not in ("Prefix", "Prompt") and title.startswith("paper"):
                continue  # the same condition as strict, biases aside
            model, guard, certificate, clock = copy.deepcopy(start), None, None, time.perf_counter()
            seen = [{k: v for k, v in b.items() if k != "labels"} for b in first[:32]]
            if settings is not None:
                guard = gr.PEGP(**settings, probes=0)
                certificate = guard.consolidate(model, seen)
                guard.begin_task()
            with torch.no_grad():
                before = model(**probe)
            loss = train(model, second, goals[1], rate, guard)
            with torch.no_grad():
                after = model(**probe)
            ended = guard.end_task("second", seen[:1]) if guard is not None else None
            row = {
                "adapter": name,
                "guard": title,
                "drift": float((after - before).abs().max() / before.abs().max()),
                "cosine": float((after * before).sum(-1).mean()),
                "loss": loss,
                "leak": ended.leak if ended else None,
                "kept": ended.kept if ended else None,
                "protected_share": 1 - certificate.free / certificate.dims if certificate else None,
                "seconds": time.perf_counter() - clock,
            }
            print(row, flush=True)
            rows.append(row)
    rows.sort(key=lambda r: list(ADAPTERS).index(r["adapter"]))
    print(store("pegp_drift.json", {"machine": machine(), "steps": options.steps, "rows": rows}))


if __name__ == "__main__":
    main()
