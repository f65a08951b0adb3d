from __future__ import annotations

import gc

import pytest
from peft import LoraConfig
from trainer_helpers import arguments, stream_of

import growthring as gr


def lora_config(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)


@pytest.fixture(scope="package", autouse=True)
def _quick_garbage_collection():
    """Every Trainer collects garbage when it starts; what was imported by now need not be looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def lora():
    return lora_config


@pytest.fixture
def build(tiny_encoder):
    """Make a trainer on the tiny encoder: ``build(stream, adapter=..., args={...}, ...)``."""

    def build(stream=None, *, model=tiny_encoder, args=None, adapter="lora", seed=1, **settings):
        adapter = lora_config() if adapter == "lora" else adapter
        stream = stream_of() if stream is None else stream
        args = arguments(**(args or {}))
        return gr.ContinualTrainer(model, stream, adapter=adapter, args=args, seed=seed, **settings)

    return build


@pytest.fixture(autouse=True)
def _nothing_stray(tmp_path, monkeypatch):
    """Whatever is written without being asked for shows up in an empty current folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert [p.name for p in here.iterdir()] == []
