"""What the layers of LARGO-style adapters share."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from growthring.errors import ConfigError

from .bases import Base
from .config import LargoConfig
from .factors import FactorB
from .starts import start_factors

__all__ = ["LargoLayer", "move"]

WAITS = {
    "principal": "",
    "minor": "",
    "activation": "has init='activation' and has seen no activations yet. Call "
    "growthring.adapters.start_from_activations(model, batches) before the first forward pass, or load a saved "
    "adapter",
    "unloaded": "was made without values (low_cpu_mem_usage=True, or a weight on the meta device) and its A0 and B0 "
    "were not loaded; load a whole saved adapter, or make it from weights that are there",
}


class LargoLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer or embedding with LARGO-style factors beside it; see :class:`LargoConfig`.

    ``W0`` is meant as ``(m, n)``, outputs by inputs: of a ``Conv1D`` or an embedding it is the transposed weight.

    Args:
        base_layer: The layer.
        name: Its qualified name, for messages.
        quantisation: What PEFT's quantisation backends need to know of the model.

    Attributes:
        largo_A: Adapter name to ``nn.Linear(n, r)`` whose weight is ``dA``; called on ``x``. None in product form.
        largo_B: Adapter name to ``nn.Linear(r, m)`` whose weight is ``dB``; called on ``(A0 + dA) x``.
        largo_embedding_A: Adapter name to ``nn.Embedding(n, r)`` whose weight is ``dA^T``; of embeddings.
        largo_A0: Adapter name to ``A0``, ``(r, n)``; saved with the adapter.
        largo_B0: Adapter name to ``B0``, ``(m, r)``; saved with the adapter. None where it is zero.
        largo_form: Adapter name to ``"delta"``, ``"residual"`` or ``"product"``.
        scaling: Adapter name to the factor ``s``.
    """

    adapter_layer_names: tuple[str, ...] = ("largo_A", "largo_embedding_A", "largo_B")
    other_param_names: tuple[str, ...] = (
        "largo_A0", "largo_B0", "largo_residual", "largo_form", "largo_init", "largo_unit", "largo_waits",
        "r", "scaling",
    )  # fmt: skip

    if TYPE_CHECKING:  # PEFT is untyped, and what its class gives would count as a submodule

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, name: str, quantisation: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        base = Base(self._core, name, quantisation or {})
        self.quantization_backend = base.backend  # PEFT's name
        self.out_features, self.in_features = base.out_features, base.in_features
        self.largo_A = nn.ModuleDict()
        self.largo_embedding_A = nn.ModuleDict()
        self.largo_B = nn.ModuleDict()
        self.largo_A0 = BufferDict(persistent=True)
        self.largo_B0 = BufferDict(persistent=True)
        self.largo_residual: dict[str, Tensor] = {}  # W0 - s B0 A0, made when it is needed
        self._residual_of: int | None = None  # the version of W0 that they were made of
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.largo_unit: dict[str, float] = {}  # alpha / r, whatever the scaling was set to since
        self.largo_form: dict[str, str] = {}
        self.largo_init: dict[str, str] = {}
        self.largo_waits: dict[str, str] = {}  # what it needs before it can be used; nothing once it has it
        self.merged_adapters: list[str] = []
        self._kept: list[Any] = []  # while something is merged: the base weight as it was, or its quantised layer
        self._disable_adapters = False

    @property
    def _core(self) -> Any:
        """The layer itself, under whatever other tuners put around it."""
        return self.get_base_layer()

    def _base(self) -> Base:
        return Base(self._core, self.name, backend=self.quantization_backend)

    def _active(self) -> list[str]:
        return list(self.active_adapters)

    def _make_a(self, r: int, like: dict[str, Any]) -> nn.Module:
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: LargoConfig) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            config: Its config.

        Raises:
            ConfigError: If the rank is above the smaller side of the weight, or the form does not fit the layer.
            NumericalError: If the weight holds NaN or infinity.
        """
        base, r = self._base(), config.r
        for name in (*self.adapter_layer_names, *self.other_param_names):  # one of this name is replaced as a whole
            held = getattr(self, name)
            if adapter_name in held:
                del held[adapter_name]
        if r > min(self.in_features, self.out_features):
            raise ConfigError(
                f"LargoConfig(r={r}): {self.name} has {self.out_features} outputs and {self.in_features} inputs, so "
                f"its rank is at most {min(self.in_features, self.out_features)}; lower r, or leave the module out "
                "with exclude_modules"
            )
        if config.form == "residual" and base.backend is not None:
            raise ConfigError(
                f"LargoConfig(form='residual'): {self.name} is quantised ({base.backend.backend_name}), and the "
                "residual form holds the weight without its singular part; take form='delta'"
            )
        if not base.is_linear and (config.form != "delta" or config.init == "activation"):
            what = "init='activation'" if config.form == "delta" else f"form={config.form!r}"
            raise ConfigError(
                f"LargoConfig({what}): {self.name} is an embedding, whose inputs are token numbers; embeddings take "
                "form='delta' with init='principal' or 'minor'. Leave it out with exclude_modules"
            )
        like = base.like()
        factor_b = FactorB(r, self.out_features, bias=False, **like)
        factor_a = None if config.form == "product" else self._make_a(r, like)
        if config.init_weights:
            for factor in (factor_a, factor_b):
                if factor is not None:
                    nn.init.zeros_(factor.weight)  # type: ignore[arg-type]
        unloaded = factor_b.weight.is_meta  # low_cpu_mem_usage: values will be loaded, so nothing is decomposed
        start_b: Tensor | None
        if config.init == "activation" or unloaded:
            start_a = torch.zeros(r, self.in_features, **like)
            has_b = config.form != "product" and config.init != "activation"
            start_b = start_a.new_zeros(self.out_features, r) if has_b else None
        else:
            start_a, start_b = start_factors(base.weight(), config, self.name)
        if factor_a is not None:
            (self.largo_A if base.is_linear else self.largo_embedding_A)[adapter_name] = factor_a
        self.largo_B[adapter_name] = factor_b
        self.largo_A0[adapter_name] = start_a.to(like["dtype"])
        if start_b is not None:
            self.largo_B0[adapter_name] = start_b.to(like["dtype"])
        self.r[adapter_name] = r
        self.scaling[adapter_name] = self.largo_unit[adapter_name] = config.scaling
        self.largo_form[adapter_name] = config.form
        self.largo_init[adapter_name] = config.init
        self.largo_waits[adapter_name] = WAITS["unloaded" if unloaded else config.init]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def start(self, adapter_name: str, start_a: Tensor) -> None:
        """Put orthonormal rows in place of the ``A0`` that an adapter waits for.

        Args:
            adapter_name: The adapter, with ``init="activation"``.
            start_a: ``(r, n)``.
        """
        held: Tensor = self.largo_A0[adapter_name]
        self.largo_A0[adapter_name] = start_a.to(held).contiguous()
        self.largo_waits[adapter_name] = ""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        place = self._base().like()["device"] if device is None else device  # PEFT's would round to the base's dtype
        move(self, adapter_name, device=place)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.largo_residual.clear()  # made anew from the weight on its new device, in its new dtype
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for adapter in list(self.largo_A0.keys()):
            loaded = state_dict.get(f"{prefix}largo_A0.{adapter}")
            whole = self._start_b(adapter) is None or f"{prefix}largo_B0.{adapter}" in state_dict
            if whole and loaded is not None and not loaded.is_meta and bool(loaded.any()):
                self.largo_waits[adapter] = ""
        self.largo_residual.clear()  # of other factors, or of another weight
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # --- scaling ------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let the adapter's deviation be ``scale`` times what it was trained to be; others are left alone."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.largo_unit[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the deviation of every active adapter by ``scale``."""
        for adapter in self._active():
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the deviation of every active adapter by ``scale``; ``None`` makes it what it was trained to be."""
        for adapter in self._active():
            if adapter in self.scaling:
                self.scaling[adapter] = self.largo_unit[adapter] if scale is None else self.scaling[adapter] / scale

    # --- weights ------------------------------------------------------------------------------------------------

    def factors(self, adapter: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """``A0``, ``B0``, ``dA``, ``dB`` of an adapter, ``(r, n)`` and ``(m, r)``; ``None`` where it has none."""
        delta_a = None
        if adapter in self.largo_A:
            delta_a = self.largo_A[adapter].weight
        elif adapter in self.largo_embedding_A:
            delta_a = self.largo_embedding_A[adapter].weight.T
        return self.largo_A0[adapter], self._start_b(adapter), delta_a, self.largo_B[adapter].weight  # type: ignore[return-value]

    def _start_b(self, adapter: str) -> Tensor | None:
        return self.largo_B0[adapter] if adapter in self.largo_B0 else None  # noqa: SIM401  # a BufferDict has no get

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``D = s (B0 dA + dB (A0 + dA))`` of an adapter, in the shape of the base layer's own weight.

        Args:
            adapter: Its name.

        Returns:
            The change that the adapter makes to the weight, in the dtype of the factors.

        Raises:
            ConfigError: If the layer has no such adapter, or it waits for its start.
        """
        if adapter not in self.largo_B:
            raise ConfigError(f"{self.name} has no adapter {adapter!r}; it has {sorted(self.largo_B)}")
        self.check_started(adapter)
        start_a, start_b, delta_a, delta_b = self.factors(adapter)
        deviation = delta_b @ (start_a if delta_a is None else start_a + delta_a)
        if start_b is not None and delta_a is not None:
            deviation = deviation + start_b @ delta_a
        return self._base().oriented(self.scaling[adapter] * deviation)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deviation of adapters to the base weight.

        The weight as it was (of a quantised layer, the layer) is kept until :meth:`unmerge`, which puts it back
        bitwise: subtracting would leave rounding, or requantise.

        Args:
            safe_merge: Check for NaN and infinity before the weight is changed.
            adapter_names: The adapters; all active ones by default.

        Raises:
            ConfigError: If the weight is computed from other tensors.
            ValueError: If ``safe_merge`` finds NaN or infinity.
        """
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.largo_B:
                continue
            base = self._base()
            if base.backend is None and "weight" not in self._core._parameters:
                raise ConfigError(
                    f"{self.name}: its weight is computed from other tensors (a parametrisation), so what is merged "
                    "into it would be lost; remove the parametrisation first, or keep the adapter"
                )
            merged = base.plus(self.get_delta_weight(adapter).detach())
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if base.backend is None:
                self._kept = self._kept or [self._core.weight.data]
                self._core.weight.data = merged
            else:
                if not self._kept:
                    self._kept = [self.base_layer]
                    self.base_layer = copy.deepcopy(self.base_layer)
                base.backend.set_base_weight(self, merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Undo every merge, bitwise."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        (kept,) = self._kept
        if isinstance(kept, nn.Module):
            self.base_layer = kept
        else:
            self._core.weight.data = kept.to(self._core.weight)
        self._kept = []
        self.merged_adapters.clear()

    # --- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output, and what the active adapters add to it.

        Args:
            x: The base layer's input.
            *args: Further arguments of the base layer.
            adapter_names: One adapter per row of the batch (``"__base__"`` for none), at inference only.
            **kwargs: Further arguments of the base layer.

        Returns:
            The output, in the base layer's dtype.

        Raises:
            ConfigError: If an adapter waits for :func:`start_from_activations`.
        """
        output: Tensor
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = [adapter for adapter in self._active() if adapter in self.largo_B]
        for adapter in active:
            self.check_started(adapter)
        if len(active) == 1 and self._as_residual(active[0]):
            return self._residual_forward(active[0], x)
        output = self.base_layer(x, *args, **kwargs)
        dtype = output.dtype
        if active and self.quantization_backend is not None:
            output = self.quantization_backend.maybe_clone_base_result(output)
        for adapter in active:
            output = output + self._increment(adapter, x)
        return output.to(dtype)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if self.merged:
            raise ConfigError(f"{self.name}: adapter_names were given while adapters are merged; unmerge them first")
        if len(adapter_names) != len(x):
            raise ConfigError(
                f"{self.name}: {len(adapter_names)} adapter_names were given for a batch of {len(x)}; give one per row"
            )
        output: Tensor = self.base_layer(x, *args, **kwargs)
        output = output.clone()
        for adapter in dict.fromkeys(adapter_names):
            if adapter not in self.largo_B:  # __base__, or an adapter of other layers
                continue
            self.check_started(adapter)
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            output[rows] += self._increment(adapter, x[rows]).to(output.dtype)
        return output

    def _increment(self, adapter: str, x: Tensor) -> Tensor:
        """``s (B0 (dA x) + dB ((A0 + dA) x))``; zero terms are not computed."""
        scale = self.scaling[adapter]
        start_b = self._start_b(adapter)
        both, u = self._inner(adapter, x, start_b is not None)
        factor_b: Any = self.largo_B[adapter]
        return factor_b(u, scale, start_b, both)

    def _inner(self, adapter: str, x: Tensor, both: bool) -> tuple[Tensor | None, Tensor]:
        """``(dA x, u)`` side by side, if ``both``, and ``u = (A0 + dA) x``."""
        raise NotImplementedError

    def _as_residual(self, adapter: str) -> bool:
        return False

    def _residual_forward(self, adapter: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def check_started(self, adapter: str) -> None:
        """Refuse an adapter that has no start yet.

        Raises:
            ConfigError: If it has none; the message says how it gets one.
        """
        if self.largo_waits[adapter]:
            raise ConfigError(f"{self.name}: adapter {adapter!r} {self.largo_waits[adapter]}")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA equals the adapter: always; :func:`save_as_lora` needs no decomposition for it."""
        return True

    def __repr__(self) -> str:
        return "largo." + super().__repr__()


def move(layer: LargoLayer, adapter: str, **to: Any) -> None:
    """Bring an adapter's factors to another device or dtype."""
    layer.largo_residual.pop(adapter, None)
    for name in (*layer.adapter_layer_names, "largo_A0", "largo_B0"):
        held = getattr(layer, name)
        if adapter in held:
            held[adapter] = held[adapter].to(**to)
