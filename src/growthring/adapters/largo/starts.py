"""What the frozen factors of a LARGO-style adapter start from."""

from __future__ import annotations

from torch import Tensor

from .config import LargoConfig
from .svd_cache import singular_triplets

__all__ = ["start_factors"]

DEAD = 1e-6
"""A chosen sigma this far below the largest one, square roots compared, would leave its factors without gradient."""


def start_factors(weight: Tensor, config: LargoConfig, name: str) -> tuple[Tensor, Tensor | None]:
    """``A0`` and ``B0`` from the singular triplets of a weight.

    With the triplets ``U, sigma, V`` that ``config.init`` asks for, ``A0 = diag(sqrt(sigma / s)) V^T`` and
    ``B0 = U diag(sqrt(sigma / s))``, so that ``s B0 A0 = U diag(sigma) V^T``. Where a chosen sigma is nearly zero (the
    minor start of a weight of deficient rank), ``A0 = V^T`` and ``B0 = U diag(sigma / s)``: the same product, but
    ``dB`` has a gradient. The product form takes ``A0 = V^T`` and no ``B0``.

    Args:
        weight: ``(m, n)``, outputs by inputs.
        config: The adapter's config; ``init`` is ``"principal"`` or ``"minor"``.
        name: The layer, for messages.

    Returns:
        ``A0`` of shape ``(r, n)`` and ``B0`` of shape ``(m, r)`` or ``None``, float32 or wider.

    Raises:
        NumericalError: If the weight holds NaN or infinity.
    """
    found = singular_triplets(
        weight, config.r, minor=config.init == "minor", iterations=config.svd_iterations, name=name
    )
    if config.form == "product":
        return found.right, None
    part = found.sigma / config.scaling
    root = part.sqrt()
    if float(root.min()) <= DEAD * (found.largest / config.scaling) ** 0.5:
        return found.right, found.left * part
    return root.unsqueeze(1) * found.right, found.left * root
