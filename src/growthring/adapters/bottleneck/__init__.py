"""Bottleneck adapters: Houlsby et al. 2019 (arXiv 1902.00751), parallel form He et al. 2022 (arXiv 2110.04366)."""

from growthring.adapters._registry import register

from .config import BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

register("growthring_bottleneck", BottleneckConfig, BottleneckModel, BottleneckModel.prefix)
