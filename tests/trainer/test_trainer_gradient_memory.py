"""GradientMemory and FreshLoRA in ContinualTrainer: what is kept, and that run folders load without growthring."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from test_trainer_folder import TEXTS
from trainer_helpers import stream_of
from transformers import AutoModel, AutoTokenizer

import growthring as gr
from growthring.errors import GuardError
from growthring.optim import GORP

pytestmark = pytest.mark.filterwarnings("ignore:GORP.*have a gradient that is zero:UserWarning")

GORP_DOOR = (GORP, {"lr": 3e-3, "rank": 4, "refresh": 3})


def memory_of(trainer):
    return next(g for g in trainer.guards if isinstance(g, gr.GradientMemory))


@pytest.mark.parametrize("optimizer", [None, GORP_DOOR], ids=["adamw", "gorp"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("last", [True, False], ids=["branches last", "branches first"])
def test_branches_and_full_weights_in_a_stream(build, tiny_encoder, tmp_path, merge, last, optimizer):
    guards = [gr.GradientMemory(0.9), gr.FreshLoRA(merge)]
    trainer = build(
        stream_of(3),
        adapter=LoraConfig(r=4, target_modules=["query", "value"]),
        full_rank="mlp_up",
        guards=guards if last else guards[::-1],
        optimizer=optimizer,
        output_dir=tmp_path / "run",
        args={"max_steps": 8},
    )
    result = trainer.fit()
    kept = [c for c in result.certificates if c.guard == "gradient-memory"]
    assert [c.kept for c in kept] == [None, True, True]
    assert all(c.leak <= 1e-5 for c in kept[1:])
    assert {s.kind for s in kept[-1].sites} == {"linear", "lora_A"}
    assert not any("go on from an earlier task" in n for c in kept for n in c.notes)
    assert {row["guard"] for row in result.sites} == {"gradient-memory"}, "of one tensor one guard speaks"
    folder = tmp_path / "run"
    loaded = AutoModel.from_pretrained(folder / "model").eval()  # base weights trained: the whole model is there
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        ours = trainer.model.encoder.eval()(**batch).last_hidden_state
        torch.testing.assert_close(loaded(**batch).last_hidden_state, ours, atol=1e-5, rtol=1e-4)
        plain = AutoModel.from_pretrained(tiny_encoder).eval()(**batch).last_hidden_state
        assert float((plain - ours).abs().max()) > 1e-3
    again = gr.GradientMemory.load_pretrained(folder / "memory" / "gradient-memory", trainer.model)
    assert again.tasks == memory_of(trainer).tasks
    assert all(torch.equal(s.stored, again._spaces[k].stored) for k, s in memory_of(trainer)._spaces.items())
    assert json.loads((folder / "results.json").read_text())["certificates"]


@pytest.mark.parametrize("merge", [True, False])
def test_branches_alone_leave_a_folder_that_loads(build, tiny_encoder, tmp_path, merge):
    trainer = build(stream_of(2), guards=[gr.FreshLoRA(merge)], output_dir=tmp_path / "run", args={"max_steps": 6})
    result = trainer.fit()
    assert [c.kept for c in result.certificates] == [None, None]
    folder = tmp_path / "run"
    assert (folder / "adapter").exists() is not merge
    assert (folder / "model").exists() is merge
    batch = trainer.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        ours = trainer.model.encoder.eval()(**batch).last_hidden_state
        if merge:
            loaded = AutoModel.from_pretrained(folder / "model").eval()
        else:
            loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), folder / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).last_hidden_state, ours, atol=1e-5, rtol=1e-4)
    gr.FreshLoRA.load_pretrained(folder / "memory", trainer.model).prepare(None, [])  # the base is as it was left
    result.report(tmp_path / "report.html")


def test_a_memory_alone_on_linear_weights(build, tmp_path):
    result = build(stream_of(2), adapter="linear", guards=[gr.GradientMemory(0.8)], optimizer=GORP_DOOR).fit()
    assert result.certificates[1].kept
    assert {row["treatment"] for row in result.sites} == {"protected"}
    result.report(tmp_path / "report.html")


def test_a_reference_cannot_be_protected_by_gradients(build):
    stream = stream_of(2)
    task = stream[0]
    reference = gr.Task("general", task.train, task.test, labels=task.labels, label_texts=task.label_texts)
    referenced = gr.TaskStream(list(stream), scenario="task", reference=reference)
    with pytest.raises(GuardError, match="reference set that is not trained on"):
        build(referenced, guards=[gr.GradientMemory()]).fit()
