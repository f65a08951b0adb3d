"""The layer of bottleneck adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from growthring.adapters._common import WrappingLayer, change_first, first_tensor
from growthring.errors import ConfigError

from .activations import activation
from .config import BottleneckConfig

__all__ = ["BottleneckLayer"]


class BottleneckLayer(WrappingLayer):
    """Wraps a module ``f`` and adds bottlenecks beside it or after it; see :class:`BottleneckConfig`.

    Attributes:
        adapter_down: Adapter name to ``nn.Linear(d, r)``.
        adapter_up: Adapter name to ``nn.Linear(r, d)``.
        adapter_mode: Adapter name to ``"parallel"`` or ``"sequential"``.
        adapter_scaling: Adapter name to the fixed factor.
    """

    adapter_layer_names = ("adapter_down", "adapter_up")
    other_param_names = ("adapter_dropout", "adapter_activation", "adapter_mode", "adapter_scaling", "adapter_source")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.in_features, self.out_features = widths(self.get_base_layer(), name)
        self.adapter_down = nn.ModuleDict()
        self.adapter_up = nn.ModuleDict()
        self.adapter_dropout = nn.ModuleDict()
        self.adapter_activation: dict[str, Callable[[Tensor], Tensor]] = {}
        self.adapter_mode: dict[str, str] = {}
        self.adapter_scaling: dict[str, float] = {}
        self.adapter_source: dict[str, str] = {}  # adapter to the module whose input it reads
        self._inputs: dict[str, Tensor] = {}  # of such modules, between their call and ours
        self._handles: dict[str, Any] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            config: Its config.
        """
        width = self.in_features if config.mode == "parallel" else self.out_features
        like = self._like()
        up = nn.Linear(config.r, self.out_features, **like)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.adapter_down[adapter_name] = nn.Linear(width, config.r, **like)
        self.adapter_up[adapter_name] = up
        self.adapter_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.adapter_activation[adapter_name] = activation(config.activation)
        self.adapter_mode[adapter_name] = config.mode
        self.adapter_scaling[adapter_name] = config.scaling
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def read_from(self, adapter_name: str, source: str, module: nn.Module) -> None:
        """Let a parallel adapter read the input of a module that runs before the wrapped one.

        Args:
            adapter_name: The adapter.
            source: The module's qualified name.
            module: The module; the adapter's width becomes that of its input.
        """
        width, _ = widths(module, source)
        old: Any = self.adapter_down[adapter_name]
        if width != old.in_features:
            place = torch.device("meta") if old.weight.is_meta else old.weight.device
            new = nn.Linear(width, old.out_features, device=place, dtype=old.weight.dtype)
            self.adapter_down[adapter_name] = new.requires_grad_(old.weight.requires_grad)
        self.adapter_source[adapter_name] = source
        if source not in self._handles:
            self._handles[source] = module.register_forward_pre_hook(_Keep(self, source), with_kwargs=True)

    def _increment(self, adapter: str, x: Tensor) -> Tensor:
        down: Any = self.adapter_down[adapter]
        up = self.adapter_up[adapter]
        if x.shape[-1] != down.in_features or not x.is_floating_point():
            raise ConfigError(
                f"{self.name}: a {self.adapter_mode[adapter]} adapter of width {down.in_features} was given "
                f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}; choose a target module "
                "whose hidden state has that width along its last axis"
            )
        x = self._cast_input_dtype(x, down.weight.dtype)
        z = self.adapter_activation[adapter](down(self.adapter_dropout[adapter](x)))
        return self.adapter_scaling[adapter] * up(z)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module and add what the active adapters give.

        Args:
            *args: Arguments of the wrapped module; the first one is the hidden state ``(..., d)``.
            **kwargs: The same, by name.

        Returns:
            What the wrapped module returns, its first tensor changed.
        """
        output = self.base_layer(*args, **kwargs)
        kept, self._inputs = self._inputs, {}  # nothing outlives the step
        active = self._active(self.adapter_down)
        if not active:
            return output
        x = first_tensor(args, kwargs)

        def change(h: Tensor) -> Tensor:
            total = h
            for name in active:
                source = self.adapter_source.get(name)
                if source is not None and source not in kept:
                    raise ConfigError(
                        f"{self.name}: its adapter reads the input of {source}, which did not run before it; is that "
                        "module replaced (modules_to_save, a copied block)? Name target_modules in place of placement"
                    )
                z = h if self.adapter_mode[name] == "sequential" else x if source is None else kept[source]
                total = total + self._increment(name, z).to(h.dtype)
            return total

        return change_first(output, change, self.name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT calls to take the adapters out.

        Raises:
            ConfigError: If ``merge`` is true.
        """
        if merge:
            self.merge(safe_merge, adapter_names)
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        return self.get_base_layer()

    def __repr__(self) -> str:
        return "adapter." + super().__repr__()


class _Keep:
    """A hook that keeps a module's input for the layer that adapts it; it copies and pickles with the model."""

    def __init__(self, layer: BottleneckLayer, source: str) -> None:
        self._layer, self._source = layer, source

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._layer._inputs[self._source] = first_tensor(args, kwargs)


def widths(module: nn.Module, name: str) -> tuple[int, int]:
    """Input and output width of a module: of its first and of its last linear layer.

    Raises:
        ConfigError: If it has none.
    """
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(into, int) and isinstance(out, int):
        return into, out
    linears = [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]
    if not linears:
        raise ConfigError(
            f"{name} is a {type(module).__name__} without a linear layer, so its width is unknown; an adapter can "
            "wrap linear layers and modules that hold some (attention, an MLP, a block)"
        )
    first, last = linears[0], linears[-1]
    return (
        int(first.weight.shape[0 if isinstance(first, Conv1D) else 1]),
        int(last.weight.shape[1 if isinstance(last, Conv1D) else 0]),
    )
