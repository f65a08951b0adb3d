"""The tuner of LARGO-style adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import logging

from growthring.errors import ConfigError, nearest

from .bases import quantisation_of
from .config import LargoConfig
from .kinds import LargoEmbedding, LargoLinear
from .layer import LargoLayer, move

__all__ = ["LargoModel"]


class LargoModel(BaseTuner):  # type: ignore[misc]
    """Puts LARGO-style adapters into a model; made by ``get_peft_model``."""

    prefix = "largo_"
    tuner_layer_cls = LargoLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's way to add an adapter, with a progress bar if the decompositions take longer than two seconds."""
        with logging.tqdm(desc="Singular vectors", unit=" layers", delay=2, leave=False) as self._progress:
            try:
                super().inject_adapter(*args, **kwargs)
            finally:
                del self._progress

    def _create_and_replace(
        self,
        peft_config: LargoConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, LargoLayer):
            target.update_layer(adapter_name, peft_config)
        else:
            inner: Any = target
            while hasattr(inner, "base_layer"):  # another tuner's layer
                inner = inner.base_layer
            layer_cls = LargoEmbedding if isinstance(inner, nn.Embedding) else LargoLinear
            layer: Any = layer_cls(target, current_key, quantisation_of(self.model))
            layer._active_adapter = adapter_name
            layer.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        self._progress.update(1)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        layer: Any
        for layer in self.modules():  # factors are made in float32; as narrow as the model was asked for
            if isinstance(layer, LargoLayer):
                base = layer.get_base_layer()
                dtype: Any = getattr(base, "compute_dtype", getattr(getattr(base, "weight", None), "dtype", None))
                if dtype in (torch.float16, torch.bfloat16):
                    move(layer, adapter_name, dtype=dtype)

    def _check_merge_allowed(self) -> None:
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name.replace("base_layer.", ""))
        layer: Any
        for name, layer in self.model.named_modules():
            if isinstance(layer, LargoLayer):
                weight = getattr(layer.get_base_layer(), "weight", None)
                shared = owners.get(id(weight), [])
                if len(shared) > 1:
                    other = next(n for n in shared if n != f"{name}.weight")
                    raise ConfigError(
                        f"{name}.weight is tied to {other}: merging the adapter would change both. Untie them first "
                        "(give one of them a copy, and set config.tie_word_embeddings=False), or export the adapter "
                        "with save_as_lora"
                    )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names``, one per row of a batch, to every layer for the time of a forward pass."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ConfigError("adapter_names were given in training mode; batches mix adapters at inference only")
        layers = [m for m in self.modules() if isinstance(m, LargoLayer | AuxiliaryTrainingWrapper)]
        known = {adapter for layer in layers if isinstance(layer, LargoLayer) for adapter in layer.largo_B}
        for name in dict.fromkeys(names):
            if name != "__base__" and name not in known:
                raise ConfigError(f"Trying to infer with non-existing adapter(s): {name}; {nearest(name, known)}")
        beams = kwargs.get("num_beams")
        rows = [n for n in names for _ in range(beams)] if isinstance(beams, int) and beams > 1 else list(names)
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        inside = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = [  # an encoder runs before the rows are repeated for the beams
            layer.register_forward_pre_hook(
                partial(_hand_over, adapter_names=list(names) if layer in inside else rows), with_kwargs=True
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple[Any, Any]:
    return args, kwargs | {"adapter_names": adapter_names}
