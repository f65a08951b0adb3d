"""From images to pixel values: resize, crop, rescale, normalise, with torch alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growthring._io import write_json
from growthring.errors import ConfigError

from .encoders import base_of

__all__ = ["ImagePreprocessor", "find_preprocessor"]

_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor_config.json has them
_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ImagePreprocessor:
    """Makes pixel values ``(batch, 3, crop, crop)`` of images of any size.

    An image is resized with antialiasing (as Pillow does it, to one level of 255), cropped at its centre, then
    ``(x * rescale - mean) / std`` per channel.

    Args:
        size: Pixels of the shorter side after resizing; or ``(height, width)``, which may change the proportions.
        crop: ``(height, width)`` cut out of the centre; default ``None``: a square of ``size``, or all of a given
            height and width.
        mean: Mean of each channel, on the scale after ``rescale``.
        std: Standard deviation of each channel.
        rescale: What bytes are multiplied by; default 1/255.
        resample: ``2`` bilinear, ``3`` bicubic (default), ``0`` nearest: Pillow's numbers.

    Raises:
        ConfigError: On sizes below 1, a crop larger than the size, or means and deviations that are not three numbers.
    """

    size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: tuple[int, int] | None = None
    rescale: float = 1 / 255
    resample: int = 3

    def __post_init__(self) -> None:
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        crop = size if self.crop is None else tuple(self.crop)
        for name, pair in (("size", size), ("crop", crop)):
            if len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in pair):
                raise ConfigError(f"images: {name}={pair}: give whole numbers of pixels, at least 1")
        if any(c > s for c, s in zip(crop, size, strict=True)):
            raise ConfigError(f"images: a crop of {crop} does not fit into the size {size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(isinstance(v, int | float) for v in values):
                raise ConfigError(f"images: {name}={values}: give three numbers, for red, green and blue")
        if not all(v > 0 for v in self.std) or not self.rescale > 0:
            raise ConfigError(f"images: std={self.std} and rescale={self.rescale} must be above 0")
        if self.resample not in _MODES:
            raise ConfigError(f"images: resample={self.resample}: allowed are 0 (nearest), 2 (bilinear), 3 (bicubic)")
        object.__setattr__(self, "crop", crop)
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, size: int | None = None) -> ImagePreprocessor:
        """Read the settings of a ``preprocessor_config.json``.

        Args:
            settings: ``size`` (a number, ``shortest_edge`` or ``height`` and ``width``), ``crop_size``,
                ``do_resize``, ``do_center_crop``, ``do_rescale``, ``rescale_factor``, ``do_normalize``,
                ``image_mean``, ``image_std``, ``resample``. A step that is switched off is left out.
            size: Pixels of each side that the model is given, in place of the file's size and crop.

        Raises:
            ConfigError: If there is no size, or no mean and deviation to normalise with, or images are not resized.
        """
        normalize = settings.get("do_normalize", True)
        mean, std = settings.get("image_mean"), settings.get("image_std")
        if normalize and (mean is None or std is None):
            raise ConfigError("images: image_mean and image_std are missing; give both, or do_normalize=False")
        shared = {
            "mean": _three(mean, 0.0) if normalize else (0.0,) * 3,
            "std": _three(std, 1.0) if normalize else (1.0,) * 3,
            "rescale": float(settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 1.0,
            "resample": settings.get("resample", 3),
        }
        if size is not None:
            return cls(size=size, **shared)
        if settings.get("size") is None or not settings.get("do_resize", True):
            raise ConfigError("images: no size is given to resize to; give image_size=")
        crop = None
        if settings.get("do_center_crop", False):
            crop = settings.get("crop_size")
            crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"]) if crop else None
        found = settings["size"]
        if isinstance(found, Mapping):
            found = found["shortest_edge"] if "shortest_edge" in found else (found["height"], found["width"])
        return cls(size=found, crop=crop, **shared)

    def to_dict(self) -> dict[str, Any]:
        """The same in the form of a ``preprocessor_config.json``."""
        height, width = self.crop  # type: ignore[misc]
        one = isinstance(self.size, int)
        side = {"shortest_edge": self.size} if one else {"height": self.size[0], "width": self.size[1]}  # type: ignore[index]
        return {
            "do_convert_rgb": True,
            "do_resize": True,
            "size": side,
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``preprocessor_config.json`` into a model's folder."""
        return write_json(Path(folder) / _FILE, self.to_dict())

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Pixel values of some images.

        Args:
            images: Arrays ``(height, width, 3)`` or tensors ``(3, height, width)`` of unsigned bytes.

        Returns:
            ``(len(images), 3, crop height, crop width)`` in float32.
        """
        tensors = [_channels_first(image) for image in images]
        made = torch.empty(len(tensors), 3, *self.crop)  # type: ignore[misc]
        by_shape: dict[torch.Size, list[int]] = {}
        for number, tensor in enumerate(tensors):
            by_shape.setdefault(tensor.shape, []).append(number)
        for rows in by_shape.values():
            made[rows] = self._same_size(torch.stack([tensors[row] for row in rows]))
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (made * self.rescale - mean) / std

    def _same_size(self, batch: Tensor) -> Tensor:
        """Resized and cropped bytes ``(n, 3, h, w)``, as float32."""
        height, width = batch.shape[-2:]
        if isinstance(self.size, int):
            short = min(height, width)
            target = (self.size * height // short, self.size * width // short)
        else:
            target = self.size
        if target != (height, width):
            mode = _MODES[self.resample]
            smooth = {} if mode == "nearest-exact" else {"antialias": True, "align_corners": False}
            batch = F.interpolate(batch, size=target, mode=mode, **smooth)  # bytes stay bytes, as in Pillow
        high, wide = self.crop  # type: ignore[misc]
        top, left = (target[0] - high) // 2, (target[1] - wide) // 2
        return batch.float()[..., top : top + high, left : left + wide]


def find_preprocessor(
    encoder: nn.Module, folder: Path | None, given: Any = None, size: int | None = None
) -> ImagePreprocessor:
    """What an image encoder wants of its images.

    Args:
        encoder: The encoder, or a dual encoder.
        folder: Where it was loaded from; its ``preprocessor_config.json`` is read.
        given: An :class:`ImagePreprocessor`, a mapping as :meth:`ImagePreprocessor.from_dict` takes it, or a
            ``transformers`` image processor (or a processor that has one), in place of the file.
        size: Pixels of each side, in place of what is found. Positions are interpolated.

    Raises:
        ConfigError: If nothing says how to normalise, the size does not suit the model's patches, or the model wants
            other than three channels.
    """
    tower = getattr(base_of(encoder), "vision_model", base_of(encoder))
    config = tower.config
    channels, patch = getattr(config, "num_channels", 3), getattr(config, "patch_size", None)
    if channels != 3:
        raise ConfigError(f"{type(tower).__name__} takes images of {channels} channels; images of a stream have 3")
    if isinstance(given, ImagePreprocessor):
        found = given if size is None else dataclasses.replace(given, size=size, crop=None)
    else:
        settings = _settings(folder, given)
        own = getattr(config, "image_size", None)
        if size is None and settings.get("size") is None and own is not None:
            settings["size"] = own if isinstance(own, int) else {"height": own[0], "width": own[1]}
        found = ImagePreprocessor.from_dict(settings, size=size)
    if isinstance(patch, int) and any(side % patch for side in found.crop or ()):
        whole = max(1, found.crop[0] // patch) * patch  # type: ignore[index]
        raise ConfigError(
            f"images of {found.crop} pixels cannot be cut into patches of {patch}; choose image_size={whole} or "
            f"{whole + patch}"
        )
    return found


def _settings(folder: Path | None, given: Any) -> dict[str, Any]:
    given = getattr(given, "image_processor", given)  # a processor of images and texts
    if isinstance(given, Mapping):
        return dict(given)
    if hasattr(given, "to_dict"):
        return dict(given.to_dict())
    if given is not None:
        raise ConfigError(
            f"image_processor={type(given).__name__}: give an ImagePreprocessor, a mapping with image_mean and "
            "image_std, or a transformers image processor"
        )
    if folder is not None and (folder / _FILE).is_file():
        return dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    where = f"the folder {str(folder)!r} holds no {_FILE}" if folder else "the model does not say how images are made"
    raise ConfigError(
        f"{where}; give image_processor={{'image_mean': [...], 'image_std': [...]}} with the values that the model "
        "was trained with"
    )


def _three(values: Any, default: float) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        values = [values] * 3
    return tuple(values) if values is not None else (default,) * 3


def _channels_first(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
