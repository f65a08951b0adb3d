"""Configuration of prompt tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from growthring.adapters._common import TokensConfig, peft_type
from growthring.errors import ConfigError, nearest

__all__ = ["PromptTokensConfig"]

PLACEMENTS = ("insert", "replace")


@dataclass
class PromptTokensConfig(TokensConfig):
    """L learned vectors in the sequence that enters the first block, for models that PEFT's prompt tuning cannot do.

    ``placement="insert"`` (image encoders: ViT, DINOv2, the vision tower of CLIP): the sequence grows by L tokens,
    behind the class token: ``[x_cls, P, x_patches]`` (VPT-shallow, Jia et al. 2022, arXiv 2203.12119). The model's
    last hidden state has L more rows as well; the class token stays the first.

    ``placement="replace"`` (text towers): the embeddings of positions ``start ... start + L - 1`` are replaced by P
    (CoOp, Zhou et al. 2022, arXiv 2109.01134), so no mask and no shape changes. Texts need L filler words there.

    For text encoders and language models that stand alone, use PEFT's own ``PromptTuningConfig``.

    Args:
        num_tokens: Number L of learned tokens.
        placement: ``"insert"`` or ``"replace"``; by default ``"insert"`` for images and ``"replace"`` for text.
        start: Position of the first learned token.
        init_std: Standard deviation of the initial values.
        tower: ``"text"`` or ``"image"``: which tower of a dual encoder.
        target_modules: Name of the module whose output is the sequence ``(batch, tokens, width)``, in place of the
            one found from the model: its embeddings, or for ``"replace"`` the embedding of its token ids.
        exclude_modules: Names of modules, or a regex, that are left alone.
        modules_to_save: Modules that train and are saved as a whole, such as a new head.

    Raises:
        ConfigError: For values out of range.
    """

    placement: str | None = field(default=None, metadata={"help": "'insert' or 'replace'."})
    start: int = field(default=1, metadata={"help": "Position of the first learned token."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("growthring_prompt_tokens")
        if self.placement is not None and self.placement not in PLACEMENTS:
            raise ConfigError(
                f"PromptTokensConfig(placement={self.placement!r}): {nearest(str(self.placement), PLACEMENTS)}"
            )
        if self.placement is None and self.target_modules is not None:
            raise ConfigError("PromptTokensConfig: say placement='insert' or 'replace' together with target_modules")
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise ConfigError(f"PromptTokensConfig(start={self.start!r}): give a position, counted from 0")
