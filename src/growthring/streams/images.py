"""Images of a split: kept as they were given (arrays, tensors, file names, encoded bytes), read when asked for.

Whatever an image is given as, it is read as an array ``(height, width, 3)`` of unsigned bytes, RGB. What that form
cannot hold without a choice (floating point, 16 bits, unknown channels) is refused with the line that mends it.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from growthring.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

__all__ = ["Cell", "Images", "is_image", "pixel_hash", "read_image"]

FORMS = (
    "a uint8 numpy array (height, width) or (height, width, 3), a uint8 torch tensor (height, width) or (3, height, "
    "width), a PIL image, the path of an image file, or the bytes of one"
)
_EXACT = {"1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}  # 8 bits or less
_TURNS = {  # EXIF orientation -> name of the PIL transposition that undoes it
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class Images(Sequence["Pixels"]):
    """The images of one split, in the order of its rows; each is read anew whenever it is asked for.

    ``images[i]`` is an array ``(height, width, 3)`` of unsigned bytes (RGB, 0 to 255), C-contiguous, writable and the
    caller's own; heights and widths may differ from image to image. Arrays and tensors that the images were given as
    are not copied and must not be changed afterwards; files and encoded bytes are decoded at each reading.

    Grey images get three equal channels; palettes are looked up; transparent pixels are laid over white; the
    orientation that a camera noted in a file is applied; of a file with several frames the first is read.

    Attributes:
        hashes: SHA-256 (hex) of each image's size and pixels.

    Raises:
        DataError: On reading: the image can no longer be read, for example because its file is gone.
    """

    __slots__ = ("_given", "hashes")

    def __init__(self, given: Sequence[Any], hashes: Sequence[str]) -> None:
        self._given = list(given)
        self.hashes = list(hashes)

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, row: int) -> Pixels: ...
    @overload
    def __getitem__(self, row: slice) -> Images: ...
    def __getitem__(self, row: int | slice) -> Pixels | Images:
        if isinstance(row, slice):
            return self.take(range(*row.indices(len(self))))
        try:
            return read_image(self._given[row])
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(f"image {row}, which could be read when its task was made: {error}.") from error

    def __eq__(self, other: object) -> bool:
        return self.hashes == other.hashes if isinstance(other, Images) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Images({len(self)})"

    def take(self, rows: Iterable[int]) -> Images:
        """Return the images with these 0-based numbers, in the order given; none is read or copied."""
        chosen = list(rows)
        return Images([self._given[i] for i in chosen], [self.hashes[i] for i in chosen])


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a ``datasets.Dataset``, which stays on disk until it is asked for."""

    data: Any
    row: int
    column: str

    def value(self) -> Any:
        """Fetch it."""
        return self.data[self.row][self.column]


def pixel_hash(pixels: Pixels) -> str:
    """Return the SHA-256 (hex) of an image's size and pixels; ``pixels`` is ``(height, width, 3)``, uint8."""
    digest = hashlib.sha256(f"{pixels.shape[0]} {pixels.shape[1]} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def is_image(value: Any) -> bool:
    """Say whether a value can only be meant as an image: two or more axes, a PIL image or a ``Path``; no string."""
    if isinstance(value, np.ndarray) or _is_a(value, "torch", "Tensor"):
        return bool(value.ndim >= 2)
    return isinstance(value, Path) or _is_a(value, "PIL.Image", "Image")


def read_image(value: Any) -> Pixels:
    """Read one image as a new array ``(height, width, 3)``, uint8, RGB.

    Args:
        value: One of the forms that :class:`Images` names.

    Raises:
        ValueError: It is no such image; the message says why and what to do.
        ConfigError: Pillow is needed and not installed.
    """
    if isinstance(value, Cell):
        try:
            value = value.value()
        except Exception as error:  # whatever a decoder makes of a broken image
            raise ValueError(f"the image cannot be read ({type(error).__name__}: {error})") from None
        if isinstance(value, np.ndarray) and value.dtype == np.int64 and value.size:  # datasets widens stored bytes
            value = value.astype(np.uint8) if value.min() >= 0 and value.max() <= 255 else value
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):  # as datasets stores images
        value = value.get("bytes") or value.get("path")
    if (
        value is None
        or (isinstance(value, float) and value != value)
        or (isinstance(value, str | bytes) and not value)
    ):
        raise ValueError(f"the image is missing ({value!r})")
    if isinstance(value, str | os.PathLike):
        return _from_file(Path(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(value), "the image")
    if _is_a(value, "PIL.Image", "Image"):
        try:
            value.load()  # an opened file may not have been read yet
        except Exception as error:
            raise ValueError(f"the image cannot be decoded ({type(error).__name__}: {error}); get it again") from None
        return _from_pil(value, "the image")
    if _is_a(value, "torch", "Tensor"):
        return _from_tensor(value)
    if isinstance(value, np.ndarray):
        return _from_array(np.asarray(value))
    raise ValueError(f"the image is of type {type(value).__name__}, not {FORMS}")


def _is_a(value: Any, module: str, name: str) -> bool:
    """``isinstance`` for classes of modules that need not be imported: without the module there is no such object."""
    found = sys.modules.get(module)
    return found is not None and isinstance(value, getattr(found, name))


# ------------------------------------------------------------------------------------------------- arrays and tensors


def _from_array(array: NDArray[Any]) -> Pixels:
    if array.dtype != np.uint8:
        _refuse_type(f"an array of {array.dtype}", array, "astype(numpy.uint8)")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))) or 0 in array.shape:
        tip = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            tip = "; if the channels stand first, give image.transpose(1, 2, 0)"
        elif array.ndim == 4:
            tip = "; a row holds one image, not a batch"
        raise ValueError(
            f"the image is an array of shape {array.shape}, not (height, width) or (height, width, 3){tip}"
        )
    return _three_channels(array)


