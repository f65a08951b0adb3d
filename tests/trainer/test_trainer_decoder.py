"""Decoder language models as encoders, and PEFT's prompt learning on text encoders."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from trainer_helpers import arguments, stream_of
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

import growthring as gr
from growthring.errors import ConfigError
from growthring.guards.batches import evaluating
from growthring.trainer.classifier import find_pooling, pool
from growthring.trainer.encoders import hidden_states

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PROMPTS = {
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
}


def llama():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaModel(LlamaConfig(**SMALL, vocab_size=200, max_position_embeddings=64, num_key_value_heads=2))


def gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 200, "n_positions": 64}
        steady = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2Model(GPT2Config(**sizes, **steady, bos_token_id=2, eos_token_id=3))


DECODERS = {"llama": llama, "gpt2": gpt2}


@pytest.fixture
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def decode(tokenizer):
    def decode(model, *, args=None, **settings):
        settings = {"adapter": LoraConfig(r=4, target_modules="all-linear")} | settings
        stream = settings.pop("stream", None) or stream_of()
        return gr.ContinualTrainer(
            model, stream, tokenizer=tokenizer, args=arguments(**(args or {})), seed=1, **settings
        )

    return decode


def batch_of(trainer, rows=8):
    return trainer._collate([trainer._data[0]["train"][i] for i in range(rows)])


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_learns_from_its_last_token(decode, name):
    trainer = decode(DECODERS[name](), args={"max_steps": 60})
    result = trainer.fit()
    assert trainer.model.pooling == result.config["pooling"] == "last"
    assert result.matrix.values[1][0] > 0.9


@pytest.mark.parametrize("name", DECODERS)
def test_padding_does_not_change_a_decoders_features(decode, name):
    trainer = decode(DECODERS[name]())
    batch = batch_of(trainer)
    model = trainer.model.eval()
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    with torch.no_grad():
        together = model.embed(batch["input_ids"], batch["attention_mask"])
        alone = [model.embed(ids[None, :n], mask[None, :n]) for ids, mask, n in zip(
            batch["input_ids"], batch["attention_mask"], lengths, strict=True
        )]  # fmt: skip
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_strict_guard_holds_on_a_decoder(decode, name):
    result = decode(DECODERS[name](), guards=[gr.PEGP(energy=0.8)]).fit()
    assert result.certificates[1].kept
    assert 0 < result.certificates[1].leak < 1e-5


def test_a_causal_model_is_taken_without_its_head(decode):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=200, num_key_value_heads=4, max_position_embeddings=64))
    trainer = decode(model, args={"max_steps": 1})
    assert isinstance(trainer.model.encoder.get_base_model(), LlamaModel)
    trainer.fit()


def test_a_tokenizer_without_padding_pads_with_its_end_token(decode, tokenizer):
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    trainer = decode(llama(), args={"max_steps": 1})
    assert trainer._collate.pad_id == tokenizer.eos_token_id
    trainer.fit()


def test_a_text_without_tokens_is_read_as_padding():
    from growthring.trainer.data import Collator

    batch = Collator(7).texts([[], [1, 2]])
    assert batch["input_ids"].tolist() == [[7, 7], [1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_pooling_of_decoders():
    assert find_pooling(llama(), None) == find_pooling(gpt2(), None) == "last"
    assert find_pooling(llama(), None, "mean") == "mean"
    with pytest.raises(ConfigError, match="the first token of a decoder has seen nothing of the text; choose 'last'"):
        find_pooling(gpt2(), None, "cls")
    with pytest.raises(ConfigError, match="pooling='lats': did you mean 'last'"):
        find_pooling(llama(), None, "lats")


# --- prompt learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_peft_prompts_learn_and_are_saved_as_stock_peft(build, tiny_encoder, tmp_path, name):
    config = PROMPTS[name]()
    trainer = build(adapter=config, output_dir=tmp_path / "run", args={"max_steps": 6})
    assert config.task_type is None  # ours is a copy
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("prompt_encoder" in n for n in trained)
    trainer.fit()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed
    assert changed <= trained
    folder = tmp_path / "run" / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), folder).eval()
    batch = batch_of(trainer)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours = hidden_states(trainer.model.encoder.eval(), **inputs)
        assert ours.shape[:2] == inputs["input_ids"].shape
        assert torch.allclose(hidden_states(loaded, **inputs), ours, atol=1e-6)


def test_rows_of_virtual_tokens_are_no_features(build):
    trainer = build(adapter=PromptTuningConfig(num_virtual_tokens=5))
    batch = batch_of(trainer)
    model = trainer.model.eval()
    with torch.no_grad():
        whole = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        assert whole.shape[1] == batch["input_ids"].shape[1] + 5
        expected = pool(whole[:, 5:], batch["attention_mask"], "mean")
        assert torch.equal(model.embed(batch["input_ids"], batch["attention_mask"]), expected)
        assert not torch.allclose(pool(whole[:, :-5], batch["attention_mask"], "mean"), expected)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_prompts_on_a_decoder(decode, name):
    trainer = decode(gpt2(), adapter=PROMPTS[name](), args={"max_steps": 6})
    trainer.fit()
    batch = batch_of(trainer)
    with evaluating(trainer.model):
        together = trainer.model.embed(batch["input_ids"], batch["attention_mask"])
        length = int(batch["attention_mask"][0].sum())
        alone = trainer.model.embed(batch["input_ids"][:1, :length], batch["attention_mask"][:1, :length])
    assert torch.allclose(together[:1], alone, atol=1e-5)


@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_take_positions_of_the_text(build, name):
    trainer = build(adapter=PROMPTS[name](), max_length=64)
    assert trainer.config["max_length"] == 61
    config = PROMPTS[name]()
    config.num_virtual_tokens = 62
    with pytest.raises(ConfigError, match="leave no position for a text"):
        build(adapter=config)


def test_a_text_of_full_length_goes_through(build, tiny_encoder):
    long = " ".join(["the"] * 100)
    rows = [(f"{word} {long}", label) for word, label in (("cat", "x"), ("dog", "y")) for _ in range(4)]
    tasks = [gr.Task(n, [(f"{t} {n} {i}", y) for i, (t, y) in enumerate(rows)], rows[::4], label_texts={
        "x": "red", "y": "blue"}) for n in ("one", "two")]  # fmt: skip
    for name in PROMPTS:
        build(gr.TaskStream(tasks), adapter=PROMPTS[name](), max_length=512, args={"max_steps": 1}).fit()


def test_ia3_learns(build, tiny_encoder, tmp_path):
    config = IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    trainer = build(adapter=config, output_dir=tmp_path / "run", args={"max_steps": 6})
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("ia3_l" in n for n in trained)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    assert {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)} == trained
    PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), tmp_path / "run" / "adapter")


def test_another_task_type_is_refused(build):
    with pytest.raises(ConfigError, match=r"PromptTuningConfig\(task_type='SEQ_CLS'\): the head is growthring's"):
        build(adapter=PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
    build(adapter=PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"))
