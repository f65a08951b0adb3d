from __future__ import annotations

import builtins
import io
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from growthring.errors import ConfigError, DataError
from growthring.streams import Images
from growthring.streams.images import Cell, is_image, pixel_hash, read_image


def picture(seed=0, shape=(5, 7, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array, form="PNG", **settings):
    out = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(out, form, **settings)
    return out.getvalue()


RGB = picture()
GREY = picture(1, (5, 7))


def forms(folder):
    (folder / "a.png").write_bytes(encoded(RGB))
    return {
        "array": RGB,
        "turned array": np.asfortranarray(RGB),
        "flipped view": RGB[:, ::-1][:, ::-1],
        "read-only": np.broadcast_to(RGB, RGB.shape),
        "tensor": torch.from_numpy(RGB).permute(2, 0, 1),
        "contiguous tensor": torch.from_numpy(RGB).permute(2, 0, 1).contiguous(),
        "pil": Image.fromarray(RGB),
        "lazy pil": Image.open(io.BytesIO(encoded(RGB))),
        "string": str(folder / "a.png"),
        "path": folder / "a.png",
        "bytes": encoded(RGB),
        "bytearray": bytearray(encoded(RGB, "BMP")),
        "tiff": encoded(RGB, "TIFF"),
        "datasets bytes": {"bytes": encoded(RGB), "path": "gone.png"},
        "datasets path": {"bytes": None, "path": str(folder / "a.png")},
        "opaque": np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)]),
        "opaque tensor": torch.cat([torch.from_numpy(RGB).permute(2, 0, 1), torch.full((1, 5, 7), 255).byte()]),
        "opaque pil": Image.fromarray(RGB).convert("RGBA"),
    }


def test_every_form_of_one_image_reads_as_the_same_new_array(tmp_path):
    given = forms(tmp_path)
    assert len({pixel_hash(read_image(value)) for value in given.values()}) == 1
    for name, value in given.items():
        read = read_image(value)
        assert np.array_equal(read, RGB), name
        assert read.flags.c_contiguous, name
        assert read.flags.writeable, name
        assert not np.shares_memory(read, RGB), name
        torch.from_numpy(read)


def test_grey_images_get_three_equal_channels():
    for value in (GREY, GREY[:, :, None], torch.from_numpy(GREY), torch.from_numpy(GREY)[None], encoded(GREY)):
        assert np.array_equal(read_image(value), np.dstack([GREY] * 3))
    mask = Image.fromarray(GREY > 127)
    assert mask.mode == "1"
    assert np.array_equal(read_image(encoded(mask))[:, :, 0], (GREY > 127) * np.uint8(255))
    assert np.array_equal(read_image(mask)[:, :, 0], (GREY > 127) * np.uint8(255))


def test_transparent_pixels_lie_over_white():
    clear = np.dstack([RGB, np.zeros((5, 7), np.uint8)])
    half = np.dstack([RGB, np.full((5, 7), 51, np.uint8)])
    expected = np.round(RGB * 0.2 + 255 * 0.8)
    for give in (lambda a: a, encoded, Image.fromarray, lambda a: torch.from_numpy(a).permute(2, 0, 1)):
        assert (read_image(give(clear)) == 255).all()
        assert np.abs(read_image(give(half)) - expected).max() <= 1
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (7, 5), 0)])
    assert (read_image(encoded(grey)) == 255).all()


def test_palettes_and_their_transparency_are_looked_up():
    table = Image.new("P", (4, 2))
    table.putpalette([10, 20, 30, 200, 100, 0])
    table.putpixel((1, 0), 1)
    plain = read_image(encoded(table))
    assert plain[0, 0].tolist() == [10, 20, 30]
    assert plain[0, 1].tolist() == [200, 100, 0]
    clear = read_image(encoded(table, transparency=0))
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert clear[0, 1].tolist() == [200, 100, 0]
    assert np.array_equal(read_image(encoded(table, "GIF")), plain)
    both = read_image(encoded(table, transparency=b"\x00\xff"))
    assert np.array_equal(both, clear)
    keyed = encoded(RGB, transparency=tuple(int(v) for v in RGB[0, 0]))
    assert read_image(keyed)[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(read_image(keyed)[1:], RGB[1:])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "PA", "La", "RGBa"])
def test_other_eight_bit_modes_are_converted(mode):
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    image = {"PA": lambda: image.convert("P").convert("PA"), "La": lambda: image.convert("LA").convert("La")}.get(
        mode, lambda: image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
    )()
    assert image.mode == mode
    assert np.abs(read_image(image).astype(int) - 200).max() <= 4  # the web palette has 204