def _from_tensor(tensor: Any) -> Pixels:
    if str(tensor.dtype) != "torch.uint8":
        numbers = np.empty(0) if tensor.is_complex() else tensor.detach().cpu().double().numpy()
        _refuse_type(f"a tensor of {tensor.dtype}", numbers, "to(torch.uint8)")
    shape = tuple(tensor.shape)
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3, 4))) or 0 in shape:
        tip = ""
        if len(shape) == 3 and shape[2] in (1, 3, 4):
            tip = "; if the channels stand last, give image.permute(2, 0, 1)"
        elif len(shape) == 4:
            tip = "; a row holds one image, not a batch"
        raise ValueError(f"the image is a tensor of shape {shape}, not (height, width) or (3, height, width){tip}")
    array = tensor.detach().cpu().numpy()
    return _three_channels(array if array.ndim == 2 else array.transpose(1, 2, 0))


def _three_channels(array: NDArray[np.uint8]) -> Pixels:
    """Copy ``(h, w)`` or ``(h, w, 1 | 3 | 4)`` bytes into a new ``(h, w, 3)``; a fourth channel is opacity."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 4:
        opacity = array[:, :, 3:].astype(np.uint16)
        over_white = array[:, :, :3] * opacity + 255 * (255 - opacity)
        return ((over_white + 127) // 255).astype(np.uint8, order="C")
    new = np.empty((*array.shape[:2], 3), np.uint8)
    new[:] = array
    return new


def _refuse_type(what: str, numbers: NDArray[Any], cast: str) -> None:
    """Raise with the line of code that makes unsigned bytes of such an image."""
    if "bool" in what:
        fix = f"give image.{cast} * 255"
    elif numbers.dtype.kind not in "fiu" or not numbers.size or not np.isfinite(numbers).all():
        fix = "it must hold whole numbers from 0 to 255"
    else:
        low, high, floating = float(numbers.min()), float(numbers.max()), "float" in what
        if low < 0:
            fix = "give images as they were before normalisation, the trainer does that itself"
        elif floating and high <= 1:
            fix = f"give (image * 255).round().{cast}"
        elif high <= 255:
            fix = f"give image{'.round()' if floating else ''}.{cast}"
        elif "uint16" in what:
            fix = f"if they fill 16 bits, give (image // 257).{cast}"
        else:
            fix = f"scale them to 0 ... 255, then .{cast}"
        fix = f"its values go from {low:.4g} to {high:.4g}: {fix}"
    raise ValueError(f"the image is {what}, not of uint8; {fix}")


# ------------------------------------------------------------------------------------------- files, through Pillow


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            "image files are read with Pillow, which is not installed: pip install growthring[image]"
        ) from None
    return Image


def _from_file(path: Path) -> Pixels:
    _pillow()
    if not path.is_file():
        if "://" in str(path) or ":/" in str(path)[2:]:
            raise ValueError(f"the image {str(path)!r} is an address; download it and give the path of the file")
        kind = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"the image file {str(path)!r} {kind}")
    return _decode(path, f"the image file {str(path)!r}")


def _decode(source: Path | io.BytesIO, what: str) -> Pixels:
    image_module = _pillow()
    try:
        with image_module.open(source) as image:  # reads the header only
            limit = image_module.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise image_module.DecompressionBombError
            image.load()
            turn = _TURNS.get(_orientation(image))
            upright = image.transpose(getattr(image_module.Transpose, turn)) if turn else image
            return _from_pil(upright, what)
    except (image_module.DecompressionBombError, image_module.DecompressionBombWarning):
        raise ValueError(
            f"{what} has more than {image_module.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit; make it smaller, or "
            f"raise PIL.Image.MAX_IMAGE_PIXELS if the file is trusted"
        ) from None
    except image_module.UnidentifiedImageError:
        raise ValueError(f"{what} is not in an image format that Pillow knows") from None
    except _Refused:
        raise
    except Exception as error:  # decoders raise anything on broken data: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{what} cannot be decoded ({type(error).__name__}: {error}); get it again") from None


class _Refused(ValueError):
    """A whole image of a kind that is not taken."""


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # the pixels are good even if what the camera noted beside them is not
        return 1


def _from_pil(image: Any, what: str) -> Pixels:
    if image.mode not in _EXACT:
        tip = ": make it 8-bit, for example with numpy.asarray(image) scaled to 0 ... 255 as uint8"
        raise _Refused(f"{what} is in Pillow's mode {image.mode!r}, which has more than 8 bits a channel{tip}")
    if 0 in image.size:
        raise _Refused(f"{what} has no pixels (size {image.size[0]} x {image.size[1]})")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        mode = "RGBA" if image.mode != "La" else "LA"
        return _three_channels(np.asarray(image.convert(mode).convert("RGBA")))
    return _three_channels(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
