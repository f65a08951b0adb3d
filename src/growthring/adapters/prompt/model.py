"""The tuner of prompt tokens."""

from __future__ import annotations

from growthring.adapters._common import WrappingTuner, one_tower
from growthring.backbones import ModuleMap
from growthring.errors import ConfigError

from .config import PromptTokensConfig
from .layer import PromptTokensLayer

__all__ = ["PromptTokensModel"]


class PromptTokensModel(WrappingTuner):
    """Puts prompt tokens into a model; made by ``get_peft_model``."""

    prefix = "prompt_tokens"
    tuner_layer_cls = PromptTokensLayer
    layer_cls = PromptTokensLayer

    def _targets(self, config: PromptTokensConfig, found: ModuleMap) -> set[str]:
        found = one_tower(found, config.tower, "PromptTokensConfig")
        stack = found.stacks[0]
        if config.placement is None:
            config.placement = "replace" if stack.modality == "text" else "insert"
        if config.placement == "insert" and stack.modality == "text":
            raise ConfigError(
                f"PromptTokensConfig(placement='insert'): {found.model} reads text here, and its mask and positions "
                "would not grow with the sequence; use placement='replace', or PEFT's PromptTuningConfig"
            )
        if config.placement == "insert" and any(len(block.attentions) > 1 for block in stack.blocks):
            raise ConfigError(
                f"PromptTokensConfig(placement='insert'): {found.model} has stages with several attentions, whose "
                "grid of patches has no place for more tokens; use a plain vision transformer, or another adapter"
            )
        target = stack.embeddings if config.placement == "insert" else stack.token_embedding
        if target is None:
            raise ConfigError(
                f"PromptTokensConfig(placement={config.placement!r}): {found.model} has no module whose output is "
                f"{'the sequence of its first block' if config.placement == 'insert' else 'the embedded token ids'}; "
                "name it as target_modules"
            )
        return {target}
