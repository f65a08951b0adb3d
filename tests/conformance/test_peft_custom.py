"""PEFT's tests on custom models, run on our configs: saving, loading, several adapters, dtypes, training, deletion."""

from __future__ import annotations

from pathlib import Path

import pytest
from upstream import load, refill

from growthring.adapters import BottleneckConfig, LargoConfig, PromptTokensConfig

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d" / "peft"
custom = load("test_custom_models", CACHE)

parallel = {"r": 8, "target_modules": ["lin0"]}
sequential = {"r": 8, "target_modules": ["lin0", "lin1"], "mode": "sequential", "activation": "gelu"}
prompt = {"num_tokens": 2, "placement": "replace", "target_modules": ["emb"]}
largo = {"r": 2, "target_modules": ["lin0", "lin1"]}

refill(
    custom,
    TEST_CASES=[
        ("parallel fast", "MLP", BottleneckConfig, parallel),
        ("sequential", "MLP", BottleneckConfig, sequential),
        ("saved head", "MLP", BottleneckConfig, {**parallel, "modules_to_save": ["lin1"]}),
        ("regex", "MLP", BottleneckConfig, {**parallel, "target_modules": "lin[01]"}),
        ("scaled", "MLP", BottleneckConfig, {**parallel, "scaling": 0.5, "dropout": 0.1}),
        ("prompt", "EmbConv1D", PromptTokensConfig, prompt),
        ("delta fast", "MLP", LargoConfig, {**largo, "alpha": 1}),
        ("minor", "MLP", LargoConfig, {**largo, "init": "minor"}),
        ("residual", "MLP", LargoConfig, {**largo, "form": "residual"}),
        ("product fast", "MLP", LargoConfig, {**largo, "form": "product"}),
        ("randomised", "MLP", LargoConfig, {**largo, "svd_iterations": 2, "target_modules": "lin[01]"}),
        ("delta and head", "MLP", LargoConfig, {**largo, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("embedding", "EmbConv1D", LargoConfig, {**largo, "target_modules": ["emb"]}),
        ("conv1d", "EmbConv1D", LargoConfig, {"r": 1, "target_modules": ["conv1d"]}),
        ("conv1d residual", "EmbConv1D", LargoConfig, {"r": 1, "target_modules": ["conv1d"], "form": "residual"}),
        ("conv1d product", "EmbConv1D", LargoConfig, {"r": 1, "target_modules": ["conv1d"], "form": "product"}),
        ("all kinds", "EmbConv1D", LargoConfig, {"r": 1, "target_modules": ["emb", "conv1d", "lin0"]}),
    ],
    ALL_PEFT_CONFIG_CLASSES=[BottleneckConfig, LargoConfig],
    MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES=[
        ("same fast", "bottleneck", BottleneckConfig,
         {**parallel, "init_weights": False}, {**parallel, "init_weights": False}),
        ("different", "bottleneck", BottleneckConfig,
         {**parallel, "init_weights": False},
         {"target_modules": ["lin1"], "mode": "sequential", "init_weights": False}),
        ("delta fast", "largo", LargoConfig, {**largo, "init_weights": False}, {**largo, "init_weights": False}),
        ("residual", "largo", LargoConfig,
         {**largo, "form": "residual", "init_weights": False}, {**largo, "form": "residual", "init_weights": False}),
        ("forms", "largo", LargoConfig,
         {**largo, "form": "product", "init_weights": False},
         {"r": 1, "target_modules": ["lin1"], "init": "minor", "init_weights": False}),
    ],
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's tests warn on purpose, and check what they check


class TestCustomModels(custom.TestPeftCustomModel):
    pass


class TestActiveAdapters(custom.TestMultipleActiveAdapters):
    pass


class TestRequiresGrad(custom.TestRequiresGrad):
    pass


if hasattr(custom, "TestPeftFsdpStateDict"):

    class TestFsdpStateDict(custom.TestPeftFsdpStateDict):
        pass
