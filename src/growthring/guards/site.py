"""One site: a trainable matrix, and where its features are seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Mode", "Site", "Slots", "original_name"]

Mode = Literal["strict", "paper"]


@dataclass(frozen=True)
class Slots:
    """Rows that a prefix or a prompt puts beside the tokens.

    Attributes:
        feature: ``"query"`` rows of the old queries, ``"mass"`` their attention on the slots, ``"logit"`` the queries
            through the Jacobian of the keys, ``"token"`` the tokens that enter beside the prompts.
        start: First slot among the keys.
        length: Number of slots ``L``.
        queries: Slots stand among the queries too; these are left out.
        layer: ``layer_idx`` of the attention that they belong to; of prompts ``None``: the first attention after they
            entered.
        head: Key-value head; ``None`` for all together.
        adapter: Adapter that they belong to; while it is not active, the model does not use them.
    """

    feature: Literal["query", "mass", "logit", "token"]
    start: int
    length: int
    queries: bool
    layer: int | None = None
    head: int | None = None
    adapter: str = ""


@dataclass(frozen=True)
class Site:
    """One protected matrix.

    Attributes:
        name: Unique: the qualified name of the parameter, with the block's name behind it if the site is a part of it.
        kind: One of :data:`~growthring.guards.energy.KINDS`.
        module: Qualified name of the module that shows the features; of prompts, the one that brings them in.
        dim: Feature dimension.
        tensor: Qualified name of the parameter, where ``name`` is more than that.
        transposed: True when features run along the first axis (``Conv1D`` of GPT-2, attention mass over slots).
        columns: Columns of the parameter that are this site, ``(start, stop)``; default all.
        bias: Qualified name of a bias that is one more column, multiplied by a feature of constant 1.
        outer: Module whose input stands for that of ``module``, if any: PEFT hands every ``A`` a cast copy of its own
            where dtypes differ, and the layer around it still shows that query, key and value share their input.
        scales: The parameter is a vector that scales features one by one (IA3), those that come in or go out.
        slots: For prefixes and prompts, where their rows stand and which of their features is meant.
        flat: A tensor of more than two dimensions (a convolution), seen as the matrix ``(first, all others)``.
    """

    name: str
    kind: str
    module: str
    dim: int
    tensor: str = ""
    transposed: bool = False
    columns: tuple[int, int] | None = None
    bias: str = ""
    outer: str = ""
    scales: Literal["", "input", "output"] = ""
    slots: Slots | None = None
    flat: bool = False

    @property
    def parameter(self) -> str:
        """Qualified name of the parameter."""
        return self.tensor or self.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """Qualified names of all parameters of the site."""
        return (self.parameter, self.bias) if self.bias else (self.parameter,)

    def crosses(self, other: Site) -> bool:
        """True when the two have elements in common."""
        if self.parameter != other.parameter:
            return False
        if self.columns is None or other.columns is None:
            return True
        return self.columns[0] < other.columns[1] and other.columns[0] < self.columns[1]

    def view(self, tensor: Tensor) -> Tensor:
        """The site's part of its parameter, features along the last axis.

        It shares storage, except of a convolution whose weight is not contiguous (``channels_last``).
        """
        if self.flat:
            tensor = tensor.reshape(tensor.shape[0], -1)
        if self.scales:
            return tensor.view(1, -1)
        if self.columns is not None:
            tensor = tensor[:, self.columns[0] : self.columns[1]]
        return tensor.mT if self.transposed else tensor

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The site's matrix ``(rows, dim)``: a view of its parameter, or a copy where there can be none."""
        matrix = self.view(tensors[self.parameter])
        return torch.cat([matrix, tensors[self.bias].unsqueeze(-1)], dim=-1) if self.bias else matrix

    def write(self, tensors: Mapping[str, Tensor], matrix: Tensor) -> None:
        """Put back what :meth:`read` gave as a copy; views need no writing."""
        if self.bias:
            self.view(tensors[self.parameter]).copy_(matrix[:, :-1])
            tensors[self.bias].copy_(matrix[:, -1])
        elif self.flat and not tensors[self.parameter].is_contiguous():
            whole = tensors[self.parameter]
            whole.copy_((matrix.mT if self.transposed else matrix).reshape(whole.shape))


def original_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and ``DistributedDataParallel`` put around a model."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
