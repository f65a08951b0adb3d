"""PEFT's tests on transformers' models, run on our configs, with tiny random models in place of those on the hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from upstream import load, refill

from growthring.adapters import BottleneckConfig, LargoConfig, PrefixTokensConfig, PromptTokensConfig

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d" / "peft"
MODELS = CACHE / "models"
SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MAKE = {
    "fast-bert": lambda: BertModel(BertConfig(max_position_embeddings=32, **SIZE)),
    "bert-classifier": lambda: BertForSequenceClassification(BertConfig(max_position_embeddings=32, **SIZE)),
    "fast-llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, eos_token_id=None, **SIZE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None, bos_token_id=None)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}


def at(*names):
    return [str(MODELS / name) for name in names]


@pytest.fixture(scope="session", autouse=True)
def _models():
    for name, make in MAKE.items():
        if not (MODELS / name / "config.json").is_file():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                make().save_pretrained(MODELS / name)


features = load("test_feature_extraction_models", CACHE)
decoders = load("test_decoder_models", CACHE)
encoder_decoders = load("test_encoder_decoder_models", CACHE)
classifiers = load("test_seq_classifier", CACHE)

bottleneck = {"r": 4, "activation": "gelu"}  # with relu, all of a tiny bottleneck can be off and has no gradient
sequential = {"r": 4, "mode": "sequential", "placement": "mlp", "activation": "gelu"}
largo = {"r": 4}
refill(
    features,
    PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST=at("fast-bert"),
    ALL_CONFIGS=[
        (BottleneckConfig, {"task_type": "FEATURE_EXTRACTION", **bottleneck}),
        (PrefixTokensConfig, {"task_type": "FEATURE_EXTRACTION", "num_tokens": 3}),
        (PromptTokensConfig, {"task_type": "FEATURE_EXTRACTION", "num_tokens": 2}),
        (LargoConfig, {"task_type": "FEATURE_EXTRACTION", **largo}),
    ],
)
refill(
    decoders,
    PEFT_DECODER_MODELS_TO_TEST=at("fast-llama", "gpt2"),
    SMALL_GRID_MODELS=at("fast-llama"),
    ALL_CONFIGS=[
        (BottleneckConfig, {"task_type": "CAUSAL_LM", **bottleneck}),
        (BottleneckConfig, {"task_type": "CAUSAL_LM", **sequential}),
        (LargoConfig, {"task_type": "CAUSAL_LM", **largo}),
        (LargoConfig, {"task_type": "CAUSAL_LM", "form": "residual", **largo}),
        (LargoConfig, {"task_type": "CAUSAL_LM", "form": "product", "init": "minor", **largo}),
    ],
)
refill(
    encoder_decoders,
    PEFT_ENCODER_DECODER_MODELS_TO_TEST=at("t5"),
    ALL_CONFIGS=[
        (BottleneckConfig, {"task_type": "SEQ_2_SEQ_LM", **bottleneck}),
        (LargoConfig, {"task_type": "SEQ_2_SEQ_LM", **largo}),
    ],
)
refill(
    classifiers,
    PEFT_SEQ_CLS_MODELS_TO_TEST=at("bert-classifier"),
    ALL_CONFIGS=[
        (BottleneckConfig, {"task_type": "SEQ_CLS", **bottleneck}),
        (PrefixTokensConfig, {"task_type": "SEQ_CLS", "num_tokens": 3}),
        (PromptTokensConfig, {"task_type": "SEQ_CLS", "num_tokens": 2}),
        (LargoConfig, {"task_type": "SEQ_CLS", **largo}),
    ],
)

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's tests warn on purpose, and check what they check


def upstream_class(module):
    """The class of tests of an upstream module; its name is not the same in every version of PEFT."""
    base = sys.modules[module.PeftCommonTester.__module__].PeftCommonTester
    (found,) = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, base) and c is not base)
    return found


class TestFeatureExtraction(upstream_class(features)):
    pass


class TestDecoders(upstream_class(decoders)):
    pass


class TestEncoderDecoders(upstream_class(encoder_decoders)):
    pass


class TestClassifiers(upstream_class(classifiers)):
    pass
