"""Deviations: which trainable tensors can leave the pretrained model, from where, and how far they are.

A *deviation* is one layer's ``D = W - W_0``:

    largo     D = s (B_0 dA + dB (A_0 + dA))      LARGO-style deltas; their anchor is zero
    product   D = s dB A_0                        the same in product form, A_0 frozen
    lora      D = s (B A - B_start A_start)       stock LoRA; B_start is zero but for starts that change the base
    weight    D = theta - theta_start             any other trainable tensor, whose start is kept

``D`` of a pair is never formed: with ``D = P Q`` of rank at most ``2 r``, ``||D||_F^2 = <P^T P, Q Q^T>``, and the
singular values of ``D`` are those of ``R_P R_Q^T`` from two thin QRs. The expanded form of ``D`` is used, in which
nothing of the size of the start cancels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from growthring.errors import ConfigError, GuardError, NumericalError

from . import shards
from .site import original_name

__all__ = [
    "HEADS",
    "Anchored",
    "Deviation",
    "anchors_of",
    "find_deviations",
    "inner",
    "matcher",
    "pairs_of",
]

HEADS = (
    r"(^|\.)(head|heads|classifier|classification_head|classif|score|lm_head|embed_out|cls|fc_norm|out_proj_head"
    r"|qa_outputs|summary|pre_classifier|modules_to_save)(\.|$)"
)
"""Names of what is no part of the pretrained model's knowledge: classification and language-model heads."""

Kind = Literal["largo", "product", "lora", "weight"]

_WIDENED = ("gaussian", "eva")  # starts of stock LoRA with a name, that leave the base as it is and B at zero


@dataclass(frozen=True, eq=False)
class Anchored:
    """One trainable tensor and the value that its deviation is measured from.

    Attributes:
        name: Qualified name.
        parameter: The parameter; a DTensor under FSDP2.
        anchor: That value, in the parameter's dtype; ``None`` for zero.
    """

    name: str
    parameter: nn.Parameter
    anchor: Tensor | None

    def delta(self) -> Tensor:
        """``theta - anchor`` in float32 or wider, detached; of a DTensor the part of this rank. May share storage."""
        now = shards.local(self.parameter.detach())
        wide = torch.promote_types(now.dtype, torch.float32)
        if self.anchor is None:
            return now.to(wide)
        return now.to(wide) - shards.local(self.anchor).to(wide)


