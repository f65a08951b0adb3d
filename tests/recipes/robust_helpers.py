"""A small sweep on disk: a keyword decides the label, some labels are wrong, a far domain has other filler words."""

from __future__ import annotations

import json
import random

import yaml

WORDS = "the a of to and in is it that was for on are with as at be this have from or had by not but what"
OTHER_WORDS = "long down day did get come made may part good bad red blue cold warm plane ship car"
FILLER, OTHER = WORDS.split(), OTHER_WORDS.split()
LORA = {"method": "sequential-lora", "title": "LoRA", "learning_rate": [1e-3, 1e-2], "adapter": {"r": 4}}
WHOLE = {"method": "sequential-linear", "title": "Fine-tuning", "learning_rate": [5e-3]}


def rows(count, seed, words=FILLER):
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        word, label = draw.choice([("cat", "x"), ("dog", "y")])
        label = draw.choice("xy") if draw.random() < 0.4 else label
        text = draw.sample(words, 5)
        text.insert(draw.randrange(6), word)
        made.append({"text": " ".join(text), "label": label})
    return made


def write_rows(file, several):
    file.write_text("".join(json.dumps(row) + "\n" for row in several), encoding="utf-8")


def sweep(folder, encoder, **changes):
    """Write data and ``sweep.yaml`` into a folder; returns the path of the file."""
    for name, count, seed, words in (
        ("train", 48, 0, FILLER), ("validation", 30, 1, FILLER), ("test", 30, 2, FILLER),
        ("near", 24, 3, FILLER), ("far", 40, 4, OTHER),
    ):  # fmt: skip
        write_rows(folder / f"{name}.jsonl", rows(count, seed, words))
    config = {
        "model": str(encoder),
        "task": {"name": "pets", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}},
        "ood": [{"name": "near", "test": "near.jsonl"}, {"name": "far", "test": "far.jsonl", "limit": 20}],
        "methods": [LORA, WHOLE],
        "frontier": ["sequential-lora"],
        "wise": [0.0, 0.5],
        "seeds": [0, 1],
        "train": {"max_steps": 4, "batch_size": 8},
        "max_length": 16,
        **changes,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file
