"""Starting adapters from what their layers read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import ConfigError, DataError
from growthring.subspace import SecondMoment

from .layer import LargoLayer

__all__ = ["start_from_activations"]

ZERO = 1e-12
"""Energies this far below the largest one are rounding."""


def start_from_activations(model: nn.Module, batches: Iterable[Any], adapter_name: str = "default") -> None:
    """Give an adapter with ``init="activation"`` its ``A0``: the main directions of each layer's inputs.

    The rows of ``A0`` are the right singular vectors of the matrix of inputs ``X`` (rows, tokens, by features), so the
    largest eigenvectors of the uncentred ``X^T X``; ``B0`` is zero. The batches run through the model in evaluation
    mode with the adapters of these layers off, so what the layers read is what the pretrained model gives them.
    Padding, where a batch has an ``attention_mask``, is left out.

    Args:
        model: The model, or one that holds it.
        batches: What the model is called with: mappings of tensors, tuples that start with the input, or tensors. A
            few hundred rows are enough; each layer needs at least ``r`` independent ones.
        adapter_name: The adapter.

    Raises:
        ConfigError: If there is no such adapter, it has another start, it was trained, or adapters are merged.
        DataError: If there are no batches, or too few rows for the rank.
    """
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, LargoLayer)}
    here = {layer: name for layer, name in layers.items() if adapter_name in layer.largo_B}
    if not here:
        known = sorted({adapter for layer in layers for adapter in layer.largo_B})
        raise ConfigError(f"the model has no LARGO-style adapter {adapter_name!r}; it has {known or 'none at all'}")
    wrong = [layer.name for layer in here if layer.largo_init[adapter_name] != "activation"]
    if wrong:
        raise ConfigError(
            f"adapter {adapter_name!r} does not start from activations (layer {wrong[0]}); make it with "
            "LargoConfig(init='activation')"
        )
    trained = [
        layer.name for layer in here if not layer.largo_waits[adapter_name] and layer.factors(adapter_name)[3].any()
    ]
    if trained:
        raise ConfigError(
            f"adapter {adapter_name!r} has its start and was trained from there (layer {trained[0]}); with another A0 "
            "it would compute something else. Add a new adapter for a new start"
        )
    if any(layer.merged for layer in layers):
        raise ConfigError("adapters are merged into the weights; call unmerge_adapter() first")
    moments = {layer: SecondMoment(layer.in_features) for layer in here}
    mask: Tensor | None = None
    # of an encoder-decoder model the mask is the source's, and the target may be as long by chance
    masks = not any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in model.modules())

    def watch(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        fits = mask is not None and x.shape[:-1] == mask.shape
        moments[layer].update(x, mask if fits else None)  # type: ignore[index]

    flags = [(module, module.training) for module in model.modules()]
    off = {layer: layer._disable_adapters for layer in layers}
    handles = [layer.register_forward_pre_hook(watch) for layer in here]
    seen = 0
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True
        with torch.inference_mode(False), torch.no_grad():
            for batch in batches:
                mask = _mask(batch) if masks else None
                _run(model, batch)
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
        for layer, flag in off.items():
            layer._disable_adapters = flag
        for module, flag in flags:
            module.training = flag
    if not seen:
        raise DataError("start_from_activations was given no batches; an iterator that was used up gives none")
    starts = {layer: _directions(moment, layer.r[adapter_name], here[layer]) for layer, moment in moments.items()}
    for layer, start in starts.items():  # all or none
        layer.start(adapter_name, start)


def _directions(moment: SecondMoment, r: int, name: str) -> Tensor:
    """The ``r`` main directions as rows."""
    if not moment.count:
        raise DataError(
            f"{name} was not called by any batch, or all its rows are padding; give batches that the model uses it "
            "for, or leave it out with exclude_modules"
        )
    energies, vectors = moment.residual_spectrum()
    found = int((energies > ZERO * energies.max()).sum()) if energies.numel() else 0
    if found < r:
        raise DataError(
            f"{name} read {moment.count} rows with {found} independent directions, and the adapter's rank is {r}; "
            "give more batches, or lower r"
        )
    return vectors[:, :r].T


def _mask(batch: Any) -> Tensor | None:
    """The mask of a batch, where a token counts; not of an additive form."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 and not bool((mask < 0).any()) else None


def _run(model: nn.Module, batch: Any) -> None:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    elif isinstance(batch, Tensor):
        model(batch.to(device))
    elif isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        model(batch[0].to(device))
    else:
        raise DataError(
            f"a batch must be a mapping of tensors, a tuple that starts with one, or a tensor; got "
            f"{type(batch).__name__}"
        )
