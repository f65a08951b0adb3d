"""Sites: which trainable tensor is protected through which features.

Every site is a matrix whose change ``D`` must satisfy ``D x = 0`` for the old features ``x``; its features lie along
the last axis. LoRA is two of them (PEGP, arXiv 2405.13383, equations 13-14 read for LoRA): ``A`` sees the input ``x``
of the layer it adapts, ``B`` sees ``A x``. LARGO-style deltas ``dA`` and ``dB`` see ``x`` and ``(A_0 + dA) x``. A
bottleneck adapter is the same with an activation between and with its biases folded in: ``[dW db] [x; 1] = 0``.
Prefixes and prompts are rows beside the tokens; what must not change there are the attention's logits and the mass it
puts on them (see :mod:`.prompts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from growthring.errors import GuardError

from .prompts import TOKEN_CONTAINERS, learned_prompts, tuned_tokens
from .site import Mode, Site, original_name

__all__ = ["find_sites", "unprotected"]

ADAPTER_PARTS = ("adapter_down", "adapter_up")
LARGO_PARTS = ("largo_A", "largo_B")


def find_sites(model: nn.Module, known: Mapping[str, int] | None = None, mode: Mode = "strict") -> list[Site]:
    """Find every trainable matrix that can be protected, and the known ones that are frozen by now.

    Args:
        model: Any module. LoRA, IA3, prefix and prompt tuning of PEFT, bottleneck and LARGO-style adapters are
            recognised; every other trainable ``nn.Linear`` or ``Conv1D`` is a linear site. A weight that several
            modules hold (tied to an embedding, say) or that is computed (weight norm) is none: features of one module
            are not all that it multiplies.
        known: Sites that a memory already holds, by name, with their dimension; they are found even when frozen.
        mode: ``"strict"``: conditions that keep what old inputs compute. ``"paper"``: those that the PEGP paper
            states, which do less for prefixes and prompts.

    Returns:
        Sites in the order of the model's modules; empty if there are none.

    Raises:
        GuardError: For tuners whose output no condition of this kind keeps (DoRA and other LoRA variants, prompts
            that come out of a network).
    """
    return list(_Finder(model, known or {}, mode).sites())


class _Finder:
    def __init__(self, model: nn.Module, known: Mapping[str, int], mode: Mode) -> None:
        self._model, self._known, self._mode = model, known, mode
        self._uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self._done: set[str] = set()  # modules that a tuner has spoken for
        self._known_tensors = {name.split("[")[0] for name in known}

    def sites(self) -> Iterator[Site]:
        for raw, module in self._model.named_modules():
            name = original_name(raw + ".").removesuffix(".") if raw else ""
            inside = f"{name}." if name else ""
            if isinstance(module, PeftModel):
                yield from self._chosen(learned_prompts(module, name, self._mode))
            elif isinstance(module, LoraLayer):
                yield from self._lora(module, name, inside)
            elif isinstance(module, IA3Layer):
                yield from self._ia3(module, name, inside)
            elif isinstance(module, BaseTunerLayer):
                yield from self._tuner(module, name, inside)
            elif isinstance(module, nn.Linear | Conv1D) and name not in self._done and self._alone(module):
                transposed = isinstance(module, Conv1D)
                dim = module.weight.shape[0 if transposed else 1]
                site = Site(f"{inside}weight", "linear", name, dim, transposed=transposed)
                yield from self._chosen(iter([(module.weight, site)]))

    def _alone(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and self._uses[id(weight)] == 1

    def _wanted(self, parameter: Tensor, name: str) -> bool:
        return parameter.requires_grad or name in self._known_tensors

    def _chosen(self, found: Iterator[tuple[Tensor, Site]]) -> Iterator[Site]:
        for parameter, site in found:
            if self._wanted(parameter, site.parameter):
                yield site

    def _lora(self, module: Any, name: str, inside: str) -> Iterator[Site]:
        for factor in ("lora_A", "lora_B"):
            for adapter, linear in getattr(module, factor).items():
                part = f"{inside}{factor}.{adapter}"
                self._done.add(part)
                if not isinstance(linear, nn.Linear) or not self._alone(linear):
                    continue
                if not self._wanted(linear.weight, f"{part}.weight"):
                    continue
                if adapter in getattr(module, "lora_variant", {}):
                    variant = type(module.lora_variant[adapter]).__name__
                    raise GuardError(
                        f"{name} uses the LoRA variant {variant}; its output is not linear in A and B alone, so "
                        "no condition on them protects it. Use plain LoRA (for DoRA: use_dora=False)"
                    )
                outer = name if factor == "lora_A" else ""
                yield Site(f"{part}.weight", factor, part, linear.in_features, outer=outer)

    def _ia3(self, module: Any, name: str, inside: str) -> Iterator[Site]:
        for adapter, vector in module.ia3_l.items():
            parameter = f"{inside}ia3_l.{adapter}"
            if not self._wanted(vector, parameter) or vector.ndim != 2:
                continue
            if module.is_feedforward:
                yield Site(parameter, "ia3", name, vector.numel(), scales="input")
            else:
                yield Site(parameter, "ia3", f"{inside}base_layer", vector.numel(), scales="output")

    def _tuner(self, module: Any, name: str, inside: str) -> Iterator[Site]:
        for container in ADAPTER_PARTS:
            parts = module._modules.get(container)  # its own: tuner layers pass on what the wrapped module has
            linears: dict[str, Any] = dict(parts.items()) if isinstance(parts, nn.ModuleDict) else {}
            for adapter, linear in linears.items():
                part = f"{inside}{container}.{adapter}"
                self._done.add(part)
                if not self._alone(linear) or not self._wanted(linear.weight, f"{part}.weight"):
                    continue
                bias = f"{part}.bias" if self._folds(linear, f"{part}.weight") else ""
                yield Site(f"{part}.weight", container, part, linear.in_features + bool(bias), bias=bias)
        for factor in LARGO_PARTS:
            parts = module._modules.get(factor)
            for adapter, linear in parts.items() if isinstance(parts, nn.ModuleDict) else ():
                part = f"{inside}{factor}.{adapter}"
                self._done.add(part)
                weight: Any = linear.weight
                if self._alone(linear) and self._wanted(weight, f"{part}.weight"):
                    outer = name if factor == "largo_A" else ""
                    yield Site(f"{part}.weight", factor, part, weight.shape[1], outer=outer)
        if any(container in module._modules for container in TOKEN_CONTAINERS):
            yield from self._chosen(tuned_tokens(module, name, self._mode))

    def _folds(self, linear: Any, weight: str) -> bool:
        """True if the bias is one more column: it trains, or both are frozen now and it was one."""
        if self._mode == "paper" or linear.bias is None:
            return False
        was = not linear.weight.requires_grad and self._known.get(weight) == linear.in_features + 1
        return bool(linear.bias.requires_grad or was)


def unprotected(model: nn.Module, sites: list[Site]) -> list[str]:
    """Names of trainable tensors that no site covers: biases, norms, embeddings."""
    covered = {name for site in sites for name in site.tensors}
    names = (original_name(n) for n, p in model.named_parameters() if p.requires_grad)
    return [n for n in names if n not in covered]
