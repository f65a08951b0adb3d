"""Loading an encoder, and choosing which of its weights train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from growthring.errors import ConfigError, nearest

__all__ = ["TRAINABLE", "freeze_all_but", "load_encoder"]

TRAINABLE = ("linear", "full")


def load_encoder(model: nn.Module | str | Path, tokenizer: Any = None) -> tuple[nn.Module, Any, Path | None]:
    """Load what is not loaded yet.

    A model with a classification head of its own is taken without it (``base_model``); growthring brings the head. An
    unused pooler is dropped: it would get no gradient.

    Args:
        model: An encoder, a PEFT model, a folder, or a hub name. Code from a hub is never run.
        tokenizer: Default: loaded from where the model came from.

    Returns:
        Encoder, tokenizer and the folder it was loaded from (``None`` for a hub name or a model object).

    Raises:
        ConfigError: If a name can be loaded neither locally nor from the hub, or no tokenizer can be found.
    """
    source = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if isinstance(model, nn.Module):
        encoder = model
    else:
        if isinstance(model, Path) and not model.is_dir():
            raise ConfigError(f"model: there is no folder {str(model)!r}")
        try:
            encoder = AutoModel.from_pretrained(str(model))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {str(model)!r} could not be loaded: it is no folder with a config.json, and the hub gave "
                f"{type(error).__name__} ({str(error).splitlines()[0]}). Give a local folder or a hub name"
            ) from error
    if not isinstance(encoder, PeftModel):
        encoder = getattr(encoder, "base_model", encoder)
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            encoder.pooler = None
    if tokenizer is None:
        if not source:
            raise ConfigError("give tokenizer=: the model does not say where it was loaded from")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            raise ConfigError(f"no tokenizer could be loaded from {str(source)!r}; give tokenizer=") from error
    folder = Path(source) if source and Path(source).is_dir() else None
    return encoder, tokenizer, folder


def freeze_all_but(encoder: nn.Module, part: str) -> None:
    """Make only ``part`` of the encoder trainable.

    Args:
        encoder: The encoder, changed in place.
        part: ``"linear"``: weights (not biases) of every linear layer; ``"full"``: every parameter.

    Raises:
        ConfigError: On another name, or if the encoder has no such parameter.
    """
    if part not in TRAINABLE:
        raise ConfigError(f"adapter={part!r}: give a PEFT config, or {nearest(part, TRAINABLE)}")
    if part == "full":
        encoder.requires_grad_(True)
        return
    encoder.requires_grad_(False)
    found = [m for m in encoder.modules() if isinstance(m, nn.Linear | Conv1D)]
    if not found:
        raise ConfigError("adapter='linear': the model has no linear layer")
    for module in found:
        module.weight.requires_grad_(True)
