"""Tiny models with adapters, prefixes, prompts and scales, and what a test asks of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from guard_helpers import answer, bert_config, default_loss, rows
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, ViTConfig, ViTModel

from growthring.adapters import BottleneckConfig, PrefixTokensConfig, PromptTokensConfig
from growthring.guards import PEGP


def bert(seed: int = 0, **changes: Any) -> BertModel:
    """Weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    return BertModel(bert_config(initializer_range=0.2, **changes), add_pooling_layer=False)


def gpt2(seed: int = 0) -> GPT2Model:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=60,
        n_positions=40,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return GPT2Model(config)


def llama(seed: int = 0, **changes: Any) -> LlamaModel:
    """Four query heads on two key heads, 16 wide."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 60,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        **changes,
    }
    return LlamaModel(LlamaConfig(**settings))


def vit(seed: int = 0, **changes: Any) -> ViTModel:
    """Four patches and a class token."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
        **changes,
    }
    return ViTModel(ViTConfig(**settings), add_pooling_layer=False)


def images(count: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator).to(dtype)}


def relu_mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def adapter_mlp(dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    settings = {"r": 8, "target_modules": ["0", "2"], "init_weights": False, **config}
    base = relu_mlp()
    torch.manual_seed(1)
    return get_peft_model(base, BottleneckConfig(**settings)).to(dtype)


def adapter_bert(**config: Any) -> nn.Module:
    base = bert()
    torch.manual_seed(1)
    return get_peft_model(base, BottleneckConfig(**{"r": 16, "init_weights": False, **config}))


def ia3_mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Six units of the first layer read only the second half of the input and have no bias: they may be silent."""
    base = relu_mlp()
    with torch.no_grad():
        base[0].weight[:6, :10] = 0.0
        base[0].bias[:6] = 0.0
    config = IA3Config(target_modules=["0", "2", "4"], feedforward_modules=["2", "4"])
    return get_peft_model(base, config).to(dtype)


def half(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs whose second half is zero."""
    x = rows(count, 20, seed, dtype)
    x[:, 10:] = 0.0
    return x


def _scaled(model: nn.Module, size: float, seed: int) -> nn.Module:
    """Prompts as large as features are, so that attention notices them."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=size)
    return model


def prefix(base: nn.Module | None = None, tokens: int = 14, size: float = 0.5, **config: Any) -> nn.Module:
    settings = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=tokens, **config)
    return _scaled(get_peft_model(base or bert(), settings), size, 1)


def prompt(base: nn.Module | None = None, tokens: int = 14, size: float = 0.5, **config: Any) -> nn.Module:
    settings = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=tokens, **config)
    return _scaled(get_peft_model(base or bert(), settings), size, 1)


def prefix_vit(tokens: int = 14, size: float = 0.5) -> nn.Module:
    return _scaled(get_peft_model(vit(), PrefixTokensConfig(num_tokens=tokens)), size, 1)


def prompt_vit(tokens: int = 14, size: float = 0.5) -> nn.Module:
    return _scaled(get_peft_model(vit(), PromptTokensConfig(num_tokens=tokens)), size, 1)


PREFIXES: dict[str, Callable[[], nn.Module]] = {
    "bert": prefix,
    "gpt2": lambda: prefix(gpt2()),
    "llama": lambda: prefix(llama()),
    "vit": prefix_vit,
}
PROMPTS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: prompt(tokens=5),
    "gpt2": lambda: prompt(gpt2(), tokens=5),
    "llama": lambda: prompt(llama(), tokens=5),
    "vit": lambda: prompt_vit(tokens=5),
}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, float]:
    """How far each trainable tensor went, relative to its size."""
    return {
        n: float((p.detach() - before[n]).norm() / before[n].norm().clamp_min(1e-3))
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def real(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Rows of real tokens, without prompts in front and padding behind."""
    mask = batch.get("attention_mask")
    if mask is None:
        return output
    return output[:, output.shape[1] - mask.shape[1] :][mask.bool()]


def guarded_step(model: nn.Module, guard: PEGP | None, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    if guard is not None:
        guard.before_step()
    optimizer.step()
    if guard is not None:
        guard.after_step()


def loss_at(model: nn.Module, batch: Any) -> float:
    """The loss without dropout."""
    out = answer(model, batch)
    return float(default_loss(lambda *_, **__: out, batch))
