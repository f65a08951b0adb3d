"""Singular triplets of weights, kept on disk by content.

A weight that was decomposed once is not decomposed again: the file's name is a SHA-256 over the weight's bytes, shape
and dtype, which triplets are wanted, and how they are found. Files are written atomically, with a SHA-256 of the name
and of what they hold; one that cannot be read, or does not hold what it was written with, is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from growthring._io import cache_folder, write_with
from growthring.errors import NumericalError
from growthring.subspace import find_range, full_precision, solver_device

__all__ = ["Triplets", "singular_triplets"]

SEED = 0
SMALLEST = 128
"""Matrices with a shorter side are decomposed faster than they are read from disk."""
MOST_BYTES = 1 << 30
"""When the folder holds more, the files that were not used for the longest time go."""


@dataclass(frozen=True)
class Triplets:
    """``r`` singular triplets of a weight.

    Attributes:
        left: ``(m, r)``, columns.
        sigma: ``(r,)``, falling.
        right: ``(r, n)``, rows.
        largest: The weight's largest singular value, of which triplets it may be.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor
    largest: float


@torch.no_grad()
def singular_triplets(weight: Tensor, r: int, *, minor: bool, iterations: int | None, name: str) -> Triplets:
    """The first or last ``r`` singular triplets of a weight, from the cache where it has them.

    Args:
        weight: ``(m, n)``, any floating dtype, ``1 <= r <= min(m, n)``; computed in float32 or wider.
        r: How many.
        minor: The last ones in place of the first.
        iterations: ``None`` for an exact decomposition, else power iterations of a randomised one (largest only).
        name: The layer, for messages.

    Returns:
        The triplets on the weight's device, float32 or wider, owning their storage.

    Raises:
        NumericalError: If the weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{name}: the weight holds NaN or infinity, so it has no singular vectors to start from")
    folder = _folder() if min(weight.shape) >= SMALLEST else None
    path = None
    if folder is not None:
        path = folder / f"{_key(weight, r, minor, iterations)}.safetensors"
        found = _read(path, weight, r)
        if found is not None:
            return found
    wide = weight.detach().to(solver_device(weight.device))
    wide = wide.to(_wide(wide.dtype))
    with full_precision(wide.device):
        if iterations is None:
            left, sigma, right = torch.linalg.svd(wide, full_matrices=False)
        else:
            generator = torch.Generator(wide.device).manual_seed(SEED)
            if not bool(wide.any()):
                left = torch.eye(wide.shape[0], r, dtype=wide.dtype, device=wide.device)
            else:
                left = find_range(wide, r, "randomized", iterations=iterations, generator=generator)
            turn, sigma, right = torch.linalg.svd(left.mT @ wide, full_matrices=False)
            left = left @ turn
    chosen = slice(sigma.shape[0] - r, None) if minor else slice(0, r)
    parts = (left[:, chosen], sigma[chosen], right[chosen])
    left, sigma, right, largest = *(p.to(weight.device).clone().contiguous() for p in parts), float(sigma[0])
    made = Triplets(left, sigma, right, largest)
    if path is not None:
        with contextlib.suppress(
            OSError, SafetensorError
        ):  # a full or read-only disk costs the time of the next start, no more
            _write(path, made)
            _tidy(path.parent)
    return made


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _folder() -> Path | None:
    """Where the files are; ``GROWTHRING_CACHE=off`` switches the cache off."""
    if os.environ.get("GROWTHRING_CACHE", "").lower() == "off":
        return None
    try:
        return cache_folder("svd")
    except RuntimeError:  # a user without a home
        return None


def _key(weight: Tensor, r: int, minor: bool, iterations: int | None) -> str:
    how = f"exact {minor}" if iterations is None else f"randomised {iterations} {SEED}"
    digest = hashlib.sha256(f"1 {tuple(weight.shape)} {weight.dtype} {r} {how} ".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, weight: Tensor, r: int) -> Triplets | None:
    """What a file holds, or ``None`` if it is not there, torn, damaged, or of the wrong shapes."""
    try:
        held = load_file(path)
        digest = held.pop("sha256")
        left, sigma, right, largest = (held[key] for key in ("left", "sigma", "right", "largest"))
    except (OSError, SafetensorError, KeyError):
        return None
    if not torch.equal(digest, _digest(path, held)):
        return None
    rows, columns = weight.shape
    if (left.shape, sigma.shape, right.shape, largest.shape) != ((rows, r), (r,), (r, columns), ()):
        return None
    if any(part.dtype != _wide(weight.dtype) for part in (left, sigma, right)):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used now, so it stays longest
    place = weight.device
    return Triplets(left.to(place), sigma.to(place), right.to(place), float(largest))


def _digest(path: Path, held: dict[str, Tensor]) -> Tensor:
    """SHA-256 of a file's name and content."""
    digest = hashlib.sha256(path.name.encode())
    for name in sorted(held):
        digest.update(name.encode())
        digest.update(held[name].reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _write(path: Path, made: Triplets) -> None:
    tensors = {"left": made.left, "sigma": made.sigma, "right": made.right}
    held = {key: tensor.cpu() for key, tensor in tensors.items()} | {
        "largest": torch.tensor(made.largest, dtype=torch.float64)
    }
    held["sha256"] = _digest(path, held)
    write_with(path, lambda temporary: save_file(held, temporary))


def _tidy(folder: Path) -> None:
    """Remove the files unused for the longest time until the folder holds at most :data:`MOST_BYTES`."""
    files = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process may tidy too
            seen = path.stat()
            files.append((seen.st_mtime, seen.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size
