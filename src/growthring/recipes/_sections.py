"""The adapter's and the guard's settings, as a configuration holds them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from ._method import plain_energy
from .settings import Name, Section

__all__ = ["TARGET_TAGS", "AdapterSettings", "GuardSettings", "Kind", "Role"]

Role: TypeAlias = Literal[
    "preset",
    "all-linear",
    "all",
    "attention",
    "attention_input",
    "attention_output",
    "query",
    "key",
    "value",
    "self_query",
    "self_value",
    "cross_query",
    "cross_value",
    "mlp",
    "mlp_up",
    "mlp_gate",
    "mlp_down",
]
TARGET_TAGS = ("one word", "a list")
TargetModules: TypeAlias = Annotated[
    Annotated[Role, Tag("one word")] | Annotated[list[Name], Field(min_length=1), Tag("a list")],
    Discriminator(lambda value: "one word" if isinstance(value, str) else "a list"),
]
Kind: TypeAlias = Literal[
    "lora_A",
    "lora_B",
    "largo_A",
    "largo_B",
    "adapter_down",
    "adapter_up",
    "prefix_key",
    "prefix_value",
    "prompt_key",
    "prompt_value",
    "ia3",
    "linear",
]

_SHARE: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_SCHEDULE: dict[str, Any] = {
    "type": "object",
    "properties": {"start": _SHARE, "end": _SHARE, "tasks": {"type": "integer", "minimum": 1}},
    "required": ["start", "end", "tasks"],
    "additionalProperties": False,
}
_NULL_RATIO: dict[str, Any] = {
    "type": "object",
    "properties": {"times": {"type": "number", "minimum": 1}},
    "required": ["times"],
    "additionalProperties": False,
}
_ONE_ENERGY: dict[str, Any] = {"anyOf": [_SHARE, _SCHEDULE, _NULL_RATIO]}
_KINDS: dict[str, Any] = {
    "type": "object",
    "properties": dict.fromkeys(get_args(Kind), _ONE_ENERGY),
    "additionalProperties": False,
    "minProperties": 1,
}


def _energy(value: Any) -> Any:
    """Check with the guard's own rules; keep plain values, which YAML and JSON can hold."""
    from growthring.guards.energy import parse_energy

    parse_energy(value)
    return plain_energy(value)


class AdapterSettings(Section):
    """The adapter. Which settings there are depends on what the method trains; defaults are filled in."""

    r: int | None = Field(
        default=None, ge=1, description="LoRA, LARGO: rank, default 8. Bottleneck adapters: width, default 16."
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="LoRA, LARGO: its output is multiplied by alpha / r. Default: LoRA 16, LARGO r.",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="LoRA and bottleneck adapters: dropout on the input. Default 0."
    )
    target_modules: TargetModules | None = Field(
        default=None,
        description="LoRA, LARGO: all-linear (default), a role found from the model's structure (attention, mlp, "
        "query ...), or the names (or ends of names) of the modules to adapt. gorp: preset (default), its choice for "
        "the model.",
    )
    init: Literal["principal", "minor", "activation"] | None = Field(
        default=None,
        description="LARGO: which singular vectors it starts from: the weight's largest (principal, default), its "
        "smallest (minor), or the largest of the layer's inputs on the first task's training rows (activation).",
    )
    form: Literal["delta", "residual", "product"] | None = Field(
        default=None,
        description="LARGO: changes of both factors beside the untouched weight (delta), factors beside what is left "
        "of the weight (residual), or one factor over fixed directions (product). Default: the method's.",
    )
    svd_iterations: int | None = Field(
        default=None,
        ge=1,
        description="LARGO: power iterations of a randomised SVD, for init principal. Default: an exact SVD.",
    )
    full_rank: TargetModules | None = Field(
        default=None,
        description="gorp: linear weights that train whole beside LoRA: preset (default), its choice for the model; "
        "all-linear or a role, without what LoRA adapts; or names of layers.",
    )
    branches: Literal["merged", "kept"] | None = Field(
        default=None,
        description="gorp: what becomes of a task's LoRA at its end: merged into the weights (default), or kept, "
        "frozen and active.",
    )
    placement: Literal["attention", "mlp", "both"] | None = Field(
        default=None, description="Bottleneck adapters: at which parts of each block. Default both."
    )
    mode: Literal["parallel", "sequential"] | None = Field(
        default=None, description="Bottleneck adapters: beside the part, or after it. Default parallel."
    )
    activation: Name | None = Field(
        default=None, description="Bottleneck adapters: an element-wise activation of PyTorch. Default relu."
    )
    scaling: float | None = Field(
        default=None, gt=0, description="Bottleneck adapters: fixed factor of the output. Default 1."
    )
    tokens: int | None = Field(default=None, ge=1, description="Prefix and prompt: number of tokens. Default 10.")
    tower: Literal["text", "image"] | None = Field(
        default=None, description="Of a dual encoder, the tower to adapt. Default both; prefix and prompt need it."
    )


