"""Linear weights of the base model that train themselves, beside a LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from growthring.backbones import ROLES, map_modules
from growthring.errors import ConfigError, nearest

__all__ = ["describe", "rate_apart", "unfreeze"]


@dataclass(frozen=True)
class _Layer:
    """One linear layer of the base model: the layer itself, and whether LoRA is wrapped around it."""

    module: nn.Module
    adapted: bool


def unfreeze(encoder: nn.Module, wanted: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Let weights of the base model train.

    Args:
        encoder: A ``PeftModel`` with LoRA, changed in place.
        wanted: Names, or ends of names, of linear layers; a role of :data:`growthring.backbones.ROLES`; or
            ``"all-linear"``. A role and ``"all-linear"`` leave out layers that LoRA adapts; a layer named by itself
            trains in both ways at once.

    Returns:
        Names of the layers in the base model, and their weights.

    Raises:
        ConfigError: There is no LoRA, a name is missing, nothing is left, or a weight is tied, quantised or unused.
    """
    config = encoder.active_peft_config if isinstance(encoder, PeftModel) else None
    if not isinstance(config, LoraConfig) or not isinstance(encoder, PeftModel):
        found = f"this one is {config.peft_type.value}" if config is not None else "there is none"
        raise ConfigError(
            f"full_rank trains base weights beside a LoRA adapter, and {found}. Give adapter=LoraConfig(...); to "
            "train base weights alone give adapter='linear', or adapter=None and a model of which some parameters "
            "require gradients"
        )
    base = encoder.get_base_model()
    layers = _layers(base)
    chosen = _by_rule(base, layers, wanted) if isinstance(wanted, str) else None
    if chosen is None:
        chosen = _by_name(layers, [wanted] if isinstance(wanted, str) else list(wanted))
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    weights = {name: _weight(name, layers[name].module, owners) for name in chosen}
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def rate_apart(weights: Mapping[str, nn.Parameter], lr: float | None) -> tuple[list[nn.Parameter], float] | None:
    """The weights with their learning rate, if they have one of their own.

    Raises:
        ConfigError: The rate is not above 0, or there is no such weight.
    """
    if lr is None:
        return None
    if not weights:
        raise ConfigError(f"full_rank_lr={lr!r} has no effect without full_rank: name the weights that train whole")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0.0 < lr < math.inf:
        raise ConfigError(f"full_rank_lr={lr!r}: a number above 0 is needed")
    return list(weights.values()), float(lr)


def describe(weights: Mapping[str, nn.Parameter], lr: float | None) -> dict[str, Any] | None:
    """What trains whole, as plain values for the results."""
    return {"layers": list(weights), "lr": lr} if weights else None


def _layers(base: nn.Module) -> dict[str, _Layer]:
    """Linear layers by the names that they had before PEFT wrapped anything; not those of adapters."""
    found: dict[str, _Layer] = {}
    inner: set[nn.Module] = set()
    for name, module in base.named_modules():
        if module in inner:
            continue
        layer, adapted = module, isinstance(module, BaseTunerLayer)
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            inner |= set(module.modules())
        if isinstance(layer, nn.Linear | Conv1D):
            found[name] = _Layer(layer, adapted)
    return found


def _by_rule(base: nn.Module, layers: dict[str, _Layer], wanted: str) -> list[str] | None:
    """Layers of a role, or all of them, without those that LoRA adapts; ``None`` if ``wanted`` is no such word."""
    if wanted == "all-linear":
        names = [name for name in layers if name.split(".")[0] != "pooler"]
    elif wanted in ROLES:
        names = list(map_modules(base).linears(wanted))
    else:
        return None
    left = [name for name in names if not layers[name].adapted]
    if not left:
        raise ConfigError(
            f"full_rank={wanted!r}: LoRA adapts every one of these {len(names)} layers, and a role leaves those out. "
            "Choose other target_modules, or name the layers, which then train in both ways"
        )
    return left


def _by_name(layers: dict[str, _Layer], wanted: Sequence[str]) -> list[str]:
    """Layers whose names are, or end with, one of these."""
    if not wanted:
        raise ConfigError("full_rank names no layer; leave it out, or name some")
    chosen: dict[str, None] = {}
    for one in wanted:
        if not isinstance(one, str):
            raise ConfigError(f"full_rank: names of linear layers are needed, not {one!r}")
        found = [name for name in layers if name == one or name.endswith(f".{one}")]
        if not found:
            known = {*(name.split(".")[-1] for name in layers), *(() if len(wanted) > 1 else ROLES)}
            raise ConfigError(f"full_rank: the model has no linear layer {one!r}; {nearest(one, known)}")
        chosen |= dict.fromkeys(found)
    unused = [name for name in chosen if name.split(".")[0] == "pooler"]
    if unused:
        raise ConfigError(
            f"full_rank: no loss reaches {unused[0]}: features are pooled from the last hidden state. Leave it out"
        )
    return list(chosen)


def _weight(name: str, module: nn.Module, owners: dict[int, list[str]]) -> nn.Parameter:
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ConfigError(
            f"full_rank: the weight of {name} ({type(module).__name__}) is quantised and cannot train. Load the model "
            "without quantisation, or leave the layer out"
        )
    others = [one for one in owners.get(id(weight), ()) if one != f"{name}.weight"]
    if others:
        raise ConfigError(
            f"full_rank: the weight of {name} is tied to {', '.join(others)}, which would change with it. Untie it "
            "(tie_word_embeddings=False), or leave the layer out"
        )
    return weight
