"""Named methods: what each one trains, what guards it, what it promises, and when to take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from growthring.errors import ConfigError, nearest

__all__ = ["METHODS", "AdapterKind", "Method", "Paper", "get_method"]

AdapterKind = Literal["lora", "linear", "full"]


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
        summary: What it does, in a sentence.
        adapter: What trains: ``"lora"`` (LoRA factors), ``"linear"`` (every linear weight), ``"full"`` (everything).
        guard: Name of the guard, or ``None``.
        joint: Whether it sees all tasks at once.
        paper: Where it was published, or ``None`` for common practice.
        guarantee: What it promises about earlier tasks.
        cost: What it costs beyond plain fine-tuning.
        use_when: When to take it.
        avoid_when: When not to.
        learning_rate: Used where a configuration gives none.
        energy: Energy for each kind of site, used where a configuration gives none; empty without a guard.
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
    guard: Literal["pegp"] | None = None
    joint: bool = False
    paper: Paper | None = None
    energy: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The method as plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        paper = dataclasses.asdict(self.paper) if self.paper is not None else None
        return values | {"paper": paper, "energy": dict(self.energy)}


_LORA = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
_PEGP = Paper("Gradient Projection For Continual Parameter-Efficient Tuning", "2405.13383")
_NONE = "None: nothing keeps a later task from changing what an earlier one learned."
_EXACT = (
    "No step moves a guarded weight within the protected part of the feature space of earlier tasks: the share that "
    "does is measured after every task and is rounding error (at most 1e-5 in float32), under any optimizer. At "
    "energy 1.0 the inputs it was measured on keep their outputs; below it, what lies outside the protected part may "
    "move."
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                name="sequential-lora",
                title="Sequential LoRA",
                summary="One LoRA adapter, trained on one task after another.",
                adapter="lora",
                paper=_LORA,
                guarantee=_NONE,
                cost="That of LoRA: a few percent of the weights train.",
                use_when="As the baseline for everything else; hard to beat at a small learning rate.",
                avoid_when="Earlier tasks still matter and the learning rate that learns well also forgets.",
                learning_rate=1e-3,
            ),
            Method(
                name="sequential-linear",
                title="Sequential fine-tuning (linear weights)",
                summary="Every linear weight of the model, trained on one task after another.",
                adapter="linear",
                guarantee=_NONE,
                cost="A whole model to train and to store; optimizer state of twice its size.",
                use_when="As the strong baseline: at a gentle learning rate it forgets little.",
                avoid_when="The result has to be a small adapter, or forgetting has to be bounded.",
                learning_rate=1e-4,
            ),
            Method(
                name="sequential-full",
                title="Sequential fine-tuning (all parameters)",
                summary="Every parameter, embeddings and norms included, trained on one task after another.",
                adapter="full",
                guarantee=_NONE,
                cost="A whole model to train and to store; optimizer state of twice its size.",
                use_when="To compare with published full fine-tuning.",
                avoid_when="The result has to be a small adapter, or forgetting has to be bounded.",
                learning_rate=5e-5,
            ),
            Method(
                name="joint",
                title="Joint training (upper bound)",
                summary="One LoRA adapter, trained on all tasks at once.",
                adapter="lora",
                joint=True,
                guarantee="Not needed: there is no earlier task. It needs the data of all tasks at the same time.",
                cost="All data kept; everything is trained again when a task is added.",
                use_when="To know how good one adapter could be if nothing had to be remembered.",
                avoid_when="Tasks arrive over time: it is a yardstick, not a continual method.",
                learning_rate=2e-3,
            ),
            Method(
                name="pegp",
                title="PEGP on LoRA",
                summary="LoRA whose updates stay out of the feature space that earlier tasks use.",
                adapter="lora",
                guard="pegp",
                paper=_PEGP,
                guarantee=_EXACT,
                cost="No old training data. A pass over a few hundred inputs after each task, at most d*d/2 floats a "
                "guarded matrix however many tasks, and two small projections a step.",
                use_when="One adapter has to learn task after task and keep what it knew, checkably.",
                avoid_when="Many more tasks than free dimensions: each takes some, and the certificate counts them.",
                learning_rate=3e-3,
                energy=MappingProxyType({"lora_A": 0.95, "lora_B": 0.90}),
            ),
            Method(
                name="pegp-linear",
                title="PEGP on linear weights",
                summary="Every linear weight, its updates kept out of the feature space that earlier tasks use.",
                adapter="linear",
                guard="pegp",
                paper=_PEGP,
                guarantee=_EXACT,
                cost="A whole model to train and to store, at most d*d/2 floats a guarded matrix however many tasks, "
                "and a projection of every matrix each step.",
                use_when="LoRA is too narrow to learn the tasks, and a full copy of the model is affordable.",
                avoid_when="The result has to be a small adapter.",
                learning_rate=2e-4,
                energy=MappingProxyType({"linear": 0.80}),
            ),
        )
    }
)
"""Every method, by name."""


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: There is none; the message offers near names.
    """
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; {nearest(str(name), METHODS)}")
    return METHODS[name]
