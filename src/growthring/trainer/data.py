"""The examples of a stream as a model takes them, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from growthring.errors import ConfigError
from growthring.streams import Task, TaskStream

from .vision import ImagePreprocessor

__all__ = [
    "Collator",
    "EncodedSplit",
    "balanced_batches",
    "encode_stream",
    "encode_task",
    "evaluation_batches",
    "inputs_of",
]

Row = dict[str, Any]

_ABOUT = ("labels", "task_ids")


class EncodedSplit(Dataset[Row]):
    """Inputs, class ids and the task id of one split (or of several, joined).

    Args:
        inputs: One list of token ids per example, or images, which are read when they are asked for.
        labels: Class ids of the whole stream.
        task_ids: Task index per example.
    """

    def __init__(self, inputs: Sequence[Any], labels: Sequence[int], task_ids: Sequence[int]) -> None:
        self.inputs, self.labels, self.task_ids = inputs, list(labels), list(task_ids)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        return {"inputs": self.inputs[index], "labels": self.labels[index], "task_ids": self.task_ids[index]}

    def length(self, index: int) -> int:
        """Tokens of a text; 0 for an image, all of which come out the same size."""
        return len(self.inputs[index]) if isinstance(self.inputs, list) else 0

    @staticmethod
    def join(parts: Sequence[EncodedSplit]) -> EncodedSplit:
        """All examples of several splits, in order."""
        if len(parts) == 1:
            return parts[0]
        lists = all(isinstance(p.inputs, list) for p in parts)
        return EncodedSplit(
            [t for p in parts for t in p.inputs] if lists else _Chain([p.inputs for p in parts]),
            [y for p in parts for y in p.labels],
            [i for p in parts for i in p.task_ids],
        )


class _Chain(Sequence[Any]):
    """Several sequences in a row, without reading them."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._places = [(number, row) for number, part in enumerate(parts) for row in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        number, row = self._places[index]
        return self._parts[number][row]


class Collator:
    """Stacks a list of examples: texts are padded to the longest, images preprocessed.

    Args:
        pad_id: Token id of padding; of no use for images.
        images: Makes pixel values; ``None`` for texts.
    """

    def __init__(self, pad_id: int = 0, images: ImagePreprocessor | None = None) -> None:
        self.pad_id, self.images = pad_id, images

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A batch: ``input_ids`` and ``attention_mask``, or ``pixel_values``; with ``labels`` and ``task_ids``."""
        inputs = [row["inputs"] for row in rows]
        made = self.texts(inputs) if self.images is None else {"pixel_values": self.images(inputs)}
        return made | {key: torch.tensor([row[key] for row in rows]) for key in _ABOUT}

    def texts(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Padded ``input_ids`` and their ``attention_mask``, each ``(len(tokens), longest)``."""
        tokens = [row if len(row) else [self.pad_id] for row in tokens]  # attention to nothing would be NaN
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(tokens), longest, dtype=torch.long)
        for number, row in enumerate(tokens):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def inputs_of(batch: dict[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """What of a batch the encoder reads: everything but labels and task ids; moved to ``device``."""
    return {k: v if device is None else v.to(device) for k, v in batch.items() if k not in _ABOUT}


def encode_stream(stream: TaskStream, tokenizer: Any, max_length: int) -> list[dict[str, EncodedSplit]]:
    """Every split of every task; texts are tokenized once.

    Args:
        stream: The stream.
        tokenizer: A ``transformers`` tokenizer; of no use for images.
        max_length: Tokens kept of a text, special tokens included.

    Raises:
        ConfigError: If ``max_length`` is below 3.
    """
    return [
        {
            name: encode_task(task, name, stream.encode(index, name), index, tokenizer, max_length)
            for name in task.splits()
        }
        for index, task in enumerate(stream)
    ]


def encode_task(
    task: Task, split: str, labels: Sequence[int], index: int, tokenizer: Any, max_length: int
) -> EncodedSplit:
    """One split of a task, with the class ids and the task index that it should have.

    Raises:
        ConfigError: If texts are to be cut to less than 3 tokens.
    """
    examples = task.splits()[split]
    inputs: Any = examples.inputs
    if task.modality == "text":
        if max_length < 3:
            raise ConfigError(f"max_length={max_length}: at least 3 tokens are needed to hold a text")
        inputs = tokenizer(list(inputs), truncation=True, max_length=max_length)["input_ids"]
    return EncodedSplit(inputs, labels, [index] * len(labels))


def evaluation_batches(
    split: EncodedSplit, batch_size: int, collate: Collator
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of similar length, with the positions of their examples; every example exactly once."""
    order = sorted(range(len(split)), key=split.length)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, collate([split[i] for i in rows])


def balanced_batches(
    split: EncodedSplit, count: int, batch_size: int, collate: Collator, seed: int
) -> list[dict[str, Tensor]]:
    """Up to ``count`` examples, drawn evenly over the classes, in batches of similar length."""
    generator = random.Random(seed)
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(split.labels):
        by_class.setdefault(label, []).append(position)
    queues = [generator.sample(rows, len(rows)) for _, rows in sorted(by_class.items())]
    chosen: list[int] = []
    while queues and len(chosen) < count:
        for queue in queues:
            chosen.append(queue.pop())
        queues = [queue for queue in queues if queue]
    chosen = sorted(chosen[:count], key=split.length)
    starts = list(range(0, len(chosen), batch_size))
    generator.shuffle(starts)
    return [collate([split[i] for i in chosen[s : s + batch_size]]) for s in starts]
