"""The contrastive alignment that makes a dual encoder of two single ones."""

from __future__ import annotations

import pytest
import torch
from vision_helpers import COLOURS, DUAL, HALF, NAMES, images, tiny_pair, tiny_tokenizer, tiny_vit

from growthring.errors import ConfigError, DataError
from growthring.trainer import align_projections


def pairs(count=48, seed=0):
    rows = images(list(COLOURS), count, seed)
    return [image for image, _ in rows], [f"a photo of a {NAMES[label]}." for _, label in rows]


def zero_shot(model):
    pixels, captions = pairs(32, seed=5)
    words = sorted(set(captions))
    with torch.no_grad():
        scores = [
            model(pixel_values=HALF(pixels), **tiny_tokenizer()([w], return_tensors="pt")).logits_per_image
            for w in words
        ]
    best = torch.cat(scores, 1).argmax(1)
    return float((best == torch.tensor([words.index(c) for c in captions])).double().mean())


@pytest.mark.parametrize("name", DUAL)
def test_images_find_their_captions(name):
    model = DUAL[name]().eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert zero_shot(model) < 0.6
    losses = align_projections(model, *pairs(), tiny_tokenizer(), HALF, steps=150, batch_size=24, learning_rate=1e-2)
    assert len(losses) == 150
    assert losses[-1] < losses[0]
    assert zero_shot(model) > 0.9
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    expected = {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    if name == "pair":
        expected |= {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"}
    assert moved == expected
    assert all(p.requires_grad for p in model.parameters())


def test_the_seed_decides():
    made = []
    for seed in (0, 0, 1):
        model = tiny_pair()
        align_projections(model, *pairs(), tiny_tokenizer(), HALF, steps=3, batch_size=8, seed=seed)
        made.append(model.visual_projection.weight.detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_first_loss_is_clips():
    from torch.nn import functional as F

    model = tiny_pair().eval()
    pixels, captions = pairs(4)  # four different captions: every pair has one right answer
    ids = [tiny_tokenizer()([c], return_tensors="pt")["input_ids"] for c in captions]
    with torch.no_grad():
        scores = torch.cat([model(pixel_values=HALF(pixels), input_ids=i).logits_per_image for i in ids], 1)
        target = torch.arange(4)
        expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    losses = align_projections(model, pixels, captions, tiny_tokenizer(), HALF, steps=1, batch_size=4)
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_bad_input():
    pixels, captions = pairs(8)
    good = (tiny_tokenizer(), HALF)
    with pytest.raises(ConfigError, match="ViTModel has no two towers to align"):
        align_projections(tiny_vit(), pixels, captions, *good)
    with pytest.raises(DataError, match="8 images and 7 captions"):
        align_projections(tiny_pair(), pixels, captions[:7], *good)
    with pytest.raises(DataError, match="1 different captions"):
        align_projections(tiny_pair(), pixels, ["a cat"] * 8, *good)
    with pytest.raises(ConfigError, match="steps=0"):
        align_projections(tiny_pair(), pixels, captions, *good, steps=0)
