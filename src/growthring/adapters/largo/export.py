"""LARGO-style adapters as stock LoRA, which loads without growthring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from growthring._io import write_with
from growthring.errors import ConfigError, DataError

from .config import LargoConfig
from .layer import LargoLayer

__all__ = ["adapter_as_lora", "save_as_lora"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COPIED = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern",
)  # fmt: skip


def save_as_lora(model: nn.Module, path: str | Path, adapter_name: str = "default") -> Path:
    """Save a LARGO-style adapter of a model as a stock LoRA that gives the same outputs, exactly.

    With ``A' = [dA; A0]`` and ``B' = [B0 + dB, dB]`` the deviation is ``D = s B' A'``: a LoRA of rank ``2 r``. Where
    ``B0`` is zero (``init="activation"``) it is ``dB (A0 + dA)``, in product form ``dB A0``: a LoRA of rank ``r``.
    Modules that were trained as a whole (``modules_to_save``) are carried over. A scale that was set since (WiSE-FT's
    interpolation) is kept.

    Args:
        model: The ``PeftModel``, or a module that holds one.
        path: Folder for ``adapter_config.json`` and ``adapter_model.safetensors``; made if it is missing.
        adapter_name: The adapter.

    Returns:
        The folder.

    Raises:
        ConfigError: If the model has no such adapter, it is none of ``LargoConfig``, or it waits for its start.

    Example:
        ```python
        save_as_lora(model, "my-lora")
        model = PeftModel.from_pretrained(base, "my-lora")  # growthring is not needed
        ```
    """
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(found) != 1:
        raise ConfigError(f"save_as_lora needs a PeftModel or a module that holds one; found {len(found)} in it")
    (peft_model,) = found
    config = peft_model.peft_config.get(adapter_name)
    if not isinstance(config, LargoConfig):
        known = sorted(name for name, other in peft_model.peft_config.items() if isinstance(other, LargoConfig))
        raise ConfigError(
            f"the model has no LARGO-style adapter {adapter_name!r}; it has {known or 'none'}. Other adapters are "
            "saved with save_pretrained"
        )
    scales, bases = {}, []
    for name, layer in peft_model.named_modules():
        if isinstance(layer, LargoLayer) and adapter_name in layer.largo_B:
            layer.check_started(adapter_name)
            scales[name] = layer.scaling[adapter_name] / config.scaling
            bases.append(layer.get_base_layer())
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    lora, factors = as_lora(config, state, scales)
    lora.fan_in_fan_out = all(isinstance(base, Conv1D) for base in bases)
    return _save(Path(path), lora, factors)


def adapter_as_lora(source: str | Path, path: str | Path) -> Path:
    """Save the LARGO-style adapter of a folder as a stock LoRA; the model that it is for is not needed.

    Args:
        source: Folder that ``save_pretrained`` wrote.
        path: Folder for the LoRA; see :func:`save_as_lora`.

    Returns:
        The folder ``path``.

    Raises:
        ConfigError: If the adapter is none of ``LargoConfig``.
        DataError: If the folder's files are not what such an adapter is made of.
    """
    folder = Path(source)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise DataError(f"{folder} holds no {name}; save the adapter with save_pretrained (safetensors) first")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    except Exception as error:  # what PEFT stumbles over, unchecked
        raise DataError(f"{folder / CONFIG} is no adapter's config: {type(error).__name__}: {error}") from error
    if not isinstance(config, LargoConfig):
        raise ConfigError(f"{folder} holds a {type(config).__name__}; only adapters of LargoConfig are converted")
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises several kinds
        raise DataError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    return _save(Path(path), *as_lora(config, state, {}))


@torch.no_grad()
def as_lora(
    config: LargoConfig, state: Mapping[str, Tensor], scales: Mapping[str, float]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the state dict of the LoRA that equals a LARGO-style adapter.

    Args:
        config: The adapter's config.
        state: Its state dict, as it is saved: without the adapter's name.
        scales: Layer to a factor of its deviation; 1 where it is left out.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, _, name = key.removesuffix(".weight").partition(".largo_")
        if name and "." not in name:  # PEFT before 0.19 saves those of other adapters too, under their names
            layers.setdefault(layer, {})[name] = value
    if not layers:
        raise DataError("the adapter holds no layer of ours; was it saved by another version of growthring?")
    made: dict[str, Tensor] = {}
    for layer, held in layers.items():
        rows = held.get("embedding_A")
        _check_factors(layer, held, config)
        parts = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in held.items()}
        start_a, start_b, delta_b = parts["A0"], parts.get("B0"), parts["B"]
        delta_a = parts["embedding_A"].T if rows is not None else parts.get("A")
        if config.init == "activation" and not bool(start_a.any()):
            raise DataError(f"{layer}: the adapter was saved before it had a start; see start_from_activations")
        if delta_a is None:
            a, b = start_a, delta_b
        elif start_b is None:
            a, b = start_a + delta_a, delta_b
        else:
            a, b = torch.cat((delta_a, start_a)), torch.cat((start_b + delta_b, delta_b), dim=1)
        b = scales.get(layer, 1.0) * b
        names = ("lora_embedding_A", "lora_embedding_B") if rows is not None else ("lora_A.weight", "lora_B.weight")
        made |= {f"{layer}.{names[0]}": a.contiguous(), f"{layer}.{names[1]}": b.contiguous()}
    rank = a.shape[0]
    kept = {key: value.contiguous() for key, value in state.items() if ".largo_" not in key}
    copied: dict[str, Any] = {name: getattr(config, name) for name in COPIED}
    lora = LoraConfig(r=rank, lora_alpha=config.scaling * rank, inference_mode=True, **copied)
    return lora, kept | made


def _check_factors(layer: str, held: Mapping[str, Tensor], config: LargoConfig) -> None:
    """Refuse factors that no adapter of this config has."""
    wanted = {"A0", "B"}
    if config.form != "product":
        wanted.add("embedding_A" if "embedding_A" in held else "A")
        if config.init != "activation":
            wanted.add("B0")
    if set(held) != wanted:
        raise DataError(
            f"{layer}: the file holds {sorted(held)}, and an adapter with form={config.form!r} and "
            f"init={config.init!r} is made of {sorted(wanted)}; is the file whole, and of this config?"
        )
    r, rows, columns = config.r, held["B"].shape[:1].numel(), held["A0"].shape[-1:].numel()
    shapes = {"A0": (r, columns), "A": (r, columns), "embedding_A": (columns, r), "B0": (rows, r), "B": (rows, r)}
    for name, value in held.items():
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if shape != shapes[name] or not value.is_floating_point():
            raise DataError(
                f"{layer}: largo_{name} is {shape} of {dtype}, where r={r} and the factors beside it want floating "
                f"numbers of shape {shapes[name]}; is the file whole, and of this config?"
            )


def _save(folder: Path, lora: LoraConfig, state: dict[str, Tensor]) -> Path:
    state = {key: value.detach().cpu().clone() for key, value in state.items()}  # nothing shares its storage
    write_with(folder / WEIGHTS, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
    lora.save_pretrained(str(folder))
    return folder
