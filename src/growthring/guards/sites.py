"""Sites: which trainable tensor is protected through which features.

Every site is a trainable matrix that multiplies its features from one side, ``y = W x``, so ``dW x = 0`` for the old
``x`` keeps ``y``. LoRA is two of them (PEGP, arXiv 2405.13383, equations 13-14 read for LoRA): ``A`` sees the input
``x`` of the layer it adapts, ``B`` sees ``A x``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
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
        module: Qualified name of the module whose first input is the feature.
        dim: Feature dimension.
        transposed: True when features run along the first axis (``Conv1D`` of GPT-2).
    """

    name: str
    kind: str
    module: str
    dim: int
    transposed: bool = False

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
            linear site.
        known: Names of sites that a memory already holds; they are found even when frozen.

    Returns:
        Sites in the order of the model's modules; empty if there are none.

    Raises:
        GuardError: For LoRA variants (DoRA and others), whose output is not linear in ``A`` and ``B`` alone.
    """
    wanted = set(known or ())
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
                    if not isinstance(linear, nn.Linear) or not (
                        linear.weight.requires_grad or f"{part}.weight" in wanted
                    ):
                        continue
                    if adapter in getattr(module, "lora_variant", {}):
                        variant = type(module.lora_variant[adapter]).__name__
                        raise GuardError(
                            f"{name} uses the LoRA variant {variant}; its output is not linear in A and B alone, so "
                            "no condition on them protects it. Use plain LoRA (for DoRA: use_dora=False)"
                        )
                    sites.append(
                        Site(f"{part}.weight", factor, name if factor == "lora_A" else part, linear.in_features)
                    )
        elif isinstance(module, nn.Linear | Conv1D) and name not in lora_parts:
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


class capture:
    """While open, hands the features of every site's module to ``sink(module_name, features)``.

    Args:
        model: The model that the sites were found in.
        modules: Names of the modules to listen to.
        sink: Called in the forward pass with the module's first input, detached.
    """

    def __init__(self, model: nn.Module, modules: set[str], sink: Callable[[str, Tensor], None]) -> None:
        self._model, self._modules, self._sink = model, modules, sink
        self._handles: list[Any] = []

    def __enter__(self) -> capture:
        for raw, module in self._model.named_modules():
            name = original_name(raw + ".").removesuffix(".") if raw else ""
            if name in self._modules:
                self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, Tensor):
                self._sink(name, first.detach())

        return hook

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def group_by_input(model: nn.Module, sites: list[Site], batch: Any) -> list[list[Site]]:
    """Group sites that always see the very same input, so that they share one basis.

    One forward pass is watched; sites belong together when every call gave their modules the same memory. Query, key
    and value projections of one attention block are the usual case.

    Args:
        model: The model.
        sites: Sites to group.
        batch: What the model is run on, once.

    Returns:
        Groups in order of first appearance. A module that was never called forms a group of its own.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)  # holding the tensors keeps their addresses from being reused
    with torch.no_grad(), capture(model, {s.module for s in sites}, lambda name, x: seen[name].append(x)):
        run_model(model, batch)
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        calls = seen.get(site.module, [])
        key: tuple[object, ...] = tuple((x.data_ptr(), tuple(x.shape), x.stride(), x.dtype) for x in calls)
        groups.setdefault((site.dim, key) if key else (site.name,), []).append(site)
    return list(groups.values())
