"""YAML as people mean it: a key twice is an error, and ``1e-3`` is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

from growthring.errors import ConfigError

__all__ = ["dump", "parse"]


class _Loader(yaml.SafeLoader):
    """Plain values only, as ``yaml.safe_load``."""


# YAML 1.1, which PyYAML reads, takes 1e-3 for a text because it has no point; YAML 1.2 and everybody else do not.
_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)[eE][0-9]+$"), list("-+.0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    first: dict[Any, yaml.Mark] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a plain word, got {key!r}")
        if key in first:
            raise ConfigError(
                f"line {key_node.start_mark.line + 1}: the key {key!r} is there twice (first on line "
                f"{first[key].line + 1}); remove one"
            )
        first[key] = key_node.start_mark
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """The value of a YAML (or JSON) text.

    Raises:
        ConfigError: It is not YAML, or a key is there twice; with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}") from None


def dump(value: Any) -> str:
    """``value`` as YAML, keys in the order given."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=119))
