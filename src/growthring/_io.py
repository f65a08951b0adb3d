"""Atomic writes: a reader sees the old file or the new one, never half of either; and where caches are."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["cache_folder", "write_json", "write_text", "write_with"]


def cache_folder(part: str, cache_dir: str | Path | None = None) -> Path:
    """The folder ``<cache>/growthring/<part>``; it is not made.

    Args:
        part: What is kept there.
        cache_dir: ``<cache>``. Default: the environment variable ``GROWTHRING_CACHE`` (its value ``off``, which
            switches off what can be computed again, names no folder), else the user's cache: ``$XDG_CACHE_HOME`` or
            ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``.
    """
    own = os.environ.get("GROWTHRING_CACHE", "")
    root = cache_dir or ("" if own.lower() == "off" else own) or os.environ.get("XDG_CACHE_HOME")
    if not root and os.name == "nt":
        root = os.environ.get("LOCALAPPDATA")
    if not root:
        root = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(root).expanduser() / "growthring" / part


def write_with(path: str | Path, writer: Callable[[Path], object]) -> Path:
    """Let ``writer`` fill a temporary file beside ``path``, flush it to disk, then rename it into place.

    Args:
        path: The file to create or replace. Missing parent folders are made.
        writer: Called with the temporary path; must create that file.

    Returns:
        ``path`` as a :class:`~pathlib.Path`.

    Raises:
        OSError: If it cannot be written; also where safetensors says so with an error of its own.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            writer(temporary)
        except SafetensorError as error:  # a full disk, to begin with
            raise OSError(str(error)) from error
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path`` atomically."""
    return write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON to ``path`` atomically; NaN and infinities are refused."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
