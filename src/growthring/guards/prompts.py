"""Prefixes and prompts: where their rows stand, and which conditions keep what old inputs make of them.

With queries ``Q_h`` of head ``h`` and prefix rows ``P_k,h``, ``P_v,h`` of shape ``(L, d_h)``, attention computes
``softmax([Q_h P_k,h^T, Q_h K_h^T] / sqrt(d_h)) [P_v,h; V_h]``. A change keeps it for old queries exactly when

* ``Q_h D_k,h^T = 0`` for every head by itself: the logits stay, so the attention ``S`` does (kind ``prefix_key``);
* ``S_P,h D_v,h = 0`` with ``S_P,h`` the mass that old queries put on the ``L`` slots (kind ``prefix_value``).

A prompt ``P`` enters as tokens; its keys are ``k(P)``, with ``k`` the embedding's norm, the layer's norm, the key
projection and the rotary positions. At the first layer

* ``Q_h J_h D^T = 0`` with ``J_h = dk_h / dP`` keeps the logits (kind ``prompt_key``; without norms ``J_h`` is
  ``W_k,h`` and this is the condition of Lu et al. 2024, "Visual Prompt Tuning in Null Space for Continual Learning",
  NeurIPS);
* ``S_P D = 0`` keeps what the slots add to the old tokens (kind ``prompt_value``).

The rows of ``P`` itself are protected too, which keeps the norms' scale to first order (that work uses a penalty).
The prompts' own outputs move with them, so beyond the first layer this bounds drift; it does not exclude it.

Mode ``"paper"`` states the conditions of PEGP's equations 10-12: for prefixes ``q D^T = 0`` over all heads together,
nothing for values; for prompts ``x D^T = 0`` and ``p D^T = 0`` over the stacked rows ``[X; P]``. Neither keeps the
attention, and the certificate's ``output_change`` shows what that costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from peft import PrefixEncoder, PromptEmbedding
from torch import Tensor, nn

from growthring.errors import GuardError

from .site import Mode, Site, Slots

__all__ = ["TOKEN_CONTAINERS", "learned_prompts", "tuned_tokens"]

TOKEN_CONTAINERS = ("prompt_tokens", "prefix_keys", "prefix_values")


Found = Iterator[tuple[Tensor, Site]]


def learned_prompts(model: Any, name: str, mode: Mode) -> Found:
    """Sites of PEFT's prefix tuning and prompt tuning.

    Args:
        model: A ``PeftModel``.
        name: Its qualified name.
        mode: Which conditions.

    Raises:
        GuardError: If the prompts are not themselves what trains.
    """
    encoders = model._modules.get("prompt_encoder")  # its own: a PeftModel passes on what it wraps
    inside = f"{name}." if name else ""
    found: Mapping[str, Any] = dict(encoders.items()) if isinstance(encoders, nn.ModuleDict) else {}
    for adapter, encoder in found.items():
        config = model.peft_config[adapter]
        parameter = f"{inside}prompt_encoder.{adapter}.embedding.weight"
        if type(encoder) is PrefixEncoder:
            if getattr(encoder, "prefix_projection", False):
                raise GuardError(
                    f"the prefix {adapter!r} comes out of a network (prefix_projection=True): no condition on that "
                    "network's weights keeps old outputs. Use prefix_projection=False"
                )
            if config.num_transformer_submodules != 1:
                raise GuardError(
                    f"the prefix {adapter!r} is shared by encoder and decoder; protect prefixes of one stack only, or "
                    "use LoRA or bottleneck adapters"
                )
            shape = (config.num_virtual_tokens, config.token_dim, config.num_attention_heads)
            for layer in range(config.num_layers):
                for what, place in (("key", 2 * layer), ("value", 2 * layer + 1)):
                    for one in _prefix(
                        parameter, name, what, shape, mode, adapter, offset=place * shape[1], layer=layer
                    ):
                        yield encoder.embedding.weight, one
        elif type(encoder) is PromptEmbedding:
            if getattr(config, "num_transformer_submodules", 1) != 1:
                raise GuardError(f"the prompt {adapter!r} enters encoder and decoder; prompts of one stack only")
            weight = encoder.embedding.weight
            for one in _prompt(parameter, name, tuple(weight.shape), 0, mode, adapter):
                yield weight, one
        else:
            raise GuardError(
                f"the prompt {adapter!r} is a {type(encoder).__name__}: what trains is not the prompt itself, so no "
                "condition of PEGP protects it. Use PrefixTuningConfig or PromptTuningConfig"
            )


def tuned_tokens(module: Any, name: str, mode: Mode) -> Found:
    """Sites of prefixes and prompts that a tuner layer holds in ``prompt_tokens`` or ``prefix_keys/prefix_values``."""
    inside = f"{name}." if name else ""
    for container in TOKEN_CONTAINERS:
        active = [adapter for adapter in module.active_adapters if adapter in module._modules.get(container, {})]
        if len(active) > 1:
            raise GuardError(
                f"{name or 'the model'} has {len(active)} active prompts or prefixes ({', '.join(active)}); PEGP "
                "follows one. Activate one with set_adapter"
            )
    for adapter, tokens in module._modules.get("prompt_tokens", {}).items():
        parameter = f"{inside}prompt_tokens.{adapter}"
        for one in _prompt(parameter, name, tuple(tokens.shape), module.prompt_start, mode, adapter):
            yield tokens, one
    for what in ("key", "value"):
        for adapter, rows in module._modules.get(f"prefix_{what}s", {}).items():
            parameter = f"{inside}prefix_{what}s.{adapter}"
            shape = (rows.shape[0], rows.shape[1], rows.shape[1] // _head_dim(module, name))
            for one in _prefix(parameter, name, what, shape, mode, adapter):
                yield rows, one


def _prefix(
    parameter: str,
    module: str,
    what: str,
    shape: tuple[int, int, int],
    mode: Mode,
    adapter: str,
    *,
    offset: int = 0,
    layer: int | None = None,
) -> Iterator[Site]:
    """Sites of one layer's prefix keys or values, from column ``offset`` on; without ``layer``: of the module's."""
    length, width, heads = shape
    size, place = width // heads, "" if layer is None else f"layer {layer} "
    queries = layer is None  # a cache adds keys only; rows that a module adds are queries too
    if mode == "paper":
        if what == "key":  # the paper has no condition for values
            slots = Slots("query", 0, length, queries, layer, None, adapter)
            columns = (offset, offset + width)
            yield Site(
                f"{parameter}[{place}key]", "prefix_key", module, width, parameter, columns=columns, slots=slots
            )
        return
    for head in range(heads):
        columns = (offset + head * size, offset + (head + 1) * size)
        name = f"{parameter}[{place}{what} head {head}]"
        if what == "key":
            slots = Slots("query", 0, length, queries, layer, head, adapter)
            yield Site(name, "prefix_key", module, size, parameter, columns=columns, slots=slots)
        else:
            slots = Slots("mass", 0, length, queries, layer, head, adapter)
            yield Site(name, "prefix_value", module, length, parameter, True, columns, slots=slots)


def _prompt(
    parameter: str, module: str, shape: tuple[int, ...], start: int, mode: Mode, adapter: str
) -> Iterator[Site]:
    length, width = shape
    feature: Literal["token", "logit"] = "token" if mode == "paper" else "logit"
    slots = Slots(feature, start, length, True, adapter=adapter)
    yield Site(f"{parameter}[key]", "prompt_key", module, width, parameter, slots=slots)
    if mode == "strict":
        slots = Slots("mass", start, length, True, adapter=adapter)
        yield Site(f"{parameter}[value]", "prompt_value", module, length, parameter, True, slots=slots)


def _head_dim(module: Any, name: str) -> int:
    attention = module.get_base_layer()
    for attribute in ("head_dim", "attention_head_size"):
        size = getattr(attention, attribute, None)
        if isinstance(size, int):
            return size
    raise GuardError(f"{name}: {type(attention).__name__} does not say how wide a head is; its prefix has no heads")
