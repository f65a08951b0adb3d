"""Running a model over batches of any usual form, without a trace of it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from growthring.errors import DataError, NumericalError

__all__ = [
    "answer_of",
    "evaluating",
    "head_of",
    "mask_for",
    "mask_of",
    "masks_apply",
    "output_of",
    "relative_change",
    "rows_in_front",
    "run_model",
    "size_of",
]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's training flag as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def size_of(batch: Any) -> int:
    """Number of examples in a batch: a mapping of tensors, a tuple that starts with one, or a tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    parts = (
        list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, tuple | list) else []
    )
    for part in parts:
        if isinstance(part, Tensor) and part.ndim:
            return part.shape[0]
    raise DataError(
        f"a batch must be a mapping of tensors, a tuple that starts with one, or a tensor; got {type(batch).__name__}"
    )


def head_of(batch: Any, count: int) -> Any:
    """The first ``count`` examples of a batch, tensors copied to the CPU; of a tuple, its input."""
    size = size_of(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            part = value[:count] if value.ndim and value.shape[0] == size else value
            return part.detach().cpu().clone()
        return value[:count] if isinstance(value, list | tuple) and len(value) == size else value

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return cut(batch[0])


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch, moved to where the model is. A tuple's first entry is the input."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    return model((batch if isinstance(batch, Tensor) else batch[0]).to(device))


def output_of(outputs: Any) -> Tensor | None:
    """The tensor that a model's outputs are about: logits, else the last hidden state, else the first tensor."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.ndim else None
    if isinstance(outputs, Mapping):
        for key in ("logits", "last_hidden_state"):
            if isinstance(outputs.get(key), Tensor):
                return outputs[key]
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        return next((o for o in outputs if isinstance(o, Tensor) and o.ndim), None)
    return None


def answer_of(model: nn.Module, batch: Any) -> Tensor | None:
    """What the model makes of a batch, without the rows that PEFT's prompt tuning puts in front of the tokens."""
    answer = output_of(run_model(model, batch))
    if answer is None or answer.ndim != 3 or not isinstance(model, PeftModel):
        return answer
    return answer[:, rows_in_front(model) :]


def rows_in_front(model: nn.Module) -> int:
    """Number of rows that PEFT's prompt tuning puts in front of the tokens; 0 without any."""
    for module in model.modules():
        config = module.active_peft_config if isinstance(module, PeftModel) else None
        if config is not None and config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING:
            return int(config.num_virtual_tokens)
    return 0


def masks_apply(model: nn.Module) -> bool:
    """False for encoder-decoder models: the mask is about the source, and the target may be as long by chance."""
    return not any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in model.modules())


def mask_of(batch: Any) -> Tensor | None:
    """The batch's attention mask ``(batch, tokens)``: one where a token counts; padding is nobody's knowledge.

    ``None`` if there is none of that form, and where images come beside the text: with as many patches as tokens, by
    chance, patches would be taken for padding.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask < 0).any()):
        return None
    images = any(isinstance(v, Tensor) and v.ndim >= 4 and v.is_floating_point() for v in batch.values())
    return None if images else mask


def mask_for(features: Tensor, batch: Any, front: int = 0) -> Tensor | None:
    """The batch's attention mask when it has one element for every feature row.

    Rows of learned prompts, ``front`` in front of the tokens, all count.
    """
    mask = mask_of(batch)
    if mask is None:
        return None
    if front and features.ndim == 3 and features.shape[:-1] == (mask.shape[0], front + mask.shape[1]):
        return torch.cat([mask.new_ones(mask.shape[0], front), mask], dim=1)
    if features.shape[:-1] == mask.shape or (
        features.ndim == 2 and features.shape[0] == mask.numel() != mask.shape[0]
    ):
        return mask
    return None


def relative_change(new: Tensor, old: Tensor, mask: Tensor | None = None) -> float:
    """``max |new - old| / max |old|`` over rows where ``mask`` is set, and over the columns that both have.

    A head that has grown since has more logits; the old ones are compared. Infinities that stand on both sides
    (columns masked out) carry no information. Where ``old`` is all zero, the change is absolute.

    Raises:
        NumericalError: If ``new`` is NaN or infinite where ``old`` is not: the weights have diverged.
    """
    width = min(new.shape[-1], old.shape[-1])
    new, old = new[..., :width].double().cpu(), old[..., :width].double().cpu()
    if mask is not None:
        keep = mask.reshape(-1).bool().cpu()
        new, old = new.reshape(-1, width)[keep], old.reshape(-1, width)[keep]
    known = torch.isfinite(old)
    if not bool(torch.isfinite(new[known]).all()):
        raise NumericalError(
            "the model answers inputs of an earlier task with NaN or infinity: training has diverged. Go back to a "
            "checkpoint and use a smaller learning rate"
        )
    if not bool(known.any()):
        return 0.0
    return float((new - old)[known].abs().max()) / (float(old[known].abs().max()) or 1.0)
