"""What will happen to every trainable tensor, said before training starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .site import Mode, Site

__all__ = ["CONDITIONS", "HOLE", "NO_MATRIX", "TensorPlan", "bare", "plan"]

Treatment = Literal["protected", "held", "frozen", "free"]

CONDITIONS: Mapping[str, str] = {
    "lora_A": "dA x = 0 for the old inputs x of the layer",
    "lora_B": "dB (A x) = 0 for what A makes of old inputs",
    "largo_A": "the change of dA is 0 on the old inputs x of the layer",
    "largo_B": "the change of dB is 0 on what A_0 + dA makes of old inputs",
    "adapter_down": "[dW db] [x; 1] = 0 for the old inputs x of the adapter",
    "adapter_up": "[dW db] [a; 1] = 0 for the old activations a",
    "prefix_key": "q_h . dP_h = 0 for the old queries q_h of every head h",
    "prefix_value": "s_h dP_h = 0 for the mass s_h that old queries put on the prefix",
    "prompt_key": "(q_h dk_h/dP) . dP = 0 for the old queries q_h of the first layer, and p . dP = 0",
    "prompt_value": "s dP = 0 for the mass s that old queries of the first layer put on the prompt",
    "ia3": "dl_i = 0 wherever old features i have energy",
    "linear": "dW x = 0 for the old inputs x of the layer",
}
"""The condition on a change of each kind of site."""

PAPER: Mapping[str, str] = {
    **CONDITIONS,
    "adapter_down": "dW x = 0 for the old inputs x of the adapter",
    "adapter_up": "dW a = 0 for the old activations a",
    "prefix_key": "q . dP = 0 over all heads together: logits of single heads may move",
    "prompt_key": "x . dP = 0 and p . dP = 0 for the tokens x that enter beside the prompt: attention may move",
}
"""The same in mode ``"paper"``."""

HOLE = "old outputs may change through it, by any amount"
_LATER = "it trains until something is protected"
NO_MATRIX = "no condition: it is no matrix that multiplies features (bias, norm, embedding, or a shared weight)"
_UNSEEN = "no condition: its features were never seen (not used by old tasks, or used where no module shows them)"


@dataclass(frozen=True)
class TensorPlan:
    """What a guard does with one trainable tensor.

    Attributes:
        name: Qualified name.
        shape: Its shape.
        treatment: ``"protected"``: a condition keeps it from the second task on. ``"held"``: it keeps its value from
            the second task on. ``"frozen"``: it never trains. ``"free"``: nothing keeps it.
        kinds: Kinds of sites on it.
        condition: The condition of each kind, or empty.
        why: Why it is not protected, or what the condition leaves open; may be empty.
        cost: What the treatment costs: of the guarantee if free, of learning otherwise; may be empty.
    """

    name: str
    shape: tuple[int, ...]
    treatment: Treatment
    kinds: tuple[str, ...]
    condition: str
    why: str
    cost: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {**dataclasses.asdict(self), "shape": list(self.shape), "kinds": list(self.kinds)}


def plan(
    parameters: Mapping[str, Tensor],
    sites: Sequence[Site],
    chosen: Collection[str] | None,
    mode: Mode,
    policy: Literal["hold", "allow", "freeze"],
    frozen: Collection[str] = (),
    unseen: Collection[str] = (),
) -> tuple[TensorPlan, ...]:
    """One entry for each trainable tensor (and each that the guard itself froze), in the order of the model.

    Args:
        parameters: All parameters by name.
        sites: All sites, those left out by ``chosen`` too.
        chosen: Kinds to protect; ``None`` for all.
        mode: Which conditions hold.
        policy: What happens to tensors without a condition.
        frozen: Names of tensors that the guard froze.
        unseen: Names of tensors of old tasks whose features were never seen, so that no condition is known.
    """
    by_tensor: dict[str, list[Site]] = {}
    for site in sites:
        for name in site.tensors:
            by_tensor.setdefault(name, []).append(site)
    rows = []
    for name, tensor in parameters.items():
        if not tensor.requires_grad and name not in frozen:
            continue
        mine = by_tensor.get(name, [])
        kept = [s for s in mine if chosen is None or s.kind in chosen]
        shape = tuple(tensor.shape)
        rows.append(
            bare(name, shape, _UNSEEN, policy)
            if kept and name in unseen
            else _one(name, shape, mine, kept, mode, policy)
        )
    return tuple(rows)


def _one(
    name: str, shape: tuple[int, ...], mine: Iterable[Site], kept: Sequence[Site], mode: Mode, policy: str
) -> TensorPlan:
    left_out = sorted({s.kind for s in mine} - {s.kind for s in kept})
    if kept:
        kinds = tuple(dict.fromkeys(s.kind for s in kept))
        condition = "; ".join((PAPER if mode == "paper" else CONDITIONS)[kind] for kind in kinds)
        why = f"left out by kinds=: {', '.join(left_out)}" if left_out else _open(kinds, mode)
        return TensorPlan(name, shape, "protected", kinds, condition, why, "")
    if left_out:
        return TensorPlan(name, shape, "free", (), "", f"left out by kinds=: {', '.join(left_out)}", HOLE)
    if loose_in_paper(name, mode):
        return TensorPlan(name, shape, "free", (), "", "mode='paper' has no condition for prefix values", HOLE)
    return bare(name, shape, NO_MATRIX, policy)


def bare(name: str, shape: tuple[int, ...], why: str, policy: str) -> TensorPlan:
    """What happens to a tensor without a condition."""
    if policy == "allow":
        return TensorPlan(name, shape, "free", (), "", why, HOLE)
    if policy == "freeze" and why == NO_MATRIX:
        return TensorPlan(name, shape, "frozen", (), "", why, "it never trains")
    return TensorPlan(name, shape, "held", (), "", why, _LATER)


def loose_in_paper(name: str, mode: Mode) -> bool:
    """True for what trains without a condition because the paper states none."""
    return mode == "paper" and ".prefix_values." in f".{name}"


def _open(kinds: Iterable[str], mode: Mode) -> str:
    if mode == "paper" and "prefix_key" in kinds:
        return "heads by themselves and prefix values stay free, so outputs drift: see output_change"
    if any(kind.startswith("prompt") for kind in kinds):
        return "beyond the first layer prompts act through their own outputs, so outputs drift: see output_change"
    return ""
