"""A dual encoder out of two single ones: a short contrastive alignment of what projects their features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growthring.errors import ConfigError, DataError, NumericalError
from growthring.guards.batches import evaluating

from .encoders import kind_of, position_settings
from .vision import ImagePreprocessor

__all__ = ["align_projections"]

MAX_SCALE = 100.0
"""The temperature never gets sharper than this, as in CLIP."""

_HEADS = ("vision_model.pooler", "text_model.pooler", "visual_projection", "text_projection", "logit_scale")


def align_projections(
    model: nn.Module,
    images: Sequence[Any],
    captions: Sequence[str],
    tokenizer: Any,
    preprocess: ImagePreprocessor,
    *,
    steps: int = 300,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """Train the two projections of a dual encoder, its poolers where it has them, and its temperature.

    For where no pretrained CLIP can be had: the outcome knows what its few pairs show and nothing else, and is no
    replacement for one. The towers stay as they are: every image and every caption goes through them once, so this
    takes little more than one forward pass over the data. The loss is CLIP's (Radford et al., arXiv 2103.00020), the
    mean of the cross-entropies from images to captions and back; pairs of one batch with the same caption all count as
    right.

    Args:
        model: A ``VisionTextDualEncoderModel`` or ``CLIPModel``; changed in place, left in evaluation mode.
        images: Arrays ``(height, width, 3)`` or tensors ``(3, height, width)`` of unsigned bytes.
        captions: One text for each image.
        tokenizer: The text tower's tokenizer.
        preprocess: Makes pixel values.
        steps: AdamW steps, at a rate that falls along a cosine; default 300.
        batch_size: Pairs of a step; default 128.
        learning_rate: Default 1e-3.
        weight_decay: Default 0.1.
        seed: Draws the batches.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: If the model is no dual encoder, or a number is out of range.
        DataError: If there are not as many captions as images, or all captions are the same.
        NumericalError: If the loss stops being a number.
    """
    if kind_of(model) != "dual":
        raise ConfigError(f"{type(model).__name__} has no two towers to align")
    if steps < 1 or batch_size < 2 or learning_rate <= 0 or weight_decay < 0:
        raise ConfigError(
            f"steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}, weight_decay={weight_decay}: at "
            "least 1 step, 2 pairs, a rate above 0 and a decay of at least 0 are needed"
        )
    if len(images) != len(captions):
        raise DataError(f"{len(images)} images and {len(captions)} captions; every image needs one")
    places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    if len(places) < 2:
        raise DataError(f"{len(places)} different captions; at least two are needed to tell apart")
    which = torch.tensor([places[c] for c in captions])
    vision: nn.Module = model.vision_model  # type: ignore[assignment]
    text: nn.Module = model.text_model  # type: ignore[assignment]
    device = next(model.parameters()).device
    with evaluating(model):
        seen = torch.cat(
            [
                _before_pooler(vision, {"pixel_values": preprocess(images[start : start + 64]).to(device)})
                for start in range(0, len(images), 64)
            ]
        )
        tokens = tokenizer(list(places), truncation=True)["input_ids"]
        read = torch.cat([_before_pooler(text, {"input_ids": torch.tensor([t], device=device)}) for t in tokens])
    trained = [p for name in _HEADS for p in _parameters(model, name)]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False).eval()
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    try:
        for _ in range(steps):
            rows = torch.randperm(len(images), generator=draw)[:batch_size]
            pairs = which[rows].to(device)
            image = F.normalize(model.visual_projection(_pool(vision, seen[rows])), dim=-1)  # type: ignore[operator]
            caption = F.normalize(model.text_projection(_pool(text, read[pairs])), dim=-1)  # type: ignore[operator]
            scores = image @ caption.T * model.logit_scale.exp()  # type: ignore[operator]
            right = (pairs[:, None] == pairs[None]).to(scores.dtype)
            right = right / right.sum(1, keepdim=True)  # symmetric counts: the same shares for rows and for columns
            loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NumericalError(f"the alignment's loss is {losses[-1]}; lower learning_rate={learning_rate:g}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(MAX_SCALE))  # type: ignore[operator]
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return losses


def _parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of a part of the model, which some models do not have."""
    part: Any = model
    for step in name.split("."):
        part = getattr(part, step, None)
    if isinstance(part, nn.Parameter):
        return [part]
    return list(part.parameters()) if isinstance(part, nn.Module) else []


def _before_pooler(tower: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What does not change while poolers and projections train: the first hidden state, or what is pooled already."""
    pixels = inputs.get("pixel_values")
    outputs = tower(**inputs, **(position_settings(tower, pixels) if pixels is not None else {}))
    pooler = getattr(tower, "pooler", None)
    return outputs.last_hidden_state[:, :1] if isinstance(pooler, nn.Module) else outputs.pooler_output


def _pool(tower: nn.Module, states: Tensor) -> Tensor:
    """The rest of the way to the projection."""
    pooler = getattr(tower, "pooler", None)
    return pooler(states) if isinstance(pooler, nn.Module) else states
