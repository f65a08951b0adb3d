"""Dual encoders: class prompts, either tower, zero-shot before training, and the reference that guards it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file
from torch.nn import functional as F
from trainer_helpers import arguments, stream_of
from transformers import AutoModel
from vision_helpers import DUAL, HALF, NAMES, image_stream, image_task, reference_task, tiny_clip, tiny_tokenizer

import growthring as gr
from growthring.errors import ConfigError
from growthring.guards.batches import evaluating
from growthring.trainer.dual import class_prompts

VISION = r"vision_model\..*(q_proj|v_proj|query|value)"
TEXT = r"text_model\..*(q_proj|v_proj|query|value)"
TOWERS = {"vision": VISION, "text": TEXT, "both": f"{VISION}|{TEXT}"}


def lora(tower="both", **settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TOWERS[tower]} | settings)


def train(model, stream=None, *, args=None, seed=1, **settings):
    settings = {"image_processor": HALF, "adapter": lora(), "tokenizer": tiny_tokenizer()} | settings
    stream = image_stream() if stream is None else stream
    return gr.ContinualTrainer(model, stream, args=arguments(**(args or {})), seed=seed, **settings)


def batch_of(trainer, task=0, rows=8):
    return trainer._collate([trainer._data[task]["train"][i] for i in range(rows)])


@pytest.mark.parametrize("name", DUAL)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_stream_is_learned_with_either_tower(name, tower):
    trainer = train(DUAL[name](), image_stream("class"), adapter=lora(tower), args={"max_steps": 40})
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("vision_model" in n for n in trained) == (tower != "text")
    assert any("text_model" in n for n in trained) == (tower != "vision")
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    batches = [batch_of(trainer, task, 16) for task in (0, 1)]
    with evaluating(trainer.model):
        losses = [float(trainer.model(**batch)["loss"]) for batch in batches]
    result = trainer.fit()
    assert {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)} == trained
    with evaluating(trainer.model):
        assert float(trainer.model(**batches[1])["loss"]) < losses[1]
    if tower == "vision":
        assert result.matrix.values[1][0] > 0.9
    assert result.config["prompt_template"] == "a photo of a {}."
    assert (result.config["head"], result.config["pooling"]) == ("label-text", "own")


@pytest.mark.parametrize("name", DUAL)
def test_logits_are_those_of_transformers(name):
    model = DUAL[name]().eval()
    trainer = train(DUAL[name](), adapter="linear", prompt_template="the photo of {}")
    batch = batch_of(trainer)
    with torch.no_grad():
        ours = trainer.model.eval()(pixel_values=batch["pixel_values"])["logits"]
        for column, entry in enumerate(trainer.stream.classes):
            ids = tiny_tokenizer()([f"the photo of {entry.text}"], return_tensors="pt")
            expected = model(pixel_values=batch["pixel_values"], **ids).logits_per_image
            assert torch.allclose(ours[:, column : column + 1], expected, rtol=1e-5, atol=1e-5)


def test_prompts_of_several_lengths_come_out_in_order():
    task = image_task("long", ["red", "green", "blue"])
    words = {"red": "cat", "green": "the red dog of a bird", "blue": "blue fish"}
    task = gr.Task(task.name, list(task.train), list(task.test), label_texts=words)
    with pytest.warns(UserWarning, match="one task"):
        stream = gr.TaskStream([task])
    trainer = train(tiny_clip(), stream, adapter=lora("vision"))
    got = trainer.model.text_vectors(range(3))
    for number, label in enumerate(task.labels):
        ids = tiny_tokenizer()([f"a photo of a {words[label]}."], return_tensors="pt")["input_ids"]
        alone = tiny_clip().eval().get_text_features(ids).pooler_output.detach()
        assert torch.allclose(got[number], F.normalize(alone, dim=-1)[0], atol=1e-6)


def test_a_frozen_text_tower_reads_the_prompts_once(monkeypatch):
    import growthring.trainer.dual as dual

    counts = {}
    for tower in ("vision", "text"):
        calls = []
        original = dual.text_features
        trainer = train(tiny_clip(), adapter=lora(tower))
        monkeypatch.setattr(dual, "text_features", lambda *a, o=original, c=calls: c.append(1) or o(*a))
        trainer.fit()
        counts[tower] = len(calls)
        monkeypatch.setattr(dual, "text_features", original)
    assert counts["vision"] == 1
    assert counts["text"] > 8


def test_kept_vectors_follow_every_change_of_the_text_tower():
    trainer = train(tiny_clip(), adapter=lora("text", init_lora_weights=False))
    model = trainer.model.eval()
    with torch.no_grad():
        first = model.text_vectors(range(4)).clone()
        assert torch.equal(model.text_vectors(range(4)), first)
        with model.encoder.disable_adapter():
            assert not torch.allclose(model.text_vectors(range(4)), first)
        assert torch.equal(model.text_vectors(range(4)), first)
        next(p for n, p in model.named_parameters() if "text_model" in n and "lora_B" in n).add_(1.0)
        assert not torch.allclose(model.text_vectors(range(4)), first)


def test_guards_see_the_prompts_of_the_batchs_tasks_alone():
    trainer = train(tiny_clip(), adapter=lora("text"))
    rows = []
    module = trainer.model.encoder.get_base_model().text_model
    hook = module.register_forward_hook(lambda m, a, k, o: rows.append(k["input_ids"].tolist()), with_kwargs=True)
    with evaluating(trainer.model):
        out = trainer.model(**batch_of(trainer, task=1))
    hook.remove()
    words = tiny_tokenizer().batch_decode([r for call in rows for r in call], skip_special_tokens=True)
    assert words == [f"a photo of a {NAMES[label]}." for label in ("blue", "yellow")] or words == [
        f"a photo of a {NAMES[label]} ." for label in ("blue", "yellow")
    ]
    assert torch.isinf(out["logits"][:, :2]).all()
    assert torch.isfinite(out["logits"][:, 2:]).all()
    assert torch.isfinite(out["loss"])


@pytest.mark.parametrize("tower", TOWERS)
def test_a_strict_guard_keeps_old_logits(tower):
    changes = {}
    for name, guards in (("guarded", [gr.PEGP(energy=1.0, samples=64)]), ("free", [])):
        trainer = train(tiny_clip(), adapter=lora(tower, r=2), guards=guards, args={"max_steps": 6})
        batch, kept = batch_of(trainer), []
        original = trainer._consolidate

        def after(*args, original=original, trainer=trainer, batch=batch, kept=kept):
            with evaluating(trainer.model):
                kept.append(trainer.model(**batch)["logits"][:, :2])
            return original(*args)

        trainer._consolidate = after
        result = trainer.fit()
        changes[name] = float((kept[1] - kept[0]).abs().max() / kept[0].abs().max())
        if guards:
            assert result.certificates[1].kept
            assert result.certificates[1].output_change < 1e-5
    assert changes["guarded"] < 1e-5
    assert changes["free"] > 1e-3


def test_the_temperature_and_what_is_not_trained_stay():
    for adapter in ("full", "linear"):
        trainer = train(tiny_clip(), adapter=adapter)
        assert not trainer.model.encoder.logit_scale.requires_grad
        before = trainer.model.encoder.logit_scale.clone()
        trainer.fit()
        assert torch.equal(before, trainer.model.encoder.logit_scale)


def test_zero_shot_works_before_training_and_mtil_is_reported():
    result = train(tiny_clip(), image_stream("task"), args={"max_steps": 20}).fit()
    values = result.matrix.values
    assert all(0 <= v <= 1 for v in values[0])
    assert result.mtil == pytest.approx(
        {"transfer": values[1][1], "average": values[1:].mean(), "last": values[2].mean()}
    )
    assert result.to_dict()["mtil"] == result.mtil
    assert result.reference is None


def test_the_reference_is_scored_at_every_row_and_never_trained_on():
    seen = []

    class Spy(gr.PEGP):
        def end_task(self, task, batches):
            batches = list(batches)
            seen.append(
                (task, {int(i) for b in batches for i in b["task_ids"]}, sum(len(b["labels"]) for b in batches))
            )
            return super().end_task(task, batches)

    stream = image_stream(reference=reference_task())
    trainer = train(tiny_clip(), stream, guards=[Spy(energy=0.9)])
    result = trainer.fit()
    assert [name for name, *_ in seen] == ["reference", "first", "second"]
    assert [tasks for _, tasks, _ in seen] == [{2}, {0}, {1}]
    assert seen[0][2] == len(stream.reference.train)
    assert len(result.reference) == 3
    assert all(0 <= a <= 1 for a in result.reference)
    assert result.to_dict()["reference"] == result.reference
    assert result.matrix.values.shape == (3, 2)
    assert [c.task for c in result.certificates] == ["reference", "first", "second"]
    assert result.certificates[1].leak is not None  # the first task is guarded already
    assert result.certificates[1].kept


def test_the_reference_is_kept_exactly_by_a_strict_guard():
    scores = {}
    for name, guards in (("guarded", [gr.PEGP(energy=1.0, samples=64)]), ("free", [])):
        stream = image_stream(reference=reference_task())
        trainer = train(tiny_clip(), stream, adapter="linear", guards=guards, args={"max_steps": 10})
        data = trainer._reference._splits["train"]
        batch = trainer._collate([data[i] for i in range(4)])
        with evaluating(trainer.model):
            before = trainer.model(**batch)["logits"]
        trainer.fit()
        with evaluating(trainer.model):
            after = trainer.model(**batch)["logits"]
        known = torch.isfinite(before)
        assert known.sum(1).tolist() == [4] * 4
        scores[name] = float((after - before)[known].abs().max() / before[known].abs().max())
    assert scores["guarded"] < 1e-5
    assert scores["free"] > 1e-3


def test_the_reference_is_scored_right(tmp_path):
    trainer = train(tiny_clip(), image_stream(reference=reference_task()), output_dir=tmp_path / "run")
    result = trainer.fit()
    assert load_file(tmp_path / "run" / "head.safetensors")["vectors"].shape[0] == len(trainer.stream.classes)
    data = trainer._reference._splits["test"]
    with evaluating(trainer.model):
        logits = trainer.model(pixel_values=trainer._collate([data[i] for i in range(len(data))])["pixel_values"])
    best = logits["logits"][:, 4:].argmax(-1) + 4
    assert result.reference[-1] == pytest.approx(float((best == torch.tensor(data.labels)).double().mean()))


def test_a_text_stream_may_have_a_reference(build, tiny_encoder):
    import warnings

    tasks = stream_of(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        stream = gr.TaskStream(list(tasks)[:2], reference=list(tasks)[2])
    result = build(stream, guards=[gr.PEGP(energy=0.9)]).fit()
    assert len(result.reference) == 3
    assert result.certificates[0].task == "reference"
    with pytest.raises(ConfigError, match=r"a linear head cannot score it"):
        build(stream, head="linear")
    with pytest.raises(ConfigError, match=r"energy='auto' is chosen between .*give a number"):
        build(stream, guards=[gr.PEGP(energy="auto")])


def test_a_run_leaves_class_vectors_and_a_stock_adapter(tmp_path):
    trainer = train(tiny_clip(), output_dir=tmp_path / "run")
    trainer.fit()
    folder = tmp_path / "run"
    head = json.loads((folder / "head.json").read_text())
    assert head["prompt_template"] == "a photo of a {}."
    assert head["images"]["image_mean"] == [0.5, 0.5, 0.5]
    loaded = PeftModel.from_pretrained(tiny_clip(), folder / "adapter").eval()
    vectors = load_file(folder / "head.safetensors")["vectors"]
    pixels = batch_of(trainer)["pixel_values"]
    with torch.no_grad():
        features = F.normalize(loaded.get_base_model().get_image_features(pixels).pooler_output, dim=-1)
        expected = trainer.model(pixel_values=pixels)["logits"]
    scale = tiny_clip().logit_scale.exp().detach()
    assert torch.allclose(scale * features @ vectors.T, expected, atol=1e-5)


@pytest.mark.parametrize("name", DUAL)
def test_a_whole_model_loads_again(name, tmp_path):
    trainer = train(DUAL[name](), adapter="linear", output_dir=tmp_path / "run")
    trainer.fit()
    assert type(AutoModel.from_pretrained(tmp_path / "run" / "model")) is type(DUAL[name]())
    again = train(tmp_path / "run" / "model", image_processor=None, tokenizer=None)
    assert again._collate.images == HALF
    pixels = batch_of(trainer)["pixel_values"]
    with torch.no_grad():
        ours, theirs = (t.model.eval()(pixel_values=pixels)["logits"] for t in (trainer, again))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_another_image_size():
    for make in DUAL.values():
        trainer = train(make(), image_size=24)
        assert batch_of(trainer)["pixel_values"].shape[-2:] == (24, 24)
        trainer.fit()


def test_a_linear_head_reads_image_features():
    trainer = train(tiny_clip(), head="linear", adapter=lora("vision"), args={"max_steps": 20})
    result = trainer.fit()
    assert result.matrix.values[1][0] > 0.9
    assert result.mtil is None


def test_learned_prompts_in_both_towers():
    from growthring.adapters import PromptTokensConfig

    template = "a photo of a {}."
    trainer = train(tiny_clip(), adapter=PromptTokensConfig(num_tokens=3, tower="text"), prompt_template=template)
    trainer.fit()
    with pytest.raises(
        ConfigError, match=r"first 8 tokens, and what is left of the prompts .* use fewer prompt tokens"
    ):
        train(tiny_clip(), adapter=PromptTokensConfig(num_tokens=7, tower="text"), prompt_template=template)
    train(tiny_clip(), adapter=PromptTokensConfig(num_tokens=3, tower="image")).fit()


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"it needs one \{\}, where the class name goes"):
        class_prompts("a photo", ["cat"])
    with pytest.raises(ConfigError, match=r"it needs one \{\}"):
        train(tiny_clip(), prompt_template="{} {}")
    assert class_prompts("a {}.", ["{x}"]) == ["a {x}."]
    with pytest.raises(ConfigError, match="CLIPModel pools by itself"):
        train(tiny_clip(), pooling="mean")
    with pytest.raises(ConfigError, match="holds texts, and CLIPModel classifies images"):
        train(tiny_clip(), stream_of())
    with pytest.raises(ConfigError, match=r"PromptTuningConfig learns prompts of a text encoder.*PromptTokensConfig"):
        train(tiny_clip(), adapter=PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="the same of the label texts of"):
        train(tiny_clip(), image_stream(), prompt_template="{} unknown", tokenizer=_knows_nothing())


def _knows_nothing():
    from transformers import BertTokenizer

    return BertTokenizer(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])})


def test_joint_training_compares_each_image_with_its_own_tasks_classes():
    trainer = train(tiny_clip(), joint=True)
    data = [trainer._data[task]["train"][0] for task in (0, 1)]
    with evaluating(trainer.model):
        logits = trainer.model(**trainer._collate(data))["logits"]
    assert torch.isfinite(logits).all()  # both tasks are in the batch
    result = trainer.fit()
    assert result.mtil is None


def test_a_wrapped_dual_encoder_trains_as_it_is():
    from peft import get_peft_model

    model = get_peft_model(tiny_clip(), lora("vision"))
    trainer = train(model, adapter=None)
    assert trainer.model.encoder is model
    trainer.fit()


def test_double_precision_stays_double():
    trainer = train(tiny_clip().double(), adapter=lora("text"))
    batch = batch_of(trainer)
    batch["pixel_values"] = batch["pixel_values"].double()
    with evaluating(trainer.model):
        assert trainer.model(**batch)["logits"].dtype == torch.float64
