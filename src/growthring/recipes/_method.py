"""What a method is, as data, and which kinds of sites each kind of adapter has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["SITE_KINDS", "TRAINS", "AdapterKind", "GuardName", "Method", "OptimizerName", "Paper"]

AdapterKind = Literal["lora", "lora+weights", "largo", "bottleneck", "prefix", "prompt", "ia3", "linear", "full"]
GuardName = Literal[
    "pegp", "inflora", "o-lora", "gradient-memory", "radius", "directional", "l2-sp", "ftp", "tpgm", "spd"
]
OptimizerName = Literal["gorp", "galore"]

TRAINS: Mapping[AdapterKind, str] = MappingProxyType(
    {
        "lora": "a LoRA adapter",
        "lora+weights": "LoRA and chosen linear weights",
        "largo": "a low-rank adapter that starts from the weights' SVD",
        "bottleneck": "bottleneck adapters",
        "prefix": "a prefix",
        "prompt": "a prompt",
        "ia3": "IA3 scales",
        "linear": "every linear weight",
        "full": "every parameter",
    }
)
"""What each kind of adapter is called in messages."""

SITE_KINDS: Mapping[AdapterKind, tuple[str, ...]] = MappingProxyType(
    {
        "lora": ("lora_A", "lora_B"),
        "lora+weights": ("lora_A", "lora_B", "linear"),
        "largo": ("largo_A", "largo_B"),
        "bottleneck": ("adapter_down", "adapter_up"),
        "prefix": ("prefix_key", "prefix_value"),
        "prompt": ("prompt_key", "prompt_value"),
        "ia3": ("ia3",),
        "linear": ("linear",),
        "full": ("linear",),
    }
)
"""Kinds of sites that PEGP finds in each kind of adapter."""


@dataclass(frozen=True)
class Paper:
    """Where a method was published.

    Attributes:
        title: Title of the paper.
        arxiv: arXiv identifier.
    """

    title: str
    arxiv: str


@dataclass(frozen=True)
class Method:
    """One way to learn a stream, as data.

    Attributes:
        name: Short name, as in a configuration.
        title: Human name.
        summary: What it does, in a sentence or two.
        adapter: What trains: ``"lora"``, ``"lora+weights"`` (LoRA, new for every task, and chosen linear weights),
            ``"largo"`` (low-rank deviations that start from the SVD of the weights), ``"bottleneck"``, ``"prefix"``,
            ``"prompt"``, ``"ia3"``, ``"linear"`` (every linear weight), ``"full"`` (everything).
        guard: What a step must respect: one of the names of :data:`GuardName`, or ``None``.
        optimizer: ``"gorp"`` or ``"galore"``, which step inside subspaces of the gradient; ``None`` where the
            configuration chooses a plain one.
        joint: Whether it sees all tasks at once.
        paper: Where it was published, or ``None`` for common practice.
        guarantee: What it promises about earlier tasks, and what is only measured.
        cost: What it costs beyond plain fine-tuning.
        use_when: When to take it.
        avoid_when: When not to.
        learning_rate: Used where a configuration gives none.
        full_rank_lr: Learning rate of the linear weights beside LoRA, where a configuration gives none.
        energy: Energy used where a configuration gives none: one for each kind of site, or one number for InfLoRA and
            the gradient memory; ``None`` without a guard that has an energy.
        choices: Settings of which the method takes some values only, as ``"adapter.form"`` or ``"guard.norm"``; the
            first value is the default.
    """

    name: str
    title: str
    summary: str
    adapter: AdapterKind
    guarantee: str
    cost: str
    use_when: str
    avoid_when: str
    learning_rate: float
    guard: GuardName | None = None
    optimizer: OptimizerName | None = None
    joint: bool = False
    paper: Paper | None = None
    full_rank_lr: float | None = None
    energy: Any = field(default=None)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of sites in what it trains, as ``energy`` and ``kinds`` of :class:`~growthring.PEGP` name them."""
        return SITE_KINDS[self.adapter]

    def to_dict(self) -> dict[str, Any]:
        """The method as plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        paper = dataclasses.asdict(self.paper) if self.paper is not None else None
        choices = {setting: list(allowed) for setting, allowed in self.choices.items()}
        return values | {"paper": paper, "energy": plain_energy(self.energy), "choices": choices}


def plain_energy(energy: Any) -> Any:
    """An energy as new plain values."""
    return {key: plain_energy(one) for key, one in energy.items()} if isinstance(energy, Mapping) else energy
