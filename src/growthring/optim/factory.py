"""From a model to parameter groups: which weights are projected is decided by what their modules are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from growthring.errors import ConfigError, nearest

from .gorp import GORP

__all__ = ["GORPFactory"]


class GORPFactory:
    """Makes a :class:`GORP` (or :class:`GaLore`) for a model; the door into ``transformers.Trainer``.

    Projected are the trainable weights of linear, ``Conv1D`` and convolution layers. LoRA factors (of low rank
    already), embeddings, biases, norms and all others are stepped as AdamW does it; biases and norms without weight
    decay, which a plain optimizer of a ``Trainer`` also spares.

    Example:
        ```python
        trainer = Trainer(model, args, optimizer_cls_and_kwargs=(gr.optim.GORPFactory, {"lr": 1e-4, "rank": 8}))
        ```
    """

    def __call__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        targets: str | Sequence[str] | None = None,
        full_rank_lr: float | None = None,
        weight_decay: float = 0.0,
        optimizer: type[GORP] = GORP,
        **options: Any,
    ) -> GORP:
        """Make the optimizer.

        Args:
            model: The model; only parameters that require a gradient are taken.
            lr: Learning rate; default 1e-3.
            targets: Layers whose weights are projected: their names, the ends of these, or one regular expression for
                whole names. Default: all that can be but LoRA factors.
            full_rank_lr: Learning rate of projected weights that are no LoRA factors; default ``lr``. The paper of
                GORP takes a hundredth of LoRA's.
            weight_decay: Decoupled weight decay of all but biases and norms; default 0.
            optimizer: The class; default :class:`GORP`.
            **options: Its other options.

        Raises:
            ConfigError: If nothing can be trained or projected, or a target is no such layer.
        """
        known = {**inspect.signature(GORP).parameters, **inspect.signature(optimizer).parameters}
        for name in options:
            if name not in known or known[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                raise ConfigError(f"GORPFactory: {optimizer.__name__} has no option {name!r}; {nearest(name, known)}")
        rank = options.pop("rank", known["rank"].default)
        found = _matrices(model)
        chosen = {w for w in found if ".lora_" not in w} if targets is None else _chosen(found, targets)
        rate = lr if full_rank_lr is None else full_rank_lr
        groups: dict[tuple[float, float, bool], list[tuple[str, Tensor]]] = {}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            projects = name in chosen
            is_lora = ".lora_" in name
            decays = p.ndim > 1
            key = (rate if projects and not is_lora else lr, weight_decay if decays else 0.0, projects)
            groups.setdefault(key, []).append((name, p))
        if not groups:
            raise ConfigError("GORPFactory: the model has no parameter that requires a gradient; unfreeze some first")
        if not any(projects for _, _, projects in groups):
            raise ConfigError(
                "GORPFactory: no trainable weight of a linear or convolution layer was found, so nothing would be "
                "projected (LoRA factors are only where targets names them); unfreeze some, or take torch.optim.AdamW"
            )
        return optimizer(
            [
                {"params": members, "lr": one, "weight_decay": decay} | ({} if projects else {"rank": None})
                for (one, decay, projects), members in groups.items()
            ],
            lr,
            rank=rank,
            **options,
        )


def _matrices(model: nn.Module) -> dict[str, str]:
    """Names of the weights that can be projected, and the names of their layers."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        f"{name}.weight" if name else "weight": name.removesuffix(".base_layer")  # as LoRA calls what it is around
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight.requires_grad and id(module.weight) not in embedded
    }


def _chosen(found: dict[str, str], targets: str | Sequence[str]) -> set[str]:
    if isinstance(targets, str):
        hits = {weight for weight, layer in found.items() if re.fullmatch(targets, layer)}
        wrong = [] if hits else [targets]
    else:
        hits, wrong = set(), []
        for one in targets:
            ends = {w for w, layer in found.items() if layer == one or layer.endswith(f".{one}")}
            hits |= ends
            wrong += [] if ends else [one]
    if wrong:
        raise ConfigError(
            f"GORPFactory(targets=...): {wrong[0]!r} names none of the {len(found)} trainable linear and convolution "
            f"layers (the first are {', '.join(list(found.values())[:3])})"
        )
    return hits
