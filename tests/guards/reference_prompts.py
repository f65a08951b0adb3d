"""Adapters, prefixes, prompts and scales protected as plainly as can be: equations, loops, dense projectors.

The forward passes are written out by hand from a model's weights; nothing here looks at growthring. The conditions:

* prefix, head h (strict): ``Q_h D_k,h^T = 0`` and ``S_h D_v,h = 0``; ``[P_k,h; K_h]`` are the keys, ``S_h`` the mass
  of real queries on the prefix;
* prompt (strict; Lu et al., NeurIPS 2024): ``Q_h J_h D^T = 0`` with ``J_h = dk_h/dP``, ``S D = 0``, and ``P D^T = 0``;
* adapter: ``[dW db] [x; 1] = 0``;
* scales: ``dl_i x_i = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from reference_pegp import grow_basis
from torch import Tensor
from torch.nn import functional as F

Place = Callable[[Tensor], Tensor]


@dataclass
class Condition:
    """A change ``D`` of ``place(tensor)`` must satisfy ``D x = 0`` for every old row ``x``."""

    tensor: str
    place: Place
    dim: int
    energy: float = 1.0
    basis: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.basis = torch.zeros(self.dim, 0, dtype=torch.float64)

    def remember(self, rows: Tensor, energy: float | None = None) -> None:
        self.basis = grow_basis(self.basis, rows.double(), self.energy if energy is None else energy)

    def cut(self, change: Tensor) -> None:
        """Project a change in place; ``place`` gives a view with the features along the last axis."""
        view = self.place(change)
        view -= view @ self.basis @ self.basis.T


class ReferenceConditions:
    """Conditions on tensors, one after another; gradients and updates are both projected."""

    def __init__(self, tensors: dict[str, torch.nn.Parameter], conditions: dict[str, Condition]) -> None:
        self.tensors, self.conditions = tensors, conditions
        self.anchor: dict[str, Tensor] = {}

    def begin(self) -> None:
        self.anchor = {n: p.detach().clone() for n, p in self.tensors.items()}

    @torch.no_grad()
    def before_step(self) -> None:
        for one in self.conditions.values():
            gradient = self.tensors[one.tensor].grad
            if gradient is not None:
                one.cut(gradient)

    @torch.no_grad()
    def after_step(self) -> None:
        for name, tensor in self.tensors.items():
            change = tensor - self.anchor[name]
            for one in self.conditions.values():
                if one.tensor == name:
                    one.cut(change)
            tensor.copy_(self.anchor[name] + change)


class ReferenceFolded:
    """Linear layers ``(weight, bias)``, each protected as one matrix ``[W b]`` that multiplies ``[x; 1]``."""

    def __init__(self, layers: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]) -> None:
        self.layers = layers
        self.basis = {n: torch.zeros(w.shape[1] + 1, 0, dtype=torch.float64) for n, (w, _) in layers.items()}
        self.anchor: dict[str, Tensor] = {}

    @staticmethod
    def joined(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([weight.detach(), bias.detach()[:, None]], 1)

    def remember(self, features: dict[str, Tensor], energy: float) -> None:
        for name, x in features.items():
            ones = torch.ones(len(x), 1, dtype=torch.float64)
            self.basis[name] = grow_basis(self.basis[name], torch.cat([x.double(), ones], 1), energy)

    def begin(self) -> None:
        self.anchor = {n: self.joined(w, b).clone() for n, (w, b) in self.layers.items()}

    def _cut(self, name: str, change: Tensor) -> Tensor:
        u = self.basis[name]
        return change - change @ u @ u.T

    def before_step(self) -> None:
        for name, (w, b) in self.layers.items():
            kept = self._cut(name, self.joined(w.grad, b.grad))
            w.grad, b.grad = kept[:, :-1].contiguous(), kept[:, -1].contiguous()

    @torch.no_grad()
    def after_step(self) -> None:
        for name, (w, b) in self.layers.items():
            new = self.anchor[name] + self._cut(name, self.joined(w, b) - self.anchor[name])
            w.copy_(new[:, :-1])
            b.copy_(new[:, -1])


class ReferenceScales:
    """Vectors that scale features: an entry whose feature was ever there stays."""

    def __init__(self, vectors: dict[str, torch.nn.Parameter]) -> None:
        self.vectors = vectors
        self.used = {n: torch.zeros(v.numel(), dtype=torch.bool) for n, v in vectors.items()}
        self.anchor: dict[str, Tensor] = {}

    def remember(self, features: dict[str, Tensor]) -> None:
        for name, x in features.items():
            self.used[name] |= (x != 0).any(0)

    def begin(self) -> None:
        self.anchor = {n: v.detach().clone() for n, v in self.vectors.items()}

    def before_step(self) -> None:
        for name, v in self.vectors.items():
            v.grad.view(-1)[self.used[name]] = 0.0

    @torch.no_grad()
    def after_step(self) -> None:
        for name, v in self.vectors.items():
            v.view(-1)[self.used[name]] = self.anchor[name].view(-1)[self.used[name]]


# --- BERT by hand -----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What attention saw in one layer."""

    queries: Tensor  # (batch, heads, queries, d_h)
    keys: Tensor  # (batch, heads, keys, d_h)
    weights: Tensor  # (batch, heads, queries, keys)


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def embed(model: Any, words: Tensor, start: int = 0) -> Tensor:
    """Word vectors with positions from ``start`` on, normalised as the model does it."""
    e = model.embeddings
    x = words + e.position_embeddings.weight[start : start + words.shape[1]] + e.token_type_embeddings.weight[0]
    return e.LayerNorm(x)


