"""An encoder with a head over all classes of a stream, as one module that ``transformers.Trainer`` can train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from growthring._io import write_json, write_with
from growthring.errors import ConfigError, nearest

from .encoders import EncoderKind, base_of, hidden_states, image_features, kind_of

__all__ = [
    "HEADS",
    "POOLINGS",
    "Head",
    "LabelTextHead",
    "LinearHead",
    "Pooling",
    "StreamClassifier",
    "StreamHead",
    "find_pooling",
    "pool",
    "pool_image",
]

Head = Literal["label-text", "linear"]
Pooling = Literal["mean", "cls", "last", "own"]
HEADS: tuple[Head, ...] = ("label-text", "linear")
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last")
"""What can be asked for; dual encoders have a pooling of their own."""


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


def pool_image(hidden: Tensor, pooling: Pooling, patches: int | None) -> Tensor:
    """One vector per image.

    Args:
        hidden: ``(batch, rows, d)``; a class token, registers and learned prompts stand in front of the patches.
        pooling: ``"cls"`` the first row, ``"mean"`` over the patches alone.
        patches: Number of patches; ``None`` or more than there are rows: all rows are patches.

    Returns:
        ``(batch, d)``.
    """
    if pooling == "cls":
        return hidden[:, 0]
    return hidden[:, max(0, hidden.shape[1] - patches) :].mean(1) if patches else hidden.mean(1)


def find_pooling(encoder: nn.Module, folder: str | Path | None, asked: str = "auto") -> Pooling:
    """How features are pooled.

    Args:
        encoder: The encoder.
        folder: Where it was loaded from; ``1_Pooling/config.json`` of a sentence encoder is read.
        asked: ``"auto"``, or what is wanted.

    Returns:
        What is asked for, ``"own"`` for a dual encoder. ``"auto"``: what the sentence encoder says; else ``"last"``
        for a decoder, whose last token alone has seen the whole text, ``"cls"`` for an image encoder with a class
        token, ``"mean"`` for all others.

    Raises:
        ConfigError: On another name; ``"last"`` for images; ``"cls"`` for a decoder, whose first token has seen
            nothing but itself.
    """
    if asked not in ("auto", *POOLINGS):
        raise ConfigError(f"pooling={asked!r}: {nearest(asked, ('auto', *POOLINGS))}")
    base, kind = base_of(encoder), kind_of(encoder)
    if kind == "dual":
        if asked != "auto":
            raise ConfigError(f"pooling={asked!r}: {type(base).__name__} pools by itself; leave pooling='auto'")
        return "own"
    if kind == "image":
        if asked == "last":
            raise ConfigError("pooling='last' is for texts; for images choose 'cls' or 'mean'")
        tokens = {n.split(".")[-1] for n, _ in base.named_parameters()} & {"cls_token", "class_embedding"}
        return asked if asked != "auto" else "cls" if tokens else "mean"  # type: ignore[return-value]
    causal = any(getattr(m, "is_causal", False) for m in base.modules())
    if causal and asked == "cls":
        raise ConfigError("pooling='cls': the first token of a decoder has seen nothing of the text; choose 'last'")
    if asked != "auto":
        return asked  # type: ignore[return-value]
    file = Path(folder) / "1_Pooling" / "config.json" if folder else None
    if file is not None and file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("pooling_mode_cls_token"):
            return "cls"
        return "last" if settings.get("pooling_mode_lasttoken") else "mean"
    return "last" if causal else "mean"


class StreamHead(nn.Module):
    """A head over all classes of a stream."""

    def begin(self, classes: Sequence[int]) -> None:
        """Get ready to learn some classes; a head that does not train has nothing to do."""

    def waiting(self) -> list[int]:
        """Ids of classes whose scores mean nothing yet."""
        return []


class LabelTextHead(StreamHead):
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

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, d)`` features to ``(batch, classes)`` logits."""
        return F.normalize(features.to(self.vectors.dtype), dim=-1) @ self.vectors.T * self.scale


