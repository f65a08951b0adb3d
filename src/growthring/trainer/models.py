"""Loading an encoder, and choosing which of its weights train."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from growthring.errors import ConfigError, nearest

from .encoders import base_of, kind_of

__all__ = ["TRAINABLE", "adapt", "freeze_all_but", "load_encoder", "usable_length"]

logger = logging.getLogger(__name__)

TRAINABLE = ("linear", "full")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_encoder(model: nn.Module | str | Path, tokenizer: Any = None) -> tuple[nn.Module, Any, Path | None]:
    """Load what is not loaded yet.

    A model loaded by name is in float32, whatever its file holds: half-precision weights round small updates away. A
    model with a classification head of its own is taken without it (``base_model``); growthring brings the head. A
    pooler stays as it is and does not train: features are pooled from the last hidden state.

    Args:
        model: An encoder, a PEFT model, a folder, or a hub name. Code from a hub is never run.
        tokenizer: Default: loaded from where the model came from. Image encoders have none.

    Returns:
        Encoder, tokenizer and the folder it was loaded from (``None`` for a hub name or a model object).

    Raises:
        ConfigError: If a name can be loaded neither locally nor from the hub, the model is of no kind that can be
            used, or no tokenizer can be found.
    """
    if isinstance(model, nn.Module):
        source = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        encoder = model
    else:
        source = _place(model)
        try:
            encoder = AutoModel.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {str(model)!r} could not be loaded: it is no folder with a config.json, and the hub gave "
                f"{type(error).__name__} ({str(error).splitlines()[0]}). Give a local folder or a hub name"
            ) from error
    if not isinstance(encoder, PeftModel):
        encoder = getattr(encoder, "base_model", encoder)
        _rest_pooler(encoder)
    folder = Path(source) if source and Path(source).is_dir() else None
    if kind_of(encoder) == "image":
        return encoder, None, folder
    return encoder, _tokenizer(source, folder) if tokenizer is None else tokenizer, folder


def _place(model: str | Path) -> str:
    """A folder's path, or a hub name; what can only be a path is not asked of the hub."""
    place = Path(model).expanduser()
    looks_local = isinstance(model, Path) or place.is_absolute() or str(model).startswith(".") or len(place.parts) > 2
    if looks_local and not place.is_dir():
        raise ConfigError(f"model: there is no folder {str(model)!r}")
    return str(place) if place.is_dir() else str(model)


def _tokenizer(source: str, folder: Path | None) -> Any:
    if not source:
        raise ConfigError("give tokenizer=: the model does not say where it was loaded from")
    # without such a file some classes come up with an empty vocabulary, and every word would be unknown
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"the folder {str(folder)!r} holds no tokenizer (no tokenizer.json or the like); give tokenizer="
        )
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer could be loaded from {source!r}; give tokenizer=") from error


def usable_length(encoder: nn.Module, tokenizer: Any, asked: int, adapter: PeftConfig | str | None = None) -> int:
    """``asked`` tokens, or fewer where the model has no positions for them; virtual tokens take positions too."""
    if isinstance(encoder, PeftModel):
        adapter = encoder.active_peft_config
    config = base_of(encoder).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[operator]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int):
        positions -= getattr(adapter, "num_virtual_tokens", None) or 0
        if positions < 3:
            raise ConfigError("the adapter's virtual tokens leave no position for a text; choose fewer")
    limits = (positions, getattr(tokenizer, "model_max_length", None))
    length = min([asked, *(n for n in limits if isinstance(n, int) and n > 0)])
    if length < asked:
        logger.info("texts are cut at %d tokens, which is what the model can hold; max_length=%d", length, asked)
    return length


