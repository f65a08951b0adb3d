"""Image encoders in a stream: what trains, what is pooled, what is refused, what a run leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from trainer_helpers import arguments, differing, stream_of, weights
from transformers import (
    AutoModel,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5Model,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from vision_helpers import HALF, image_stream, tiny_clip, tiny_dino, tiny_vit

import growthring as gr
from growthring.errors import ConfigError
from growthring.guards.batches import evaluating
from growthring.trainer.classifier import find_pooling, pool_image
from growthring.trainer.encoders import hidden_states, kind_of

MODELS = {"vit": tiny_vit, "dino": tiny_dino}


def lora(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)


def train(model, stream=None, *, args=None, seed=1, **settings):
    settings = {"image_processor": HALF, "adapter": lora()} | settings
    stream = image_stream() if stream is None else stream
    return gr.ContinualTrainer(model, stream, args=arguments(**(args or {})), seed=seed, **settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scenario", ["task", "class"])
def test_an_image_stream_is_learned(name, scenario):
    trainer = train(MODELS[name](), image_stream(scenario), args={"max_steps": 25})
    result = trainer.fit()
    assert result.matrix.values[1][0] > 0.9
    assert result.matrix.values[2][1] > 0.9
    assert result.config["head"] == "linear"
    assert result.config["pooling"] == "cls"
    assert result.mtil is None


def test_guards_get_pixel_values_as_the_model_takes_them():
    seen = []

    class Spy(gr.PEGP):
        def end_task(self, task, batches):
            batches = list(batches)
            seen.append(batches)
            return super().end_task(task, batches)

    guard = Spy(energy=0.9)
    trainer = train(tiny_vit(), guards=[guard])
    result = trainer.fit()
    assert [set(b) for bs in seen for b in bs] == [{"pixel_values", "labels", "task_ids"}] * 2
    assert seen[0][0]["pixel_values"].shape == (22, 3, 16, 16)
    with evaluating(trainer.model):
        assert trainer.model(**seen[0][0])["logits"].shape == (22, 4)
    assert [c.kept for c in result.certificates] == [None, True]


def test_a_strict_guard_keeps_old_images():
    changes = {}
    for name, guards in (("guarded", [gr.PEGP(energy=1.0, samples=64)]), ("free", [])):
        trainer = train(tiny_vit(), adapter=lora(r=2), guards=guards, args={"max_steps": 6})
        batch = trainer._collate([trainer._data[0]["train"][i] for i in range(8)])
        kept = {}
        original = trainer._consolidate

        def after(number, *args, original=original, trainer=trainer, batch=batch, kept=kept):
            with evaluating(trainer.model):
                kept[number] = trainer.model.embed(pixel_values=batch["pixel_values"])
            return original(number, *args)

        trainer._consolidate = after
        result = trainer.fit()
        changes[name] = float((kept[1] - kept[0]).abs().max() / kept[0].abs().max())
        if guards:
            assert result.certificates[1].output_change < 1e-5  # the head's new rows are no old answers
    assert changes["guarded"] < 1e-5
    assert changes["free"] > 1e-2


def test_the_same_seed_gives_the_same_run():
    left, right = (train(tiny_dino(), seed=3) for _ in range(2))
    assert not differing(weights(left), weights(right))
    left.fit(), right.fit()
    assert not differing(weights(left), weights(right))


def test_predictions_do_not_depend_on_the_batch_size():
    trainer = train(tiny_vit())
    trainer.fit()
    assert trainer.predict(0, "test", batch_size=1) == trainer.predict(0, "test", batch_size=12)


@pytest.mark.parametrize("name", MODELS)
def test_another_size_interpolates_positions(name):
    model = MODELS[name]()
    trainer = train(model, image_size=24)
    batch = trainer._collate([trainer._data[0]["train"][i] for i in range(2)])
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert hidden_states(trainer.model.encoder, pixel_values=batch["pixel_values"]).shape == (2, 10, 32)
    trainer.fit()


def test_a_size_that_patches_do_not_fill_is_refused():
    with pytest.raises(ConfigError, match=r"patches of 8; choose image_size=16 or 24"):
        train(tiny_vit(), image_size=20)


def test_mean_pooling_reads_patches_alone():
    hidden = torch.arange(2 * 7 * 3.0).view(2, 7, 3)  # a class token, two prompts, four patches
    assert torch.equal(pool_image(hidden, "mean", 4), hidden[:, 3:].mean(1))
    assert torch.equal(pool_image(hidden, "mean", None), hidden.mean(1))
    assert torch.equal(pool_image(hidden, "mean", 49), hidden.mean(1))  # a hierarchical model merges its patches
    assert torch.equal(pool_image(hidden, "cls", 4), hidden[:, 0])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_learned_prompts_stay_out_of_the_features(pooling):
    from growthring.adapters import PromptTokensConfig

    trainer = train(tiny_vit(), adapter=PromptTokensConfig(num_tokens=3), pooling=pooling)
    batch = trainer._collate([trainer._data[0]["train"][i] for i in range(2)])
    hidden = hidden_states(trainer.model.encoder.eval(), pixel_values=batch["pixel_values"])
    assert hidden.shape == (2, 1 + 3 + 4, 32)
    expected = hidden[:, 0] if pooling == "cls" else hidden[:, 4:].mean(1)
    assert torch.equal(trainer.model.embed(pixel_values=batch["pixel_values"]), expected)


@pytest.mark.parametrize("kind", ["BottleneckConfig", "PrefixTokensConfig", "PromptTokensConfig"])
def test_our_adapters_learn_images(kind, tmp_path):
    import growthring.adapters as adapters

    config = {"BottleneckConfig": {"r": 4}, "PrefixTokensConfig": {"num_tokens": 3}, "PromptTokensConfig": {}}[kind]
    trainer = train(tiny_vit(), adapter=getattr(adapters, kind)(**config), output_dir=tmp_path / "run")
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    moved = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(before[n], p)}
    assert names
    assert moved == names
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "run" / "adapter").eval()
    batch = trainer._collate([trainer._data[0]["test"][i] for i in range(2)])
    with torch.no_grad():
        ours = hidden_states(trainer.model.encoder, pixel_values=batch["pixel_values"])
        assert torch.allclose(hidden_states(loaded, pixel_values=batch["pixel_values"]), ours, atol=1e-6)


def test_a_run_leaves_a_model_that_loads_with_its_preprocessing(tmp_path):
    trainer = train(tiny_vit(), adapter="linear", output_dir=tmp_path / "run", image_size=24)
    trainer.fit()
    encoder = AutoModel.from_pretrained(tmp_path / "run" / "model")
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        ours = hidden_states(trainer.model.encoder, pixel_values=pixels)
        assert torch.allclose(hidden_states(encoder, pixel_values=pixels), ours, atol=1e-6)
    assert not list((tmp_path / "run" / "model").glob("tokenizer*"))
    again = gr.ContinualTrainer(tmp_path / "run" / "model", image_stream(), adapter=lora(), args=arguments())
    assert again._collate.images == trainer._collate.images  # read from preprocessor_config.json
    head = json.loads((tmp_path / "run" / "head.json").read_text())
    assert head["images"] == json.loads((tmp_path / "run" / "model" / "preprocessor_config.json").read_text())
    assert (head["head"], head["pooling"]) == ("linear", "cls")


def test_a_classifier_is_taken_without_its_head():
    model = ViTForImageClassification(ViTConfig.from_dict(tiny_vit().config.to_dict() | {"num_labels": 3}))
    trainer = train(model)
    trainer.fit()
    assert "classifier" not in "".join(n for n, _ in trainer.model.named_parameters())


def test_an_unused_pooler_does_not_train():
    trainer = train(tiny_vit(), adapter="full")
    still = {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert still == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    assert not any("pooler" in n and "lora" in n for n, _ in train(tiny_vit()).model.named_parameters())


def test_joint_training_reads_all_images():
    result = train(tiny_vit(), joint=True, args={"max_steps": 30}).fit()
    assert min(result.matrix.values[1]) > 0.9


def test_what_fits_nothing_is_refused_by_name(tiny_encoder):
    with pytest.raises(ConfigError, match=r"holds images, and BertModel reads texts; choose a model for images"):
        train(tiny_encoder)
    with pytest.raises(ConfigError, match=r"holds texts, and ViTModel reads images"):
        train(tiny_vit(), stream_of())
    with pytest.raises(ConfigError, match=r"head='label-text' compares .*; use head='linear'"):
        train(tiny_vit(), head="label-text")
    with pytest.raises(ConfigError, match="pooling='last' is for texts"):
        train(tiny_vit(), pooling="last")
    with pytest.raises(ConfigError, match="image_size and image_processor are for images"):
        gr.ContinualTrainer(tiny_encoder, stream_of(), adapter=lora(), args=arguments(), image_size=16)
    with pytest.raises(ConfigError, match="images of 1 channels"):
        train(tiny_vit(num_channels=1))


def test_a_convolutional_network_is_refused():
    network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(ConfigError, match=r"last hidden state of ResNetModel has 4 axes.*Supported: text encoders"):
        train(network, adapter="full")


def test_kinds():
    assert kind_of(tiny_vit()) == "image"
    assert kind_of(tiny_clip()) == "dual"
    t5 = T5Model(T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8, vocab_size=20))
    with pytest.raises(ConfigError, match=r"T5Model is an encoder-decoder; give its encoder alone \(T5EncoderModel"):
        kind_of(t5)
    assert kind_of(t5.get_encoder()) == "text"
    with pytest.raises(ConfigError, match=r"Linear is no transformers model .*Supported: text encoders"):
        kind_of(torch.nn.Linear(2, 2))


def test_sound_and_sigmoid_models_are_refused():
    from transformers import SiglipConfig, SiglipModel, Wav2Vec2Config, Wav2Vec2Model

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sound = Wav2Vec2Model(
        Wav2Vec2Config(**small, conv_dim=[8], conv_stride=[5], conv_kernel=[10], num_conv_pos_embeddings=4)
    )
    with pytest.raises(ConfigError, match=r"Wav2Vec2Model reads input_values \(audio\)"):
        kind_of(sound)
    text = small | {"vocab_size": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}))
    with pytest.raises(ConfigError, match="SiglipModel was trained with a sigmoid loss"):
        kind_of(siglip)


def test_no_class_token_is_averaged():
    from transformers import SwinConfig, SwinModel

    swin = SwinModel(
        SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=16, patch_size=2)
    )
    assert find_pooling(swin, None) == "mean"
    train(swin, image_size=16, adapter="linear").fit()


def test_an_adapter_that_finds_no_layer_is_told_the_names():
    with pytest.raises(ConfigError, match=r"the adapter finds no layer in ViTModel: .* are named .*(query|q_proj)"):
        train(tiny_vit(), adapter=lora(target_modules=["no_such_layer"]))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(adapter):
    made = []
    for checkpointing in (False, True):
        new = hasattr(TrainingArguments, "activation_checkpointing")
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        args = {name: checkpointing, f"{name}_kwargs": {"use_reentrant": False}}
        trainer = train(tiny_vit(), adapter=lora() if adapter == "lora" else adapter, args=args)
        trainer.fit()
        made.append(weights(trainer))
    assert all(torch.allclose(made[0][n], made[1][n], atol=1e-6) for n in made[0])
