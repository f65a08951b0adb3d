"""Follow tensors through one forward pass: which linear layers made a query, what an MLP's last layer reads.

Every tensor carries marks. A linear layer's output is marked with the layer's name alone; other functions pass on the
marks of what they read. Where scaled dot-product attention is computed, fused or as two products around a softmax,
the marks of its arguments name the projections, and its output is marked as attended.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

__all__ = ["AttentionCall", "LinearCall", "ModuleCall", "Trace", "base_of", "plain_name"]

Mark = tuple[
    str, Any
]  # ("linear", name) | ("attended", number) | ("scores", number) | ("probs", number) | ("input", key)
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
_TIMES = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}


def plain_name(name: str) -> str:
    """A module's name as it was before PEFT wrapped anything."""
    return name.replace(".base_layer", "")


def base_of(module: nn.Module) -> nn.Module:
    """The module that PEFT layers are wrapped around, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


@dataclass
class LinearCall:
    """One use of a linear layer."""

    name: str
    source: int  # equal for the very same tensor
    marks: frozenset[Mark]


@dataclass
class AttentionCall:
    """One attention: where it ran, and which marks its arguments carried."""

    module: str
    query: frozenset[Mark]
    key: frozenset[Mark]
    value: frozenset[Mark] = frozenset()
    thirds: bool = False  # keys and values are the second and the last third of one linear layer's output


@dataclass
class ModuleCall:
    """One use of a module that may be an embedding or a block."""

    name: str
    marks: frozenset[Mark]
    ids: Tensor | None  # the first argument, if it holds whole numbers
    makes_tokens: bool  # whether (batch, tokens, width) comes out


@dataclass
class Trace:
    """Run a model once with :meth:`watch` and read what happened from the lists.

    Attributes:
        model: The model.
        linears: Uses of linear layers in order.
        attentions: Attentions in order; without ``value`` where two products had no softmax between them.
        modules: Uses of other modules in the order in which they ended.
        norms: Names of normalisation layers in order.
        gates: Linear layers of which something other than the output itself multiplied another one's output.
    """

    model: nn.Module
    linears: list[LinearCall] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    gates: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # weak, so that the pass needs no more memory than any other
        self._marks: Any = WeakTensorKeyDictionary()
        self._numbers: Any = WeakTensorKeyDictionary()
        self._count = itertools.count()
        self._outputs: deque[tuple[str, Tensor]] = deque(maxlen=3)  # of the linear layers that ran last
        self._keys: dict[int, Tensor] = {}  # of attention whose values are still to come
        self._stack: list[str] = []
        self._opaque = 0

    def watch(self, inputs: Mapping[str, Any]) -> None:
        """Run the model on ``inputs`` and record."""
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                self._set(value, frozenset({("input", key)}))
        handles = []
        inner: set[nn.Module] = set()  # parts of a wrapped layer other than the layer; the whole counts as one
        for raw, module in self.model.named_modules():
            if module in inner or raw == "":
                continue
            if isinstance(module, BaseTunerLayer):
                whole = isinstance(base_of(module), nn.Linear | Conv1D | nn.Embedding)
                parts: Iterable[nn.Module] = module.modules() if whole else _without_base(module)
                inner |= {part for part in parts if part is not module}
            elif raw.endswith("base_layer"):
                continue  # seen as the wrapper
            name = plain_name(raw)
            kind = self._kind(module)
            handles.append(module.register_forward_pre_hook(self._enter(name, kind), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name, kind), with_kwargs=True))
        try:
            with torch.no_grad(), _Follow(self):
                self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _kind(self, module: nn.Module) -> str:
        base = base_of(module)
        if isinstance(base, nn.Linear | Conv1D):
            return "linear"
        return "norm" if _is_norm(base) else "other"

    def _enter(self, name: str, kind: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            self._opaque += kind == "linear"

        return hook

    def _leave(self, name: str, kind: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._stack.pop()
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            marks = self.union(inputs[:1] if kind != "other" else inputs)
            first = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
            if kind == "linear" and first is not None and inputs:
                self._opaque -= 1
                number = self._numbers.setdefault(inputs[0], next(self._count))
                self.linears.append(LinearCall(name, number, marks))
                self._outputs.append((name, first))
                kept = frozenset() if _listed(name) else frozenset(m for m in marks if m[0] == "input")
                self._set(first, kept | {("linear", name)})
            elif kind == "norm" and first is not None:
                self.norms.append(name)
                # one layer's output that is normed stays that layer's (query norms); a sum of several does not
                keep = marks if len(marks) == 1 else frozenset(m for m in marks if m[0] == "input")
                self._set(first, keep)
            elif kind == "other":
                whole = inputs and not inputs[0].is_floating_point()
                tokens = first is not None and first.dim() == 3 and first.is_floating_point()
                self.modules.append(ModuleCall(name, marks, inputs[0] if whole else None, tokens))

        return hook

    def _set(self, tensor: Tensor, marks: frozenset[Mark]) -> None:
        self._marks[tensor] = marks

    def union(self, values: Any) -> frozenset[Mark]:
        """Marks of every tensor in ``values``."""
        marks: set[Mark] = set()
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                marks |= self._marks.get(leaf, frozenset())
        return frozenset(marks)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Mark the result of one function."""
        if self._opaque or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return
        name = getattr(func, "__name__", "")
        marks = self.union((args, kwargs))
        where = self._stack[-1] if self._stack else ""
        if name == "scaled_dot_product_attention":
            tensors = tuple([*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs)][:3])
            query, key, value = (self.union(t) for t in tensors)
            self.attentions.append(AttentionCall(where, query, key, value, self._in_thirds(tensors[1], tensors[2])))
            marks = frozenset({("attended", len(self.attentions) - 1)})
        elif name in _PRODUCTS:
            tensors = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            left, right = self.union(tensors[-2]), self.union(tensors[-1])
            probabilities = next((number for kind, number in left if kind == "probs"), None)
            if probabilities is not None:
                call = self.attentions[probabilities]
                call.value, keys = right, self._keys.pop(probabilities, None)
                call.thirds = keys is not None and self._in_thirds(keys, tensors[-1])
                marks = frozenset({("attended", probabilities)})
            elif left and right:
                self._keys[len(self.attentions)] = tensors[-1].mT
                self.attentions.append(AttentionCall(where, left, right))
                marks = frozenset({("scores", len(self.attentions) - 1)})
        elif name in _TIMES:
            self._see_gate(*(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)))
        elif name in ("softmax", "_softmax"):
            marks = frozenset(("probs", number) if kind == "scores" else (kind, number) for kind, number in marks)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._set(leaf, marks)

    def _see_gate(self, *factors: Tensor) -> None:
        """``act(gate(x)) * up(x)``: one factor is a linear layer's very output, the other was made of another's."""
        if len(factors) != 2:
            return
        made = [{mark[1] for mark in self.union(factor) if mark[0] == "linear"} for factor in factors]
        plain = [any(factor is output for _, output in self._outputs) for factor in factors]
        if len(made[0]) == len(made[1]) == 1 and made[0] != made[1] and plain[0] != plain[1]:
            self.gates |= made[plain[0]]

    def _in_thirds(self, key: Tensor, value: Tensor) -> bool:
        """Whether a linear layer's output ends with these keys and values, heads one after another inside each."""
        if key.dim() != 4 or value.dim() != 4:
            return False
        flat = [t.transpose(1, 2).flatten(2) for t in (key, value)]
        for _, output in self._outputs:
            parts = output.chunk(3, dim=-1)[1:] if output.dim() == 3 else ()
            if len(parts) == 2 and all(
                a.shape == b.shape and torch.equal(a, b) for a, b in zip(flat, parts, strict=True)
            ):
                return True
        return False


