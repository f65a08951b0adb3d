"""A whole run with a LARGO-style adapter: trained, scored, saved, loaded, exported."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, TrainingArguments
from typer.testing import CliRunner

import growthring as gr
from growthring.adapters import LargoConfig
from growthring.cli import app

WORDS = ["the", "a", "of", "to", "and", "in", "is", "it", "that", "was"]


def rows(end):
    return [(f"{word} {animal} {end}", label) for word in WORDS for animal, label in (("cat", "red"), ("dog", "blue"))]


def stream():
    tasks = [gr.Task("one", rows("for"), rows("on")), gr.Task("two", rows("are"), rows("with"))]
    return gr.TaskStream(tasks, scenario="domain")


@pytest.mark.parametrize("form", ["delta", "residual", "product"])
def test_a_run(form, tiny_encoder, tmp_path):
    options = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True}
    args = TrainingArguments(output_dir=str(tmp_path / "unused"), logging_steps=10, **options)
    adapter = LargoConfig(r=2, form=form, alpha=4, target_modules=["query", "value"])
    trainer = gr.ContinualTrainer(
        tiny_encoder, stream(), adapter=adapter, args=args, seed=1, output_dir=tmp_path / "run"
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit()
    after = trainer.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("largo_B" in name for name in changed)

    ids = torch.arange(5, 25).view(4, 5)
    wanted = trainer.model.encoder.eval()(input_ids=ids)[0]
    fresh = lambda: AutoModel.from_pretrained(tiny_encoder).eval()  # noqa: E731
    own = PeftModel.from_pretrained(fresh(), tmp_path / "run/adapter")
    torch.testing.assert_close(own(input_ids=ids)[0], wanted, atol=1e-6, rtol=1e-6)
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "lora")])
    assert done.exit_code == 0, done.stderr
    lora = PeftModel.from_pretrained(fresh(), tmp_path / "lora")
    torch.testing.assert_close(lora(input_ids=ids)[0], wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fresh()(input_ids=ids)[0], wanted, atol=1e-3)
