"""A guard's memory on disk: ``guard.json``, ``memory.safetensors`` and ``probes.safetensors``; nothing executable."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from growthring._io import write_json, write_with
from growthring.errors import ConfigError, DataError

from .base import Guard

__all__ = ["FORMAT_VERSION", "load", "plain", "restore", "save"]

_Kept = TypeVar("_Kept", bound=Guard)

FORMAT_VERSION = 1
_FORMAT = "growthring.memory"
_FILES = ("memory.safetensors", "probes.safetensors")


def plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries of plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def save(folder: Path, guard: str, settings: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Write a guard's settings and state; tensors go to safetensors, the rest to JSON that points at them.

    Args:
        folder: Made if missing.
        guard: Name of the guard.
        settings: Constructor arguments.
        state: Nested dictionaries and lists of tensors, strings and numbers. What stands under ``"probes"`` gets a
            file of its own, so that kept inputs can be looked at or left at home.

    Returns:
        ``folder``.
    """
    files: dict[str, dict[str, Tensor]] = {name: {} for name in _FILES}

    def walk(value: Any, path: str, file: str) -> Any:
        if isinstance(value, Tensor):
            files[file][path] = value.detach().cpu().contiguous()
            return {"tensor": path, "file": file}
        if isinstance(value, Mapping):
            return {
                "map": {
                    k: walk(v, f"{path}/{k}", _FILES[1] if path + k == "probes" else file) for k, v in value.items()
                }
            }
        if isinstance(value, list | tuple):
            return {"list": [walk(v, f"{path}/{i}", file) for i, v in enumerate(value)]}
        return {"value": value}

    tree = walk(state, "", _FILES[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_id = secrets.token_hex(8)  # in every file: a kill between two of them is seen on loading
    meta = {"format": _FORMAT, "format_version": str(FORMAT_VERSION), "save_id": save_id}
    for name, tensors in files.items():
        write_with(folder / name, lambda t, tensors=tensors: save_file(tensors, t, metadata=meta))  # type: ignore[misc]
    head = {"format": _FORMAT, "format_version": FORMAT_VERSION, "guard": guard, "save_id": save_id}
    write_json(folder / "guard.json", {**head, "settings": dict(settings), "state": tree})
    return folder


def load(folder: Path, guard: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Raises:
        DataError: If a file is missing, is not a memory, is torn, belongs to another guard, or is of a newer format.
    """
    path = folder / "guard.json"
    if not path.is_file():
        raise DataError(
            f"{folder} holds no guard memory: it has no guard.json. Write one with guard.save_pretrained(folder)"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise ValueError(f"it says it is {document['format']!r}")
        version, owner = int(document["format_version"]), document["guard"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a growthring memory: {error}") from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}; this growthring reads up to {FORMAT_VERSION}. Upgrade growthring"
        )
    if owner != guard:
        raise DataError(f"{path} holds the memory of the guard {owner!r}, not of {guard!r}")
    tensors: dict[str, dict[str, Tensor]] = {}

    def build(node: Any) -> Any:
        if "tensor" in node:
            if node["file"] not in _FILES:
                raise ValueError(f"unknown file {node['file']!r}")
            if node["file"] not in tensors:
                tensors[node["file"]] = _read(folder / node["file"], document.get("save_id"))
            return tensors[node["file"]][node["tensor"]]
        if "map" in node:
            return {k: build(v) for k, v in node["map"].items()}
        if "list" in node:
            return [build(v) for v in node["list"]]
        return node["value"]

    try:
        return dict(document["settings"]), build(document["state"])
    except (AttributeError, KeyError, TypeError, ValueError, OSError, RecursionError, SafetensorError) as error:
        raise DataError(f"the memory in {folder} is not whole: {type(error).__name__}: {error}") from error


def restore(cls: Callable[..., _Kept], name: str, folder: Path, model: nn.Module | None) -> _Kept:
    """A guard made with the stored settings, attached to ``model`` if there is one, with the stored state.

    Raises:
        DataError: If the folder holds no whole memory of this guard, or one of a newer format.
        GuardError: If the memory belongs to another model, or needs one and none is given.
    """
    settings, state = load(folder, name)
    try:
        guard = cls(**settings)
        if model is not None:
            guard.attach(model)
        guard.load_state_dict(state)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the memory in {folder} is not whole: {type(error).__name__}: {error}") from error
    return guard


def _read(path: Path, save_id: str | None) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        if (file.metadata() or {}).get("save_id") != save_id:
            raise ValueError(f"{path.name} and guard.json were not written together")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
