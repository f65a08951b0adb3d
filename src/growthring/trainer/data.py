"""Token ids of a stream, made once, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from growthring.errors import ConfigError
from growthring.streams import TaskStream

__all__ = ["Collator", "EncodedSplit", "balanced_batches", "encode_stream", "evaluation_batches"]

Row = dict[str, Any]


class EncodedSplit(Dataset[Row]):
    """Token ids, class ids and the task id of one split (or of several, joined).

    Args:
        tokens: One list of token ids per example.
        labels: Class ids of the whole stream.
        task_ids: Task index per example.
    """

    def __init__(self, tokens: Sequence[list[int]], labels: Sequence[int], task_ids: Sequence[int]) -> None:
        self.tokens, self.labels, self.task_ids = list(tokens), list(labels), list(task_ids)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Row:
        return {"input_ids": self.tokens[index], "labels": self.labels[index], "task_ids": self.task_ids[index]}

    @staticmethod
    def join(parts: Sequence[EncodedSplit]) -> EncodedSplit:
        """All examples of several splits, in order."""
        return EncodedSplit(
            [t for p in parts for t in p.tokens],
            [y for p in parts for y in p.labels],
            [i for p in parts for i in p.task_ids],
        )


class Collator:
    """Pads a list of examples to its longest and stacks them.

    Args:
        pad_id: Token id of padding.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A batch of ``input_ids``, ``attention_mask``, ``labels`` and ``task_ids``."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, :length] = torch.tensor(row["input_ids"])
            mask[number, :length] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([row["labels"] for row in rows]),
            "task_ids": torch.tensor([row["task_ids"] for row in rows]),
        }


def encode_stream(stream: TaskStream, tokenizer: Any, max_length: int) -> list[dict[str, EncodedSplit]]:
    """Tokenize every split of every task once.

    Args:
        stream: The stream.
        tokenizer: A ``transformers`` tokenizer.
        max_length: Tokens kept of a text, special tokens included.

    Raises:
        ConfigError: If the tokenizer has no padding token and no end token to pad with, or ``max_length`` is below 3.
    """
    if max_length < 3:
        raise ConfigError(f"max_length={max_length}: at least 3 tokens are needed to hold a text")
    encoded = []
    for index, task in enumerate(stream):
        splits = {}
        for name, examples in task.splits().items():
            tokens = tokenizer(list(examples.texts), truncation=True, max_length=max_length)["input_ids"]
            labels = stream.encode(index, name)
            splits[name] = EncodedSplit(tokens, labels, [index] * len(labels))
        encoded.append(splits)
    return encoded


def evaluation_batches(
    split: EncodedSplit, batch_size: int, collate: Collator
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of similar length, with the positions of their examples; every example exactly once."""
    order = sorted(range(len(split)), key=lambda i: len(split.tokens[i]))
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
    chosen = sorted(chosen[:count], key=lambda i: len(split.tokens[i]))
    starts = list(range(0, len(chosen), batch_size))
    generator.shuffle(starts)
    return [collate([split[i] for i in chosen[s : s + batch_size]]) for s in starts]
