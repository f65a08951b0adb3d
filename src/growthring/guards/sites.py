"""Sites: which trainable tensor is protected through which features.

Every site is a trainable matrix that multiplies its features from one side, ``y = W x``, so ``dW x = 0`` for the old
``x`` keeps ``y``. LoRA is two of them (PEGP, arXiv 2405.13383, equations 13-14 read for LoRA): ``A`` sees the input
``x`` of the layer it adapts, ``B`` sees ``A x``.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from growthring.errors import GuardError

from .batches import run_model

__all__ = ["Site", "capture", "find_sites", "group_by_input", "original_name", "unprotected"]


@dataclass(frozen=True)
class Site:
    """One protected matrix.

    Attributes:
        name: Qualified name of the parameter.
        kind: ``"lora_A"``, ``"lora_B"`` or ``"linear"``.
        module: Qualified name of the module that multiplies by the matrix; its first input is the feature.
        dim: Feature dimension.
        transposed: True when features run along the first axis (``Conv1D`` of GPT-2).
        outer: Module whose input stands for that of ``module``, if any: PEFT hands every ``A`` a cast copy of its own
            where dtypes differ, and the layer around it still shows that query, key and value share their input.
    """

    name: str
    kind: str
    module: str
    dim: int
    transposed: bool = False
    outer: str = ""

    def view(self, tensor: Tensor) -> Tensor:
        """``tensor`` with features along the last axis; shares its storage."""
        return tensor.mT if self.transposed else tensor


def original_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and ``DistributedDataParallel`` put around a model."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def find_sites(model: nn.Module, known: Mapping[str, str] | None = None) -> list[Site]:
    """Find every trainable matrix that can be protected, and the known ones that are frozen by now.

    Args:
        model: Any module; LoRA layers of PEFT are recognised, every other trainable ``nn.Linear`` or ``Conv1D`` is a
            linear site. A weight that several modules hold (tied to an embedding, say) or that is computed (weight
            norm) is none: features of one module are not all that it multiplies.
        known: Names of sites that a memory already holds; they are found even when frozen.

    Returns:
        Sites in the order of the model's modules; empty if there are none.

    Raises:
        GuardError: For LoRA variants (DoRA and others), whose output is not linear in ``A`` and ``B`` alone.
    """
    wanted = set(known or ())
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)

    def alone(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and uses[id(weight)] == 1

    sites: list[Site] = []
    lora_parts: set[str] = set()
    for raw, module in model.named_modules():
        name = original_name(raw + ".").removesuffix(".") if raw else ""
        if isinstance(module, LoraLayer):
            inside = f"{name}." if name else ""
            for factor in ("lora_A", "lora_B"):
                for adapter, linear in getattr(module, factor).items():
                    part = f"{inside}{factor}.{adapter}"
                    lora_parts.add(part)
                    if not isinstance(linear, nn.Linear) or not alone(linear):
                        continue
                    if not linear.weight.requires_grad and f"{part}.weight" not in wanted:
                        continue
                    if adapter in getattr(module, "lora_variant", {}):
                        variant = type(module.lora_variant[adapter]).__name__
                        raise GuardError(
                            f"{name} uses the LoRA variant {variant}; its output is not linear in A and B alone, so "
                            "no condition on them protects it. Use plain LoRA (for DoRA: use_dora=False)"
                        )
                    outer = name if factor == "lora_A" else ""
                    sites.append(Site(f"{part}.weight", factor, part, linear.in_features, outer=outer))
        elif isinstance(module, nn.Linear | Conv1D) and name not in lora_parts and alone(module):
            weight = f"{name}.weight" if name else "weight"
            if module.weight.requires_grad or weight in wanted:
                transposed = isinstance(module, Conv1D)
                sites.append(Site(weight, "linear", name, module.weight.shape[0 if transposed else 1], transposed))
    return sites


def unprotected(model: nn.Module, sites: list[Site]) -> list[str]:
    """Names of trainable tensors that no site covers: biases, norms, embeddings."""
    covered = {site.name for site in sites}
    names = (original_name(n) for n, p in model.named_parameters() if p.requires_grad)
    return [n for n in names if n not in covered]


Key = tuple[object, ...]


class capture:
    """While open, hands the features of every site to ``sink(site, features, key)``.

    Equal keys mean the very same numbers, as long as the features of both are kept alive.

    Args:
        model: The model that the sites were found in.
        sites: Sites to listen to.
        sink: Called in the forward pass, whenever the site's matrix is used, with its features, detached.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], sink: Callable[[Site, Tensor, Key], None]) -> None:
        self._model, self._sink = model, sink
        self._inner = {site.module: site for site in sites}
        self._outer = {site.outer for site in sites} - {""}
        self._latest: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._eager: Any = contextlib.nullcontext()

    def __enter__(self) -> capture:
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in self._model.modules()):
            self._eager = torch.compiler.set_stance("force_eager")  # a compiled graph calls no hook that came later
        self._eager.__enter__()
        for raw, module in self._model.named_modules():
            name = original_name(raw + ".").removesuffix(".") if raw else ""
            if name in self._inner or name in self._outer:
                self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(first, Tensor):
                return
            if name in self._outer:
                self._latest[name] = first
            if name in self._inner:
                site = self._inner[name]
                features = self._latest.get(site.outer, first)
                # the version counts changes in place: nn.ReLU(inplace=True) leaves other numbers at the same address
                version = 0 if features.is_inference() else features._version
                place = (features.data_ptr(), tuple(features.shape), features.stride(), features.dtype)
                self._sink(site, features.detach(), (*place, version))

        return hook

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._latest.clear()
        self._eager.__exit__(*exception)


def group_by_input(model: nn.Module, sites: list[Site], batch: Any) -> list[list[Site]]:
    """Group sites that see the very same input, so that they share one basis.

    One forward pass is watched; sites belong together when every call gave them the same memory in the same state.
    Query, key and value projections of one attention block are the usual case.

    Args:
        model: The model.
        sites: Sites to group.
        batch: What the model is run on, once.

    Returns:
        Groups in order of first appearance. A matrix that was never used forms a group of its own.
    """
    seen: dict[str, list[Key]] = defaultdict(list)
    alive: list[Tensor] = []  # holding the tensors keeps their addresses from being reused

    def sink(site: Site, features: Tensor, key: Key) -> None:
        seen[site.name].append(key)
        alive.append(features)

    with torch.no_grad(), capture(model, sites, sink):
        run_model(model, batch)
    groups: dict[Key, list[Site]] = {}
    for site in sites:
        calls = tuple(seen.get(site.name, ()))
        groups.setdefault((site.dim, calls) if calls else (site.name,), []).append(site)
    return list(groups.values())
