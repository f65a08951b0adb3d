"""LARGO-style adapters: low-rank factors that start from singular vectors (our reading of arXiv 2506.12394)."""

from growthring.adapters._registry import register

from .activations import start_from_activations
from .config import LargoConfig
from .export import adapter_as_lora, save_as_lora
from .kinds import LargoEmbedding, LargoLinear
from .layer import LargoLayer
from .model import LargoModel

__all__ = [
    "LargoConfig",
    "LargoEmbedding",
    "LargoLayer",
    "LargoLinear",
    "LargoModel",
    "adapter_as_lora",
    "save_as_lora",
    "start_from_activations",
]

register("growthring_largo", LargoConfig, LargoModel, LargoModel.prefix)