class LinearHead(StreamHead):
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

    def waiting(self) -> list[int]:
        """Ids of classes that no task has brought yet."""
        known = {c for block in self.members for c in block}
        return [c for c in range(len(self.initial)) if c not in known]

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, d)`` features to ``(batch, classes)`` logits."""
        features = features.to(self.initial.dtype)
        logits = features @ self.initial.T
        for block, members in zip(self.blocks, self.members, strict=True):
            index = torch.tensor(members, device=logits.device)
            logits = logits.index_copy(1, index, block(features).to(logits.dtype))
        return logits


class StreamClassifier(nn.Module):
    """Encoder, pooling and head. Called as ``transformers.Trainer`` calls a model.

    Args:
        encoder: A ``transformers`` encoder of texts or images, a dual encoder, or a PEFT model around one.
        head: The head.
        pooling: See :func:`pool` and :func:`pool_image`; a dual encoder pools itself.
        task_classes: For every task the ids of its classes; the loss of an example compares its own task's classes
            only (local cross-entropy), so a new task never pushes down the logits of an old one.
        classes: Number of classes of all tasks.
    """

    allowed: Tensor
    head: StreamHead

    def __init__(
        self,
        encoder: nn.Module,
        head: StreamHead,
        pooling: Pooling,
        task_classes: Sequence[Sequence[int]],
        classes: int,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.pooling = encoder, head, pooling
        self.kind: EncoderKind = kind_of(encoder)
        self.patch = getattr(base_of(encoder).config, "patch_size", None)
        allowed = torch.zeros(len(task_classes), classes, dtype=torch.bool)
        for row, ids in enumerate(task_classes):
            allowed[row, list(ids)] = True
        self.register_buffer("allowed", allowed, persistent=False)

    def embed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Pooled features ``(batch, d)`` of texts or of images, in float32 at least."""
        if pixel_values is None:
            if input_ids is None:
                raise ConfigError("a batch holds neither input_ids nor pixel_values")
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return pool(hidden_states(self.encoder, input_ids=input_ids, attention_mask=mask), mask, self.pooling)
        if self.kind == "dual":
            return image_features(self.encoder, pixel_values)
        hidden = hidden_states(self.encoder, pixel_values=pixel_values)
        high, wide = pixel_values.shape[-2:]
        patches = (high // self.patch) * (wide // self.patch) if isinstance(self.patch, int) else None
        return pool_image(hidden, self.pooling, patches)

    def logits(self, features: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Scores of classes, in float32 at least.

        Args:
            features: ``(batch, d)`` as :meth:`embed` gives them.
            tasks: Ids of the tasks whose classes are asked for; scores of other classes may then be minus infinity.
                Default: all classes.

        Returns:
            ``(batch, classes)``.
        """
        return _wide(self.head(features))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits over all classes, and the local cross-entropy when labels and task ids are given.

        Classes that the head has no rows for yet have logits of minus infinity: what it answers old inputs does not
        change when it grows. (Before a task is learned, :meth:`logits` scores its classes all the same.)

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``.
            pixel_values: ``(batch, 3, height, width)``, in place of the two.
            labels: ``(batch,)`` class ids of the whole stream.
            task_ids: ``(batch,)`` which task each example belongs to.
        """
        logits = self.logits(self.embed(input_ids, attention_mask, pixel_values), task_ids)
        waiting = self.head.waiting()
        answer = logits.index_fill(1, torch.tensor(waiting, device=logits.device), -torch.inf) if waiting else logits
        if labels is None or task_ids is None:
            return {"logits": answer}
        local = logits.masked_fill(~self.allowed[task_ids], float("-inf"))
        return {"loss": F.cross_entropy(local, labels), "logits": answer}

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute activations of the encoder in the backward pass; the Trainer calls this when asked to."""
        self.encoder.activation_checkpointing_enable(**settings)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The same, under the name that older Trainers call it by."""
        self.encoder.gradient_checkpointing_enable(**settings)  # type: ignore[operator]

    def save_head(
        self, folder: str | Path, classes: Sequence[dict[str, Any]], images: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``head.safetensors`` and ``head.json``: kind of head, pooling, class names, how images are made."""
        folder = Path(folder)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.head_tensors().items()}
        if "vectors" in tensors:  # those of a reference follow, and classes does not name them
            tensors["vectors"] = tensors["vectors"][: len(classes)].clone()
        write_with(folder / "head.safetensors", lambda t: save_file(tensors, t))
        settings = self.head_settings() | {"pooling": self.pooling, "classes": list(classes)}
        write_json(folder / "head.json", settings | ({"images": dict(images)} if images else {}))

    def head_tensors(self) -> dict[str, Tensor]:
        """What ``head.safetensors`` holds."""
        return dict(self.head.state_dict())

    def head_settings(self) -> dict[str, Any]:
        """What ``head.json`` says of the head itself."""
        if isinstance(self.head, LinearHead):
            return {"head": "linear", "scale": None, "blocks": self.head.members}
        return {"head": "label-text", "scale": getattr(self.head, "scale", None), "blocks": None}


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
