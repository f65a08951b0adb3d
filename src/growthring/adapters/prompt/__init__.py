"""Learned tokens in the sequence: visual prompts (VPT, arXiv 2203.12119) and context tokens (CoOp, 2109.01134)."""

from growthring.adapters._registry import register

from .config import PromptTokensConfig
from .layer import PromptTokensLayer
from .model import PromptTokensModel

__all__ = ["PromptTokensConfig", "PromptTokensLayer", "PromptTokensModel"]

register("growthring_prompt_tokens", PromptTokensConfig, PromptTokensModel, PromptTokensModel.prefix)
