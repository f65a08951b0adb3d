"""Watching attention from outside: queries, keys and weights of every attention module of a transformers model.

transformers looks its attention up in a table by the name that the model's configuration gives. While
:class:`watching` is open, that name is ours: the same attention in plain matrix products, which
also hands over what it saw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growthring.errors import GuardError

from .batches import run_model
from .site import Site, Slots

__all__ = ["Attended", "key_jacobian", "real_rows", "rows_at", "watching"]

_NAME = "growthring_watch"


@dataclass(frozen=True)
class Attended:
    """One call of one attention module.

    Attributes:
        module: The module.
        query: ``(batch, heads, queries, d_h)``, as it meets the keys (rotated, where positions are).
        key: ``(batch, key-value heads, keys, d_h)``.
        weights: ``(batch, heads, queries, keys)``, after the softmax.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    weights: Tensor


_sink: ContextVar[Callable[[Attended], None] | None] = ContextVar("growthring_attention", default=None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain matrix products; the signature is that of transformers."""
    if settings.get("s_aux") is not None:
        raise GuardError(
            f"{type(module).__name__} has attention sinks; PEGP cannot follow its prefixes or prompts. Use LoRA or a "
            "bottleneck adapter"
        )
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if cap := settings.get("softcap"):
        scores = torch.tanh(scores / cap) * cap
    if attention_mask is not None:
        mask = attention_mask[..., : scores.shape[-1]]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    sink = _sink.get()
    if sink is not None:
        sink(Attended(module, query, key, weights))
    return (weights.to(values.dtype) @ values).transpose(1, 2).contiguous(), weights


class watching:
    """While open, every attention call of ``model`` is handed to ``sink``.

    Args:
        model: The model; its configurations are put back on leaving.
        sink: Called within the forward pass.
    """

    def __init__(self, model: nn.Module, sink: Callable[[Attended], None]) -> None:
        found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        self._configs = list({id(c): c for c in found if getattr(c, "_attn_implementation", None)}.values())
        self._sink = sink

    def __enter__(self) -> watching:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
        self._before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = _NAME
        self._token = _sink.set(self._sink)
        return self

    def __exit__(self, *exception: object) -> None:
        _sink.reset(self._token)
        for config, before in zip(self._configs, self._before, strict=True):
            config._attn_implementation = before


def rows_at(call: Attended, slots: Slots, mask: Tensor | None, jacobian: Tensor | None = None) -> Tensor:
    """The feature rows of one site in one attention call.

    Args:
        call: What the attention saw.
        slots: Which rows are meant.
        mask: The batch's attention mask ``(batch, tokens)``, if it has one; padding is nobody's knowledge.
        jacobian: For ``"logit"`` features, ``dk / dP`` of :func:`key_jacobian`.

    Returns:
        ``(rows, d)``.
    """
    queries, groups = call.query.shape[2], call.query.shape[1] // call.key.shape[1]
    real = real_rows(call.query.shape[0], queries, slots, mask).to(call.query.device)
    heads = slice(None) if slots.head is None else slice(slots.head * groups, (slots.head + 1) * groups)
    if slots.feature == "mass":
        mass = call.weights[:, heads, :, slots.start : slots.start + slots.length]
        return mass.transpose(1, 2)[real].reshape(-1, slots.length)
    rows = call.query[:, heads].transpose(1, 2)[real]  # (real queries, heads, d_h)
    if slots.feature == "query" and slots.head is None:
        if groups != 1:
            raise GuardError(
                f"mode='paper' joins all heads of a query, and {type(call.module).__name__} has {groups} query heads "
                "for each key head. Use mode='strict'"
            )
        return rows.flatten(1)
    if slots.feature == "query":
        return rows.reshape(-1, rows.shape[-1])
    assert jacobian is not None
    parts = []
    for head in range(call.key.shape[1]):
        mine = rows[:, head * groups : (head + 1) * groups].reshape(-1, rows.shape[-1])
        root = torch.linalg.qr(mine.double(), mode="r")[1]  # as good as all rows: R^T R = Q^T Q
        parts.append((root @ jacobian[:, head].to(root)).flatten(0, 1))
    return torch.cat(parts)


def real_rows(batch: int, length: int, slots: Slots, mask: Tensor | None) -> Tensor:
    """Which of ``(batch, length)`` rows are tokens: neither slots nor padding."""
    real = torch.ones(batch, length, dtype=torch.bool)
    tokens = real.new_ones(length)
    if slots.queries:
        tokens[slots.start : slots.start + slots.length] = False
    if mask is not None and mask.shape[0] == batch:
        if mask.shape[1] == length:
            real = mask.cpu().bool().clone()
        elif mask.shape[1] == int(tokens.sum()):
            real[:, tokens] = mask.cpu().bool()
    return real & tokens


class _Stop(Exception):
    """The first attention has been seen."""


def key_jacobian(model: nn.Module, site: Site, entrance: nn.Module, prompts: Tensor, batch: Any) -> Tensor:
    """``dk / dP``: how the keys of the first attention after a prompt follow it, norms and rotations included.

    Args:
        model: In evaluation mode.
        site: A site with ``"logit"`` features.
        entrance: The module that brings the prompts in.
        prompts: The prompt's rows ``P``, ``(L, d)``, as the model holds them.
        batch: Any batch.

    Returns:
        ``(L, key-value heads, d_h, d)``, float64 where the model is.

    Raises:
        GuardError: If no attention that transformers' table serves follows the prompts.
    """
    assert site.slots is not None
    slots = site.slots
    seen: list[Tensor] = []
    entered: list[bool] = []

    def sink(call: Attended) -> None:
        if entered:
            seen.append(call.key[0, :, slots.start : slots.start + slots.length])
            raise _Stop

    trains = prompts.requires_grad
    prompts.requires_grad_(True)
    hook = entrance.register_forward_pre_hook(lambda *_: entered.append(True))
    try:
        with torch.enable_grad(), watching(model, sink):
            with contextlib.suppress(_Stop):
                run_model(model, batch)
            if not seen:
                raise GuardError(
                    f"no attention was seen after the prompt {site.parameter}: the model does not use transformers' "
                    "attention functions, so its keys cannot be followed. Use mode='paper', LoRA or an adapter"
                )
            keys = seen[0]
            rows = [
                torch.autograd.grad(keys[head, :, part].sum(), prompts, retain_graph=True)[0]
                for head in range(keys.shape[0])
                for part in range(keys.shape[2])
            ]
    finally:
        hook.remove()
        prompts.requires_grad_(trains)
    stacked = torch.stack(rows, dim=1)  # (L, heads * d_h, d)
    return stacked.reshape(slots.length, keys.shape[0], keys.shape[2], -1).detach()
