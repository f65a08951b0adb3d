"""Find the parts of a model: one small forward pass is watched, and its data flow says what every layer is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growthring.errors import ConfigError

from ._inputs import example_inputs
from ._trace import AttentionCall, Trace, base_of
from .module_map import Attention, Block, Mlp, ModuleMap, Stack

__all__ = ["map_modules", "map_towers"]

_MODALITY = {"input_ids": "text", "decoder_input_ids": "text", "pixel_values": "image"}


def map_modules(model: nn.Module, example: Mapping[str, Any] | None = None) -> ModuleMap:
    """Find blocks, attention, projections, MLPs, norms and embeddings of a model.

    The model is run once, without gradients and in eval mode, on a tiny made-up input; nothing of it changes. PEFT
    layers are seen as what they wrap, so a model with adapters has the same map as the one without.

    Args:
        model: A text or image encoder, a decoder, an encoder-decoder or a dual encoder.
        example: Keyword arguments of one forward pass; made from the model's config by default.

    Returns:
        The map; names are relative to ``model``.

    Raises:
        ConfigError: If no forward pass can be made, or no repeated layers with attention are found in it; the message
            says what was looked for and what was found.
    """
    kind = type(model).__name__
    inputs = dict(example) if example is not None else example_inputs(model)
    trace = _watched(model, inputs)
    blocks: dict[str, list[int]] = {}
    for number, call in enumerate(trace.attentions):
        block = _block_of(model, call.module) if call.value else None
        if block is not None:
            blocks.setdefault(block, []).append(number)
    if not blocks:
        attended = sum(bool(call.value) for call in trace.attentions)
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ConfigError(
            f"{kind} cannot be mapped: looked for repeated layers (entries of an nn.ModuleList) in which linear "
            f"layers give queries, keys and values to softmax(QK')V; found {len(trace.linears)} uses of linear "
            f"layers, {attended} of attention, lists {lists or 'none'}.{_hidden(model)} Name target_modules yourself"
        )
    stacks: dict[str, list[Block]] = {}
    for name, numbers in blocks.items():
        stacks.setdefault(name.rpartition(".")[0], []).append(_block(trace, kind, name, numbers))
    return ModuleMap(
        kind,
        tuple(_stack(model, trace, inputs, name, tuple(parts), set(blocks)) for name, parts in stacks.items()),
        _shared(trace),
    )


def map_towers(model: nn.Module, example: Mapping[str, Any] | None = None) -> dict[str, ModuleMap]:
    """Map each tower of a dual encoder apart.

    Args:
        model: ``CLIPModel``, ``VisionTextDualEncoderModel`` or another model that reads text and images.
        example: As for :func:`map_modules`.

    Returns:
        Modality (``"text"``, ``"image"``) to the map of its tower.

    Raises:
        ConfigError: If the model has one modality only, or cannot be mapped.
    """
    whole = map_modules(model, example)
    if len(whole.modalities) < 2:
        raise ConfigError(f"{whole.model} reads {whole.modalities[0]} only, it has no towers; use map_modules")
    return {modality: whole.tower(modality) for modality in whole.modalities}


def _hidden(model: nn.Module) -> str:
    """A hint if attention runs in a kernel that cannot be followed."""
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used in (None, "eager", "sdpa"):
        return ""
    return f" Attention runs as {used!r}, which cannot be followed: map the model under 'sdpa' or 'eager' first."


def _watched(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Run the model once."""
    trace = Trace(model)
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            trace.watch(inputs)
    except Exception as error:
        shapes = {key: tuple(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
        raise ConfigError(
            f"{type(model).__name__} cannot be mapped: its forward pass on {shapes} failed ({type(error).__name__}: "
            f"{error}); give an example that works, as map_modules(model, example={{...}}), or name target_modules"
        ) from error
    finally:
        for module in training:
            module.training = True
    return trace


def _block_of(model: nn.Module, name: str) -> str | None:
    """The outermost list entry that a module lies in."""
    parts = name.split(".")
    module, seen = model, []
    for part in parts:
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        seen.append(part)
        if listed:
            return ".".join(seen)
        module = base_of(module)
        module = getattr(module, part)
    return None


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _block(trace: Trace, kind: str, name: str, numbers: list[int]) -> Block:
    linears = [call for call in trace.linears if _inside(call.name, name)]
    attentions = tuple(dict.fromkeys(_attention(trace, kind, trace.attentions[n], n) for n in numbers))
    taken = {part for a in attentions for part in (*a.inputs, a.output)}
    feeds = {}  # a linear layer and the layers of the block whose output it reads
    for call in linears:
        before = {mark[1] for mark in call.marks if mark[0] == "linear" and _inside(mark[1], name)}
        if before and call.name not in taken and not before & taken and call.name not in before:
            feeds[call.name] = tuple(dict.fromkeys(c.name for c in linears if c.name in before))
    inner = {source for sources in feeds.values() for source in sources}
    mlps = []
    for down in dict.fromkeys(feeds):
        if down in inner:
            continue  # in the middle of a longer chain
        up = feeds[down]
        while any(source in feeds for source in up):
            up = tuple(dict.fromkeys(first for source in up for first in feeds.get(source, (source,))))
        mlps.append(Mlp(up, down, next((first for first in up if first in trace.gates), None)))
    norms = tuple(dict.fromkeys(norm for norm in trace.norms if _inside(norm, name)))
    return Block(name, attentions, tuple(mlps), norms)


def _attention(trace: Trace, kind: str, call: AttentionCall, number: int) -> Attention:
    names = {}
    for part in ("query", "key", "value"):
        linear = sorted({mark[1] for mark in getattr(call, part) if mark[0] == "linear"})
        if len(linear) != 1:
            raise ConfigError(
                f"{kind} cannot be mapped: {call.module} makes its {part} out of {linear or 'no linear layer'}; "
                "exactly one projection was looked for. Name target_modules yourself"
            )
        names[part] = linear[0]
    source = {c.name: c.source for c in trace.linears}
    output = next((c.name for c in trace.linears if ("attended", number) in c.marks), None)
    thirds = len(set(names.values())) == 1 and call.thirds
    return Attention(call.module, **names, output=output, cross=source[names["query"]] != source[names["key"]],
                     thirds=thirds)  # fmt: skip


def _stack(
    model: nn.Module, trace: Trace, inputs: Mapping[str, Any], name: str, blocks: tuple[Block, ...], others: set[str]
) -> Stack:
    first = next(call for call in trace.modules if call.name == blocks[0].name)
    keys = sorted(str(mark[1]) for mark in first.marks if mark[0] == "input" and mark[1] in _MODALITY)
    own = next((key for key in keys if key.startswith("decoder_")), keys[0] if keys else "")
    modality = _MODALITY.get(own, "other")
    holds_blocks = {call.name for call in trace.modules if any(_inside(block, call.name) for block in others)}
    table = None
    if modality == "text":
        ids = inputs[own].flatten()
        table = next(
            (
                call.name
                for call in trace.modules
                if isinstance(base_of(_get(model, call.name)), nn.Embedding)
                and call.ids is not None
                and torch.equal(call.ids.flatten(), ids)
            ),
            None,
        )
    makes = [
        call.name
        for call in trace.modules
        if call.name not in holds_blocks
        and not any(_inside(call.name, block) for block in others)
        and call.makes_tokens
        and ("input", own) in call.marks
        and (table is None or _inside(table, call.name))
    ]
    outermost = [a for a in makes if not any(a != b and _inside(a, b) for b in makes)]
    return Stack(name, modality, blocks, outermost[0] if outermost else None, table)


def _get(model: nn.Module, name: str) -> nn.Module:
    """A module by the name that it had before PEFT wrapped anything."""
    module = model
    for part in name.split("."):
        while isinstance(module, nn.Module) and "base_layer" in module._modules and part not in module._modules:
            module = module.get_submodule("base_layer")
        module = getattr(module, part)
    return module


def _shared(trace: Trace) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for call in trace.linears:
        groups.setdefault(call.source, []).append(call.name)
    return tuple(names for names in (tuple(dict.fromkeys(group)) for group in groups.values()) if len(names) > 1)
