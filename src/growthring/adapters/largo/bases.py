"""The layers that can be adapted, and how their weights are read: as they are, transposed, or dequantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from growthring.errors import ConfigError

try:
    from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
except ImportError:  # peft before its quantisation backends: quantised layers are refused
    get_quantization_kwargs = resolve_quantization_backend = None

__all__ = ["Base", "embed_scale", "quantisation_of"]


class Base:
    """A base layer's weight as ``(m, n)``, outputs by inputs.

    Args:
        layer: The layer.
        name: Its qualified name, for messages.
        quantisation: What PEFT's backends need to know of the model.
        backend: The backend, where it is known already.

    Raises:
        ConfigError: If the layer cannot be adapted.
    """

    def __init__(
        self, layer: nn.Module, name: str, quantisation: dict[str, Any] | None = None, backend: Any = None
    ) -> None:
        self.layer, self.name = layer, name
        self.backend = backend
        if quantisation is not None and resolve_quantization_backend is not None:
            self.backend = resolve_quantization_backend(layer, **quantisation)
        self.is_linear = not isinstance(layer, nn.Embedding)
        self.out_features, self.in_features = self._sizes()

    def _sizes(self) -> tuple[int, int]:
        layer: Any = self.layer
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            raise ConfigError(
                f"{self.name} is the output projection of nn.MultiheadAttention, which reads its weight without "
                "calling it, so an adapter on it would do nothing; leave it out with exclude_modules"
            )
        if isinstance(layer, Conv1D):
            sizes = (int(layer.weight.shape[1]), int(layer.weight.shape[0]))
        elif isinstance(layer, nn.Embedding):
            sizes = (layer.embedding_dim, layer.num_embeddings)
        elif isinstance(layer, nn.Linear) or self.backend is not None:
            sizes = (int(layer.out_features), int(layer.in_features))
        else:
            raise ConfigError(
                f"{self.name} is a {type(layer).__name__}; LargoConfig can adapt Linear, Conv1D and Embedding layers. "
                "Name other target_modules"
            )
        if min(sizes) == 0:
            raise ConfigError(
                f"{self.name} has {sizes[0]} outputs and {sizes[1]} inputs: an empty weight has no singular vectors; "
                "leave it out with exclude_modules"
            )
        weight = getattr(layer, "weight", None)
        if self.backend is None and (weight is None or not weight.is_floating_point() or weight.itemsize < 2):
            held = "missing" if weight is None else str(weight.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{self.name} is a {type(layer).__name__} whose weight is {held}; it seems quantised in a way "
                "that this version of peft has no backend for. Load the model unquantised, or update peft"
            )
        return sizes

    def like(self) -> dict[str, Any]:
        """Device and dtype of new factors: float32 over anything narrower."""
        weight = getattr(self.layer, "weight", None)
        weight = getattr(self.layer, "qweight", None) if weight is None else weight
        device = torch.device("cpu") if weight is None else weight.device
        wide = self.backend is None and weight is not None and weight.dtype == torch.float64
        return {"device": device, "dtype": torch.float64 if wide else torch.float32}

    def weight(self) -> Tensor:
        """``W0`` as ``(m, n)``, dequantised; not to be written to.

        Raises:
            ConfigError: If it is quantised in a way that cannot be undone.
        """
        return self.oriented(self._held())

    def _held(self) -> Tensor:
        layer: Any = self.layer
        if self.backend is None:
            return layer.weight.detach()
        try:
            return self.backend.get_base_weight(layer).detach()
        except (NotImplementedError, TypeError) as error:
            raise ConfigError(
                f"{self.name}: {str(error).strip()} A start from the weight and merging need it; "
                "LargoConfig(init='activation') starts without"
            ) from error

    def oriented(self, weight: Tensor) -> Tensor:
        """From outputs by inputs to the base layer's own shape, or back."""
        return weight.T if isinstance(self.layer, Conv1D | nn.Embedding) else weight

    def plus(self, deviation: Tensor) -> Tensor:
        """The weight, in its own shape and dtype, with a deviation added in the wider of both dtypes."""
        held = self._held()
        return (held + deviation.to(held.device)).to(held.dtype)


def quantisation_of(model: nn.Module) -> dict[str, Any]:
    """What PEFT's backends need to know of a model."""
    return {} if get_quantization_kwargs is None else dict(get_quantization_kwargs(model))


def embed_scale(layer: Any) -> Tensor | None:
    """The factor that some embeddings multiply their output by."""
    scale: Tensor | None = layer._get_embed_scale()
    return scale
