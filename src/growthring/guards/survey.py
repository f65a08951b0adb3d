"""What PEGP found in the model that it is attached to."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from growthring.errors import GuardError
from growthring.subspace import Subspace

from . import marks
from .memory import FeatureMemory
from .plan import loose_in_paper
from .site import Mode, Site, original_name
from .sites import find_sites, unprotected

__all__ = ["Survey", "check_trainable"]

logger = logging.getLogger(__name__)


class Survey:
    """The sites of a model that are to be protected, its parameters, and what no site covers.

    Args:
        model: The model.
        memory: What is protected already; its sites must be in the model.
        mode: Which conditions.
        kinds: Kinds of sites to protect; ``None`` for all.

    Raises:
        GuardError: If nothing trainable can be protected, the weights are not there yet (meta device), or the memory
            belongs to another model.
    """

    def __init__(self, model: nn.Module, memory: FeatureMemory, mode: Mode, kinds: Collection[str] | None) -> None:
        everything = find_sites(model, memory.dims, mode)
        self.model, self._mode = model, mode
        self.sites: list[Site] = [s for s in everything if kinds is None or s.kind in kinds]
        self.parameters: dict[str, nn.Parameter] = {original_name(n): p for n, p in model.named_parameters()}
        self._covered = {n for s in self.sites for n in s.tensors}
        self._left_out = {n for s in everything for n in s.tensors} - self._covered
        what = "LoRA and IA3 on linear layers, bottleneck adapters, prefixes, prompts, and plain linear weights"
        asked = f" of the kinds {', '.join(kinds)}" if kinds is not None else ""
        check_trainable("PEGP", self.parameters, self.sites, what, asked)
        self._check_memory(memory)

    def loose(self) -> list[str]:
        """Names of trainable tensors that no site covers and that nothing says to leave free."""
        names = unprotected(self.model, self.sites)
        return [n for n in names if n not in self._left_out and not loose_in_paper(n, self._mode)]

    def freeze(self) -> list[str]:
        """Stop the training of what :meth:`loose` names, for good; returns the names."""
        names = self.loose()
        for name in names:
            self.parameters[name].requires_grad_(False)
        if names:
            logger.info("PEGP: %d trainable tensors without a condition are frozen (%s, ...)", len(names), names[0])
        return names

    def guarded(self, memory: FeatureMemory, known: Collection[str]) -> tuple[list[tuple[Site, Subspace]], list[str]]:
        """Sites that train and have something to protect, with their spaces; and known tensors that nothing keeps."""
        training = [s for s in self.sites if all(self.parameters[n].requires_grad for n in s.tensors)]
        guarded = [(s, u) for s in training if (u := memory.space(s.name)) is not None and u.rank]
        kept = {n for s, _ in guarded for n in s.tensors}
        unseen = (s for s in training if memory.space(s.name) is None)
        bare = dict.fromkeys(n for s in unseen for n in s.tensors if n not in kept)
        return guarded, [n for n in (*self.loose(), *bare) if n in known]

    def seen(self, memory: FeatureMemory, known: Collection[str]) -> marks.Seen:
        """Every known trainable tensor, features last, with the space that is protected of it (``None``: all)."""
        training = {n: p for n, p in self.parameters.items() if p.requires_grad and n in known}
        sites = [s for s in self.sites if training.keys() >= set(s.tensors)]
        loose = [n for n in self.loose() if n in training]
        return {s.name: (s.read(training).detach(), memory.space(s.name)) for s in sites} | {
            n: (training[n], None) for n in loose
        }

    def full(self, memory: FeatureMemory) -> bool:
        """True when there are sites, and each of them is full or crossed by a full one on the same tensor."""
        spaces = {s.name: memory.space(s.name) for s in self.sites}
        stuck = [s for s in self.sites if (space := spaces[s.name]) is not None and space.free == 0]
        return bool(stuck) and all(any(s.crosses(other) for other in stuck) for s in self.sites)

    def resting(self, memory: FeatureMemory) -> dict[str, Site]:
        """Factors ``A`` by the name of the ``B`` behind them, where ``B`` is zero and nothing protects it yet."""
        inner = {s.module: s for s in self.sites if s.kind == "lora_A" and self.parameters[s.parameter].requires_grad}
        found = {}
        for site in self.sites:
            new = site.kind == "lora_B" and memory.space(site.name) is None
            other = inner.get(site.module.replace("lora_B.", "lora_A.")) if new else None
            if other is not None and not bool(self.parameters[site.parameter].any()):
                found[site.name] = other
        return found

    def _check_memory(self, memory: FeatureMemory) -> None:
        found = {s.name for s in self.sites}
        missing = [n for n in memory.site_space if n not in found]
        if missing:
            raise GuardError(
                f"the memory protects {len(memory.site_space)} tensors, and {len(missing)} of them are not in "
                f"this model (the first: {missing[0]}). Attach it to the model it was made with, wrapped the same way"
            )
        for site in self.sites:
            space = memory.space(site.name)
            if space is not None and space.dim != site.dim:
                raise GuardError(
                    f"{site.name} sees {site.dim} features, but the memory holds a basis of R^{space.dim}"
                )


def check_trainable(
    who: str, parameters: Mapping[str, nn.Parameter], sites: Sequence[Site], what: str, asked: str = ""
) -> None:
    """Refuse a model in which a guard has nothing to protect.

    Args:
        who: Name of the guard, for messages.
        parameters: All parameters by name.
        sites: What the guard found.
        what: What it protects, in words.
        asked: Which of that it was asked for.

    Raises:
        GuardError: If nothing trains, no site does, weights are not there yet (meta device), or lie on several ranks.
    """
    trainable = [n for n, p in parameters.items() if p.requires_grad]
    if not trainable:
        raise GuardError(
            f"{who}: no parameter of the model is trainable. Add an adapter (peft.get_peft_model) or set "
            "requires_grad on the weights that should learn; a PEFT model loaded for inference needs "
            "is_trainable=True"
        )
    if not any(parameters[s.parameter].requires_grad for s in sites):
        raise GuardError(
            f"{who} found no site{asked} among the {len(trainable)} trainable tensors (the first: "
            f"{', '.join(trainable[:3])}). It protects {what}"
        )
    absent = [n for n in trainable if parameters[n].is_meta]
    if absent:
        raise GuardError(
            f"{who}: {len(absent)} trainable tensors are on the meta device (the first: {absent[0]}); load "
            "the weights first"
        )
    spread = [n for n in trainable if hasattr(parameters[n], "device_mesh")]
    if spread:
        raise GuardError(
            f"{who}: {len(spread)} trainable tensors are DTensors (the first: {spread[0]}), as FSDP2 makes them, and "
            "guards measure and correct whole tensors. Train with DDP (DistributedDataParallel), or without the guard"
        )
