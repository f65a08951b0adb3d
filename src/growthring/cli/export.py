"""``growthring export``: what a run trained, in a format that loads without growthring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from growthring.errors import ConfigError, nearest

from . import _console

__all__ = ["export"]

FORMATS = ("lora",)
LORA_RANK = 8
"""PEFT's, of a LoRA whose config names none."""


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of an adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")],
    to: Annotated[str, typer.Option("--to", help="The format: lora.")] = "lora",
) -> None:
    """Write the adapter of a run as a stock LoRA, which PEFT and transformers load without growthring.

    The model is not loaded: a LoRA of the same outputs is made of the adapter's own weights.

    Examples:
        growthring export runs/largo --to lora --out my-lora

        growthring export runs/largo/adapter --out my-lora
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: {nearest(to, FORMATS)}")
    source = _adapter_of(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: this is no empty folder; name a new one")
    kind = str(_config(source).get("peft_type"))
    if kind not in ("LORA", "GROWTHRING_LARGO"):
        raise ConfigError(
            f"{source} holds an adapter of type {kind}; LARGO-style adapters (GROWTHRING_LARGO) and LoRA (LORA) can "
            "be exported. Load this one with peft, and growthring where it is one of growthring's"
        )
    from safetensors import SafetensorError

    from growthring.adapters import adapter_as_lora

    try:
        if kind == "LORA":
            _copy(source, out)
        else:
            adapter_as_lora(source, out)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{out} cannot be written: {why}; choose another folder") from error
    rank = _config(out).get("r", LORA_RANK)
    _console.output().print(f"A LoRA of rank {rank}: {out.resolve()}", soft_wrap=True)


def _adapter_of(run: Path) -> Path:
    """The folder of the adapter."""
    for folder in (run / "adapter", run):
        if (folder / "adapter_config.json").is_file():
            return folder
    if not run.is_dir():
        beside = [p.name for p in run.parent.iterdir() if p.is_dir()] if run.parent.is_dir() else []
        tip = f"; {nearest(run.name, beside)}" if beside and len(beside) <= 50 else ""
        raise ConfigError(f"{run}: there is no such folder{tip}")
    if (run / "model").is_dir():
        raise ConfigError(
            f"{run} holds no adapter: this run trained the model's own weights. They are in {run / 'model'}, and "
            "transformers loads them as they are"
        )
    raise ConfigError(
        f"{run} holds neither adapter/ nor adapter_config.json; it is no run folder, or its run did not end"
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds no adapter's config")
    return value


def _copy(source: Path, out: Path) -> None:
    """Copy an adapter that is a stock LoRA already."""
    import shutil

    names = ("adapter_config.json", "adapter_model.safetensors")
    if not (source / names[1]).is_file():
        raise ConfigError(f"{source} holds no {names[1]}; only safetensors are read")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, out / name)
