"""The layer of prefix tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from growthring.adapters._common import WrappingLayer, first_tensor
from growthring.errors import ConfigError

from .config import PrefixTokensConfig

__all__ = ["PrefixTokensLayer"]


class PrefixTokensLayer(WrappingLayer):
    """Wraps an attention module whose keys and values get learned rows in front; see :class:`PrefixTokensConfig`.

    Attention modules view keys with the shape of their input, so rows cannot be added inside the projections. The
    input is padded by L rows instead, the projections' rows for them are replaced by the learned ones, and the
    outputs at these L rows are dropped: what is left is attention with ``[P_k; K]`` and ``[P_v; V]``. Prefixes of
    several active adapters stand one after another.

    Attributes:
        prefix_keys: Adapter name to learned keys ``(L, d_kv)``, heads one after another.
        prefix_values: Adapter name to learned values ``(L, d_kv)``.
        key_projection: Name of the key projection inside the wrapped module.
        value_projection: The same for values; equal to the former where projections are fused.
    """

    adapter_layer_names = ("prefix_keys", "prefix_values")

    def __init__(self, base_layer: nn.Module, name: str, key: str, value: str) -> None:
        super().__init__(base_layer, name)
        self.key_projection, self.value_projection = key, value
        self.prefix_keys = nn.ParameterDict()
        self.prefix_values = nn.ParameterDict()

    def _width(self, name: str) -> int:
        module = self.get_base_layer().get_submodule(name)
        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ConfigError(f"{self.name}.{name} is a {type(module).__name__}, no linear projection")
        width = int(weight.shape[1 if isinstance(module, Conv1D) else 0])
        return width // 3 if self.key_projection == self.value_projection else width

    def update_layer(self, adapter_name: str, config: PrefixTokensConfig) -> None:
        """Add a prefix.

        Args:
            adapter_name: Its name.
            config: Its config.
        """
        for container, projection in (
            (self.prefix_keys, self.key_projection),
            (self.prefix_values, self.value_projection),
        ):
            values = torch.empty(config.num_tokens, self._width(projection), **self._like())
            nn.init.normal_(values, std=config.init_std)
            container[adapter_name] = nn.Parameter(values)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def active_prefix(self) -> tuple[Tensor, Tensor] | None:
        """Learned keys and values of all active adapters ``(L, d_kv)`` each; ``None`` if there are none."""
        active = self._active(self.prefix_keys)
        if not active:
            return None
        return torch.cat([self.prefix_keys[n] for n in active]), torch.cat([self.prefix_values[n] for n in active])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped attention with the active prefixes.

        Args:
            *args: Arguments of the wrapped module; the first one is the hidden state ``(batch, tokens, d)``.
            **kwargs: The same, by name. A mask is widened by L columns that every query sees.

        Returns:
            What the wrapped module returns, without the padded rows.

        Raises:
            ConfigError: If it is given a cache or rotary positions, which know nothing of the padded rows.
        """
        prefix = self.active_prefix
        if prefix is None:
            return self.base_layer(*args, **kwargs)
        for name in (
            "past_key_values",
            "past_key_value",
            "layer_past",
            "position_embeddings",
            "encoder_hidden_states",
        ):
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{self.name}: attention was called with {name}; prefix tokens are for encoders that attend to "
                    "one sequence without cache or rotary positions. Use PEFT's PrefixTuningConfig for language models"
                )
        count = len(prefix[0])
        args, kwargs, tokens = self._padded(count, args, kwargs)
        handles = self._hooks(*prefix)
        try:
            output = self.base_layer(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return _dropped(output, count, tokens)

    def _padded(self, count: int, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], int]:
        first = None if args else next(iter(kwargs), "")
        hidden = first_tensor(args, kwargs)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            what = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ConfigError(f"{self.name}: a hidden state (batch, tokens, width) was expected first, {what} came in")
        tokens = hidden.shape[1]
        padded = torch.cat([hidden.new_zeros(len(hidden), count, hidden.shape[-1]), hidden], dim=1)
        rest = tuple(_widened(value, "", self.name, count, tokens) for value in args[1:])
        named = {
            name: padded if name == first else _widened(value, name, self.name, count, tokens)
            for name, value in kwargs.items()
        }
        return (padded, *rest) if args else (), named, tokens

    def _hooks(self, keys: Tensor, values: Tensor) -> list[Any]:
        base, count = self.base_layer, len(keys)

        def put(*parts: Tensor | None) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                width = output.shape[-1] // len(parts)
                rows = [
                    output[:, :count, i * width : (i + 1) * width]
                    if part is None
                    else part.to(output.dtype).expand(len(output), -1, -1)
                    for i, part in enumerate(parts)
                ]
                return torch.cat([torch.cat(rows, dim=-1), output[:, count:]], dim=1)

            return hook

        if self.key_projection == self.value_projection:
            return [base.get_submodule(self.key_projection).register_forward_hook(put(None, keys, values))]
        return [
            base.get_submodule(self.key_projection).register_forward_hook(put(keys)),
            base.get_submodule(self.value_projection).register_forward_hook(put(values)),
        ]

    def __repr__(self) -> str:
        return "prefix_tokens." + super().__repr__()


def _widened(value: Any, name: str, where: str, count: int, tokens: int) -> Any:
    """A mask over ``tokens`` keys with ``count`` more in front, each seen as the most visible key is seen.

    Additive, boolean and 0/1 masks alike: the largest value of a row is what stands for "seen".
    """
    if not isinstance(value, Tensor) or tokens not in value.shape[1:]:
        return value
    if value.dim() == 4 and value.shape[-1] == tokens:
        if value.shape[-2] == tokens:  # one row for each query; outputs of the padded ones are dropped
            value = torch.cat([value[..., :1, :].expand(*value.shape[:-2], count, tokens), value], dim=-2)
        return torch.cat([value.amax(-1, keepdim=True).expand(*value.shape[:-1], count), value], dim=-1)
    if value.dim() == 2 and "mask" in name:
        return torch.cat([value.new_ones(len(value), count), value], dim=-1)
    raise ConfigError(
        f"{where}: attention was called with {name or 'an argument'} of shape {tuple(value.shape)}, which goes with "
        f"its {tokens} tokens and would not fit {count} more (relative positions?); prefix tokens cannot be used here"
    )


def _dropped(output: Any, count: int, tokens: int) -> Any:
    """``output`` without its first ``count`` rows of tokens, in the hidden state and in attention weights."""

    def drop(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() in (3, 4) and value.shape[-2] == tokens + count:
            return value[..., count:, :]
        return value

    return tuple(drop(value) for value in output) if isinstance(output, tuple) else drop(output)
