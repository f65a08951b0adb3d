"""One LoRA branch a task, on stock PEFT: what InfLoRA and O-LoRA share.

Every task gets an adapter of its own in the same ``PeftModel``. All are active, so the model computes
``W x + sum_t s_t B_t A_t x``; only the newest trains. PEFT does the work (``add_adapter``, ``set_adapter`` with a
list, ``add_weighted_adapter``), and the model stays one that PEFT saves and loads.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError
from growthring.subspace import solver_device

__all__ = ["Branches", "Factors", "merge_branches"]

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Factors(NamedTuple):
    """The two factors of one branch at one layer: it adds ``scale * b @ a @ x``."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def update(self) -> Tensor:
        """``scale * b @ a``, ``(out, in)`` in float64."""
        where = solver_device(self.a.device)
        a, b = (t.detach().to(where).double() for t in (self.a, self.b))
        return self.scale * (b @ a)


class Branches:
    """The LoRA adapters of a model, taken as branches that add up.

    Args:
        model: A ``PeftModel`` with LoRA on linear layers, or a module that holds one or several.
        who: Name of the guard, for messages.

    Raises:
        GuardError: If there is no LoRA, or one whose branches do not add up to ``B A x``.
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        self.who = who
        self.wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, PeftModel)]
        self.models: list[Any] = [peft for _, peft in found]
        self.layers: dict[str, Any] = {}
        for place, peft in found:
            prefix = f"{place}." if len(found) > 1 else ""  # names do not depend on what stands around the PeftModel
            for name, module in peft.named_modules():
                if isinstance(module, LoraLayer):
                    self.layers[prefix + name.replace("_orig_mod.", "")] = module
        if not self.layers:
            raise GuardError(
                f"{who} gives every task a LoRA branch of its own, and this model has no LoRA: wrap it with "
                "peft.get_peft_model(model, LoraConfig(...)) first"
            )
        for peft in self.models:
            self._check_configs(peft)
        for name, layer in self.layers.items():
            self._check_layer(name, layer)

    # --- reading ------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Active adapters, oldest first."""
        return list(dict.fromkeys(n for peft in self.models for n in peft.peft_config if n in peft.active_adapters))

    def has(self, name: str) -> bool:
        """True when the model holds an adapter of that name, active or not."""
        return any(name in peft.peft_config for peft in self.models)

    def factors(self, name: str) -> Iterator[tuple[str, Factors]]:
        """Layer names with the factors that one branch has there."""
        for layer_name, layer in self.layers.items():
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                yield layer_name, Factors(a, b, float(layer.scaling[name]))

    def idle(self, name: str) -> bool:
        """True for a branch that adds nothing: every ``B`` is zero, as PEFT makes them."""
        return not any(bool(f.b.detach().any()) for _, f in self.factors(name))

    def sums(self, names: Iterable[str]) -> list[float]:
        """Numbers that change when a factor of one of these branches does."""
        found = (t.detach().double() for name in names for _, f in self.factors(name) for t in (f.a, f.b))
        return [float(number) for t in found for number in (t.sum(), t.square().sum())]

    @torch.no_grad()
    def marks(self) -> dict[str, float]:
        """``v^T (sum s B A) w`` of every layer, with fixed vectors: merging branches leaves it as it is."""
        marks = dict.fromkeys(self.layers, 0.0)
        for name in self.names():
            for layer, f in self.factors(name):
                a, b = f.a.double(), f.b.double()
                marks[layer] += f.scale * float((_pattern(b.shape[0]).to(b) @ b) @ (a @ _pattern(a.shape[1]).to(a)))
        return marks

    # --- changing -----------------------------------------------------------------------------------------------

    def add(self, name: str, weights: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Add a branch, configured like the newest one; not active yet.

        Args:
            name: Its adapter name.
            weights: Values by layer, under ``"A"`` and ``"B"``; default: PEFT's, with ``B`` zero.

        Raises:
            GuardError: If the model is wrapped already, or the weights are of another shape.
        """
        if self.wrapped:
            raise GuardError(
                f"{self.who} adds parameters, which DistributedDataParallel does not see: call guard.prepare with the "
                "model as it was before it was wrapped"
            )
        for peft in self.models:
            template = peft.active_adapters[-1] if peft.active_adapters else next(iter(peft.peft_config))
            config = copy.deepcopy(peft.peft_config[template])
            config.init_lora_weights, config.inference_mode = True, False
            with _flags_kept(peft):
                peft.add_adapter(name, config)
        if weights is None:
            return
        for layer, f in self.factors(name):
            if (
                layer not in weights
                or f.a.shape != weights[layer]["A"].shape
                or f.b.shape != weights[layer]["B"].shape
            ):
                shape = tuple(weights[layer]["A"].shape) if layer in weights else "missing"
                raise GuardError(
                    f"{self.who}: the stored branch {name!r} does not fit {layer}: its A is {shape}, the adapter's is "
                    f"{tuple(f.a.shape)}. Make the adapter with the rank and the targets that it was stored with"
                )
            with torch.no_grad():
                f.a.copy_(weights[layer]["A"])
                f.b.copy_(weights[layer]["B"])

    def remove(self, name: str) -> None:
        """Take an adapter that is not active out of the model."""
        for peft in self.models:
            if name in peft.peft_config:
                peft.delete_adapter(name)

    def restart(self, name: str) -> None:
        """Put a branch back to PEFT's first weights."""
        for layer in self.layers.values():
            if name in layer.lora_A:
                layer.reset_lora_parameters(name, True)

    def activate(self, names: Sequence[str], train: str = "") -> None:
        """Make exactly these branches active; of the first, the factors named in ``train`` (of ``"AB"``) train."""
        for peft in self.models:
            mine = [n for n in names if n in peft.peft_config]
            if not mine:
                continue
            peft.set_adapter(mine[0])  # also tells the PeftModel itself, which takes one name only
            peft.base_model.set_adapter(mine, inference_mode=True)
        for _, f in self.factors(names[0]):
            f.a.requires_grad_("A" in train)
            f.b.requires_grad_("B" in train)

    # --- checks -------------------------------------------------------------------------------------------------

    def _check_configs(self, peft: Any) -> None:
        for name, config in peft.peft_config.items():
            if not isinstance(config, LoraConfig):
                raise GuardError(f"{self.who} works on LoRA; the adapter {name!r} is {config.peft_type}")
            for field in ("modules_to_save", "trainable_token_indices", "target_parameters"):
                if getattr(config, field, None):
                    raise GuardError(
                        f"the adapter {name!r} sets {field}={getattr(config, field)!r}: PEFT cannot add such parts up "
                        f"over several adapters. Leave {field} out (task_type='SEQ_CLS' and the like set "
                        "modules_to_save), and train a head by requires_grad_(True) on it"
                    )
            if config.bias != "none":
                raise GuardError(f"the adapter {name!r} trains biases (bias={config.bias!r}); use bias='none'")
            init = str(config.init_lora_weights).lower()
            if init.startswith(_CHANGES_BASE):
                raise GuardError(
                    f"the adapter {name!r} was made with init_lora_weights={config.init_lora_weights!r}, which "
                    "changes the base weights; branches on top would not fit the base that they are loaded on. "
                    "Use True"
                )

    def _check_layer(self, name: str, layer: Any) -> None:
        linear = all(isinstance(part, nn.Linear) for part in layer.lora_A.values())
        base = layer.get_base_layer()
        if not linear or len(layer.lora_embedding_A) or isinstance(base, nn.MultiheadAttention):
            raise GuardError(f"{self.who} needs LoRA on linear layers; {name} is a {type(base).__name__}")
        for adapter, variant in getattr(layer, "lora_variant", {}).items():
            raise GuardError(
                f"{name}: the adapter {adapter!r} is the LoRA variant {type(variant).__name__}, whose output is not "
                "B A x; use plain LoRA"
            )
        if any(part.bias is not None for part in layer.lora_B.values()):
            raise GuardError(f"{name}: lora_bias=True adds a bias that every input sees; use lora_bias=False")
        if layer.merged:
            raise GuardError(f"{name}: an adapter is merged into the weight; call unmerge_adapter() first")


def merge_branches(model: nn.Module, adapter_name: str = "default") -> None:
    """Replace all active LoRA branches by one stock LoRA that computes their sum.

    Its rank is the sum of theirs; what the model answers stays the same to rounding. Under the name ``"default"`` it
    is what ``save_pretrained(folder)`` writes into ``folder`` itself. A guard goes on afterwards as before.

    Args:
        model: The model, changed in place: the branches are removed. Merge a deep copy to keep them.
        adapter_name: Name of the one adapter; default ``"default"``.

    Raises:
        GuardError: If the model has no LoRA, or one that does not add up.
        ConfigError: If an adapter that is not active has that name.
    """
    branches = Branches(model, "merge_branches")
    if branches.has(adapter_name) and adapter_name not in branches.names():
        raise ConfigError(f"merge_branches: an adapter {adapter_name!r} exists that is not active; give another name")
    free = adapter_name
    while branches.has(free):
        free = f"merged-{free}"
    if branches.names() == [adapter_name]:
        return
    _sum(branches, free)
    if free != adapter_name:  # PEFT cannot rename
        _sum(branches, adapter_name)


def _sum(branches: Branches, target: str) -> None:
    """Add the adapter ``target``, equal to the sum of the active ones, make it the active one and remove those."""
    old = branches.names()
    for peft in branches.models:
        mine = [name for name in old if name in peft.active_adapters]
        with _flags_kept(peft):
            if len(mine) > 1:
                peft.add_weighted_adapter(mine, [1.0] * len(mine), target, combination_type="cat")
                continue
            config = copy.deepcopy(peft.peft_config[mine[0]])  # PEFT sums one adapter at a single rank; keep its own
            config.init_lora_weights = True
            peft.add_adapter(target, config)
    with torch.no_grad():
        for layer in branches.layers.values():
            mine = [name for name in old if name in layer.lora_A]
            if len(mine) == 1 and layer.lora_A[mine[0]].weight.shape == layer.lora_A[target].weight.shape:
                for side in (layer.lora_A, layer.lora_B):
                    side[target].weight.copy_(side[mine[0]].weight)
                layer.lora_A[target].weight.mul_(layer.scaling[mine[0]])
            if target in layer.lora_A:  # "cat" expects a scale of 1, and rslora makes it the root of the rank
                layer.lora_A[target].weight.div_(layer.scaling[target])
    branches.activate([target], "AB")
    for name in old:
        branches.remove(name)


@contextlib.contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """PEFT 0.18 freezes everything but adapters when it adds one, a head that trains beside them too."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _pattern(size: int) -> Tensor:
    # as good as random, the same everywhere
    return torch.arange(1.0, size + 1, dtype=torch.float64).square().cos() * 2**0.5