def test_the_orientation_that_a_camera_noted_is_applied():
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        data = encoded(RGB, exif=exif.tobytes())
        right = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert np.array_equal(read_image(data), right), turn
    assert read_image(data).shape == (7, 5, 3)
    assert np.array_equal(read_image(encoded(RGB, exif=b"Exif\x00\x00nonsense")), RGB)


def test_of_several_frames_the_first_is_read():
    frames = [Image.fromarray(picture(seed)) for seed in (0, 1)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_image(data), RGB)


X = picture(2, (5, 6, 3))
REFUSED = {
    "float": (X / 255.0, r"array of float64, not of uint8; its values .*give \(image \* 255\)\.round\(\)\.astype"),
    "float 255": (
        X.astype("f4"),
        r"array of float32, .* from \d to 25\d: give image\.round\(\)\.astype\(numpy.uint8\)",
    ),
    "normalised": (X / 255.0 - 0.5, r"from -0\..*as they were before normalisation"),
    "half tensor": (torch.rand(3, 4, 4).bfloat16(), r"a tensor of torch\.bfloat16.*\.to\(torch\.uint8\)"),
    "nan": (np.full((4, 4), np.nan), r"array of float64.*whole numbers from 0 to 255"),
    "int64": (X.astype("i8"), r"array of int64, .*: give image\.astype\(numpy\.uint8\)"),
    "int tensor": (torch.zeros(3, 4, 4, dtype=torch.int32), r"tensor of torch\.int32.*image\.to\(torch\.uint8\)"),
    "uint16": (X.astype("u2") * 257, r"array of uint16.*give \(image // 257\)\.astype"),
    "large": (X.astype("i4") * 9999, r"scale them to 0 \.\.\. 255"),
    "bool": (X > 9, r"array of bool.*image\.astype\(numpy\.uint8\) \* 255"),
    "bool tensor": (torch.ones(4, 4).bool(), r"tensor of torch\.bool.*image\.to\(torch\.uint8\) \* 255"),
    "complex": (X.astype("c16"), r"array of complex128.*whole numbers"),
    "complex tensor": (torch.ones(4, 4, dtype=torch.complex64), r"tensor of torch\.complex64.*whole numbers"),
    "objects": (X.astype(object), r"array of object"),
    "words": (np.array([["a"]]), r"array of <U1"),
    "channels first": (X.transpose(2, 0, 1), r"array of shape \(3, 5, 6\).*transpose\(1, 2, 0\)"),
    "channels last": (torch.from_numpy(X), r"tensor of shape \(5, 6, 3\).*permute\(2, 0, 1\)"),
    "batch": (X[None], r"shape \(1, 5, 6, 3\).*one image, not a batch"),
    "tensor batch": (torch.from_numpy(X)[None], r"shape \(1, 5, 6, 3\).*one image, not a batch"),
    "vector": (X.ravel(), r"array of shape \(90,\), not \(height, width\)"),
    "scalar": (np.uint8(3), r"of type uint8, not a uint8 numpy array"),
    "two channels": (X[:, :, :2], r"array of shape \(5, 6, 2\)"),
    "no pixels": (X[:0], r"array of shape \(0, 6, 3\)"),
    "no tensor pixels": (torch.zeros(3, 0, 4).byte(), r"tensor of shape \(3, 0, 4\)"),
    "no pil pixels": (Image.new("RGB", (0, 3)), r"has no pixels \(size 0 x 3\)"),
    "none": (None, r"missing \(None\)"),
    "nan cell": (float("nan"), r"missing \(nan\)"),
    "empty dict": ({"bytes": None, "path": None}, r"missing"),
    "other dict": ({"file": "x"}, r"of type dict"),
    "list": (X.tolist(), r"of type list, not a uint8 numpy array"),
    "number": (3, r"of type int"),
    "16 bits": (Image.fromarray(GREY.astype("u2") * 257), r"mode 'I;16', which has more than 8 bits.*uint8"),
    "32 bits": (Image.new("I", (3, 3)), r"mode 'I'"),
    "float pil": (Image.new("F", (3, 3)), r"mode 'F'"),
    "lab": (Image.new("LAB", (3, 3)), r"mode 'LAB'"),
    "16-bit file": (encoded(Image.fromarray(GREY.astype("u2") * 257)), r"mode 'I;16'"),
    "no file": ("nowhere/x.png", r"image file 'nowhere/x\.png' is not there"),
    "empty name": ("", r"the image is missing \(''\)"),
    "nul": ("a\0b.png", r"."),
    "folder": (Path(__file__).parent, r"is a folder"),
    "address": ("https://example.org/cat.png", r"is an address; download it"),
    "cut pil": (Image.open(io.BytesIO(encoded(picture(3, (64, 64, 3)))[:3000])), r"cannot be decoded \(OSError"),
    "no image": (b"hello, this is not one", r"not in an image format that Pillow knows"),
    "empty bytes": (b"", r"missing \(b''\)"),
    "cut png": (encoded(picture(3, (64, 64, 3)))[:3000], r"cannot be decoded \(.*get it again"),
    "cut jpeg": (encoded(picture(3, (64, 64, 3)), "JPEG")[:1500], r"cannot be decoded \(OSError"),
    "torn png": (encoded(RGB)[:60] + b"\0" * 60 + encoded(RGB)[60:], r"cannot be decoded \("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_eight_bit_image_is_refused_with_the_fix(case):
    value, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_image(value)
    assert not isinstance(caught.value, ConfigError)
    assert "an tensor" not in str(caught.value)


def test_the_fix_that_a_message_gives_works():
    for bad, mended in (
        (X / 255.0, lambda image: (image * 255).round().astype(np.uint8)),
        (X.astype("i8"), lambda image: image.astype(np.uint8)),
        (X.astype("u2") * 257, lambda image: (image // 257).astype(np.uint8)),
        (X.transpose(2, 0, 1), lambda image: image.transpose(1, 2, 0)),
        (torch.from_numpy(X), lambda image: image.permute(2, 0, 1)),
    ):
        assert np.array_equal(read_image(mended(bad)), X)


def test_huge_images_are_refused_and_the_limit_is_pillows(monkeypatch):
    data = encoded(np.zeros((40, 50), np.uint8))
    assert read_image(data).shape == (40, 50, 3)
    for limit in (1500, 900):  # between once and twice the limit Pillow warns, above it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for action in ("error", "ignore"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                with pytest.raises(ValueError, match=rf"has more than {limit:,} pixels.*MAX_IMAGE_PIXELS"):
                    read_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(data).shape == (40, 50, 3)


def test_bytes_of_any_kind_end_in_a_clear_error():
    rng = np.random.default_rng(0)
    whole = {form: encoded(picture(4, (16, 16, 3)), form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
    messages = []
    for data in whole.values():
        for _ in range(60):
            torn = bytearray(data)
            for place in rng.integers(0, len(torn), 6):
                torn[place] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own remarks
                try:
                    assert read_image(bytes(torn)).ndim == 3
                except ValueError as error:
                    messages.append(str(error))
    assert len(messages) > 60
    assert all(message.startswith("the image ") for message in messages)


def test_images_are_read_anew_and_not_kept(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB))
    given = [RGB, path, encoded(GREY)]
    images = Images(given, [pixel_hash(read_image(value)) for value in given])
    first = images[1]
    first[:] = 0
    assert np.array_equal(images[1], RGB)
    assert images.hashes[0] == images.hashes[1] != images.hashes[2]
    assert [image.shape for image in images] == [(5, 7, 3)] * 3
    assert np.array_equal(images[-1], images[2])
    with pytest.raises(IndexError):
        images[3]
    part = images.take([2, 0])
    assert part == images[::-2]
    assert part != images
    assert part != [1]
    assert (len(part), repr(part)) == (2, "Images(2)")
    again = pickle.loads(pickle.dumps(images))
    assert again == images
    assert np.array_equal(again[1], RGB)
    path.unlink()
    with pytest.raises(
        DataError, match=r"image 1, which could be read when its task was made: .*a\.png' is not there"
    ):
        images[1]


def test_hashes_tell_shapes_apart():
    flat = np.zeros((4, 6, 3), np.uint8)
    assert pixel_hash(flat) != pixel_hash(flat.transpose(1, 0, 2))
    assert pixel_hash(flat) != pixel_hash(np.zeros((1, 24, 3), np.uint8))
    assert pixel_hash(RGB[:, ::-1]) == pixel_hash(RGB[:, ::-1].copy())


def test_what_can_only_be_an_image():
    for value in (RGB, torch.zeros(2, 2), torch.zeros(3, 2, 2), Image.new("L", (2, 2)), Path("x")):
        assert is_image(value)
    for value in ("x.png", b"", 3, None, [[1]], torch.tensor([5, 7]), np.float64(1), np.array([1.0]), np.str_("x")):
        assert not is_image(value)


def test_without_pillow_arrays_work_and_files_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_pillow(name, *rest):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", no_pillow)
    assert np.array_equal(read_image(RGB), RGB)
    assert read_image(torch.from_numpy(GREY)).shape == (5, 7, 3)
    for value in ("x.png", b"x"):
        with pytest.raises(ConfigError, match=r"pip install growthring\[image\]"):
            read_image(value)


def test_cells_say_why_they_cannot_be_read():
    with pytest.raises(ValueError, match=r"cannot be read \(IndexError"):
        read_image(Cell([], 0, "image"))
    assert np.array_equal(read_image(Cell([{"image": RGB}], 0, "image")), RGB)
