"""Pixel values, compared with Pillow's resizing and with what the settings mean."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from vision_helpers import HALF, tiny_clip, tiny_dino, tiny_vit

from growthring.errors import ConfigError
from growthring.trainer import ImagePreprocessor
from growthring.trainer.vision import find_preprocessor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "rescale": 1.0}


def picture(height, width, seed=0):
    """A smooth picture with some noise, as bytes."""
    draw = np.random.default_rng(seed)
    down, right = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(down / 5 + c) + np.cos(right / 7 - c) for c in range(3)], -1)
    return np.clip(waves * 55 + 120 + draw.normal(0, 8, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 56), (97, 61, 32), (40, 90, 48), (64, 64, 64)])
@pytest.mark.parametrize("resample", [2, 3])
def test_resizing_is_pillows_to_one_level(height, width, size, resample):
    image_module = pytest.importorskip("PIL.Image")
    array = picture(height, width)
    short = min(height, width)
    target = (size * width // short, size * height // short)
    theirs = np.asarray(image_module.fromarray(array).resize(target, resample), dtype=np.int64)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    theirs = theirs[top : top + size, left : left + size]
    ours = ImagePreprocessor(size=size, resample=resample, **PLAIN)([array])[0].permute(1, 2, 0).numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.02


def test_normalisation():
    image = np.full((8, 8, 3), 51, np.uint8)
    made = ImagePreprocessor(size=8, mean=MEAN, std=STD)([image])
    expected = (0.2 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert made.dtype == torch.float32
    assert torch.allclose(made, expected.view(1, 3, 1, 1).expand(1, 3, 8, 8))


def test_arrays_and_tensors_of_any_size_make_one_batch_in_order():
    arrays = [picture(20, 20, 1), picture(33, 21, 2), picture(20, 20, 3), picture(9, 40, 4)]
    tensors = [torch.from_numpy(a.transpose(2, 0, 1).copy()) for a in arrays]
    together = HALF(arrays)
    assert together.shape == (4, 3, 16, 16)
    for number, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
        assert torch.equal(together[number], HALF([array])[0])
        assert torch.equal(together[number], HALF([tensor])[0])


def test_a_crop_is_the_centre():
    image = np.zeros((12, 20, 3), np.uint8)
    image[4:8, 8:12] = 255
    made = ImagePreprocessor(size=(12, 20), crop=(4, 4), **PLAIN)([image])
    assert made.shape == (1, 3, 4, 4)
    assert (made == 255).all()


def test_settings_of_a_file_go_round(tmp_path):
    for one in (HALF, ImagePreprocessor(256, MEAN, STD, crop=(224, 224)), ImagePreprocessor((24, 32), MEAN, STD)):
        one.save_pretrained(tmp_path)
        read = ImagePreprocessor.from_dict(json.loads((tmp_path / "preprocessor_config.json").read_text()))
        assert read == one
        image = picture(40, 50)
        assert torch.equal(read([image]), one([image]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 16}, {"size": 16, "crop": (16, 16)}),
        ({"size": {"height": 8, "width": 16}}, {"size": (8, 16), "crop": (8, 16)}),
        (
            {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
            {"size": 20, "crop": (16, 16)},
        ),
        ({"size": 20, "crop_size": 16}, {"size": 20, "crop": (20, 20)}),  # a crop that is switched off
        ({"size": 20, "crop_size": 16, "do_center_crop": True}, {"size": 20, "crop": (16, 16)}),
        ({"size": 16, "do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"size": 16, "do_rescale": False}, {"rescale": 1.0}),
        ({"size": 16, "rescale_factor": 0.5}, {"rescale": 0.5}),
        ({"size": 16, "image_mean": 0.5, "image_std": 0.25}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
    ],
)
def test_settings_of_a_file_are_read(settings, expected):
    read = ImagePreprocessor.from_dict({"image_mean": MEAN, "image_std": STD} | settings)
    assert {name: getattr(read, name) for name in expected} == expected


def test_the_folder_then_the_model_say_the_size(tmp_path):
    ImagePreprocessor(256, MEAN, STD, crop=(224, 224)).save_pretrained(tmp_path)
    assert find_preprocessor(tiny_vit(), tmp_path).crop == (224, 224)
    assert find_preprocessor(tiny_vit(), tmp_path, size=56).crop == (56, 56)
    assert find_preprocessor(tiny_vit(), tmp_path, size=56).mean == MEAN
    given = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert find_preprocessor(tiny_vit(), tmp_path, given) == HALF  # the model's own 16 pixels
    assert find_preprocessor(tiny_clip(), None, given) == HALF
    assert find_preprocessor(tiny_dino(), None, HALF, 24).crop == (24, 24)


def test_an_image_processor_of_transformers_is_read():
    pytest.importorskip("PIL")
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    found = find_preprocessor(tiny_clip(), None, processor)
    assert found.crop == (16, 16)
    image = picture(40, 28)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(found([image]), theirs.float(), atol=0.02)  # one level of 255, normalised


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=(0, 0): give whole numbers"),
        ({"size": (8, 8, 8)}, "give whole numbers of pixels"),
        ({"size": 8, "crop": (9, 8)}, "does not fit into the size"),
        ({"size": 8, "mean": (0.5,)}, "give three numbers"),
        ({"size": 8, "std": (0.0, 1.0, 1.0)}, "must be above 0"),
        ({"size": 8, "resample": 7}, "resample=7: allowed are"),
    ],
)
def test_bad_settings(settings, message):
    import re

    with pytest.raises(ConfigError, match=re.escape(message)):
        ImagePreprocessor(**{"mean": (0.5,) * 3, "std": (0.5,) * 3} | settings)


def test_what_nothing_says_is_asked_for(tmp_path):
    with pytest.raises(
        ConfigError, match=r"the model does not say how images are made; give image_processor=\{'image"
    ):
        find_preprocessor(tiny_vit(), None)
    with pytest.raises(ConfigError, match=r"holds no preprocessor_config.json; give image_processor"):
        find_preprocessor(tiny_vit(), tmp_path)
    with pytest.raises(ConfigError, match="image_mean and image_std are missing"):
        find_preprocessor(tiny_vit(), None, {"size": 16})
    with pytest.raises(ConfigError, match="image_processor=int: give an ImagePreprocessor"):
        find_preprocessor(tiny_vit(), None, 5)
    with pytest.raises(ConfigError, match="no size is given to resize to"):
        find_preprocessor(tiny_vit(), None, {"size": 16, "do_resize": False, "image_mean": MEAN, "image_std": STD})
