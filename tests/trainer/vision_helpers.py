"""Tiny image models and streams: its colour decides the label of a noisy image."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

import growthring as gr
from growthring.trainer import ImagePreprocessor

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = ImagePreprocessor(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
NAMES = {"red": "cat", "green": "dog", "blue": "red", "yellow": "blue"}  # in words that tell nothing
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "the", ".", *NAMES.values(), "bird", "fish"]


def images(labels, count, seed, side=16):
    """``count`` pairs of image and label, ``side`` pixels square."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = labels[number % len(labels)]
        image = draw.integers(0, 90, (side, side, 3), dtype=np.uint8)
        rows.append((image + np.array(COLOURS[label], dtype=np.uint8) * np.uint8(120), label))
    return rows


def image_task(name, labels, *, train=24, test=12, seed=0, side=16, names=NAMES):
    return gr.Task(
        name,
        images(labels, train, seed, side),
        images(labels, test, seed + 1000, side),
        label_texts={label: names[label] for label in labels},
    )


def image_stream(scenario="task", *, train=24, side=16, reference=None):
    """Two tasks of two colours each."""
    tasks = [("first", ["red", "green"]), ("second", ["blue", "yellow"])]
    made = [image_task(n, labels, train=train, seed=i, side=side) for i, (n, labels) in enumerate(tasks)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return gr.TaskStream(made, scenario=scenario, reference=reference)


def reference_task():
    """A few images of all colours, called otherwise: what the model knows before the first task."""
    names = dict(zip(COLOURS, ("bird", "fish", "photo", "the"), strict=True))
    return image_task("colours", list(COLOURS), train=4, test=16, seed=7, names=names)


def tiny_vit(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTModel(ViTConfig(**SMALL | {"intermediate_size": 64, "image_size": 16, "patch_size": 8} | settings))


def tiny_dino(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(**SMALL | {"mlp_ratio": 2, "image_size": 16, "patch_size": 8} | settings)
        return Dinov2Model(config)


def tiny_tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, do_lower_case=True, model_max_length=32)


def tiny_clip():
    """A CLIPModel; ``[SEP]`` (3) ends a text."""
    text = SMALL | {"intermediate_size": 64, "vocab_size": len(WORDS), "max_position_embeddings": 32}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = SMALL | {"intermediate_size": 64, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def tiny_pair():
    """A VisionTextDualEncoderModel of a DINOv2 and a BERT."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"intermediate_size": 64, "vocab_size": len(WORDS), "max_position_embeddings": 32}
        text = BertModel(BertConfig(**SMALL | sizes, initializer_range=0.2, hidden_dropout_prob=0.0))
        return VisionTextDualEncoderModel(vision_model=tiny_dino(), text_model=text)


DUAL = {"clip": tiny_clip, "pair": tiny_pair}
