"""Settings whose meaning depends on the method: the adapter and the guard. What has no effect is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from growthring.errors import ConfigError

from ._defaults import ADAPTER_DEFAULTS, GUARD_DEFAULTS, PAPER_MEMORY
from ._method import TRAINS, AdapterKind, Method, plain_energy
from ._sections import TARGET_TAGS, AdapterSettings, GuardSettings, Kind, Role
from .methods import METHODS
from .settings import Section

__all__ = [
    "ADAPTER_DEFAULTS",
    "GUARD_DEFAULTS",
    "PAPER_MEMORY",
    "TARGET_TAGS",
    "AdapterSettings",
    "GuardSettings",
    "Kind",
    "Role",
    "adapter_for",
    "guard_for",
]

_TWO_MODES: tuple[AdapterKind, ...] = ("bottleneck", "prefix", "prompt")


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
    if "dropout" in values and method.adapter == "largo":
        raise ConfigError(
            f"adapter.dropout: {values['dropout']:g}: an adapter that starts from the weights' SVD has none: it would "
            "disturb what the pretrained model computes. Remove dropout"
        )
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
    filled = {**allowed, **_chosen(method, "adapter", allowed, values), **values}
    if method.adapter == "largo":
        filled["alpha"] = float(filled["r"]) if filled["alpha"] is None else filled["alpha"]
        _check_start(filled)
    return (given or AdapterSettings()).model_copy(update=filled)


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
    filled = {**allowed, **_chosen(method, "guard", allowed, values), **values}
    if "energy" in filled:
        filled["energy"] = _energy_for(method, filled, linear_head)
    return (given or GuardSettings()).model_copy(update=filled)


def _check_start(filled: Mapping[str, Any]) -> None:
    """Refuse starts that a low-rank adapter from an SVD cannot have."""
    if filled["svd_iterations"] is not None and filled["init"] != "principal":
        raise ConfigError(
            f"adapter.svd_iterations: {filled['svd_iterations']}: a randomised SVD finds the largest singular vectors "
            f"of a weight, and init is {filled['init']}. Remove svd_iterations, or choose init: principal"
        )
    if filled["init"] == "activation" and filled["form"] == "residual":
        raise ConfigError(
            "adapter.form: residual takes a part of the weight's own SVD out of it, and init: activation starts from "
            "none. Choose form: delta, or init: principal or minor"
        )


def _chosen(
    method: Method, part: Literal["adapter", "guard"], allowed: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Defaults of the settings of which the method takes some values only.

    Raises:
        ConfigError: A configuration gives another value.
    """
    defaults: dict[str, Any] = {}
    for setting, options in method.choices.items():
        where, _, name = setting.partition(".")
        if where != part or name not in allowed:
            continue
        defaults[name] = options[0]
        if values.get(name, options[0]) not in options:
            others = [m.name for m in METHODS.values() if values[name] in m.choices.get(setting, ())]
            other = f", or choose another method ({', '.join(others)})" if others else ""
            raise ConfigError(
                f"{setting}: {values[name]!r}: the method {method.name!r} takes {' or '.join(map(str, options))}. "
                f"Remove {name}{other}"
            )
    return defaults


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