def adapt(encoder: nn.Module, adapter: PeftConfig | str | None) -> nn.Module:
    """Make what should train trainable.

    Args:
        encoder: The encoder, changed in place.
        adapter: A PEFT config (not changed), ``"linear"``, ``"full"``, or ``None`` to leave everything as it is.

    Returns:
        The encoder, wrapped where ``adapter`` is a PEFT config.

    Raises:
        ConfigError: If there is an adapter already, a name is unknown, no layer is found to adapt, the rank is larger
            than the width, or PEFT's prompt learning is to adapt what is no text encoder.
    """
    if not isinstance(adapter, PeftConfig):
        if adapter is not None:
            freeze_all_but(encoder, adapter)
        return encoder
    if isinstance(encoder, PeftModel):
        raise ConfigError("the model already has an adapter; give adapter=None to train that one")
    rank, width = getattr(adapter, "r", None), int(getattr(encoder.config, "hidden_size", 0))
    if isinstance(rank, int) and 0 < width < rank:
        raise ConfigError(f"adapter rank {rank} is larger than the model's width {width}; choose r <= {width}")
    adapter = copy.deepcopy(adapter)
    if isinstance(adapter, PromptLearningConfig):
        _for_features(encoder, adapter)
    _exclude_pooler(encoder, adapter)
    kinds = {type(m) for m in encoder.modules()}
    if hasattr(adapter, "fan_in_fan_out") and Conv1D in kinds and nn.Linear not in kinds:
        adapter.fan_in_fan_out = True  # GPT-2 stores its matrices so; PEFT would find out, with a warning
    with warnings.catch_warnings():
        # peft asks transformers for this property under its old name; nothing a user of ours could change
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        try:
            return get_peft_model(encoder, adapter)
        except ConfigError:
            raise
        except ValueError as error:
            if "target modules" not in str(error).lower():
                raise
            layers = {n.split(".")[-1] for n, m in encoder.named_modules() if isinstance(m, nn.Linear | Conv1D)}
            raise ConfigError(
                f"the adapter finds no layer in {type(encoder).__name__}: {str(error).splitlines()[0]} Linear layers "
                f"of this model are named {', '.join(sorted(layers))}"
            ) from error


def freeze_all_but(encoder: nn.Module, part: str) -> None:
    """Make only ``part`` of the encoder trainable.

    Args:
        encoder: The encoder, changed in place.
        part: ``"linear"``: weights (not biases) of every linear layer; ``"full"``: every parameter. Of an unused
            pooler nothing; the temperature of a dual encoder stays as it is.

    Raises:
        ConfigError: On another name, or if the encoder has no such parameter.
    """
    if part not in TRAINABLE:
        raise ConfigError(f"adapter={part!r}: give a PEFT config, or {nearest(str(part), TRAINABLE)}")
    encoder.requires_grad_(part == "full")
    if part == "linear":
        found = [m for m in encoder.modules() if isinstance(m, nn.Linear | Conv1D)]
        if not found:
            raise ConfigError("adapter='linear': the model has no linear layer")
        for module in found:
            module.weight.requires_grad_(True)
    _rest_pooler(encoder)


def _rest_pooler(encoder: nn.Module) -> None:
    """Freeze what no loss reaches (a pooler), and a dual encoder's temperature, which would only scale the loss."""
    pooler, temperature = getattr(encoder, "pooler", None), getattr(encoder, "logit_scale", None)
    for part in (pooler, temperature):
        if isinstance(part, nn.Module | nn.Parameter):
            part.requires_grad_(False)


def _for_features(encoder: nn.Module, adapter: PeftConfig) -> None:
    """Let a prompt-learning config give features, which is what PEFT has to be told."""
    kind = type(adapter).__name__
    if kind_of(encoder) != "text":
        raise ConfigError(
            f"{kind} learns prompts of a text encoder, and {type(encoder).__name__} is none; for image encoders and "
            "dual encoders use growthring.adapters.PromptTokensConfig or PrefixTokensConfig"
        )
    task = getattr(adapter.task_type, "value", adapter.task_type)
    if task not in (None, "FEATURE_EXTRACTION"):
        raise ConfigError(f"{kind}(task_type={task!r}): the head is growthring's; leave task_type out")
    adapter.task_type = "FEATURE_EXTRACTION"


def _exclude_pooler(encoder: nn.Module, adapter: PeftConfig) -> None:
    """Say in the adapter's config that an unused pooler has no adapter, so that stock PEFT makes none on loading."""
    pooler = getattr(encoder, "pooler", None)
    if not isinstance(pooler, nn.Module) or not hasattr(adapter, "exclude_modules"):
        return
    names = [n for n, m in encoder.named_modules() if n.split(".")[0] == "pooler" and isinstance(m, nn.Linear)]
    given = adapter.exclude_modules
    if not names:
        return
    if isinstance(given, str):
        adapter.exclude_modules = "|".join([f"(?:{given})", *map(re.escape, names)])
    else:
        adapter.exclude_modules = sorted({*(given or ()), *names})
