"""Registering a tuner with PEFT from outside; the one place that leans on how PEFT keeps its list of methods."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

__all__ = ["register"]


def register(name: str, config_cls: type, model_cls: type, prefix: str) -> None:
    """Make PEFT know a method; a second call with the same method changes nothing.

    PEFT finds methods by members of an enum and has no public way to add one, so the member is made here.

    Args:
        name: Name in lower case; ``adapter_config.json`` holds it in upper case as ``peft_type``.
        config_cls: The config.
        model_cls: The tuner.
        prefix: What the names of the adapter's parameters begin with.
    """
    key = name.upper()
    if key not in PeftType.__members__:
        member = str.__new__(PeftType, key)
        member._name_, member._value_ = key, key
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(key)
        PeftType._member_map_[key] = member
        PeftType._value2member_map_[key] = member
    if PeftType(key) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)
