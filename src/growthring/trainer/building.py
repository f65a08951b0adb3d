"""Putting a model, a stream and a head together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from growthring.errors import ConfigError, nearest
from growthring.guards.batches import evaluating
from growthring.streams import Task, TaskStream

from .classifier import HEADS, LabelTextHead, LinearHead, Pooling, StreamClassifier, find_pooling, pool
from .data import Collator, EncodedSplit, encode_stream, encode_task, evaluation_batches
from .dual import ClassPrompts, DualClassifier, class_prompts
from .encoders import EncoderKind, base_of, hidden_states, image_features, kind_of
from .folder import check_folder
from .models import adapt, load_encoder, usable_length
from .vision import find_preprocessor

__all__ = ["Built", "build", "candidates_of_reference"]

logger = logging.getLogger(__name__)


@dataclass
class Built:
    """A model and data that fit it.

    Attributes:
        model: The classifier.
        tokenizer: ``None`` for image encoders.
        collate: Makes batches.
        data: Every split of every task.
        reference: The splits of the stream's reference, if it has one; its task id is the number of tasks.
        head: ``"label-text"`` or ``"linear"``.
        pooling: How features are pooled.
        max_length: Tokens kept of a text.
        folder: Where the encoder was loaded from.
    """

    model: StreamClassifier
    tokenizer: Any
    collate: Collator
    data: list[dict[str, EncodedSplit]]
    reference: dict[str, EncodedSplit] | None
    head: str
    pooling: Pooling
    max_length: int
    folder: Path | None


def build(
    model: nn.Module | str | Path,
    stream: TaskStream,
    *,
    adapter: PeftConfig | str | None,
    tokenizer: Any,
    head: str,
    pooling: str,
    max_length: int,
    image_size: int | None,
    image_processor: Any,
    prompt_template: str,
    device: torch.device,
    seed: int,
    output: Path | None = None,
) -> Built:
    """Load, check, encode, adapt; arguments as for :class:`~growthring.ContinualTrainer`.

    Raises:
        ConfigError: If the parts do not fit together.
    """
    encoder, tokenizer, folder = load_encoder(model, tokenizer)
    check_folder(output, folder)
    kind = kind_of(encoder)
    _check_modality(encoder, kind, stream)
    head = _check_head(head, kind, stream)
    how = find_pooling(encoder, folder, pooling)
    if kind == "image":
        pad = 0
    else:
        max_length, pad = usable_length(encoder, tokenizer, max_length, adapter), pad_id(tokenizer)
    if kind == "text":
        if image_size is not None or image_processor is not None:
            raise ConfigError("image_size and image_processor are for images, and the stream holds texts")
        collate = Collator(pad)
    else:
        collate = Collator(pad, find_preprocessor(encoder, folder, image_processor, image_size))
    data = encode_stream(stream, tokenizer, max_length)
    reference = _encode_reference(stream, tokenizer, max_length)
    encoder = encoder.to(device)
    groups = [(task.name, task.labels, stream.class_ids(index)) for index, task in enumerate(stream)]
    texts = [entry.text for entry in stream.classes]
    extra = reference_of(stream)
    if extra is not None:
        groups.append((extra.name, extra.labels, candidates_of_reference(stream)))
        texts += [extra.label_texts[label] for label in extra.labels]
    built: LabelTextHead | LinearHead | ClassPrompts
    if head == "linear":
        built = LinearHead(_width(encoder, kind, collate, device), len(texts))
    else:
        spoken = class_prompts(prompt_template, texts) if kind == "dual" else texts
        tokens = tokenizer(spoken, truncation=True, max_length=max_length)["input_ids"]
        _check_label_tokens(groups, tokens, 0)
        if kind == "dual":
            _width(encoder, kind, collate, device)
            built = ClassPrompts(tokens, prompt_template)
        else:
            built = LabelTextHead(_embed_texts(encoder, tokens, how, collate, device))
    set_seed(seed)  # the adapter's first weights do not depend on the kind of head
    encoder = adapt(encoder, adapter)
    classes = [ids for _, _, ids in groups]
    if isinstance(built, ClassPrompts):
        _check_label_tokens(groups, built.tokens, _replaced(encoder))
        classifier: StreamClassifier = DualClassifier(encoder, built, classes, len(texts))
    else:
        classifier = StreamClassifier(encoder, built, how, classes, len(texts))
    return Built(classifier.to(device), tokenizer, collate, data, reference, head, how, max_length, folder)


def reference_of(stream: TaskStream) -> Task | None:
    """The stream's reference task, if it has one."""
    return getattr(stream, "reference", None)


def candidates_of_reference(stream: TaskStream) -> list[int]:
    """Class ids of the reference's labels: they follow those of the stream."""
    task = reference_of(stream)
    return list(range(len(stream.classes), len(stream.classes) + len(task.labels))) if task is not None else []


def pad_id(tokenizer: Any) -> int:
    """The token to pad with.

    Raises:
        ConfigError: If the tokenizer has neither a padding token nor an end token.
    """
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    raise ConfigError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")


