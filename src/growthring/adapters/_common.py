"""What our tuners share: a layer that stands in for any module, and a config that finds its targets by role."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.utils import ModelOutput

from growthring.backbones import ModuleMap, map_modules
from growthring.errors import ConfigError

__all__ = ["TokensConfig", "WrappingLayer", "WrappingTuner", "change_first", "first_tensor", "names", "one_tower"]


def names(value: Any) -> Any:
    """Module names as PEFT compares them: a list becomes a set."""
    return set(value) if isinstance(value, list | tuple) else value


def positive(config: object, name: str) -> None:
    """Check a whole number of at least one."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): give a whole number of at least 1")


def check_tower(config: object, tower: str | None) -> None:
    """Check the name of a tower."""
    if tower not in (None, "text", "image"):
        raise ConfigError(f"{type(config).__name__}(tower={tower!r}): allowed: 'text', 'image', or None")


def one_tower(found: ModuleMap, tower: str | None, what: str) -> ModuleMap:
    """The part of a map that a config asks for."""
    if tower is not None:
        return found.tower(tower)
    if len(found.modalities) > 1:
        raise ConfigError(f"{found.model} has towers for {' and '.join(found.modalities)}; say {what}(tower=...)")
    return found


@dataclass
class TokensConfig(PeftConfig):  # type: ignore[misc]
    """Fields that prompts and prefixes share."""

    num_tokens: int = field(default=10, metadata={"help": "Number L of learned tokens."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the initial values."})
    tower: str | None = field(
        default=None, metadata={"help": "'text' or 'image': which tower of a dual encoder is adapted."}
    )
    target_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regex) of the modules to wrap; found from the model by default."}
    )
    exclude_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regex) of modules that are left alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train and are saved as a whole, such as a new head."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules, self.exclude_modules = names(self.target_modules), names(self.exclude_modules)
        positive(self, "num_tokens")
        check_tower(self, self.tower)
        if not self.init_std >= 0:
            raise ConfigError(f"{type(self).__name__}(init_std={self.init_std!r}): give a number of at least 0")


def first_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The hidden state among a module's arguments: the first of them."""
    return args[0] if args else next(iter(kwargs.values()), None)


def change_first(output: Any, change: Callable[[Tensor], Tensor], where: str) -> Any:
    """``output`` with its first tensor changed; tuples and ``ModelOutput`` keep the rest."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, ModelOutput):
        key = next(iter(output))
        changed = copy.copy(output)
        changed[key] = change(output[key])
        return changed
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        rest = (change(output[0]), *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest
    raise ConfigError(
        f"{where}: a {type(output).__name__} came out of the wrapped module; a tensor, or a tuple or ModelOutput that "
        "begins with one, was expected. Choose another target module"
    )


class WrappingLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A tuner layer around any module; what it does not have itself, it takes from the module.

    Args:
        base_layer: The module.
        name: Its qualified name, for messages.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not made yet
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def _like(self) -> dict[str, Any]:
        """Device and dtype of new weights: those of the wrapped module, PyTorch's own where it has none."""
        weights = (p for p in self.base_layer.parameters() if p.is_floating_point())
        like = next(weights, torch.empty(0))
        return {"device": like.device, "dtype": like.dtype}

    def _active(self, container: nn.ModuleDict | nn.ParameterDict) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in container]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused: what the adapter computes is no change of a weight.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{self.name}: {type(self).__name__} cannot be merged, its output is no linear function of the input; "
            "keep the adapter, or train a LoRA if plain weights are needed"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class WrappingTuner(BaseTuner):  # type: ignore[misc]
    """A tuner whose targets are found by :func:`growthring.backbones.map_modules` where none are named."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name and type
    layer_cls: type[WrappingLayer]

    def _targets(self, config: Any, found: ModuleMap) -> set[str]:
        """Names of the modules to wrap."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = self._targets(peft_config, map_modules(self.model))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.layer_cls(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, self.layer_cls):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # taken out again; PEFT would copy a weight, which attention or embeddings do not have
            setattr(parent, child_name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        layers = [module for module in model.modules() if isinstance(module, self.layer_cls)]
        ours = {
            id(p) for layer in layers for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()
        }
        for name, parameter in model.named_parameters():
            if self.prefix in name and id(parameter) not in ours:
                parameter.requires_grad_(
                    False
                )  # PEFT before 0.21 goes by names, and a model's own may hold our prefix


def peft_type(name: str) -> PeftType:
    """The enum member that :func:`register` made."""
    return PeftType(name.upper())
