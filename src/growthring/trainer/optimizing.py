"""A task's optimizer: from a class or a factory, with a learning rate of its own for full-rank weights."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from growthring.errors import ConfigError
from growthring.optim import GORP, GORPFactory

__all__ = ["Optimizer", "check_optimizer", "explain_optimizer", "is_factory", "resolve", "separate"]

Optimizer = tuple[Any, dict[str, Any]]
"""A ``torch.optim.Optimizer`` class, or a factory that is called as ``factory()(model, **kwargs)``; and keywords."""


def is_factory(kind: Any) -> bool:
    """Whether ``transformers.Trainer`` calls ``kind()(model, **kwargs)`` and not ``kind(groups, **kwargs)``."""
    return not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))


def check_optimizer(optimizer: Optimizer | None, args: TrainingArguments) -> None:
    """Refuse an optimizer that is none, and projection of gradients that DeepSpeed has flattened.

    Raises:
        ConfigError: In both cases.
    """
    if optimizer is None:
        return
    kind = optimizer[0]
    if not callable(kind):
        raise ConfigError(f"optimizer={optimizer!r}: give (class, keyword arguments), or (factory, keyword arguments)")
    projects = isinstance(kind, type) and issubclass(kind, GORP | GORPFactory)
    if projects and (args.deepspeed or getattr(args, "deepspeed_plugin", None)):
        raise ConfigError(
            f"{kind.__name__} projects the gradient of a matrix, and DeepSpeed ZeRO flattens parameters to one "
            "dimension, so that no matrix is left. Use DDP or FSDP2 in place of DeepSpeed, or another optimizer (a "
            "guard such as PEGP protects earlier tasks under any)"
        )


def resolve(optimizer: Optimizer, args: TrainingArguments) -> Optimizer:
    """The optimizer with the learning rate and the weight decay of ``args`` where it leaves them out.

    Of a class the Trainer itself puts the weight decay into the parameter groups.
    """
    kind, settings = optimizer
    factory = is_factory(kind)
    known = inspect.signature(kind() if factory else kind).parameters
    filled = {"lr": args.learning_rate, **({"weight_decay": args.weight_decay} if factory else {})}
    return kind, {name: value for name, value in filled.items() if name in known} | dict(settings)


def separate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], lr: float) -> None:
    """Give some of an optimizer's parameters groups of their own, with another learning rate.

    Args:
        optimizer: Changed in place, before its first step and before a scheduler is made.
        parameters: Those that move.
        lr: Their learning rate.
    """
    moving = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        inside = [id(parameter) in moving for parameter in group["params"]]
        if inside and all(inside):
            group["lr"] = lr
        if not any(inside) or all(inside):
            continue
        lists = {key: group[key] for key in ("params", "param_names") if key in group}
        new = {key: value for key, value in group.items() if key not in lists} | {"lr": lr}
        for key, values in lists.items():
            group[key] = [value for value, one in zip(values, inside, strict=True) if not one]
            lists[key] = [value for value, one in zip(values, inside, strict=True) if one]
        moved = lists["params"]
        new["params"] = list(zip(lists["param_names"], moved, strict=True)) if "param_names" in lists else moved
        optimizer.add_param_group(new)


def explain_optimizer(model: nn.Module, optimizer: Optimizer | None, args: TrainingArguments) -> list[dict[str, Any]]:
    """How an optimizer would treat every parameter of a model, as plain values; empty if it does not say.

    Args:
        model: The model as it trains.
        optimizer: The optimizer.
        args: Training arguments.
    """
    if optimizer is None or not (is_factory(optimizer[0]) or hasattr(optimizer[0], "explain")):
        return []
    kind, settings = resolve(optimizer, args)
    if is_factory(kind):
        made = kind()(model, **settings)
    else:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        made = kind(settings.pop("params", named), **settings)
    plans = made.explain() if callable(getattr(made, "explain", None)) else ()
    return [{k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(plan).items()} for plan in plans]
