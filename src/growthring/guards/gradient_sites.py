"""Where gradients are remembered: both sides of every trained matrix, in coordinates that no task changes.

A weight ``W`` ``(out, in)`` has an input side ``R^in`` and an output side ``R^out``. Both belong to the *layer*: a
LoRA factor ``A`` ``(r, in)`` has the same input side as the weight that it adapts, whatever its adapter is called and
however often a new one takes its place, and ``B`` ``(out, r)`` the same output side. The ``r`` coordinates between the
two are made anew with every adapter, so nothing is remembered in them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from growthring.errors import GuardError
from growthring.subspace import Subspace

from . import marks
from .plan import HOLE, NO_MATRIX, TensorPlan, bare
from .site import Site, original_name
from .survey import check_trainable

__all__ = ["CONDITION", "KINDS", "GradientSurvey", "Side"]

Side = Literal["input", "output", "both"]

KINDS = ("linear", "conv", "lora_A", "lora_B")
"""Kinds of sites that a gradient memory protects."""

CONDITION: Mapping[str, str] = {
    "input": "dW u = 0 for the input directions u of old tasks' gradients",
    "output": "u^T dW = 0 for the output directions u of old tasks' gradients",
}
"""The condition on a change of each side; of a LoRA factor, read ``dA`` or ``dB`` for ``dW``."""

_SPARED = {
    "lora_B": "needs no condition where A reads nothing protected: then B A does not either, whatever B is; an A that "
    "is new in a task is moved there",
    "lora_A": "needs no condition where B writes nothing protected: then B A does not either, whatever A is; a B that "
    "is new in a task is zero",
}
_GOES_ON = "where the other factor is older than the task, it still meets protected directions, and they may change"
READING = 1e-4
"""A LoRA factor with a larger share of itself among protected directions meets them; rounding leaves 1e-7."""
_MATRICES = (nn.Linear, Conv1D, _ConvNd)


class GradientSurvey:
    """The matrices of a model whose gradients are remembered.

    Args:
        model: The model.
        side: Which sides of them.
        dims: Dimensions of what is remembered already, by layer and side; it must be in the model.

    Raises:
        GuardError: If nothing trainable is a matrix, weights are not there yet (meta device), a LoRA variant is no
            product of two factors, or the memory belongs to another model.
    """

    def __init__(self, model: nn.Module, side: Side, dims: Mapping[str, int]) -> None:
        self.model, self._sides = model, ("input", "output") if side == "both" else (side,)
        self.parameters: dict[str, nn.Parameter] = {original_name(n): p for n, p in model.named_parameters()}
        self._names = {id(p): n for n, p in self.parameters.items()}
        self.key: dict[str, str] = {}
        """Layer and side of every site, by its name: what the memory is about."""
        self.partner: dict[str, str] = {}
        """The other LoRA factor of a site, by the site's name."""
        self.spared: dict[str, str] = {}
        """LoRA factors without a condition of their own: their kind, by name."""
        self._dims: dict[str, int] = {}  # of every layer and side, trained or not
        self.sites: list[Site] = list(self._find())
        check_trainable(
            "GradientMemory",
            self.parameters,
            self.sites,
            "linear weights, convolutions and LoRA factors",
        )
        self._check_memory(dims)

    def targets(self, target: Callable[[str], float]) -> dict[str, float]:
        """The highest threshold among the sites of each layer and side; ``target`` gives that of a kind."""
        found: dict[str, float] = {}
        for site in self.sites:
            key = self.key[site.name]
            found[key] = max(found.get(key, 0.0), target(site.kind))
        return found

    def loose(self) -> list[str]:
        """Names of trainable tensors that are no matrix of a layer: biases, norms, embeddings."""
        covered = {s.parameter for s in self.sites} | self.spared.keys()
        return [n for n, p in self.parameters.items() if p.requires_grad and n not in covered]

    def guarded(self, spaces: Mapping[str, Subspace]) -> list[tuple[Site, Subspace]]:
        """Sites with something to protect."""
        found = ((site, spaces.get(self.key[site.name])) for site in self.sites)
        return [(site, space) for site, space in found if space is not None and space.rank]

    def fresh(self, spaces: Mapping[str, Subspace]) -> list[tuple[Site, Subspace]]:
        """Guarded LoRA factors whose partner is zero: moving them changes no output."""
        pairs = ((site, space, self.partner.get(site.name)) for site, space in self.guarded(spaces))
        return [(s, u) for s, u, other in pairs if other is not None and not bool(self.parameters[other].any())]

    def reading(self, spaces: Mapping[str, Subspace], values: Mapping[str, Tensor]) -> list[Site]:
        """Guarded LoRA factors of which, with these values, more than rounding lies in protected directions."""
        pairs = [(s, u) for s, u in self.guarded(spaces) if s.name in self.partner and s.parameter in values]
        return [s for s, u in pairs if u.share(s.read(values)) > READING]

    def seen(self, spaces: Mapping[str, Subspace], known: Collection[str]) -> marks.Seen:
        """Every known trainable tensor with the space that is protected of it (``None``: all).

        Weights under a LoRA are left out: between two tasks they may take up a branch.
        """
        guarded = ((s, u) for s, u in self.guarded(spaces) if s.parameter in known)
        sites = [(s, u) for s, u in guarded if not s.module.endswith("base_layer")]
        return {s.name: (s.read(self.parameters).detach(), u) for s, u in sites} | {
            n: (self.parameters[n], None) for n in self.loose() if n in known
        }

    def full(self, spaces: Mapping[str, Subspace]) -> bool:
        """True when every site's tensor has a side without a free direction."""
        stuck = {s.parameter for s, u in self.guarded(spaces) if u.free == 0}
        return all(s.parameter in stuck for s in self.sites)

    def plan(self, policy: str, frozen: Collection[str], reading: Collection[str]) -> tuple[TensorPlan, ...]:
        """One entry for each trainable tensor (and each that the guard froze), in the order of the model.

        Args:
            policy: What happens to tensors without a condition.
            frozen: Names of tensors that the guard froze.
            reading: Names of LoRA factors that meet protected directions.
        """
        by_tensor: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites:
            by_tensor[site.parameter].append(site)
        rows = []
        for name, tensor in self.parameters.items():
            if not tensor.requires_grad and name not in frozen:
                continue
            mine, shape = by_tensor.get(name, ()), tuple(tensor.shape)
            if mine:
                kinds = tuple(dict.fromkeys(s.kind for s in mine))
                sides = ("output" if self.key[s.name].endswith("[out]") else "input" for s in mine)
                condition = "; ".join(CONDITION[side] for side in sides)
                why = _GOES_ON if name in reading else ""
                rows.append(TensorPlan(name, shape, "protected", kinds, condition, why, HOLE if why else ""))
            elif (kind := self.spared.get(name)) is not None:
                rows.append(TensorPlan(name, shape, "free", (kind,), "", _SPARED[kind], ""))
            else:
                rows.append(bare(name, shape, NO_MATRIX, policy))
        return tuple(rows)

    # --- finding ------------------------------------------------------------------------------------------------

    def _find(self) -> Iterator[Site]:
        done: set[str] = set()  # modules that are a LoRA's
        holders: dict[int, list[nn.Module]] = defaultdict(list)
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders[id(parameter)].append(module)
        for raw, module in self.model.named_modules():
            name = original_name(raw + ".").removesuffix(".") if raw else ""
            if isinstance(module, LoraLayer):
                yield from self._lora(module, name, done)
            elif isinstance(module, _MATRICES) and name not in done:
                weight = module._parameters.get("weight")
                alike = [type(other) for other in holders[id(weight)]] if weight is not None else []
                if weight is None or weight.numel() == 0 or any(kind is not type(module) for kind in alike):
                    continue  # computed, or an embedding too
                if self._names[id(weight)] != (f"{name}.weight" if name else "weight"):
                    continue  # one weight of several layers counts once
                yield from self._weight(module, weight, name)

    def _weight(self, module: nn.Module, weight: nn.Parameter, name: str) -> Iterator[Site]:
        kind = "conv" if isinstance(module, _ConvNd) else "linear"
        input_first = isinstance(module, Conv1D | _ConvTransposeNd)
        layer = name.removesuffix("base_layer").removesuffix(".")
        for side in self._sides:
            yield from self._site(weight, kind, layer, name, side, (side == "input") == input_first)

    def _lora(self, module: Any, name: str, done: set[str]) -> Iterator[Site]:
        for adapter in module.lora_A:
            a, b = module.lora_A[adapter], module.lora_B[adapter]
            done |= {f"{name}.lora_A.{adapter}", f"{name}.lora_B.{adapter}"}
            matrices = isinstance(a, nn.Linear | _ConvNd) and isinstance(b, nn.Linear | _ConvNd)
            if not matrices or hasattr(module, "parameter_name"):
                continue  # LoRA on a parameter: no factor has a side of its own
            if adapter in getattr(module, "lora_variant", {}) and a.weight.requires_grad:
                variant = type(module.lora_variant[adapter]).__name__
                raise GuardError(
                    f"{name} uses the LoRA variant {variant}; its output is not linear in A and B alone, so no "
                    "condition on them protects it. Use plain LoRA (for DoRA: use_dora=False)"
                )
            for part, other, factor, side in ((a, b, "lora_A", "input"), (b, a, "lora_B", "output")):
                place = f"{name}.{factor}.{adapter}"
                if side in self._sides:
                    for site in self._site(part.weight, factor, name, place, side, side == "output"):
                        self.partner[site.name] = self._names[id(other.weight)]
                        yield site
                elif part.weight.requires_grad:
                    self.spared[self._names[id(part.weight)]] = factor

    def _site(
        self, weight: nn.Parameter, kind: str, layer: str, module: str, side: str, first: bool
    ) -> Iterator[Site]:
        """The site of one side of a weight; ``first``: that side is its first dimension."""
        tensor = self._names[id(weight)]
        mark = "" if side == "input" else "[out]"
        key = f"{layer}.weight{mark}" if layer else f"weight{mark}"
        dim = weight.shape[0] if first else weight.numel() // weight.shape[0]
        self._dims[key] = dim
        if weight.requires_grad:
            name = tensor + (mark if kind in ("linear", "conv") else "")
            self.key[name] = key
            yield Site(name, kind, module, dim, tensor=tensor, transposed=first, flat=weight.ndim > 2)

    def _check_memory(self, dims: Mapping[str, int]) -> None:
        missing = [key for key in dims if key not in self._dims]
        if missing:
            raise GuardError(
                f"the memory is about {len(dims)} layers, and {len(missing)} of them are not in this model (the "
                f"first: {missing[0]}). Attach it to the model it was made with, wrapped the same way"
            )
        for key, dim in dims.items():
            if self._dims[key] != dim:
                raise GuardError(f"{key} has {self._dims[key]} directions, but the memory holds a basis of R^{dim}")
