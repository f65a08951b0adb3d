"""What trains, and the errors of settings under which nothing would."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from trainer_helpers import differing, stream_of, weights
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel

import growthring as gr
from growthring.errors import ConfigError, GuardError


def trainable(trainer):
    return {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def moved(trainer):
    """Names of the tensors that a run changed."""
    before = weights(trainer)
    trainer.fit()
    return {*differing(before, weights(trainer))}


def test_lora_moves_its_factors_only(build):
    trainer = build()
    names = trainable(trainer)
    assert names
    assert all("lora_A" in n or "lora_B" in n for n in names)
    assert not any("pooler" in n for n in names)
    assert moved(trainer) == names


def test_linear_moves_weights_and_no_biases(build):
    trainer = build(adapter="linear")
    base = trainer.model.encoder
    expected = {
        f"encoder.{n}.weight" for n, m in base.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n
    }
    assert trainable(trainer) == expected
    assert len(expected) == 12
    assert moved(trainer) == expected


def test_full_moves_everything_but_an_unused_pooler(build):
    trainer = build(adapter="full")
    names = {n for n, _ in trainer.model.named_parameters()}
    assert trainable(trainer) == {n for n in names if "pooler" not in n}
    assert {n for n in names if "pooler" in n} == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    still = trainable(trainer) - moved(trainer)
    assert not still


def test_none_trains_what_the_model_trains(build, tiny_encoder):
    encoder = AutoModel.from_pretrained(tiny_encoder).requires_grad_(False)
    encoder.encoder.layer[1].attention.self.query.weight.requires_grad_(True)
    trainer = build(model=encoder, adapter=None)
    assert moved(trainer) == {"encoder.encoder.layer.1.attention.self.query.weight"}


def test_a_peft_model_trains_as_it_is(build, tiny_encoder, lora):
    model = get_peft_model(AutoModel.from_pretrained(tiny_encoder), lora(target_modules=["query"]))
    trainer = build(model=model, adapter=None)
    assert trainer.model.encoder is model
    names = trainable(trainer)
    assert len(names) == 4
    assert moved(trainer) == names


def test_a_peft_model_takes_no_second_adapter(build, tiny_encoder, lora):
    model = get_peft_model(AutoModel.from_pretrained(tiny_encoder), lora())
    with pytest.raises(ConfigError, match="already has an adapter; give adapter=None"):
        build(model=model)


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_an_adapter_loaded_for_inference_is_refused(build, tiny_encoder, lora, tmp_path, head):
    get_peft_model(AutoModel.from_pretrained(tiny_encoder), lora()).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), tmp_path / "adapter")
    with pytest.raises(GuardError, match=r"nothing is trainable: .*is_trainable=True"):
        build(model=frozen, adapter=None, head=head)


def test_a_frozen_model_is_refused(build, tiny_encoder):
    frozen = AutoModel.from_pretrained(tiny_encoder).requires_grad_(False)
    with pytest.raises(GuardError, match="nothing is trainable"):
        build(model=frozen, adapter=None)


def test_the_pooler_of_a_given_model_stays(build, tiny_encoder):
    encoder = AutoModel.from_pretrained(tiny_encoder)
    pooler = encoder.pooler
    build(model=encoder, adapter="full")
    assert encoder.pooler is pooler


def test_a_model_with_a_head_is_taken_without_it(build, tiny_encoder):
    from transformers import AutoTokenizer

    model = BertForSequenceClassification(BertConfig.from_pretrained(tiny_encoder, num_labels=3))
    trainer = build(model=model, adapter="linear", tokenizer=AutoTokenizer.from_pretrained(tiny_encoder))
    assert isinstance(trainer.model.encoder, BertModel)
    trainer.fit()


def test_a_wrapped_model_with_a_head_is_refused(build, tiny_encoder, lora):
    from transformers import AutoTokenizer

    config = BertConfig.from_pretrained(tiny_encoder, num_labels=3)
    model = get_peft_model(BertForSequenceClassification(config), lora())
    with pytest.raises(ConfigError, match="have no last_hidden_state; give an encoder"):
        build(model=model, adapter=None, tokenizer=AutoTokenizer.from_pretrained(tiny_encoder))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("linaer", "adapter='linaer': give a PEFT config, or did you mean 'linear'"),
        ("fulll", "did you mean 'full'"),
        ("adalora", "allowed: full, linear"),
    ],
)
def test_an_unknown_adapter_offers_the_nearest(build, adapter, message):
    with pytest.raises(ConfigError, match=message):
        build(adapter=adapter)


def test_a_rank_above_the_width_is_refused(build, lora):
    with pytest.raises(ConfigError, match="adapter rank 33 is larger than the model's width 32; choose r <= 32"):
        build(adapter=lora(r=33))
    build(adapter=lora(r=32))


def test_joint_takes_no_guard(build):
    with pytest.raises(ConfigError, match="no earlier task to guard; drop the guards"):
        build(joint=True, guards=[gr.PEGP()])


def test_a_learning_rate_of_zero_is_an_error(build):
    with pytest.raises(GuardError, match="task 'animals' took 4 steps and no weight changed: the learning rate"):
        build(args={"learning_rate": 0.0}).fit()


def test_no_epoch_is_an_error(build):
    with pytest.raises(GuardError, match="took 0 steps and no weight changed"):
        build(args={"max_steps": -1, "num_train_epochs": 0}).fit()


def test_an_optimizer_without_a_trainable_parameter_is_an_error(build):
    aside = nn.Parameter(torch.zeros(2), requires_grad=False)
    settings = {"lr": 0.1, "params": [aside]}
    with pytest.raises(GuardError, match="the optimizer has no trainable parameter"):
        build(optimizer=(torch.optim.SGD, settings)).fit()
    assert settings == {"lr": 0.1, "params": [aside]}  # the Trainer takes entries out of what it is given


def test_an_optimizer_of_something_else_is_noticed(build):
    aside = nn.Parameter(torch.zeros(2))
    with pytest.raises(GuardError, match="no weight changed"):
        build(optimizer=(torch.optim.SGD, {"lr": 0.1, "params": [aside]})).fit()


def test_a_head_that_trains_alone_by_accident_is_told(build, caplog, lora):
    """The linear head learns, but the adapter is cut off from the loss."""
    trainer = build(head="linear")
    trainer.model.embed = lambda input_ids, *_, **__: torch.nn.functional.one_hot(input_ids[:, 1] % 32, 32).float()
    trainer.fit()
    assert "task 'animals' changed the head and nothing in the encoder" in caplog.text


@pytest.mark.parametrize("where", ["nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_model_folder_that_is_missing(build, where):
    from pathlib import Path

    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        build(model=Path(where))
    with pytest.raises(ConfigError, match="nowhere"):
        build(model=where)


def test_a_folder_without_a_model(build, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"could not be loaded: .*config.json.*Give a local folder or a hub name"):
        build(model=tmp_path / "empty")


def test_a_folder_without_a_tokenizer(build, tiny_encoder, tmp_path):
    """transformers would come up with a vocabulary of five special tokens, and every word would be unknown."""
    AutoModel.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"holds no tokenizer .*give tokenizer="):
        build(model=tmp_path / "bare")
    from transformers import AutoTokenizer

    build(model=tmp_path / "bare", tokenizer=AutoTokenizer.from_pretrained(tiny_encoder))


def test_a_model_object_that_does_not_say_where_it_is_from(build, tiny_encoder):
    with pytest.raises(ConfigError, match="give tokenizer=: the model does not say"):
        build(model=BertModel(BertConfig.from_pretrained(tiny_encoder)))


def test_a_tokenizer_without_padding(build, tiny_encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="neither a padding nor an end token"):
        build(tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 2}, "max_length=2: at least 3"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"seed": -1}, "seed=-1: it must be between 0 and"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"config": {"path": object()}}, "must hold plain values"),
        ({"config": {"x": float("nan")}}, "must hold plain values"),
        ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0.1"),
        ({"tensorboard": True}, "give output_dir"),
    ],
)
def test_settings_that_cannot_work(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_trackers_that_are_not_used_are_told(build):
    with pytest.warns(UserWarning, match=r"report_to=\['tensorboard'\] is not used.*tensorboard=True"):
        build(args={"report_to": ["tensorboard"]})


def test_a_guard_that_cannot_work_says_so_before_anything_is_scored(build, lora):
    trainer = build(adapter=lora(use_dora=True), guards=[gr.PEGP()])
    trainer._scorer.score = lambda *args: pytest.fail("scored before the guard was attached")
    with pytest.raises(GuardError, match=r"DoRA|Dora"):
        trainer.fit()


def test_two_runs_may_share_one_stream(build):
    stream = stream_of()
    assert build(stream).fit().matrix == build(stream).fit().matrix
