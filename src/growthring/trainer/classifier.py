"""A text encoder with a head over all classes of a stream, as one module that ``transformers.Trainer`` can train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from growthring._io import write_json, write_with

from .models import hidden_states

__all__ = [
    "HEADS",
    "POOLINGS",
    "Head",
    "LabelTextHead",
    "LinearHead",
    "Pooling",
    "TextClassifier",
    "find_pooling",
    "pool",
]

Head = Literal["label-text", "linear"]
Pooling = Literal["mean", "cls", "last"]
HEADS: tuple[Head, ...] = ("label-text", "linear")
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last")


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text.

    Args:
        hidden: ``(batch, tokens, d)``.
        mask: ``(batch, tokens)``, 1 for real tokens.
        pooling: ``"mean"`` over real tokens, ``"cls"`` the first token, ``"last"`` the last real token.

    Returns:
        ``(batch, d)``.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * positions).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def find_pooling(folder: str | Path | None) -> Pooling:
    """How a sentence encoder pools: read from ``1_Pooling/config.json`` where it has one, else ``"mean"``."""
    file = Path(folder) / "1_Pooling" / "config.json" if folder else None
    if file is not None and file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("pooling_mode_cls_token"):
            return "cls"
        if settings.get("pooling_mode_lasttoken"):
            return "last"
    return "mean"


class LabelTextHead(nn.Module):
    """Cosine similarity to embedded label names, times a fixed scale. Nothing in it trains.

    The label vectors are embedded once, by the untouched model: zero-shot works before any training, and no later
    task can move an earlier task's classes.

    Args:
        vectors: ``(classes, d)`` unit vectors.
        scale: Inverse temperature of the softmax; default 20.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, scale: float = 20.0) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.scale = scale

    def begin(self, classes: Sequence[int]) -> None:
        """Nothing to do: the head does not train."""

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, d)`` features to ``(batch, classes)`` logits."""
        return F.normalize(features.to(self.vectors.dtype), dim=-1) @ self.vectors.T * self.scale


class LinearHead(nn.Module):
    """One linear head that grows by a block of rows whenever a task brings new classes.

    A block trains while a task has one of its classes, and rests otherwise. (In a training block, rows of classes that
    the task does not have get no gradient; weight decay still shrinks them.) Rows of classes that no task has brought
    yet are fixed small random numbers: their accuracy is that of chance, as it should be.

    Args:
        dim: Feature dimension ``d``.
        classes: Number of classes of the whole stream.
    """

    initial: Tensor

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("initial", torch.randn(classes, dim) * dim**-0.5)
        self.blocks = nn.ModuleList()
        self.members: list[list[int]] = []

    def begin(self, classes: Sequence[int]) -> None:
        """Make a block for classes seen for the first time; train only blocks that hold one of ``classes``."""
        old = {c for block in self.members for c in block}
        new = [c for c in classes if c not in old]
        if new:
            block = nn.Linear(self.initial.shape[1], len(new), bias=False, device=self.initial.device)
            with torch.no_grad():
                block.weight.copy_(self.initial[new])
            self.blocks.append(block)
            self.members.append(new)
        for part, members in zip(self.blocks, self.members, strict=True):
            part.requires_grad_(any(c in members for c in classes))

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, d)`` features to ``(batch, classes)`` logits."""
        features = features.to(self.initial.dtype)
        logits = features @ self.initial.T
        for block, members in zip(self.blocks, self.members, strict=True):
            index = torch.tensor(members, device=logits.device)
            logits = logits.index_copy(1, index, block(features).to(logits.dtype))
        return logits


class TextClassifier(nn.Module):
    """Encoder, pooling and head. Called as ``transformers.Trainer`` calls a model.

    Args:
        encoder: A ``transformers`` encoder, or a PEFT model around one, whose output has ``last_hidden_state``.
        head: The head.
        pooling: See :func:`pool`.
        task_classes: For every task the ids of its classes; the loss of an example compares its own task's classes
            only (local cross-entropy), so a new task never pushes down the logits of an old one.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: LabelTextHead | LinearHead,
        pooling: Pooling,
        task_classes: Sequence[Sequence[int]],
        classes: int,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.pooling = encoder, head, pooling
        allowed = torch.zeros(len(task_classes), classes, dtype=torch.bool)
        for row, ids in enumerate(task_classes):
            allowed[row, list(ids)] = True
        self.register_buffer("allowed", allowed, persistent=False)

    allowed: Tensor

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled features ``(batch, d)``."""
        return pool(hidden_states(self.encoder, input_ids, attention_mask), attention_mask, self.pooling)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, task_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits over all classes, and the local cross-entropy when labels and task ids are given.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``.
            labels: ``(batch,)`` class ids of the whole stream.
            task_ids: ``(batch,)`` which task each example belongs to.
        """
        logits = self.head(self.embed(input_ids, attention_mask)).float()
        if labels is None or task_ids is None:
            return {"logits": logits}
        local = logits.masked_fill(~self.allowed[task_ids], float("-inf"))
        return {"loss": F.cross_entropy(local, labels), "logits": logits}

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute activations of the encoder in the backward pass; the Trainer calls this when asked to."""
        self.encoder.activation_checkpointing_enable(**settings)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The same, under the name that older Trainers call it by."""
        self.encoder.gradient_checkpointing_enable(**settings)  # type: ignore[operator]

    def save_head(self, folder: str | Path, classes: Sequence[dict[str, Any]]) -> None:
        """Write ``head.safetensors`` and ``head.json`` (class names, kind of head, pooling)."""
        folder = Path(folder)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}
        write_with(folder / "head.safetensors", lambda t: save_file(tensors, t))
        kind = "linear" if isinstance(self.head, LinearHead) else "label-text"
        members = self.head.members if isinstance(self.head, LinearHead) else None
        scale = self.head.scale if isinstance(self.head, LabelTextHead) else None
        write_json(
            folder / "head.json",
            {"head": kind, "pooling": self.pooling, "scale": scale, "blocks": members, "classes": list(classes)},
        )