class _Follow(TorchFunctionMode):
    """Hands every function called on tensors to the trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._trace.follow(func, args, kwargs or {}, result)
        return result


def _without_base(layer: nn.Module) -> set[nn.Module]:
    """Modules that a tuner layer adds to what it wraps."""
    added = {name: child for name, child in layer.named_children() if name != "base_layer"}
    return {module for child in added.values() for module in child.modules()}


def _listed(name: str) -> bool:
    """Whether a module lies in a list of modules, as repeated blocks do."""
    return any(part.isdigit() for part in name.split("."))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module without children gives the same for ``x`` and ``4 x``, as norms do and scales do not."""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return True
    parameters = list(module.parameters(recurse=False))
    if not parameters or any(p.dim() != 1 for p in parameters) or next(module.children(), None) is not None:
        return False
    width, like = parameters[0].numel(), parameters[0]
    x = torch.linspace(-1.0, 2.0, 2 * width, device=like.device).reshape(1, 2, width).to(like.dtype)
    try:
        with torch.no_grad():
            once, fourfold = module(x), module(4 * x)
    except Exception:
        return False  # it takes something else than one hidden state
    return isinstance(once, Tensor) and bool(torch.allclose(once, fourfold, rtol=0.02, atol=1e-3)) and bool(once.any())