def _check_modality(encoder: nn.Module, kind: EncoderKind, stream: TaskStream) -> None:
    holds, reads = stream[0].modality, "text" if kind == "text" else "image"
    if holds != reads:
        name = type(base_of(encoder)).__name__
        what = "classifies images by the similarity to class prompts" if kind == "dual" else f"reads {reads}s"
        raise ConfigError(f"the stream {stream.name!r} holds {holds}s, and {name} {what}; choose a model for {holds}s")


def _check_head(head: str, kind: EncoderKind, stream: TaskStream) -> str:
    if head not in ("auto", *HEADS):
        raise ConfigError(f"head={head!r}: {nearest(head, ('auto', *HEADS))}")
    if head == "auto":
        head = "linear" if kind == "image" else "label-text"
    if kind == "image" and head == "label-text":
        raise ConfigError(
            "head='label-text' compares features with embedded label names, and an image encoder reads no text; use "
            "head='linear', or a dual encoder (CLIPModel, VisionTextDualEncoderModel)"
        )
    if head == "linear" and reference_of(stream) is not None:
        raise ConfigError(
            "the stream has a reference, whose classes nothing is trained on: a linear head cannot score it. Use "
            "head='label-text' (with a text encoder or a dual encoder), or drop the reference"
        )
    return head


def _encode_reference(stream: TaskStream, tokenizer: Any, max_length: int) -> dict[str, EncodedSplit] | None:
    task = reference_of(stream)
    if task is None:
        return None
    ids = dict(zip(task.labels, candidates_of_reference(stream), strict=True))
    return {
        name: encode_task(task, name, [ids[label] for label in rows.labels], len(stream), tokenizer, max_length)
        for name, rows in task.splits().items()
    }


def _width(encoder: nn.Module, kind: EncoderKind, collate: Collator, device: torch.device) -> int:
    """Dimension of the features. An image encoder is tried on one black image: it must take the size."""
    if kind == "text" or collate.images is None:
        return int(base_of(encoder).config.hidden_size)  # type: ignore[union-attr,arg-type]
    pixels = torch.zeros(1, 3, *collate.images.crop, device=device)  # type: ignore[misc]
    try:
        with evaluating(encoder):
            made = image_features(encoder, pixels) if kind == "dual" else hidden_states(encoder, pixel_values=pixels)
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{type(base_of(encoder)).__name__} does not take images of {tuple(pixels.shape[-2:])} pixels: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return int(made.shape[-1])


def _embed_texts(
    encoder: nn.Module, tokens: Sequence[list[int]], pooling: Pooling, collate: Collator, device: torch.device
) -> Tensor:
    """Unit vectors ``(texts, d)`` of label texts."""
    split = EncodedSplit(list(tokens), [0] * len(tokens), [0] * len(tokens))
    vectors: list[Tensor] = [torch.empty(0)] * len(tokens)
    encoder.eval()
    with torch.no_grad():
        for rows, batch in evaluation_batches(split, 64, collate):
            mask = batch["attention_mask"].to(device)
            hidden = hidden_states(encoder, input_ids=batch["input_ids"].to(device), attention_mask=mask)
            for row, vector in zip(rows, F.normalize(pool(hidden, mask, pooling).float(), dim=-1), strict=True):
                vectors[row] = vector
    return torch.stack(vectors)


def _check_label_tokens(
    groups: Sequence[tuple[str, Sequence[str], Sequence[int]]], tokens: Sequence[Sequence[int]], replaced: int
) -> None:
    """Classes of one task with the same tokens get the same vector: nothing could be learned.

    Args:
        groups: Name, labels and class ids of each task.
        tokens: Token ids of every class.
        replaced: Tokens at the start that learned prompts take the place of.
    """
    for name, labels, ids in groups:
        first: dict[tuple[int, ...], str] = {}
        for label, number in zip(labels, ids, strict=True):
            other = first.setdefault(tuple(tokens[number][replaced:]), label)
            if other == label:
                continue
            if replaced:
                raise ConfigError(
                    f"task {name!r}: the learned prompts take the place of the first {replaced} tokens, and what is "
                    f"left of the prompts of {other!r} and {label!r} is the same; use fewer prompt tokens, or a "
                    "longer prompt_template with the class name at its end"
                )
            raise ConfigError(
                f"task {name!r}: the tokenizer makes the same of the label texts of {other!r} and "
                f"{label!r}; give label_texts in words that it knows, or use head='linear'"
            )


def _replaced(encoder: nn.Module) -> int:
    """Tokens at the start of a text that learned prompts stand for, the start token included; 0 without any."""
    base = base_of(encoder)
    ends = [0]
    for module in base.text_model.modules():  # type: ignore[union-attr]
        prompts = getattr(module, "prompt_tokens", None)
        if isinstance(prompts, nn.ParameterDict):
            ends += [int(module.prompt_start) + p.shape[0] for p in prompts.values()]  # type: ignore[arg-type]
    return max(ends)