class GuardSettings(Section):
    """The guard, for methods that have one. Which settings there are depends on it; defaults are filled in."""

    energy: Annotated[
        Any,
        PlainValidator(_energy),
        WithJsonSchema({"anyOf": [*_ONE_ENERGY["anyOf"], _KINDS, {"const": "auto"}, {"type": "null"}]}),
    ] = Field(
        default=None,
        description="Share of old features' (gradient memory: gradients') energy to protect: a number in (0, 1] or a "
        "schedule {start, end, tasks}. PEGP also: one for each kind of site, {times} (directions above so many times "
        "the smallest energy), or auto (chosen on validation data at the first task boundary). Default: the method's.",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="PEGP, InfLoRA: inputs whose features are collected at the end of a task. TPGM: validation rows "
        "on which its radii are trained. Default 256.",
    )
    probes: int | None = Field(
        default=None,
        ge=0,
        description="PEGP: inputs of each task kept to measure how far outputs drift; 0 keeps none. Default 8.",
    )
    unprotected: Literal["hold", "allow", "freeze"] | None = Field(
        default=None,
        description="PEGP: trained tensors that no condition protects are held from the second task on (default), "
        "may move, or never train.",
    )
    mode: Literal["strict", "sound", "paper"] | None = Field(
        default=None,
        description="PEGP on bottleneck adapters, prefixes and prompts: conditions that keep what old inputs compute "
        "(strict, default), or those that the paper states. Gradient memory: exact after every step (sound, default), "
        "or the published rule (paper), for comparison.",
    )
    side: Literal["input", "output", "both"] | None = Field(
        default=None,
        description="Gradient memory: protect directions of the inputs (default), the outputs or both.",
    )
    source: Literal["gradient", "momentum", "exp_avg"] | None = Field(
        default=None,
        description="Gradient memory: what is remembered of a task: its gradients (default), Adam's first moment over "
        "the task, or its last one.",
    )
    project: Literal["update", "gradient"] | None = Field(
        default=None,
        description="PEGP, gradient memory: project the update (default), exact for any optimizer; or gradients "
        "alone, for comparison.",
    )
    kinds: Annotated[list[Kind], Field(min_length=1)] | None = Field(
        default=None, description="PEGP: kinds of sites to protect; the others train freely. Default all."
    )
    merge: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="PEGP: weight of a freely trained copy mixed in after every task. Default 0.",
    )
    weight: float | None = Field(
        default=None,
        ge=0,
        description="O-LoRA: weight of the overlap, default 0.5. L2-SP: of the squared deviation, default 0.01. SPD: "
        "strength, default 1. Directional: pull toward the start, default 0.",
    )
    norm: Literal["l1", "squared", "rows", "tensor"] | None = Field(
        default=None,
        description="O-LoRA: absolute values of the overlap (l1, default) or their squares (squared). FTP, TPGM: sums "
        "of absolute values of each row (rows, default), or the Frobenius norm of the tensor.",
    )
    mu: float | None = Field(
        default=None,
        gt=0,
        description="Radius, directional, FTP, TPGM: learning rate of the radii, or of the strengths, that are "
        "trained beside the weights. Default: radius 1 (in units), the others 0.01.",
    )
    kappa: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Radius, FTP: how much of the wish to shrink counts; at 0 radii do not shrink by it. Default 1.",
    )
    unit: Literal["step", "absolute", "anchor"] | None = Field(
        default=None,
        description="Radius: what mu is a share of: the step's length (step, default), 1 (absolute), or the norm of "
        "what the factor started from (anchor).",
    )
    granularity: Literal["factor", "layer", "component"] | None = Field(
        default=None,
        description="Radius: one for each factor (default), for each layer, or for each rank-one component.",
    )
    iterations: int | None = Field(
        default=None, ge=1, description="TPGM: steps in which the radii are trained when a task ends. Default 200."
    )
