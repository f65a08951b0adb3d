"""Settings whose meaning depends on the method: the adapter and the guard. What has no effect is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from growthring.errors import ConfigError

from ._method import TRAINS, AdapterKind, GuardName, Method, plain_energy
from .methods import METHODS
from .settings import Name, Section

__all__ = [
    "ADAPTER_DEFAULTS",
    "GUARD_DEFAULTS",
    "PAPER_MEMORY",
    "AdapterSettings",
    "GuardSettings",
    "adapter_for",
    "guard_for",
]

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

ADAPTER_DEFAULTS: Mapping[AdapterKind, Mapping[str, Any]] = {
    "lora": {"r": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear", "tower": None},
    "lora+weights": {
        "r": 8,
        "alpha": 16.0,
        "dropout": 0.0,
        "target_modules": "preset",
        "full_rank": "preset",
        "branches": "merged",
        "tower": None,
    },
    "bottleneck": {
        "r": 16,
        "placement": "both",
        "mode": "parallel",
        "activation": "relu",
        "scaling": 1.0,
        "dropout": 0.0,
        "tower": None,
    },
    "prefix": {"tokens": 10, "tower": None},
    "prompt": {"tokens": 10, "tower": None},
    "ia3": {"tower": None},
    "linear": {},
    "full": {},
}
"""The settings that each kind of adapter has, with their defaults."""

GUARD_DEFAULTS: Mapping[GuardName, Mapping[str, Any]] = {
    "pegp": {
        "energy": None,
        "samples": 256,
        "probes": 8,
        "unprotected": "hold",
        "mode": "strict",
        "project": "update",
        "kinds": None,
        "merge": 0.0,
    },
    "inflora": {"energy": None, "samples": 256},
    "o-lora": {"weight": 0.5, "norm": "l1"},
    "gradient-memory": {
        "energy": None,
        "mode": "sound",
        "side": "input",
        "source": "gradient",
        "project": "update",
    },
}
"""The settings that each guard has, with their defaults; the energy's is that of the method."""

PAPER_MEMORY: Mapping[str, Any] = {"side": "output", "source": "exp_avg", "project": "gradient"}
"""The gradient memory of the published rule."""

_TWO_MODES: tuple[AdapterKind, ...] = ("bottleneck", "prefix", "prompt")


def _energy(value: Any) -> Any:
    """Check with the guard's own rules; keep plain values, which YAML and JSON can hold."""
    from growthring.guards.energy import parse_energy

    parse_energy(value)
    return plain_energy(value)


