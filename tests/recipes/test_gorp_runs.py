"""GORP and GaLore from a configuration to a run folder: both modes, merged and kept branches."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, TrainingArguments

import growthring as gr
from growthring.errors import ConfigError
from growthring.guards import FreshLoRA, GradientMemory
from growthring.optim import GORP, GaLore, GORPFactory
from growthring.recipes import build, load_config, run
from growthring.trainer import optimizing

OPTIMIZER = {"rank": 4, "refresh": 3}
TRAIN = {"learning_rate": 0.01, "batch_size": 8, "max_steps": 6}
UP = [f"encoder.layer.{i}.intermediate.dense" for i in range(2)]


def features(model, folder):
    tokens = AutoTokenizer.from_pretrained(str(folder))(["a red bird", "the one long train"], padding=True)
    model.eval()
    with torch.no_grad():
        return model(**{k: torch.tensor(tokens[k]) for k in ("input_ids", "attention_mask")}).last_hidden_state


@pytest.mark.parametrize("mode", ["sound", "paper"])
@pytest.mark.parametrize("branches", ["merged", "kept"])
def test_gorp_learns_keeps_and_saves_a_plain_model(tiny_stream, tiny_encoder, tmp_path, mode, branches):
    file = tiny_stream("gorp", optimizer=OPTIMIZER, train=TRAIN, guard={"mode": mode}, adapter={"branches": branches})
    trainer = build(load_config(file), output_dir=tmp_path / "out")
    guards = trainer.guards
    assert [type(guard) for guard in guards] == [GradientMemory, FreshLoRA]
    assert guards[1].merge == (branches == "merged")
    result = trainer.fit()

    memory = [c for c in result.certificates if c.guard == "gradient-memory"]
    assert [c.leak is None for c in memory] == [True, False]
    if mode == "sound":
        assert memory[1].kept
        assert memory[1].leak <= 1e-5
    else:
        assert memory[1].leak > 1e-3, "the published rule leaks"
        assert memory[1].kept is False
    assert {s.kind for s in memory[1].sites} == {"linear", "lora_A" if mode == "sound" else "lora_B"}

    adapters = {n.split(".")[-2] for n, _ in trainer.model.named_parameters() if "lora_A" in n}
    assert len(adapters) == (1 if branches == "merged" else 2), "one branch a task, or one at a time"
    folder = tmp_path / "out" / "model"
    assert not (tmp_path / "out" / "adapter").exists()
    plain = AutoModel.from_pretrained(str(folder))
    ours, theirs = features(trainer.model.encoder, folder), features(plain, folder)
    assert torch.allclose(ours, theirs, atol=1e-5)
    start = AutoModel.from_pretrained(str(tiny_encoder)).state_dict()
    moved = {n for n, value in plain.state_dict().items() if not torch.equal(value, start[n])}
    attention = {f"encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")}
    assert moved == {f"{n}.weight" for n in (*UP, *attention)}, "exactly what the preset names"

    stored = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert stored["full_rank"] == UP
    assert {
        row["name"].split(".base_model.model.")[-1]: row["side"] for row in stored["optimizer"] if row["rank"]
    } == {f"{name}.weight": "right" for name in UP}


def test_merged_and_kept_branches_compute_the_same(tiny_stream, tmp_path):
    ends = {}
    for branches in ("merged", "kept"):
        file = tiny_stream("gorp", optimizer=OPTIMIZER, train=TRAIN, adapter={"branches": branches})
        trainer = build(load_config(file), output_dir=tmp_path / branches)
        trainer.fit()
        ends[branches] = features(trainer.model.encoder, tmp_path / branches / "model")
    assert torch.allclose(ends["merged"], ends["kept"], atol=1e-3)


def test_every_task_trains_once(tiny_stream):
    """FreshLoRA's ``merge`` is no weight of a second training, as PEGP's is."""
    trainer = build(load_config(tiny_stream("gorp", optimizer=OPTIMIZER, train=TRAIN)))
    result = trainer.fit()
    assert [task["steps"] for task in result.timings["tasks"]] == [6, 6]


@pytest.mark.parametrize("name", ["gorp-full", "galore"])
def test_all_linear_weights_in_a_subspace(tiny_stream, tmp_path, name):
    seen = {}

    class Watch(gr.trainer.continual.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            inner = optimizer.optimizer
            sizes = [v.numel() for s in inner.state.values() for k, v in s.items() if k == "exp_avg"]
            seen.update(kind=type(inner), state=sum(sizes), weights=sum(p.numel() for p in inner.state))

    trainer = build(load_config(tiny_stream(name, optimizer={"rank": 4}, train=TRAIN)), output_dir=tmp_path / "out")
    trainer.callbacks.append(Watch())
    result = trainer.fit()
    assert seen["kind"] is (GaLore if name == "galore" else GORP)
    assert seen["state"] < seen["weights"] / 4
    assert len(result.optimizer) == 12
    assert {(row["treatment"], row["rank"]) for row in result.optimizer} == {("projected", 4)}
    assert result.full_rank == []
    assert (tmp_path / "out" / "model").is_dir()
    assert (tmp_path / "out" / "memory").is_dir() == (name == "gorp-full")
    if name == "gorp-full":
        assert result.certificates[1].kept


def test_without_the_memory_the_same_run_leaks(tiny_stream):
    """Negative control: the certificate measures, it does not assume."""
    config = load_config(tiny_stream("gorp-full", optimizer=OPTIMIZER, train=TRAIN))
    trainer = build(config)
    guard = trainer.guards[0]
    guard.bind = lambda optimizer: None
    guard.project = "gradient"
    assert trainer.fit().certificates[1].leak > 1e-3


def test_full_rank_weights_have_their_own_rate(tiny_stream):
    moved = {}
    for rate in (1e-2, 1e-4):
        file = tiny_stream("gorp", optimizer={**OPTIMIZER, "full_rank_lr": rate}, train={**TRAIN, "max_steps": 1})
        trainer = build(load_config(file))
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "intermediate" in n}
        trainer.fit()
        moved[rate] = max(
            float((p - start[n]).detach().abs().max()) for n, p in trainer.model.named_parameters() if n in start
        )
    assert moved[1e-2] == pytest.approx(100 * moved[1e-4], rel=0.05)


def test_a_rank_above_every_matrix_is_refused_while_the_earlier_run_is_there(tiny_stream, tmp_path):
    run(load_config(tiny_stream("sequential-linear")), tmp_path / "out")
    for method in ("galore", "gorp"):
        with pytest.raises(ConfigError, match=r"rank=128.*above every matrix"):
            run(load_config(tiny_stream(method, optimizer={"rank": 128})), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.mark.parametrize("kind", [GORP, GaLore, GORPFactory])
def test_deepspeed_is_refused_with_what_to_use_instead(kind):
    args = TrainingArguments(output_dir="never-made", use_cpu=True)
    optimizing.check_optimizer((kind, {}), args)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ConfigError, match=rf"{kind.__name__} projects .* DeepSpeed ZeRO flattens .* DDP or FSDP2"):
        optimizing.check_optimizer((kind, {}), args)
    optimizing.check_optimizer((torch.optim.AdamW, {}), args)
    optimizing.check_optimizer(None, args)