@dataclass(frozen=True, eq=False)
class Deviation:
    """One layer's ``D = W - W_0``.

    Attributes:
        name: Qualified name of the layer, with the adapter's name behind it; of a plain weight, the tensor's.
        kind: ``"largo"``, ``"product"``, ``"lora"`` or ``"weight"``.
        tensors: The tensors that train: of a pair ``A`` before ``B``.
        a: Second factor of a pair ``(r, n)``: ``dA`` (``A_0`` in product form), or LoRA's ``A``; of convolutions these
            have more axes.
        b: First factor ``(m, r)``: ``dB``, or LoRA's ``B``.
        a0: ``A_0``, or LoRA's ``A_start``; ``None`` where it plays no part.
        b0: ``B_0``, or LoRA's ``B_start``; ``None`` for zero.
        table: ``a`` is the table ``(n, r)`` of an embedding.
        layer: The module that holds a pair.
        adapter: The adapter that the pair is.
    """

    name: str
    kind: Kind
    tensors: tuple[Anchored, ...]
    a: Tensor | None = None
    b: Tensor | None = None
    a0: Tensor | None = None
    b0: Tensor | None = None
    table: bool = False
    layer: nn.Module | None = None
    adapter: str = ""

    @property
    def scale(self) -> float:
        """``s = alpha / r`` of a pair, as the layer has it now; else 1."""
        layer: Any = self.layer
        return 1.0 if layer is None else float(layer.scaling[self.adapter])

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``(P, Q)`` with ``D = P Q``, ``(m, k)`` and ``(k, n)``, ``k <= 2 r``; ``None`` for a plain weight.

        Differentiable in what trains, in float32 or wider; whole tensors on every rank.
        """
        if self.a is None or self.b is None:
            return None
        a, b = _matrix(self.a), _matrix(self.b)
        a = a.mT if self.table else a
        a0, b0 = (None if t is None else _matrix(t) for t in (self.a0, self.b0))
        if self.kind == "largo":
            assert a0 is not None
            right = [a, a0 + a] if b0 is not None else [a0 + a]
            left = [b0, b] if b0 is not None else [b]
        elif self.kind == "lora" and b0 is not None and a0 is not None:
            left, right = [b - b0, b0], [a, a - a0]
        else:
            left, right = [b], [a]
        return self.scale * torch.cat(left, dim=1), torch.cat(right, dim=0)

    def energy(self) -> Tensor:
        """``||D||_F^2``, a scalar, differentiable in what trains."""
        pair = self.factors()
        if pair is not None:
            return (pair[0].mT @ pair[0]).mul(pair[1] @ pair[1].mT).sum().clamp_min(0.0)
        (only,) = self.tensors
        now = _wide(shards.whole(only.parameter))
        return (now if only.anchor is None else now - _wide(shards.whole(only.anchor))).square().sum()

    @torch.no_grad()
    def frobenius(self) -> float:
        """``||D||_F``, measured in float64.

        Raises:
            NumericalError: If ``D`` has NaN or infinity in it.
        """
        values = self._values()
        return float(values.norm()) if values is not None else float(self._dense().norm())

    @torch.no_grad()
    def spectral(self) -> float:
        """``||D||_2``, measured in float64; of a tensor that is no matrix, of ``(first, all others)``.

        Raises:
            NumericalError: If ``D`` has NaN or infinity in it.
        """
        values = self._values()
        if values is None:
            dense = self._dense()
            if dense.ndim < 2:
                return float(dense.norm())
            rows = dense.flatten(1)
            rows = rows if rows.shape[0] <= rows.shape[1] else rows.mT
            values = torch.linalg.eigvalsh(rows @ rows.mT)[-1:].clamp_min(0.0).sqrt()  # an SVD takes ten times as long
        return float(values.max()) if values.numel() else 0.0

    def _values(self) -> Tensor | None:
        """Singular values of a pair's ``D``."""
        pair = self.factors()
        if pair is None:
            return None
        left, right = (torch.linalg.qr(self._finite(_double(m))).R for m in (pair[0], pair[1].mT))
        return torch.linalg.svdvals(left @ right.mT)

    def _dense(self) -> Tensor:
        (only,) = self.tensors
        now = self._finite(_double(shards.whole(only.parameter)))
        return now if only.anchor is None else now - _double(shards.whole(only.anchor))

    def _finite(self, values: Tensor) -> Tensor:
        if not bool(values.isfinite().all()):
            raise NumericalError(
                f"{self.name} has NaN or infinity in it, so it is no distance from the pretrained model. Training "
                "broke earlier: go back to a checkpoint, and take a smaller learning rate or clip gradients"
            )
        return values


def find_deviations(
    model: nn.Module, exclude: str | None = HEADS, anchors: Mapping[str, Tensor | None] | None = None
) -> list[Deviation]:
    """Find everything trainable that can leave the pretrained model.

    Args:
        model: Any module, wrapped (DDP, ``torch.compile``) or sharded (FSDP2) or not.
        exclude: A regular expression; tensors whose name it is found in are left out. Default :data:`HEADS`; ``None``
            leaves nothing out.
        anchors: What :func:`anchors_of` gave when the tensors were where they started; others are copied from the
            model now. Nothing is copied of LARGO's deltas, whose anchor is zero, nor of LoRA's factor that is zero.

    Returns:
        Deviations in the order of the model's modules, pairs before plain weights. Only adapters that train count.

    Raises:
        ConfigError: If ``exclude`` is no regular expression.
        GuardError: If nothing trainable is left, weights are not there yet (meta device), tensors are sharded
            otherwise than by rows, or a LoRA variant trains whose deviation is not ``s B A``.
    """
    return list(_Finder(model, exclude, anchors or {}).found())


