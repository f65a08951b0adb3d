"""Adapters of our own, as PEFT tuners that are registered when this package is imported.

They are used as PEFT's own: ``get_peft_model(model, BottleneckConfig(r=16))``, ``save_pretrained``,
``PeftModel.from_pretrained``, several adapters in one model, ``disable_adapter``.
"""

from .bottleneck import BottleneckConfig, BottleneckLayer
from .largo import (
    LargoConfig,
    LargoEmbedding,
    LargoLayer,
    LargoLinear,
    adapter_as_lora,
    save_as_lora,
    start_from_activations,
)
from .prefix import PrefixTokensConfig, PrefixTokensLayer
from .prompt import PromptTokensConfig, PromptTokensLayer

__all__ = [
    "BottleneckConfig",
    "BottleneckLayer",
    "LargoConfig",
    "LargoEmbedding",
    "LargoLayer",
    "LargoLinear",
    "PrefixTokensConfig",
    "PrefixTokensLayer",
    "PromptTokensConfig",
    "PromptTokensLayer",
    "adapter_as_lora",
    "save_as_lora",
    "start_from_activations",
]
