"""Configuration of prefix tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from growthring.adapters._common import TokensConfig, peft_type
from growthring.errors import ConfigError

__all__ = ["PrefixTokensConfig"]


@dataclass
class PrefixTokensConfig(TokensConfig):
    """L learned keys and values in front of every attention, for encoders that take no ``past_key_values``.

    ``softmax(Q [P_k; K]^T / sqrt(d_h)) [P_v; V]`` per head (Li and Liang 2021, arXiv 2101.00190; PEGP, arXiv
    2405.13383, eq. 3-4). ``P_k`` and ``P_v`` stand beside projected keys and values; no sequence grows outside
    attention. For language models, use PEFT's own ``PrefixTuningConfig``.

    Args:
        num_tokens: Number L of learned keys and values of each attention.
        init_std: Standard deviation of the initial values.
        tower: ``"text"`` or ``"image"``: which tower of a dual encoder.
        target_modules: Names of attention modules, in place of those found from the model.
        exclude_modules: Names of modules, or a regex, that are left alone.
        modules_to_save: Modules that train and are saved as a whole, such as a new head.
        projections: Filled in from the model and saved: attention module to its key and value projection, relative
            to it; the two are one and the same where projections are fused. Needed with ``target_modules``.

    Raises:
        ConfigError: For values out of range.
    """

    projections: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Attention module to its key and value projection, relative to it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("growthring_prefix_tokens")
        if self.target_modules is not None and not self.projections:
            raise ConfigError(
                "PrefixTokensConfig: target_modules need projections={attention: [key projection, value projection]}; "
                "leave both out to have them found from the model"
            )
