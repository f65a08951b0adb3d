"""The tuner of prefix tokens."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from growthring.adapters._common import WrappingTuner, one_tower
from growthring.backbones import ModuleMap
from growthring.errors import ConfigError

from .config import PrefixTokensConfig
from .layer import PrefixTokensLayer

__all__ = ["PrefixTokensModel"]


class PrefixTokensModel(WrappingTuner):
    """Puts prefix tokens into a model; made by ``get_peft_model``."""

    prefix = "prefix_"
    tuner_layer_cls = PrefixTokensLayer
    layer_cls = PrefixTokensLayer

    def _targets(self, config: PrefixTokensConfig, found: ModuleMap) -> set[str]:
        found = one_tower(found, config.tower, "PrefixTokensConfig")
        projections: dict[str, list[str]] = {}
        for block in found.blocks:
            for attention in block.attentions:
                inside = attention.module + "."
                if attention.cross or not all(name.startswith(inside) for name in attention.inputs):
                    raise ConfigError(
                        f"PrefixTokensConfig: {attention.module} of {found.model} "
                        f"{'attends to another sequence' if attention.cross else 'does not hold its projections'}; "
                        "self-attention that projects its own input was looked for. Use PEFT's PrefixTuningConfig"
                    )
                if attention.fused and not attention.thirds:
                    raise ConfigError(
                        f"PrefixTokensConfig: {attention.query} of {found.model} gives query, key and value in one "
                        "tensor, but not one after another; there is no place for the learned rows"
                    )
                own = _positions(self.model.get_submodule(attention.module))
                if own:
                    raise ConfigError(
                        f"PrefixTokensConfig: {attention.module} of {found.model} has {own}, a position of its own "
                        "for every pair of tokens, and learned rows have none; prefix tokens cannot be used here"
                    )
                projections[attention.module] = [n.removeprefix(inside) for n in (attention.key, attention.value)]
        config.projections = projections
        return set(projections)

    def _create_and_replace(
        self,
        peft_config: PrefixTokensConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, PrefixTokensLayer):
            key, value = self._projections(peft_config, current_key)
            layer = PrefixTokensLayer(target, current_key, key, value)
            layer.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        else:
            target.update_layer(adapter_name, peft_config)

    @staticmethod
    def _projections(config: PrefixTokensConfig, name: str) -> tuple[str, str]:
        for module, pair in (config.projections or {}).items():
            if (name == module or name.endswith("." + module)) and len(pair) == 2:
                return pair[0], pair[1]
        raise ConfigError(f"PrefixTokensConfig(projections=...): nothing about {name}; give [key, value] for it")


def _positions(attention: nn.Module) -> str | None:
    """Name of a table that attention adds to its scores: a weight outside of linear layers and norms."""
    base = attention.get_base_layer() if isinstance(attention, PrefixTokensLayer) else attention
    for name, module in base.named_modules():
        own = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
        if own and not isinstance(module, nn.Linear | Conv1D):
            return name or "a table"
    return None
