"""Where GORP works in a model, found from the model's structure: its LoRA, and the matrices that train whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from growthring.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from growthring.backbones import ModuleMap

__all__ = ["GorpPreset", "gorp_preset"]

_LORA = ("self_query", "self_value")
_WHOLE = (("cross_query", "cross_value"), ("mlp_gate",), ("mlp_up",))
"""Roles whose matrices train whole; the first that a model has."""
_BY_HAND = "Name the layers yourself: target_modules of a LoraConfig, and full_rank"


@dataclass(frozen=True)
class GorpPreset:
    """Where GORP works in one model, as names of linear layers.

    Attributes:
        lora: Layers that get a LoRA, as ``target_modules`` of a ``LoraConfig`` takes them.
        full_rank: Layers whose weights train whole, as ``full_rank`` of :class:`~growthring.ContinualTrainer` takes
            them.
        roles: The roles of ``full_rank``, as :data:`growthring.backbones.ROLES` names them.
    """

    lora: tuple[str, ...]
    full_rank: tuple[str, ...]
    roles: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The preset as plain values for JSON."""
        return {name: list(value) for name, value in asdict(self).items()}


def gorp_preset(model: nn.Module, *, tower: str | None = None) -> GorpPreset:
    """Say which layers of a model GORP adapts with LoRA, and which it trains whole.

    LoRA goes to the queries and values of self-attention, which is what the paper adapts in T5 and Llama. The matrices
    that train whole are of the first kind that the model (of a dual encoder: the tower) has: queries and values of
    cross-attention (the paper's choice in T5), gates of gated MLPs (its choice in Llama), or the linear layers into
    plain MLPs (BERT, ViT, GPT-2). The structure alone decides, as :func:`growthring.backbones.map_modules` finds it;
    where queries, keys and values come from one fused layer, LoRA goes to that.

    Args:
        model: A text or image encoder, a decoder, an encoder-decoder or a dual encoder, with adapters or without.
        tower: ``"text"`` or ``"image"``: the tower of a dual encoder; default both.

    Raises:
        ConfigError: The model cannot be mapped, it has no such tower, or one fused layer would be both.
    """
    from growthring.backbones import map_modules

    found = map_modules(model)
    lora: list[str] = []
    whole: list[str] = []
    chosen: list[str] = []
    for modality in found.modalities if tower is None else (tower,):
        part = found.tower(modality)
        adapted = [name for role in _LORA for name in _linears(part, role)]
        roles = next((roles for roles in _WHOLE if _linears(part, roles[0])), ())
        if not adapted or not roles:
            missing = "cross-attention and no MLP of linear layers" if adapted else "self-attention"
            raise ConfigError(f"gorp_preset: {found.model} has no {missing}. {_BY_HAND}")
        lora += adapted
        whole += [name for role in roles for name in _linears(part, role)]
        chosen += roles
    both = [name for name in whole if name in lora]
    if both:
        raise ConfigError(
            f"gorp_preset: {found.model} makes queries and the input of its MLP in one layer ({both[0]}), which "
            f"cannot have a LoRA and train whole. {_BY_HAND}"
        )
    return GorpPreset(*(tuple(dict.fromkeys(names)) for names in (lora, whole, chosen)))


def _linears(found: ModuleMap, role: str) -> tuple[str, ...]:
    try:
        return found.linears(role)
    except ConfigError:
        return ()