def bert_by_hand(model: Any, x: Tensor, mask: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, list[Seen]]:
    """BERT's layers on embedded tokens ``x``; ``prefix`` is ``(L, layers, 2, heads, d_h)``."""
    count, seen = model.config.num_attention_heads, []
    for number, layer in enumerate(model.encoder.layer):
        attention = layer.attention.self
        q, k, v = (heads(f(x), count) for f in (attention.query, attention.key, attention.value))
        see = mask
        if prefix is not None:
            front = [prefix[:, number, i].transpose(0, 1).expand(x.shape[0], -1, -1, -1) for i in (0, 1)]
            k, v = torch.cat([front[0], k], 2), torch.cat([front[1], v], 2)
            see = torch.cat([mask.new_ones(mask.shape[0], prefix.shape[0]), mask], 1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(see[:, None, None, :] == 0, float("-inf"))
        weights = scores.softmax(-1)
        seen.append(Seen(q, k, weights))
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = layer.attention.output.LayerNorm(layer.attention.output.dense(mixed) + x)
        x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
    return x, seen


def prefix_rows(weight: Tensor, model: Any) -> Tensor:
    """PEFT's ``(L, layers * 2 * d)`` as ``(L, layers, 2, heads, d_h)``."""
    count = model.config.num_attention_heads
    return weight.reshape(weight.shape[0], model.config.num_hidden_layers, 2, count, -1)


def prefix_forward(model: Any, weight: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, list[Seen]]:
    """BERT with a prefix as PEFT gives it: positions begin behind the prefix."""
    rows = prefix_rows(weight, model)
    words = model.embeddings.word_embeddings(batch["input_ids"])
    return bert_by_hand(model, embed(model, words, rows.shape[0]), batch["attention_mask"], rows)


def prefix_features(model: Any, weight: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries and mass of real tokens, for every layer and head."""
    length, real = weight.shape[0], batch["attention_mask"].bool()
    with torch.no_grad():
        _, seen = prefix_forward(model, weight, batch)
    found = {}
    for number, one in enumerate(seen):
        for head in range(one.queries.shape[1]):
            found[f"key {number} {head}"] = one.queries[:, head][real]
            found[f"value {number} {head}"] = one.weights[:, head, :, :length][real]
    return found


def prefix_conditions(name: str, weight: Tensor, model: Any, energy: float = 1.0) -> dict[str, Condition]:
    length, layers, _, count, size = prefix_rows(weight, model).shape
    found = {}
    for number in range(layers):
        for head in range(count):
            for i, what in enumerate(("key", "value")):
                first = ((2 * number + i) * count + head) * size

                def place(t: Tensor, first: int = first, across: bool = what == "value") -> Tensor:
                    part = t[:, first : first + size]
                    return part.T if across else part

                found[f"{what} {number} {head}"] = Condition(name, place, size if what == "key" else length, energy)
    return found


def prompt_forward(model: Any, weight: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, list[Seen]]:
    """BERT with a prompt as PEFT gives it: in front of the words, before positions and norm."""
    words = model.embeddings.word_embeddings(batch["input_ids"])
    x = torch.cat([weight.expand(words.shape[0], -1, -1), words], 1)
    mask = batch["attention_mask"]
    mask = torch.cat([mask.new_ones(mask.shape[0], weight.shape[0]), mask], 1)
    return bert_by_hand(model, embed(model, x), mask)


def prompt_features(model: Any, weight: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``q_h dk_h/dp_l`` for every real query, head and slot; the mass on the slots, of every head."""
    length = weight.shape[0]
    real = torch.nn.functional.pad(batch["attention_mask"].bool(), (length, 0))
    with torch.no_grad():
        first = prompt_forward(model, weight, batch)[1][0]
    projection, count = model.encoder.layer[0].attention.self.key, model.config.num_attention_heads
    logits = []
    for slot in range(length):

        def key(p: Tensor, slot: int = slot) -> Tensor:
            return projection(embed(model, p.expand(1, 1, -1), slot))[0, 0]

        jacobian = torch.autograd.functional.jacobian(key, weight[slot].detach()).reshape(count, -1, weight.shape[1])
        logits += [first.queries[:, head][real] @ jacobian[head] for head in range(count)]
    mass = [first.weights[:, head, :, :length][real] for head in range(count)]
    return {"key": torch.cat(logits), "value": torch.cat(mass)}


def prompt_conditions(name: str, weight: Tensor, energy: float = 1.0) -> dict[str, Condition]:
    return {
        "key": Condition(name, lambda t: t, weight.shape[1], energy),
        "value": Condition(name, lambda t: t.T, weight.shape[0], energy),
    }
