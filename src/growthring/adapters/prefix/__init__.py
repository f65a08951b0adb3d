"""Learned keys and values in attention (Li and Liang 2021, arXiv 2101.00190), for encoders without a cache."""

from growthring.adapters._registry import register

from .config import PrefixTokensConfig
from .layer import PrefixTokensLayer
from .model import PrefixTokensModel

__all__ = ["PrefixTokensConfig", "PrefixTokensLayer", "PrefixTokensModel"]

register("growthring_prefix_tokens", PrefixTokensConfig, PrefixTokensModel, PrefixTokensModel.prefix)
