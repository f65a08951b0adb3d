"""What kind of encoder a model is, and the features that it gives."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from growthring.errors import ConfigError

__all__ = [
    "SUPPORTED",
    "EncoderKind",
    "base_of",
    "hidden_states",
    "image_features",
    "kind_of",
    "position_settings",
    "text_features",
]

EncoderKind = Literal["text", "image", "dual"]

SUPPORTED = (
    "text encoders (BERT family) and decoder language models without their heads (AutoModel), image encoders whose "
    "last hidden state is a sequence (ViT, DINOv2), CLIPModel and VisionTextDualEncoderModel"
)

_TOWERS = ("get_image_features", "get_text_features", "logit_scale", "vision_model", "text_model")


def base_of(encoder: nn.Module) -> nn.Module:
    """The ``transformers`` model inside a PEFT model, else the model itself."""
    return encoder.get_base_model() if isinstance(encoder, PeftModel) else encoder


def kind_of(encoder: nn.Module) -> EncoderKind:
    """Say what a model reads.

    Returns:
        ``"text"`` (token ids to a last hidden state; decoders too), ``"image"`` (pixels to a last hidden state) or
        ``"dual"`` (a text tower and an image tower with a common space).

    Raises:
        ConfigError: If it is none of these; the message says what it is.
    """
    base = base_of(encoder)
    name = type(base).__name__
    if getattr(base, "config", None) is None:
        raise ConfigError(f"{name} is no transformers model (it has no config). Supported: {SUPPORTED}")
    if all(hasattr(base, part) for part in _TOWERS):
        if hasattr(base, "logit_bias"):
            raise ConfigError(f"{name} was trained with a sigmoid loss, not a softmax. Supported: {SUPPORTED}")
        return "dual"
    reads = getattr(base, "input_modalities", ("text",))
    reads = (reads,) if isinstance(reads, str) else tuple(reads)
    if len(reads) > 1:
        raise ConfigError(f"{name} reads {' and '.join(reads)}, and has no two towers. Supported: {SUPPORTED}")
    if getattr(base.config, "is_encoder_decoder", False) and isinstance(getattr(base, "decoder", None), nn.Module):
        raise ConfigError(
            f"{name} is an encoder-decoder; give its encoder alone (T5EncoderModel, or model.get_encoder()). "
            f"Supported: {SUPPORTED}"
        )
    first = getattr(base, "main_input_name", "input_ids")
    if first == "pixel_values":
        return "image"
    if first == "input_ids":
        return "text"
    raise ConfigError(f"{name} reads {first} ({reads[0]}). Supported: {SUPPORTED}")


def hidden_states(encoder: nn.Module, **inputs: Tensor) -> Tensor:
    """The last hidden state of a text or image encoder.

    Args:
        encoder: The encoder.
        **inputs: ``input_ids`` and ``attention_mask`` ``(batch, tokens)``, or ``pixel_values``
            ``(batch, 3, height, width)``.

    Returns:
        ``(batch, tokens, d)``, in float32 at least. Rows that prompt tuning puts in front of a text are left out.

    Raises:
        ConfigError: If the model gives none, or a feature map in place of a sequence.
    """
    pixels = inputs.get("pixel_values")
    settings = {} if pixels is None else position_settings(base_of(encoder), pixels)
    hidden = getattr(encoder(**inputs, **settings), "last_hidden_state", None)
    if hidden is None:
        raise ConfigError(
            f"the outputs of {type(encoder).__name__} have no last_hidden_state; give an encoder (AutoModel), not a "
            "model with a head of its own"
        )
    if hidden.ndim != 3:
        raise ConfigError(
            f"the last hidden state of {type(base_of(encoder)).__name__} has {hidden.ndim} axes, not (batch, tokens, "
            f"d): a convolutional network? Supported: {SUPPORTED}"
        )
    if pixels is None:
        hidden = hidden[:, hidden.shape[1] - inputs["input_ids"].shape[1] :]  # virtual tokens stand in front
    return _wide(hidden)


def image_features(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """Projected features ``(batch, d)`` of a dual encoder's image tower, not normalised, in float32 at least."""
    base = base_of(encoder)
    settings = position_settings(base.vision_model, pixel_values)  # type: ignore[arg-type]
    return _pooled(base.get_image_features(pixel_values=pixel_values, **settings))  # type: ignore[operator]


def text_features(encoder: nn.Module, input_ids: Tensor) -> Tensor:
    """Projected features ``(batch, d)`` of a dual encoder's text tower for texts of one length without padding."""
    return _pooled(base_of(encoder).get_text_features(input_ids=input_ids))  # type: ignore[operator]


def _pooled(outputs: Any) -> Tensor:
    return _wide(outputs if isinstance(outputs, Tensor) else outputs.pooler_output)


def _wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def position_settings(tower: nn.Module, pixel_values: Tensor) -> dict[str, bool]:
    """Ask for interpolated positions where the images have another size than the model's; DINOv2 does so unasked."""
    size = getattr(tower.config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if sides == tuple(pixel_values.shape[-2:]):
        return {}
    return {"interpolate_pos_encoding": True} if _can_interpolate(type(tower).forward) else {}


@functools.cache
def _can_interpolate(forward: Callable[..., Any]) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(forward).parameters