class AdapterSettings(Section):
    """The adapter. Which settings there are depends on what the method trains; defaults are filled in."""

    r: int | None = Field(
        default=None, ge=1, description="LoRA: rank, default 8. Bottleneck adapters: width, default 16."
    )
    alpha: float | None = Field(
        default=None, gt=0, description="LoRA: its output is multiplied by alpha / r. Default 16."
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="LoRA and bottleneck adapters: dropout on the input. Default 0."
    )
    target_modules: TargetModules | None = Field(
        default=None,
        description="LoRA: all-linear (default), a role found from the model's structure (attention, mlp, query ...), "
        "or the names (or ends of names) of the modules to adapt. gorp: preset (default), its choice for the model.",
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
        description="PEGP, InfLoRA: inputs whose features are collected at the end of a task. Default 256.",
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
    weight: float | None = Field(default=None, ge=0, description="O-LoRA: weight of the overlap. Default 0.5.")
    norm: Literal["l1", "squared"] | None = Field(
        default=None, description="O-LoRA: absolute values of the overlap (default) or their squares."
    )


def adapter_for(method: Method, given: AdapterSettings | None) -> AdapterSettings | None:
    """The adapter's settings with defaults filled in; ``None`` for methods that have none.

    Raises:
        ConfigError: A setting has no effect for this method.
    """
    allowed = ADAPTER_DEFAULTS[method.adapter]
    if not allowed:
        if given is not None:
            raise ConfigError(
                f"adapter: has no effect: the method {method.name!r} trains {TRAINS[method.adapter]} and has no "
                f"adapter. Remove adapter, or choose a method that has one ({_having('adapter')})"
            )
        return None
    values = _given(given)
    for name in values:
        if name not in allowed:
            raise ConfigError(
                f"adapter.{name}: has no effect: the method {method.name!r} trains {TRAINS[method.adapter]}, which "
                f"has the settings {', '.join(allowed)}"
            )
    if values.get("target_modules") == "preset" and "full_rank" not in allowed:
        raise ConfigError(
            f"adapter.target_modules: preset is GORP's choice, and the method is {method.name!r}; choose all-linear, "
            "a role or names"
        )
    where = [n for n in ("target_modules", "full_rank") if n in allowed]
    if values.get("tower") is not None and where and all(isinstance(values.get(n), list) for n in where):
        raise ConfigError(
            f"adapter.tower: has no effect beside a list of {' and of '.join(where)}: names say where; give one of "
            "the two"
        )
    return (given or AdapterSettings()).model_copy(update={**allowed, **values})


def guard_for(method: Method, given: GuardSettings | None, *, linear_head: bool) -> GuardSettings | None:
    """The guard's settings with defaults filled in; ``None`` for methods without a guard.

    Args:
        method: The method.
        given: What the configuration says.
        linear_head: Whether a linear head may train, which is a linear site.

    Raises:
        ConfigError: A setting has no effect for this method.
    """
    if method.guard is None:
        if given is not None:
            raise ConfigError(
                f"guard: has no effect: the method {method.name!r} has no guard. Remove guard, or choose a method "
                f"that has one ({_having('guard')})"
            )
        return None
    allowed = dict(GUARD_DEFAULTS[method.guard])
    values = _given(given)
    if method.guard == "pegp" and method.adapter not in _TWO_MODES:
        del allowed["mode"]
        if "mode" in values:
            raise ConfigError(
                f"guard.mode: has no effect: for {TRAINS[method.adapter]} the conditions of the paper are exact, so "
                "strict and paper are the same. Remove mode"
            )
    modes = ("sound", "paper") if method.guard == "gradient-memory" else ("strict", "paper")
    if "mode" in allowed and values.get("mode", "paper") not in modes:
        raise ConfigError(f"guard.mode: {values['mode']!r}: the method {method.name!r} has {' and '.join(modes)}")
    fixed = PAPER_MEMORY if method.guard == "gradient-memory" and values.get("mode") == "paper" else {}
    allowed |= fixed
    for name in values:
        if name in fixed and values[name] != fixed[name]:
            raise ConfigError(
                f"guard.{name}: {values[name]!r}: the published rule (mode: paper) has {fixed[name]!r}. Remove "
                f"{name}, or choose mode: sound"
            )
        if name not in allowed:
            raise ConfigError(
                f"guard.{name}: has no effect: the guard of the method {method.name!r} has the settings "
                f"{', '.join(allowed)}"
            )
    filled = {**allowed, **values}
    if "energy" in filled:
        filled["energy"] = _energy_for(method, filled, linear_head)
    return (given or GuardSettings()).model_copy(update=filled)


def _energy_for(method: Method, filled: Mapping[str, Any], linear_head: bool) -> Any:
    energy, by_kind = filled["energy"], plain_energy(method.energy)
    if method.guard in ("inflora", "gradient-memory"):
        if energy == "auto" or (isinstance(energy, Mapping) and "start" not in energy):
            who = "InfLoRA" if method.guard == "inflora" else "the gradient memory"
            raise ConfigError(f"guard.energy: {who} takes one number or a schedule {{start, end, tasks}}: {energy!r}")
        return by_kind if energy is None else energy
    kinds = list(method.kinds)
    if filled.get("mode") == "paper":
        kinds = [kind for kind in kinds if not kind.endswith("_value")]  # the paper has no condition for them
    if linear_head and "linear" not in kinds:
        kinds.append("linear")
    _check_kinds("guard.kinds", filled["kinds"] or (), method, kinds)
    if filled["kinds"]:
        kinds = [kind for kind in kinds if kind in filled["kinds"]]
    if energy is None:
        return {kind: one for kind, one in by_kind.items() if kind in kinds} or None
    if isinstance(energy, Mapping) and not energy.keys() & {"start", "times"}:
        _check_kinds("guard.energy", energy, method, kinds)
    return energy


def _check_kinds(where: str, named: Iterable[str], method: Method, kinds: Iterable[str]) -> None:
    for kind in named:
        if kind not in kinds:
            raise ConfigError(
                f"{where}.{kind}: has no effect: with these settings the method {method.name!r} protects "
                f"{' and '.join(kinds)}"
            )


def _given(settings: Section | None) -> dict[str, Any]:
    """What a configuration says, without what it leaves to the defaults."""
    if settings is None:
        return {}
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {name: value for name, value in values.items() if value is not None}


def _having(part: Literal["adapter", "guard"]) -> str:
    found = [m.name for m in METHODS.values() if (ADAPTER_DEFAULTS[m.adapter] if part == "adapter" else m.guard)]
    return ", ".join(found)
