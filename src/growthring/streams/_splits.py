"""The examples of one split, and how rows are drawn from them: stratified, seeded, the same on every machine.

Rows are ranked by a SHA-256 of seed, purpose and content (the text, or the hash of the pixels). Neither Python's
``hash`` (salted per process) nor the state of a global random generator takes part, and the order of the rows in the
file does not matter.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from growthring.errors import ConfigError
from growthring.streams.images import Images

__all__ = ["Examples", "carve", "same_text", "sample", "shuffled"]


@dataclass(frozen=True)
class Examples:
    """The checked rows of one split.

    Attributes:
        inputs: What the model is given, one a row: non-empty strings, or :class:`Images`, of which each is an array
            ``(height, width, 3)`` of unsigned bytes.
        labels: The label of each row; same length as ``inputs``.
    """

    inputs: list[str] | Images
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        return iter(zip(self.inputs, self.labels, strict=True))

    @property
    def modality(self) -> Literal["text", "image"]:
        """What the inputs are."""
        return "image" if isinstance(self.inputs, Images) else "text"

    @property
    def texts(self) -> list[str]:
        """The inputs of a text split.

        Raises:
            ConfigError: They are images.
        """
        if isinstance(self.inputs, Images):
            raise ConfigError("these examples are images and have no texts; their arrays are in .inputs")
        return self.inputs

    @property
    def keys(self) -> list[str]:
        """What tells one input from another: the text itself, or the hash of an image's size and pixels."""
        return self.inputs.hashes if isinstance(self.inputs, Images) else self.inputs

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each label that occurs, by label name."""
        return dict(sorted(Counter(self.labels).items()))

    def take(self, rows: Iterable[int]) -> Examples:
        """Return the rows with these 0-based numbers, in the order given; images are neither read nor copied."""
        chosen = list(rows)
        inputs = self.inputs
        taken = inputs.take(chosen) if isinstance(inputs, Images) else [inputs[i] for i in chosen]
        return Examples(taken, [self.labels[i] for i in chosen])


def same_text(text: str) -> str:
    """Return the form under which two texts count as the same: runs of white space made one blank."""
    return " ".join(text.split())


def _rank(seed: int, purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()


def shuffled(examples: Examples, seed: int, purpose: str) -> list[int]:
    """Return the row numbers in an order that seed, purpose and content fix; equal inputs stay in row order."""
    keys = examples.keys
    return sorted(range(len(examples)), key=lambda i: (_rank(seed, purpose, keys[i]), i))


def _quotas(weights: Mapping[str, int], caps: Mapping[str, int], total: int) -> dict[str, int]:
    """Share ``total`` rows among labels in proportion to ``weights``, one each if it goes round, at most caps."""
    total = min(total, sum(caps.values()))
    whole = sum(weights.values())
    least = {label: min(1, cap) for label, cap in caps.items()}
    if total < sum(least.values()):
        least = dict.fromkeys(caps, 0)
    exact = {label: total * weight / whole for label, weight in weights.items()}
    quota = {label: min(caps[label], max(least[label], int(exact[label]))) for label in sorted(weights)}
    while sum(quota.values()) < total:
        open_ = [label for label in quota if quota[label] < caps[label]]
        quota[max(open_, key=lambda label: exact[label] - quota[label])] += 1
    while sum(quota.values()) > total:
        over = [label for label in quota if quota[label] > least[label]]
        quota[max(over, key=lambda label: quota[label] - exact[label])] -= 1
    return quota


def sample(examples: Examples, count: int, seed: int, purpose: str) -> Examples:
    """Draw ``count`` rows, stratified by label; every label keeps a row if ``count`` allows it.

    Args:
        examples: What to draw from; all of it is returned if it has no more than ``count`` rows.
        count: Rows wanted, at least 1.
        seed: Chooses the rows.
        purpose: Makes draws with one seed independent of each other, for example task and split name.

    Returns:
        The chosen rows in their first order.
    """
    if count >= len(examples):
        return examples
    sizes = Counter(examples.labels)
    left = _quotas(sizes, sizes, count)
    chosen = []
    for i in shuffled(examples, seed, purpose):
        if left[examples.labels[i]]:
            left[examples.labels[i]] -= 1
            chosen.append(i)
    return examples.take(sorted(chosen))


def carve(examples: Examples, count: int, seed: int, purpose: str) -> tuple[Examples, Examples]:
    """Split about ``count`` rows off, stratified by label: at least one a label when possible, and never its last.

    Rows with the same input stay on one side, so that none is on both; an input with two labels is not carved.

    Args:
        examples: The rows to divide.
        count: Rows wanted on the carved side.
        seed: Chooses the rows.
        purpose: As in :func:`sample`.

    Returns:
        ``(kept, carved)``; ``carved`` is empty when no label has two different inputs.
    """
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(examples.keys):
        groups.setdefault(same_text(key), []).append(i)
    by_label: dict[str, list[list[int]]] = {label: [] for label in examples.labels}
    for key in sorted(groups, key=lambda key: _rank(seed, purpose, key)):
        rows = groups[key]
        if len({examples.labels[i] for i in rows}) == 1:
            by_label[examples.labels[rows[0]]].append(rows)
    sizes = Counter(examples.labels)
    # The last group of a label stays, so that training data keep every label.
    spare = {label: found[:-1] for label, found in by_label.items()}
    caps = {label: sum(map(len, found)) for label, found in spare.items()}
    quota = _quotas(sizes, caps, max(count, sum(1 for cap in caps.values() if cap)))
    carved: set[int] = set()
    for label, found in spare.items():
        left = quota[label]
        for rows in found:
            if len(rows) <= left:
                carved.update(rows)
                left -= len(rows)
        if found and left == quota[label] > 0:  # every input of this label is repeated more often than its quota
            smallest = min(found, key=len)
            carved.update(smallest)
    kept = [i for i in range(len(examples)) if i not in carved]
    return examples.take(kept), examples.take(sorted(carved))
