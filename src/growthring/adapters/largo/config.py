"""Configuration of LARGO-style adapters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from peft.config import PeftConfig

from growthring.adapters._common import names, peft_type, positive
from growthring.errors import ConfigError, nearest

__all__ = ["LargoConfig"]

INITS = ("principal", "minor", "activation")
FORMS = ("delta", "residual", "product")


@dataclass
class LargoConfig(PeftConfig):  # type: ignore[misc]
    """An adapter of low rank that starts from singular vectors and trains only the difference to its start.

    A LARGO-style reading: our derivation from the abstract of LARGO (arXiv 2506.12394). With the pretrained weight
    ``W0`` (``m x n``), ``s = alpha / r``, frozen factors ``A0`` (``r x n``), ``B0`` (``m x r``) and the trained
    ``dA``, ``dB``, which start at zero, the layer deviates by ``D = s (B0 dA + dB A0 + dB dA)``; nothing of ``W0`` is
    changed, whatever the form:

    - ``form="delta"``: ``y = W0 x + s (B0 (dA x) + dB ((A0 + dA) x))``. Starts bitwise as the base model, and works
      over quantised weights.
    - ``form="residual"``: ``y = (W0 - s B0 A0) x + s (B0 + dB) ((A0 + dA) x)``: the same function at LoRA's cost, but
      equal at the start only to rounding, and a second copy of each adapted weight is held (never saved). Where
      several adapters are active, in batches that mix adapters, for scaled adapters, and where the base weight trains
      too or its layer does more than multiply by it (hooks, a subclass, another tuner's layer), it is computed in
      delta form.
    - ``form="product"``: rows of ``A0`` are orthonormal and frozen, ``B0 = 0``, there is no ``dA``: ``y = W0 x +
      s dB (A0 x)``, so that ``||D||_F = s ||dB||_F``.

    ``init`` says which vectors: the first or last ``r`` singular triplets of ``W0`` (``principal`` as in PiSSA,
    ``minor`` as in MiLoRA; ``sqrt(sigma / s)`` goes to each factor, all of it to ``B0`` where a chosen sigma is
    nearly zero, since two zero factors have no gradient), or the right singular vectors of the layer's inputs
    (``activation``; :func:`start_from_activations` has to be called before the first forward pass).

    Factors are float32 over weights of half precision, unless ``get_peft_model(..., autocast_adapter_dtype=False)``.

    Args:
        r: Rank, at most the smaller side of every adapted weight.
        alpha: ``s = alpha / r``, from 1e-6 to 1e6; ``None`` (default) is ``r``, so ``s = 1``.
        init: ``"principal"`` (default), ``"minor"`` or ``"activation"``.
        form: ``"delta"`` (default), ``"residual"`` or ``"product"``.
        svd_iterations: ``None`` (default) decomposes exactly; a number is that of the power iterations of a randomised
            decomposition, which finds the principal triplets only.
        init_weights: ``False`` starts the trained factors at random in place of zero; for tests.
        target_modules: Names of linear layers, ``Conv1D`` or embeddings, or a regex, or ``"all-linear"``; PEFT's
            choice for LoRA by default.
        exclude_modules: Names of modules, or a regex, that are left alone.
        modules_to_save: Modules that train and are saved as a whole, such as a new head.
        layers_to_transform: Numbers of the blocks that get adapters; all by default.
        layers_pattern: Name of the list of blocks, for ``layers_to_transform``.
        dropout: Only 0.0: the factors hold a part of the pretrained weight, which dropout would change.

    Raises:
        ConfigError: For values out of range and for settings that exclude one another.
    """

    r: int = field(default=8, metadata={"help": "Rank of the factors."})
    alpha: float | None = field(default=None, metadata={"help": "Scaling is alpha / r; None: alpha = r."})
    init: str = field(default="principal", metadata={"help": "'principal', 'minor' or 'activation'."})
    form: str = field(default="delta", metadata={"help": "'delta', 'residual' or 'product'."})
    svd_iterations: int | None = field(
        default=None, metadata={"help": "None: exact SVD. A number: power iterations of a randomised one."}
    )
    init_weights: bool = field(default=True, metadata={"help": "True: the trained factors start at zero."})
    target_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regex, or 'all-linear') of the modules to adapt."}
    )
    exclude_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regex) of modules that are left alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train and are saved as a whole."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks that get adapters."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, with `layers_to_transform`."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Only 0: dropout would change the pretrained function."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("growthring_largo")
        self._check_names()
        self.target_modules, self.exclude_modules = names(self.target_modules), names(self.exclude_modules)
        positive(self, "r")
        if self.init not in INITS:
            raise ConfigError(f"LargoConfig(init={self.init!r}): {nearest(str(self.init), INITS)}")
        if self.form not in FORMS:
            raise ConfigError(f"LargoConfig(form={self.form!r}): {nearest(str(self.form), FORMS)}")
        alpha = self.alpha
        if alpha is not None and (
            isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf
        ):
            raise ConfigError(f"LargoConfig(alpha={alpha!r}): give a finite number above 0, or None for alpha = r")
        if not 1e-6 <= self.scaling <= 1e6:
            raise ConfigError(
                f"LargoConfig(r={self.r}, alpha={alpha!r}): the scaling alpha / r is {self.scaling:g}, and single "
                "precision needs it between 1e-6 and 1e6; give an alpha near r, or None for alpha = r"
            )
        if not isinstance(self.init_weights, bool):
            raise ConfigError(
                f"LargoConfig(init_weights={self.init_weights!r}): allowed: True, or False for a random start; which "
                "vectors the adapter starts from is said by init"
            )
        if self.dropout != 0:
            raise ConfigError(
                f"LargoConfig(dropout={self.dropout!r}): only 0.0 is allowed. The factors start from the pretrained "
                "weight's own singular vectors, so dropout would change the pretrained function from the first step"
            )
        if self.svd_iterations is not None:
            positive(self, "svd_iterations")
            if self.init != "principal":
                raise ConfigError(
                    f"LargoConfig(svd_iterations={self.svd_iterations}, init={self.init!r}): a randomised "
                    "decomposition finds the largest singular values only; take init='principal', or leave "
                    "svd_iterations at None"
                )
        if self.init == "activation" and self.form == "residual":
            raise ConfigError(
                "LargoConfig(init='activation', form='residual'): this start has B0 = 0, so there is nothing to take "
                "out of the weight; use form='delta' or form='product'"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def _check_names(self) -> None:
        """Refuse what PEFT would stumble over without saying where it came from."""
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "modules_to_save":
                try:
                    re.compile(value)
                except re.error as error:
                    raise ConfigError(
                        f"LargoConfig({name}={value!r}): this is no regular expression ({error}); give a list of "
                        "names, or mend it"
                    ) from None
            elif value is not None and not (
                isinstance(value, list | tuple | set | frozenset) and all(isinstance(part, str) for part in value)
            ):
                regex = "" if name == "modules_to_save" else ", or a regular expression"
                raise ConfigError(f"LargoConfig({name}={value!r}): give a list of names{regex}")

    @property
    def scaling(self) -> float:
        """``s = alpha / r``."""
        return 1.0 if self.alpha is None else self.alpha / self.r
