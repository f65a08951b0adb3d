"""A tiny made-up input for a model, from the arguments that its forward pass names and from its config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from growthring.errors import ConfigError

__all__ = ["example_inputs"]

TOKENS = 6


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for one forward pass on one sample.

    Images have the size that the config names: others are refused by some models, and some remember what they saw.

    Raises:
        ConfigError: If the model has no config, or its forward pass takes neither token ids nor pixels.
    """
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(whole, "config", None)
    names = inspect.signature(whole.forward).parameters
    if config is None or not {"input_ids", "pixel_values"} & set(names):
        raise ConfigError(
            f"{type(whole).__name__} cannot be mapped: looked for a config and a forward pass that takes input_ids or "
            f"pixel_values; it takes {', '.join(names)}. Give an example, as map_modules(model, example={{...}}), or "
            "name target_modules yourself"
        )
    like = next((p for p in whole.parameters() if p.is_floating_point()), torch.empty(0))
    inputs: dict[str, Any] = {}
    text = getattr(config, "text_config", None) or config
    if "input_ids" in names:
        vocabulary = int(getattr(text, "vocab_size", 0) or TOKENS + 2)
        ids = torch.arange(TOKENS, 0, -1, device=like.device).remainder(vocabulary)[None]  # unlike positions
        inputs["input_ids"] = ids
        if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids.flip(1)[:, : TOKENS - 1] + 1
        if "use_cache" in names:
            inputs["use_cache"] = False
    if "pixel_values" in names:
        image = getattr(config, "vision_config", None) or config
        size = getattr(image, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else size
        channels = int(getattr(image, "num_channels", 3) or 3)
        pixels = torch.linspace(-1, 1, channels * height * width).reshape(1, channels, height, width)
        inputs["pixel_values"] = pixels.to(like)
    return inputs
