"""Named methods: what each one trains, what guards it, what it promises, and when to take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from growthring.errors import ConfigError, nearest

from ._method import Method, Paper
from .methods_robust import robust_methods

__all__ = ["METHODS", "get_method"]

_LORA = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")
_ADAPTER = Paper("Towards a Unified View of Parameter-Efficient Transfer Learning", "2110.04366")
_PREFIX = Paper("Prefix-Tuning: Optimizing Continuous Prompts for Generation", "2101.00190")
_PROMPT = Paper("The Power of Scale for Parameter-Efficient Prompt Tuning", "2104.08691")
_IA3 = Paper("Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", "2205.05638")
_PEGP = Paper("Gradient Projection For Continual Parameter-Efficient Tuning", "2405.13383")
_GPM = Paper("Gradient Projection Memory for Continual Learning", "2103.09762")
_NSCL = Paper("Training Networks in Null Space of Feature Covariance for Continual Learning", "2103.07113")
_INFLORA = Paper("InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", "2404.00228")
_GALORE = Paper("GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", "2403.03507")
_GORP = Paper("Continual Gradient Low-Rank Projection Fine-Tuning for LLMs", "2507.02503")
_OLORA = Paper("Orthogonal Subspace Learning for Language Model Continual Learning", "2310.14152")

_NONE = "None: nothing keeps a later task from changing what an earlier one learned."
_STEP = (
    "No step moves a guarded tensor within the protected part of the feature space of earlier tasks: the share that "
    "does is measured after every task and is rounding error (at most 1e-5 in float32), under any optimizer."
)
_EXACT = (
    f"{_STEP} At energy 1.0 the inputs it was measured on keep their outputs; below it, what lies outside the "
    "protected part may move."
)
_MEMORY = (
    "No old training data. A pass over a few hundred inputs after each task, at most d*d/2 floats a guarded matrix "
    "however many tasks, and two small projections a step."
)
_WHOLE = "A whole model to train and to store; optimizer state of twice its size."
_GUARDED_WHOLE = (
    "A whole model to train and to store, at most d*d/2 floats a guarded matrix however many tasks, and a projection "
    "of every matrix each step."
)


def _sequential() -> Iterator[Method]:
    yield Method(
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
    )
    yield Method(
        name="sequential-adapter",
        title="Sequential bottleneck adapters",
        summary="Bottleneck adapters in every block, trained on one task after another.",
        adapter="bottleneck",
        paper=_ADAPTER,
        guarantee=_NONE,
        cost="A few percent of the weights train; two small layers more at inference, which cannot be merged away.",
        use_when="As the baseline for pegp-adapter.",
        avoid_when="The result has to be merged into plain weights: that needs LoRA.",
        learning_rate=2e-3,
    )
    yield Method(
        name="sequential-prefix",
        title="Sequential prefix tuning",
        summary="Learned keys and values in front of every attention, trained on one task after another.",
        adapter="prefix",
        paper=_PREFIX,
        guarantee=_NONE,
        cost="Very few parameters; every attention reads a few tokens more.",
        use_when="As the baseline for pegp-prefix.",
        avoid_when="Few steps are affordable: prefixes learn slowly and want a large learning rate.",
        learning_rate=1e-1,
    )
    yield Method(
        name="sequential-prompt",
        title="Sequential prompt tuning",
        summary="Learned tokens at the input, trained on one task after another.",
        adapter="prompt",
        paper=_PROMPT,
        guarantee=_NONE,
        cost="The fewest parameters of all; every layer reads a few tokens more.",
        use_when="As the baseline for pegp-prompt.",
        avoid_when="The tasks are far from what the model was trained on: a prompt is too small for them.",
        learning_rate=3e-2,
    )
    yield Method(
        name="sequential-ia3",
        title="Sequential IA3",
        summary="A learned scale for every key, value and MLP feature, trained on one task after another.",
        adapter="ia3",
        paper=_IA3,
        guarantee=_NONE,
        cost="One number a feature; scales can be merged into the weights.",
        use_when="As the baseline for pegp-ia3.",
        avoid_when="The tasks need new features: scales only weigh those that are there.",
        learning_rate=5e-3,
    )
    yield Method(
        name="sequential-linear",
        title="Sequential fine-tuning (linear weights)",
        summary="Every linear weight of the model, trained on one task after another.",
        adapter="linear",
        guarantee=_NONE,
        cost=_WHOLE,
        use_when="As the strong baseline: at a gentle learning rate it forgets little.",
        avoid_when="The result has to be a small adapter, or forgetting has to be bounded.",
        learning_rate=1e-4,
    )
    yield Method(
        name="sequential-full",
        title="Sequential fine-tuning (all parameters)",
        summary="Every parameter, embeddings and norms included, trained on one task after another.",
        adapter="full",
        guarantee=_NONE,
        cost=_WHOLE,
        use_when="To compare with published full fine-tuning.",
        avoid_when="The result has to be a small adapter, or forgetting has to be bounded.",
        learning_rate=5e-5,
    )
    yield Method(
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
    )


def _pegp() -> Iterator[Method]:
    shared: dict[str, Any] = {"guard": "pegp", "paper": _PEGP}
    yield Method(
        name="pegp",
        title="PEGP on LoRA",
        summary="LoRA whose updates stay out of the feature space that earlier tasks use.",
        adapter="lora",
        guarantee=_EXACT,
        cost=_MEMORY,
        use_when="One adapter has to learn task after task and keep what it knew, checkably.",
        avoid_when="Many more tasks than free dimensions: each takes some, and the certificate counts them.",
        learning_rate=3e-3,
        energy=MappingProxyType({"lora_A": 0.95, "lora_B": 0.90}),
        **shared,
    )
    yield Method(
        name="pegp-adapter",
        title="PEGP on bottleneck adapters",
        summary="Bottleneck adapters whose updates, biases included, stay out of the feature space of earlier tasks.",
        adapter="bottleneck",
        guarantee=f"{_EXACT} This holds for any element-wise activation.",
        cost=_MEMORY,
        use_when="As pegp, where a nonlinear adapter learns the tasks better than LoRA.",
        avoid_when="The result has to be merged into plain weights: that needs LoRA.",
        learning_rate=2e-3,
        energy=MappingProxyType({"adapter_down": 0.95, "adapter_up": 0.80}),
        **shared,
    )
    yield Method(
        name="pegp-prefix",
        title="PEGP on prefixes",
        summary="Prefix keys and values, kept for every head out of what the queries of earlier tasks can see.",
        adapter="prefix",
        guarantee=f"{_EXACT} In mode paper single heads and prefix values are free, and outputs drift; by how much is "
        "measured.",
        cost=_MEMORY,
        use_when="A prefix has to learn task after task, or to compare with published prefix results.",
        avoid_when="Heads are narrow and tasks many: a head of 32 dimensions is soon full.",
        learning_rate=1e-1,
        energy=MappingProxyType({"prefix_key": 0.90, "prefix_value": 0.90}),
        **shared,
    )
    yield Method(
        name="pegp-prompt",
        title="PEGP on prompts",
        summary="Input prompts whose keys and values at the first layer stay what the queries of earlier tasks saw.",
        adapter="prompt",
        guarantee=f"{_STEP} That bounds the drift and does not exclude it, at energy 1.0 either: behind the first "
        "layer prompts act through their own outputs. The drift of old outputs is measured.",
        cost=_MEMORY,
        use_when="The model must stay as it is except for a few input tokens.",
        avoid_when="Old outputs have to stay exactly what they were: take pegp, pegp-adapter or pegp-prefix.",
        learning_rate=3e-2,
        energy=MappingProxyType({"prompt_key": 0.90, "prompt_value": 0.90}),
        **shared,
    )
    yield Method(
        name="pegp-ia3",
        title="PEGP on IA3",
        summary="IA3 scales, of which only those of features that earlier tasks hardly use may move.",
        adapter="ia3",
        guarantee=_EXACT,
        cost=_MEMORY,
        use_when="Scales are all that may train, and old outputs matter.",
        avoid_when="Features are dense, as they are in most models: nearly every scale is then held.",
        learning_rate=5e-3,
        energy=MappingProxyType({"ia3": 0.90}),
        **shared,
    )
    yield Method(
        name="pegp-linear",
        title="PEGP on linear weights",
        summary="Every linear weight, its updates kept out of the feature space that earlier tasks use.",
        adapter="linear",
        guarantee=_EXACT,
        cost=_GUARDED_WHOLE,
        use_when="LoRA is too narrow to learn the tasks, and a full copy of the model is affordable.",
        avoid_when="The result has to be a small adapter.",
        learning_rate=2e-4,
        energy=MappingProxyType({"linear": 0.80}),
        **shared,
    )


def _family() -> Iterator[Method]:
    yield Method(
        name="gpm",
        title="GPM (updates projected)",
        summary="Every linear weight, with GPM's memory: its energy of 0.97 that rises by 0.003 a task. Unlike the "
        "published code, the update is projected and not the gradient alone, so any optimizer is exact and not only "
        "SGD; the smallest basis that reaches the energy is kept, where that code keeps one direction fewer at first; "
        "and biases never train, where it trains them in the first task.",
        adapter="linear",
        guard="pegp",
        paper=_GPM,
        guarantee=_EXACT,
        cost=_GUARDED_WHOLE,
        use_when="To compare with GPM on a pretrained model.",
        avoid_when="The tasks need room: at this energy a pretrained model has little left.",
        learning_rate=2e-4,
        energy=MappingProxyType({"linear": MappingProxyType({"start": 0.97, "end": 1.0, "tasks": 11})}),
    )
    yield Method(
        name="adam-nscl",
        title="Adam-NSCL (updates projected)",
        summary="Every linear weight, updated in the approximate null space: directions whose energy is at most ten "
        "times the smallest. Unlike the published code, every token counts (that code averages each batch first), "
        "the protected space only grows, and no penalty acts on norms, which never train.",
        adapter="linear",
        guard="pegp",
        paper=_NSCL,
        guarantee=_EXACT,
        cost=_GUARDED_WHOLE,
        use_when="To compare with Adam-NSCL on a pretrained model.",
        avoid_when="The spectrum of the features falls slowly: what counts as null space then carries energy.",
        learning_rate=2e-4,
        energy=MappingProxyType({"linear": MappingProxyType({"times": 10.0})}),
    )
    yield Method(
        name="inflora",
        title="InfLoRA branches",
        summary="A new LoRA branch a task, with A designed from the task's inputs outside the space of earlier tasks "
        "and frozen; only B trains. The paper adapts keys and values only.",
        adapter="lora",
        guard="inflora",
        paper=_INFLORA,
        guarantee="A new branch gives zero for inputs in the protected space of earlier tasks, whatever its B "
        "becomes: exact under any optimizer, and measured. Below energy 1.0 the rest of an old input can move.",
        cost="One branch a task at training and inference, or one merged LoRA at the end; two passes over a few "
        "hundred inputs a task, at most d*d/2 floats a layer.",
        use_when="Tasks are few, and each may have parameters of its own.",
        avoid_when="The stream is long: branches add up.",
        learning_rate=2e-3,
        energy=0.95,
    )
    yield Method(
        name="o-lora",
        title="O-LoRA branches",
        summary="A new LoRA branch a task; a term of the loss pushes its A away from the A of earlier branches.",
        adapter="lora",
        guard="o-lora",
        paper=_OLORA,
        guarantee="None that is exact: orthogonal weights do not keep outputs on old inputs, and the term is weighed "
        "against the loss. The overlap that is left is measured.",
        cost="One branch a task at training and inference, or one merged LoRA at the end; a small term of the loss.",
        use_when="To compare with O-LoRA. It keeps no statistics of the data.",
        avoid_when="Old outputs have to be bounded: take inflora or pegp.",
        learning_rate=1e-3,
        choices=MappingProxyType({"guard.norm": ("l1", "squared")}),
    )


def _projected() -> Iterator[Method]:
    state = "Optimizer state of rank r in place of twice the weights; a search for the subspace every so many steps."
    memory = (
        "No step moves a weight along the leading directions of earlier tasks' gradients, as many as hold the share "
        "energy of what the optimizer's subspaces showed of them. The share of an update that does is measured after "
        "every task and is rounding error. All else may change. In mode paper Adam leaks, which is measured too."
    )
    yield Method(
        name="galore",
        title="GaLore (linear weights)",
        summary="Every linear weight of the model, stepped in a low-rank subspace of its gradient, on one task after "
        "another.",
        adapter="linear",
        optimizer="galore",
        paper=_GALORE,
        guarantee=_NONE,
        cost=f"A whole model to train and to store. {state}",
        use_when="As the baseline for gorp, or where the optimizer's state does not fit into memory.",
        avoid_when="Earlier tasks matter: nothing guards them.",
        learning_rate=4e-4,
    )
    yield Method(
        name="gorp",
        title="GORP on LoRA and chosen weights",
        summary="A new LoRA on attention for every task and chosen matrices trained whole, in one optimizer that "
        "steps in gradient subspaces outside those of earlier tasks. Which matrices: queries and values of "
        "cross-attention, else the MLP's gates, else the layers into the MLP.",
        adapter="lora+weights",
        guard="gradient-memory",
        optimizer="gorp",
        paper=_GORP,
        guarantee=memory,
        cost=f"{state} While a task trains one copy of each guarded weight; at most d*d/2 floats a matrix over all "
        "tasks. The whole model is stored.",
        use_when="LoRA alone is too narrow and a full optimizer state too large; it needs no pass over old inputs.",
        avoid_when="Old outputs have to be bounded: gradients are no inputs. Take pegp or pegp-linear.",
        learning_rate=1e-3,
        full_rank_lr=1e-4,
        energy=0.95,
    )
    yield Method(
        name="gorp-full",
        title="GORP on linear weights",
        summary="Every linear weight of the model, stepped in gradient subspaces outside those of earlier tasks; no "
        "LoRA.",
        adapter="linear",
        guard="gradient-memory",
        optimizer="gorp",
        paper=_GORP,
        guarantee=memory,
        cost=f"A whole model to train and to store, a copy of it while a task trains, at most d*d/2 floats a matrix. "
        f"{state}",
        use_when="As gorp, where every layer has to learn.",
        avoid_when="Old outputs have to be bounded: gradients are no inputs. Take pegp-linear.",
        learning_rate=2e-4,
        energy=0.95,
    )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for group in (_sequential(), _pegp(), _family(), _projected(), robust_methods())
        for method in group
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