def anchors_of(deviations: Sequence[Deviation]) -> dict[str, Tensor | None]:
    """Anchors by name, ``None`` for zero: to keep, and to hand to :func:`find_deviations` from then on."""
    return {tensor.name: tensor.anchor for deviation in deviations for tensor in deviation.tensors}


def pairs_of(model: nn.Module) -> list[Deviation]:
    """The pairs of all adapters in a model, active or not, whether they train or not; without tensors and anchors.

    Raises:
        GuardError: If a LoRA's deviation is not ``s B A``.
    """
    return list(_Finder(model, None, {}, trains=False).pairs())


def matcher(exclude: str | None) -> Callable[[str], bool]:
    """Whether a name is left out by ``exclude``.

    Raises:
        ConfigError: If it is no regular expression.
    """
    if exclude is None:
        return lambda name: False
    try:
        expression = re.compile(exclude)
    except (re.error, TypeError) as error:
        raise ConfigError(f"exclude={exclude!r} is no regular expression: {error}") from error
    return lambda name: expression.search(name) is not None


def inner(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP and ``torch.compile``: the same object however it is wrapped."""
    while True:
        parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        inside = model.module if parallel else model._modules.get("_orig_mod")
        if not isinstance(inside, nn.Module):
            return model
        model = inside


class _Finder:
    def __init__(
        self, model: nn.Module, exclude: str | None, anchors: Mapping[str, Tensor | None], *, trains: bool = True
    ) -> None:
        left_out = matcher(exclude)
        self._model, self._anchors = model, anchors
        self._names = {id(p): original_name(n) for n, p in model.named_parameters()}
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and trains}
        self._all, self._trainable = not trains, {}
        if self._all:
            return
        self._trainable = {original_name(n): p for n, p in trainable.items() if not left_out(original_name(n))}
        if not self._trainable:
            what = "no parameter of the model is trainable. Add an adapter or set requires_grad on what should learn"
            if trainable:
                what = (
                    f"all {len(trainable)} trainable tensors (the first: {next(iter(trainable))}) are left out by "
                    f"exclude={exclude!r}, heads by default. Train an adapter or weights too, or pass another exclude"
                )
            raise GuardError(f"nothing can deviate from the pretrained model: {what}")
        absent = [n for n, p in self._trainable.items() if p.is_meta]
        if absent:
            raise GuardError(
                f"{len(absent)} trainable tensors are on the meta device (the first: {absent[0]}); load the weights "
                "first"
            )
        shards.check(self._trainable)

    def found(self) -> Iterator[Deviation]:
        done: set[str] = set()
        for one in self.pairs():
            ours = {t.name for t in one.tensors}
            if ours and not ours & done:
                done |= ours
                yield one
        for name in self._trainable:
            if name not in done:
                yield Deviation(name, "weight", (self._anchored(name),))

    # --- pairs --------------------------------------------------------------------------------------------------

    def pairs(self) -> Iterator[Deviation]:
        """Every pair, with those of its tensors that train."""
        for raw, module in self._model.named_modules():
            name = original_name(f"{raw}.").removesuffix(".")
            yield from self._largo(module, name)
            yield from self._lora(module, name)

    def _largo(self, module: nn.Module, name: str) -> Iterator[Deviation]:
        parts = module._modules.get("largo_B")
        if not isinstance(parts, nn.ModuleDict):
            return
        layer: Any = module
        for adapter, linear in parts.items():
            b: Any = linear.weight
            a0, b0 = _held(layer.largo_A0, adapter), _held(layer.largo_B0, adapter)
            inner, table = (_held(module._modules.get(k), adapter) for k in ("largo_A", "largo_embedding_A"))
            a: Any = getattr(table if inner is None else inner, "weight", None)
            tensors = tuple(Anchored(n, self._trainable[n], None) for n in (self._name(a), self._name(b)) if n)
            label = f"{name}.{adapter}"
            if a is None:
                yield Deviation(label, "product", tensors, a0, b, layer=module, adapter=adapter)
            else:
                yield Deviation(label, "largo", tensors, a, b, a0, b0, table is not None, module, adapter)

    def _lora(self, module: nn.Module, name: str) -> Iterator[Deviation]:
        if not isinstance(module, LoraLayer):
            return
        layer: Any = module
        for adapter in (*layer.lora_A, *layer.lora_embedding_A):
            if adapter in layer.lora_A:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            else:
                a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            names = [n for n in (self._name(a), self._name(b)) if n]
            if not names and not self._all:
                continue
            variant = getattr(layer, "lora_variant", {}).get(adapter)
            if variant is not None or type(layer).__name__ == "ParamWrapper":
                what = "target_parameters" if variant is None else f"the variant {type(variant).__name__}"
                raise GuardError(
                    f"{name} has LoRA with {what}, whose deviation from the base weight is not s B A. Use plain LoRA "
                    "on modules (for DoRA: use_dora=False) or growthring's LargoConfig"
                )
            tensors = tuple(self._start(n) for n in names)
            moved = self._moves_base(adapter)
            if moved and self._all:
                raise GuardError(
                    f"{name}: the start of adapter {adapter!r} was taken out of the base weight (PiSSA, OLoRA and the "
                    "like), so how far it is from there cannot be told from the model alone; the certificate of a "
                    "guard that was attached before training says it"
                )
            start = {t.name: t.anchor for t in tensors}
            a0, b0 = (start.get(self._name(t), t.detach()) if moved else None for t in (a, b))
            yield Deviation(f"{name}.{adapter}", "lora", tensors, a, b, a0, b0, layer=module, adapter=adapter)

    def _moves_base(self, adapter: str) -> bool:
        """True if the adapter's start is no start at zero: PiSSA, OLoRA and the like take it out of the base."""
        for module in self._model.modules():
            configs = getattr(module, "peft_config", None)  # of a PeftModel, or of a model that PEFT was injected into
            config = configs.get(adapter) if isinstance(configs, Mapping) else None
            if config is not None:
                start = getattr(config, "init_lora_weights", True)
                return isinstance(start, str) and start.lower() not in _WIDENED
        return False

    # --- tensors ------------------------------------------------------------------------------------------------

    def _name(self, tensor: Tensor) -> str:
        """Name of a tensor that trains and is not left out; else empty."""
        name = self._names.get(id(tensor), "")
        return name if name in self._trainable else ""

    def _start(self, name: str) -> Anchored:
        """With its start as anchor; none if that is zero."""
        parameter, known = self._trainable[name], name in self._anchors
        zero = self._anchors[name] is None if known else not bool(shards.whole(parameter.detach()).any())
        return Anchored(name, parameter, None) if zero else self._anchored(name)

    def _anchored(self, name: str) -> Anchored:
        parameter, known = self._trainable[name], self._anchors.get(name)
        if known is None:
            return Anchored(name, parameter, parameter.detach().clone())
        if known.shape != parameter.shape:
            raise GuardError(
                f"{name} has shape {tuple(parameter.shape)} now, and its start was kept as {tuple(known.shape)}: "
                "leave tensors that grow out (exclude=), as heads are by default"
            )
        return Anchored(name, parameter, shards.like(known, parameter.detach()))


def _held(container: Any, adapter: str) -> Any:
    return container[adapter] if container is not None and adapter in container else None


def _matrix(factor: Tensor) -> Tensor:
    """All of a factor; that of a convolution with its last axes as one."""
    full = _wide(shards.whole(factor))
    return full.flatten(1) if full.ndim > 2 else full


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
