"""From settings to what trains: a PEFT config that fits the model, weights beside it, the optimizer, the guards."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from growthring.errors import ConfigError, nearest

from ._method import Method
from .method_settings import AdapterSettings, GuardSettings
from .optimizer_settings import OptimizerSettings
from .presets import gorp_preset

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from growthring.guards import Guard

__all__ = ["make_adapter", "make_full_rank", "make_guards", "make_optimizer"]


def make_adapter(method: Method, settings: AdapterSettings | None, encoder: nn.Module) -> PeftConfig | str:
    """What the method trains of this encoder.

    Prefixes and prompts of text encoders and decoders are PEFT's own, where the model takes them; those of image
    encoders and of the towers of dual encoders are :mod:`growthring.adapters`'.

    Args:
        method: The method.
        settings: The adapter's settings, filled in; ``None`` for methods without an adapter.
        encoder: The encoder without an adapter.

    Returns:
        A PEFT config, ``"linear"`` or ``"full"``.

    Raises:
        ConfigError: The settings do not fit the encoder, or its parts cannot be found.
    """
    from growthring.trainer.encoders import kind_of

    if settings is None:
        return method.adapter
    reads = kind_of(encoder)
    if settings.tower is not None and reads != "dual":
        raise ConfigError(
            f"adapter.tower: has no effect: {type(encoder).__name__} is no dual encoder, it has one tower. Remove it"
        )
    if method.adapter in ("lora", "lora+weights"):
        from peft import LoraConfig

        return LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=_targets(settings, encoder),
        )
    if method.adapter == "largo":
        from growthring.adapters import LargoConfig

        chosen: Any = {name: getattr(settings, name) for name in ("r", "alpha", "init", "form", "svd_iterations")}
        targets: Any = _targets(settings, encoder)
        return LargoConfig(target_modules=targets, **chosen)
    if method.adapter == "bottleneck":
        from growthring.adapters import BottleneckConfig

        names = ("r", "placement", "mode", "activation", "scaling", "dropout", "tower")
        return BottleneckConfig(**{name: getattr(settings, name) for name in names})
    if method.adapter == "ia3":
        from peft import IA3Config

        found = _map(encoder, settings.tower)
        down = found.linears("mlp_down")
        scaled = {*found.linears("key"), *found.linears("value"), *down}
        return IA3Config(target_modules=sorted(scaled), feedforward_modules=sorted(down))
    return _tokens(method, settings, encoder, reads)


def make_full_rank(method: Method, settings: AdapterSettings | None, encoder: nn.Module) -> str | list[str] | None:
    """Weights that train whole beside LoRA, as ``full_rank`` of :class:`~growthring.ContinualTrainer` takes them.

    Args:
        method: The method.
        settings: The adapter's settings, filled in.
        encoder: The encoder without an adapter.

    Returns:
        Names of layers, a role or ``"all-linear"``; ``None`` for methods that train no such weights.

    Raises:
        ConfigError: There are none in the encoder, or LoRA adapts all of them.
    """
    if settings is None or settings.full_rank is None:
        return None
    wanted = settings.full_rank
    if isinstance(wanted, list):
        _check_names(wanted, encoder, "full_rank")
        return wanted
    if wanted == "preset":
        names: Iterable[str] = gorp_preset(encoder, tower=settings.tower).full_rank
    elif settings.tower is None:
        return str(wanted)
    else:
        names = _map(encoder, settings.tower).linears("all" if wanted == "all-linear" else wanted)
    adapted = _targets(settings, encoder)
    ends = () if isinstance(adapted, str) else tuple(f".{one}" for one in adapted)
    left = [] if isinstance(adapted, str) else [name for name in names if not f".{name}".endswith(ends)]
    if not left:
        raise ConfigError(
            f"adapter.full_rank: {wanted}: LoRA adapts every one of these layers. Choose fewer target_modules, or "
            "name the layers, which then train in both ways"
        )
    return left


def make_optimizer(method: Method, settings: OptimizerSettings | None) -> tuple[Any, dict[str, Any]] | None:
    """The optimizer of a method that has one of its own, as :class:`~growthring.ContinualTrainer` takes it."""
    if settings is None:
        return None
    from growthring.optim import GORP, GaLore, GORPFactory

    values = {name: getattr(settings, name) for name in type(settings).model_fields if name != "full_rank_lr"}
    values = {name: value for name, value in values.items() if value is not None}
    # LoRA's factors have a low rank already, and a head has few rows: AdamW steps them
    kind = GaLore if method.optimizer == "galore" else GORP
    return GORPFactory, {"optimizer": kind, "targets": r"(?!head\.)(?!.*\.lora_).+", **values}


def make_guards(method: Method, settings: GuardSettings | None, adapter: AdapterSettings | None = None) -> list[Guard]:
    """The guards of a method: none, one, or a memory and what gives every task a LoRA of its own."""
    from growthring import guards

    if settings is None:
        return []
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    values = {name: value for name, value in values.items() if value is not None}
    if method.guard == "gradient-memory":
        del values["mode"]  # it has decided the others
        made: list[Guard] = [guards.GradientMemory(**values)]
        if adapter is not None and adapter.branches is not None:
            made.append(guards.FreshLoRA(merge=adapter.branches == "merged"))  # it merges when the memory is done
        return made
    kinds: dict[str, Any] = {
        "pegp": guards.PEGP,
        "inflora": guards.InfLoRA,
        "o-lora": guards.OLoRA,
        "radius": guards.Radius,
        "directional": guards.Directional,
        "l2-sp": guards.L2SP,
        "ftp": guards.FTP,
        "tpgm": guards.TPGM,
        "spd": guards.SPD,
    }
    return [kinds[str(method.guard)](**values)]


def _tokens(method: Method, settings: AdapterSettings, encoder: nn.Module, reads: str) -> PeftConfig:
    if reads == "text" and (method.adapter == "prompt" or _takes_a_cache(encoder)):
        from peft import PrefixTuningConfig, PromptTuningConfig

        kind = PrefixTuningConfig if method.adapter == "prefix" else PromptTuningConfig
        return kind(task_type="FEATURE_EXTRACTION", num_virtual_tokens=settings.tokens, **_sizes(encoder))
    from growthring.adapters import PrefixTokensConfig, PromptTokensConfig

    if reads == "dual" and settings.tower is None:
        raise ConfigError(
            f"adapter.tower: is missing: {type(encoder).__name__} has two towers, and a {method.adapter} belongs to "
            "one of them. Say text or image"
        )
    own: Any = PrefixTokensConfig if method.adapter == "prefix" else PromptTokensConfig
    return own(num_tokens=settings.tokens, tower=settings.tower)


def _takes_a_cache(encoder: nn.Module) -> bool:
    """Whether PEFT can hand the prefix over as keys and values of earlier tokens."""
    return "past_key_values" in inspect.signature(encoder.forward).parameters


def _sizes(encoder: nn.Module) -> dict[str, int]:
    """Sizes that PEFT does not find by itself where a model's config calls them otherwise, as DistilBERT's does."""
    config: Any = encoder.config
    if config.to_dict().keys() & {"hidden_size", "n_embd", "d_model"}:
        return {}
    return {
        "token_dim": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }


def _targets(settings: AdapterSettings, encoder: nn.Module) -> str | list[str]:
    """Modules for LoRA: all of them by PEFT's own word, those of a role, or names that were given."""
    wanted = settings.target_modules
    if isinstance(wanted, list):
        _check_names(wanted, encoder, "target_modules")
        return wanted
    if wanted == "preset":
        return list(gorp_preset(encoder, tower=settings.tower).lora)
    if wanted == "all-linear" and settings.tower is None:
        return "all-linear"
    return list(_map(encoder, settings.tower).linears("all" if wanted == "all-linear" else str(wanted)))


def _map(encoder: nn.Module, tower: str | None) -> Any:
    from growthring.backbones import map_modules

    found = map_modules(encoder)
    return found if tower is None else found.tower(tower)


def _check_names(wanted: list[str], encoder: nn.Module, setting: str) -> None:
    """Refuse names that match no linear layer: PEFT ignores them as long as one other name matches."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for one in wanted:
        if not any(name == one or name.endswith(f".{one}") for name in names):
            near = nearest(one, {name.split(".")[-1] for name in names})
            raise ConfigError(f"adapter.{setting}: the model has no linear layer {one!r}; {near}")
