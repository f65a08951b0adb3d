"""A guard's memory on disk: ``guard.json`` and ``memory.safetensors`` (and ``probes.safetensors``), nothing executable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from growthring._io import write_json, write_with
from growthring.errors import DataError

__all__ = ["FORMAT_VERSION", "load", "plain", "save"]

FORMAT_VERSION = 1


def plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries of plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def save(folder: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Write a guard's settings and state; tensors go to safetensors, the rest to JSON that points at them.

    Args:
        folder: Made if missing.
        settings: Constructor arguments, with ``"guard"`` naming the kind when it is not PEGP.
        state: Nested dictionaries and lists of tensors, strings and numbers.

    Returns:
        ``folder``.
    """
    files: dict[str, dict[str, Tensor]] = {"memory.safetensors": {}, "probes.safetensors": {}}

    def walk(value: Any, path: str, file: str) -> Any:
        if isinstance(value, Tensor):
            files[file][path] = value.detach().cpu().contiguous()
            return {"tensor": path, "file": file}
        if isinstance(value, Mapping):
            return {
                "map": {
                    k: walk(v, f"{path}/{k}", "probes.safetensors" if path == "" and k == "probes" else file)
                    for k, v in value.items()
                }
            }
        if isinstance(value, list | tuple):
            return {"list": [walk(v, f"{path}/{i}", file) for i, v in enumerate(value)]}
        return {"value": value}

    tree = walk(state, "", "memory.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"format": "growthring.memory", "format_version": str(FORMAT_VERSION)}
    for name, tensors in files.items():
        write_with(folder / name, lambda t, tensors=tensors: save_file(tensors, t, metadata=meta))  # type: ignore[misc]
    document = {
        "format": "growthring.memory",
        "format_version": FORMAT_VERSION,
        "guard": "pegp",
        "settings": dict(settings),
        "state": tree,
    }
    write_json(folder / "guard.json", document)
    return folder


def load(folder: Path, guard: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Raises:
        DataError: If a file is missing, is not a memory, is torn, belongs to another guard, or is of a newer format.
    """
    path = folder / "guard.json"
    if not path.is_file():
        raise DataError(
            f"{folder} holds no guard memory: there is no guard.json. Save one with guard.save_pretrained(folder)"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") != "growthring.memory":
            raise ValueError("it says it is something else")
        version = int(document["format_version"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not a growthring memory: {error}") from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}; this growthring reads up to {FORMAT_VERSION}. Upgrade growthring"
        )
    if document["guard"] != guard:
        raise DataError(f"{path} holds the memory of the guard {document['guard']!r}, not of {guard!r}")
    tensors: dict[str, dict[str, Tensor]] = {}

    def build(node: Any) -> Any:
        if "tensor" in node:
            file = node["file"]
            if file not in ("memory.safetensors", "probes.safetensors"):
                raise ValueError(f"unknown file {file!r}")
            if file not in tensors:
                tensors[file] = load_file(folder / file)
            return tensors[file][node["tensor"]]
        if "map" in node:
            return {k: build(v) for k, v in node["map"].items()}
        if "list" in node:
            return [build(v) for v in node["list"]]
        return node["value"]

    try:
        return dict(document["settings"]), build(document["state"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"the memory in {folder} is not whole: {type(error).__name__}: {error}") from error
    except Exception as error:  # safetensors raises its own class for a torn file
        if type(error).__module__.startswith("safetensors") or type(error).__name__ == "SafetensorError":
            raise DataError(f"the memory in {folder} is not whole: {error}") from error
        raise
