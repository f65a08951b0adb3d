"""Element-wise activations of PyTorch by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from growthring.errors import ConfigError, nearest

__all__ = ["ACTIVATIONS", "activation"]

ACTIVATIONS = (
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "identity", "leaky_relu", "logsigmoid", "mish",
    "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh", "tanhshrink",
)  # fmt: skip
MIXES = ("softmax", "log_softmax", "softmin", "gumbel_softmax", "glu", "swiglu", "geglu", "normalize", "layer_norm")


def identity(x: Tensor) -> Tensor:
    """The input."""
    return x


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name.

    Raises:
        ConfigError: For a name that is unknown, or whose function is not element-wise: mixing coordinates would break
            what guards promise.
    """
    if name in MIXES:
        raise ConfigError(
            f"activation={name!r} mixes coordinates; only element-wise activations are allowed, so that a protected "
            f"input keeps its output: {', '.join(ACTIVATIONS)}"
        )
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation={name!r} is unknown; {nearest(str(name), ACTIVATIONS)}")
    if name == "identity":
        return identity
    return getattr(torch, name) if name in ("sigmoid", "tanh") else getattr(F, name)
