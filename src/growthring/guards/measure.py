"""How far a model is from the pretrained one, measured: layer by layer, and as a whole."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import GuardError

from . import shards
from .deviation import HEADS, Anchored, Deviation, matcher, pairs_of
from .site import original_name

__all__ = ["DeviationTable", "LayerDeviation", "deviation"]


@dataclass(frozen=True)
class LayerDeviation:
    """One layer, or one tensor that no adapter is on.

    Attributes:
        name: Qualified name of the layer that adapters are on; else of the tensor.
        frobenius: ``||W - W_0||_F``.
        spectral: ``||W - W_0||_2``; of a tensor with more than two axes, as ``(first, all others)``.
    """

    name: str
    frobenius: float
    spectral: float


@dataclass(frozen=True)
class DeviationTable:
    """A model's distance from the pretrained one.

    Attributes:
        total: ``sqrt(sum ||W - W_0||_F^2)`` over all layers.
        layers: The layers, in the order of the model.
    """

    total: float
    layers: tuple[LayerDeviation, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"total": self.total, "layers": [dataclasses.asdict(layer) for layer in self.layers]}


@torch.no_grad()
def deviation(
    model: nn.Module, base: Mapping[str, Tensor] | None = None, *, exclude: str | None = HEADS
) -> DeviationTable:
    """Measure how far a model is from the pretrained one: active LARGO-style adapters and LoRA, and plain weights.

    The deviations of several active adapters on one layer are added up before they are measured; they count while
    they are disabled (``disable_adapter``) too. Adapters count with the scale that they have now, so a scaled one
    (WiSE-FT's interpolation) is nearer. Nothing of the size of a weight is made for adapters.

    Args:
        model: Any module; adapters need not train. Not one with merged adapters.
        base: Pretrained values of plain weights by name, as ``state_dict`` or ``named_parameters`` gives them; needed
            if any of those trains. What it names and the model has not is passed over.
        exclude: Regular expression for names that are left out; default heads. ``None`` leaves out none.

    Returns:
        The table. A layer on which nothing has moved is in it with zeros.

    Raises:
        ConfigError: If ``exclude`` is no regular expression.
        GuardError: If there is nothing to measure, ``base`` lacks a weight that trains, adapters are merged, or one
            deviates otherwise than by ``s B A``.

    Example:
        ```python
        table = gr.deviation(model)
        farthest = max(table.layers, key=lambda layer: layer.frobenius)
        ```
    """
    merged = [n for n, m in model.named_modules() if getattr(m, "merged_adapters", None)]
    if merged:
        raise GuardError(
            f"deviation: adapters are merged into {len(merged)} layers (the first: {merged[0]}); unmerge them first"
        )
    pairs, left_out = pairs_of(model), matcher(exclude)
    together: dict[int, list[Deviation]] = defaultdict(list)
    for pair in pairs:
        if pair.adapter in getattr(pair.layer, "active_adapters", ()) and not left_out(pair.name):
            together[id(pair.layer)].append(pair)
    factors = {id(tensor) for pair in pairs for tensor in (pair.a, pair.b)}
    plain = {original_name(n): p for n, p in model.named_parameters() if id(p) not in factors}
    known = {original_name(name): value for name, value in (base or {}).items()}
    layers = [_together(found) for found in together.values()]
    layers += _plain({name: p for name, p in plain.items() if not left_out(name)}, known)
    if not layers:
        raise GuardError(
            "deviation: the model has no active LoRA or LARGO-style adapter and nothing else that trains, so there is "
            "nothing to measure. Pass base=, the pretrained weights by name, to compare plain weights"
        )
    return DeviationTable(math.sqrt(math.fsum(layer.frobenius**2 for layer in layers)), tuple(layers))


def _together(pairs: list[Deviation]) -> LayerDeviation:
    """All adapters on one layer."""
    name, one = pairs[0].name.removesuffix(f".{pairs[0].adapter}"), pairs[0]
    if len(pairs) > 1:
        factors = [both for pair in pairs if (both := pair.factors()) is not None]
        left, right = torch.cat([p for p, _ in factors], dim=1), torch.cat([q for _, q in factors])
        one = Deviation(name, "lora", (), right, left)
    return LayerDeviation(name, one.frobenius(), one.spectral())


def _plain(weights: Mapping[str, nn.Parameter], known: Mapping[str, Tensor]) -> list[LayerDeviation]:
    """Weights of which the pretrained value is known; all that train must be among them."""
    absent = [name for name, p in weights.items() if p.requires_grad and name not in known]
    if absent:
        raise GuardError(
            f"deviation: {len(absent)} plain weights train (the first: {absent[0]}), and base= has no pretrained "
            "value of them: pass {name: tensor} of the model before training"
        )
    found = []
    for name, p in weights.items():
        if name not in known:
            continue
        if known[name].shape != p.shape:
            raise GuardError(
                f"deviation: {name} has shape {tuple(p.shape)}, and its pretrained value {tuple(known[name].shape)}"
            )
        one = Deviation(name, "weight", (Anchored(name, p, shards.like(known[name], p.detach())),))
        found.append(LayerDeviation(name, one.frobenius(), one.spectral()))
    return found
