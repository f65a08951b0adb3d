"""The tuner of bottleneck adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from growthring.adapters._common import WrappingTuner
from growthring.backbones import ModuleMap
from growthring.errors import ConfigError

from .config import BottleneckConfig
from .layer import BottleneckLayer

__all__ = ["BottleneckModel"]


class BottleneckModel(WrappingTuner):
    """Puts bottleneck adapters into a model; made by ``get_peft_model``."""

    prefix = "adapter_"
    tuner_layer_cls = BottleneckLayer
    layer_cls = BottleneckLayer

    def _targets(self, config: BottleneckConfig, found: ModuleMap) -> set[str]:
        if config.tower is not None:
            found = found.tower(config.tower)
        wanted = config.layers_to_transform
        numbers = {wanted} if isinstance(wanted, int) else set(wanted or ())
        pairs: dict[str, str] = {}
        for stack in found.stacks:
            if out := sorted(number for number in numbers if not 0 <= number < len(stack.blocks)):
                raise ConfigError(
                    f"BottleneckConfig(layers_to_transform={wanted!r}): {stack.name} has {len(stack.blocks)} blocks, "
                    f"numbered from 0; there is no {out[0]}"
                )
            for number, block in enumerate(stack.blocks):
                if numbers and number not in numbers:
                    continue
                if config.placement in ("attention", "both"):
                    pairs |= {a.output: a.query for a in block.attentions if a.output is not None}
                if config.placement in ("mlp", "both"):
                    pairs |= {mlp.down: mlp.up[0] for mlp in block.mlps}
        for part, role in (("attention", "attention_output"), ("mlp", "mlp_down")):
            if config.placement in (part, "both"):
                found.linears(role)  # fails loudly if the model has none
        config.input_modules = pairs if config.mode == "parallel" else {}
        return set(pairs)

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
        source = (peft_config.input_modules or {}).get(current_key)
        if source is not None:
            layer: Any = getattr(parent, target_name)
            layer.read_from(adapter_name, source, self.model.get_submodule(source))
