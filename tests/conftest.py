from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = """the a of to and in is it that was for on are with as at be this have from or had by not but what all were we
when your can said there use an each which she do how their if will up other about out many then them these so some
her would make like him into time has look two more write go see number no way could people my than first water been
call who oil its now find long down day did get come made may part good bad red blue cold warm cat dog fish bird
one three train plane ship car north south test""".split()  # noqa: SIM905


def pytest_configure(config):
    # PEFT asks a transformers property whose new name older transformers do not have.
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """Folder of a random BERT (2 layers, 4 heads, width 32) and its tokenizer of about a hundred words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    words = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = BertTokenizer(vocab=words, do_lower_case=True, model_max_length=64)
    tokenizer.save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def tiny_stream(tmp_path, tiny_encoder):
    """A function that writes ``stream.yaml`` over two tiny tasks and the tiny encoder, and returns its path."""
    import json

    import yaml

    texts = {
        "animals": {
            "good": ["the good cat", "a dog", "my cat and dog"],
            "bad": ["a red bird", "the fish", "long fish"],
        },
        "traffic": {
            "north": ["the car", "one train", "a long train"],
            "south": ["two plane", "the plane", "up a plane"],
        },
    }
    data = tmp_path / "data"
    data.mkdir()
    for task, labels in texts.items():
        for split, times in (("train", 4), ("test", 2)):
            rows = [
                {"text": f"{split} {text} {WORDS[number]}", "label": label}
                for label, several in labels.items()
                for text in several
                for number in range(times)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (data / f"{task}-{split}.jsonl").write_text(lines, encoding="utf-8")

    def write(method="pegp", name="stream.yaml", **changes):
        tasks = [
            {"name": task, "train": f"data/{task}-train.jsonl", "test": f"data/{task}-test.jsonl"} for task in texts
        ]
        config = {
            "model": str(tiny_encoder),
            "stream": {"tasks": tasks},
            "method": method,
            "train": {"learning_rate": 0.01, "batch_size": 8, "max_steps": 2},
            "max_length": 16,
            **changes,
        }
        file = tmp_path / name
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return file

    return write


COLOURS = {
    "cherry": (220, 30, 40), "lemon": (230, 220, 40), "violet": (140, 60, 200),
    "daisy": (235, 235, 230), "sea": (30, 70, 200), "coal": (25, 25, 30),
}  # fmt: skip
PROMPT_WORDS = ["a", "photo", "of", "the", "picture", "."]


@pytest.fixture(scope="session")
def image_world(tmp_path_factory):
    """Folder with a random ViT (``my-vit``), a random CLIP (``my-clip``) and small images in class folders.

    ``images/fruit``, ``images/flowers`` and ``images/known`` each hold ``train`` and ``test``.
    """
    import json

    import numpy as np
    import torch
    from transformers import BertTokenizer, CLIPConfig, CLIPModel, ViTConfig, ViTModel

    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    root = tmp_path_factory.mktemp("image-world")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    look = size | {"image_size": 16, "patch_size": 8}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PROMPT_WORDS, *COLOURS]
    read = size | {
        "vocab_size": len(words), "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(ViTConfig(**look)).save_pretrained(str(root / "my-vit"))
        CLIPModel(CLIPConfig(text_config=read, vision_config=look, projection_dim=16)).save_pretrained(
            str(root / "my-clip")
        )
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True).save_pretrained(
        str(root / "my-clip")
    )
    pixels = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for model in ("my-vit", "my-clip"):
        (root / model / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")

    draw = np.random.default_rng(0)
    tasks = {"fruit": ("cherry", "lemon"), "flowers": ("violet", "daisy"), "known": ("sea", "coal")}
    for task, labels in tasks.items():
        for split, count in (("train", 12), ("test", 6)):
            for label in labels:
                folder = root / "images" / task / split / label
                folder.mkdir(parents=True)
                for number in range(count):
                    noise = draw.integers(-20, 21, (16, 16, 3))
                    image = np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)
                    pillow.fromarray(image).save(folder / f"{number}.png")
    return root
