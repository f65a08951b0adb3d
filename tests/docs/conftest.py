"""What the pages name: a small encoder and small data files, in a folder of their own."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

TEAMS = {
    "billing": "invoice charge refund card payment price",
    "delivery": "parcel late courier address arrived box",
    "technical": "login crash error screen update button",
}
MOODS = {"positive": "lovely great perfect happy best wonderful", "negative": "awful broken poor sad worst boring"}
LABEL_WORDS = "invoices payments refunds logins errors"  # the pages write label texts with them
COMMON = "the a my is was not and it again please with this for to"


def _rows(kinds: Mapping[str, str], count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = list(kinds)[number % len(kinds)]
        words = draw.choices(kinds[label].split(), k=4) + draw.choices(COMMON.split(), k=5)
        draw.shuffle(words)
        rows.append((f"{' '.join(words)} {seed} {number}", label))
    return rows


def _csv(path: Path, head: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def _jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_encoder(folder: Path) -> None:
    """A BERT with random weights and a vocabulary that knows the words above."""
    words = " ".join([*TEAMS.values(), *MOODS.values(), COMMON, LABEL_WORDS, *TEAMS, *MOODS]).split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    folder.mkdir(parents=True)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(str(folder))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape["initializer_range"] = 0.3  # large enough that every layer matters, as in a trained model
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(str(folder))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, image_world: Path) -> Path:
    """A folder with ``my-encoder/``, ``my-vit/``, ``my-clip/``, ``data/``, ``images/``, as the pages describe it."""
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(image_world, root, dirs_exist_ok=True)
    make_encoder(root / "my-encoder")
    data = root / "data"
    data.mkdir()
    for split, count, seed in (("train", 48, 1), ("test", 24, 2)):
        _csv(data / f"tickets-{split}.csv", ("body", "team"), _rows(TEAMS, count, seed))
        _jsonl(data / f"reviews-{split}.jsonl", _rows(MOODS, count, seed + 10))
    for name, seed in (("tweets", 31), ("books", 32)):
        _jsonl(data / f"{name}.jsonl", _rows(MOODS, 24, seed))
    for name, seed in (("shop", 21), ("film", 22)):
        rows = _rows(MOODS, 32, seed)
        _csv(data / f"{name}.csv", ("text", "label"), [(text, str(int(mood == "positive"))) for text, mood in rows])
    return root
