"""From pydantic's list of errors to sentences: where, what came in, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from growthring.errors import nearest

__all__ = ["explain"]

_TYPES = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "finite_number": "a finite number",
}
_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
_NAMES = {bool: "true/false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}


def explain(error: ErrorDetails, root: type[BaseModel], tags: Sequence[str] = ()) -> str:
    """One sentence for one error.

    Args:
        error: An entry of ``ValidationError.errors()``.
        root: The model that was validated; near keys are looked up in it.
        tags: Names of union branches, which pydantic puts into the path and no user has written.
    """
    loc = [part for part in error["loc"] if part not in tags and part != "[key]"]
    path = _path(loc)
    kind, context, value = error["type"], error.get("ctx") or {}, error["input"]
    if kind == "extra_forbidden":
        return f"{path}: there is no such key; {nearest(str(loc[-1]), _keys(root, loc[:-1]))}"
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "value_error":
        message = str(context.get("error", error["msg"]))
        return f"{path}: {message}" if path else message
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", str(context["expected"]))
        tip = nearest(str(value), options)
        allowed = "" if tip.startswith("allowed") else f" (allowed: {', '.join(options)})"
        return f"{path}: {_shown(value)}: {tip}{allowed}"
    if kind in _TYPES:
        wanted = _TYPES[kind]
        tip = f"; put it in quotes: '{value}'" if kind == "string_type" and isinstance(value, int | float) else ""
        return f"{path}: must be {wanted}, got {_shown(value)}{tip}"
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"{path}: must be {words} {context[bound]:g}, got {value!r}"
    if kind in ("string_too_short", "too_short"):
        return f"{path}: must not be empty"
    return f"{path}: {error['msg']}, got {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    name = _NAMES.get(type(value))
    return f"{text} ({name})" if name else text


def _path(loc: Sequence[int | str]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _keys(root: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys that may stand at a place."""
    models = [root]
    for part in loc:
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models(field.annotation)]
    return sorted({key for model in models for key in model.model_fields})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
