"""What a run leaves behind: the model in formats that load anywhere, and what was asked for."""

from __future__ import annotations

import copy
import enum
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainingArguments

from growthring.errors import ConfigError
from growthring.guards import FreshLoRA, Guard, InfLoRA, OLoRA, merge_branches
from growthring.streams import TaskStream

from .classifier import StreamClassifier
from .dual import ClassPrompts
from .optimizing import Optimizer
from .vision import ImagePreprocessor

if TYPE_CHECKING:
    from .building import Built

__all__ = ["check_config", "check_folder", "describe_tasks", "resolved_config", "save_adapter", "save_model"]

_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "bf16",
    "fp16",
)
_ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "alpha",
    "init",
    "form",
    "svd_iterations",
    "target_modules",
    "feedforward_modules",
    "num_virtual_tokens",
    "num_tokens",
    "tower",
    "placement",
    "mode",
    "activation",
    "scaling",
)


def check_folder(folder: Path | None, source: Path | None) -> None:
    """Refuse a run folder that cannot be one, or whose model would land on the one that the run starts from.

    Raises:
        ConfigError: In both cases.
    """
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {str(folder)!r} is a file; give a folder")
    if source is not None and source.resolve() in ((folder / "model").resolve(), (folder / "adapter").resolve()):
        raise ConfigError(
            f"output_dir={str(folder)!r} would write the trained model over {str(source)!r}, which it starts from; "
            "choose another folder"
        )


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as it was given.

    Raises:
        ConfigError: If JSON cannot hold it; better now than when the results are written.
    """
    try:
        json.dumps(dict(config), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config goes into results.json and must hold plain values: {error}") from error
    return dict(config)


def resolved_config(
    method: str,
    adapter: PeftConfig | str | None,
    built: Built,
    args: TrainingArguments,
    steps: Mapping[str, int],
    optimizer: Optimizer | None,
    guards: Sequence[Guard],
) -> dict[str, Any]:
    """The settings of a run that was put together in Python, as plain values."""
    train = {key: _plain(getattr(args, key)) for key in _ARGUMENTS}
    train["steps"] = dict(steps)
    if optimizer is not None:
        train["optim"] = {"class": optimizer[0].__qualname__, **_plain(optimizer[1])}
    if isinstance(adapter, PeftConfig):
        kept = {key: getattr(adapter, key) for key in _ADAPTER if hasattr(adapter, key)}
        adapter = _plain(kept)
    images, head = built.collate.images, built.model.head
    return {
        "method": method,
        "adapter": adapter,
        "head": built.head,
        "pooling": built.pooling,
        "max_length": built.max_length if built.model.kind != "image" else None,
        "images": _plain(images.to_dict()) if images is not None else None,
        "prompt_template": head.template if isinstance(head, ClassPrompts) else None,
        "guards": [{"name": g.name, **(_plain(g.settings()) if hasattr(g, "settings") else {})} for g in guards],
        "train": train,
    }


def describe_tasks(stream: TaskStream) -> list[dict[str, Any]]:
    """Name, labels and sizes of the splits of every task."""
    return [
        {"name": t.name, "labels": list(t.labels), **{split: len(rows) for split, rows in t.splits().items()}}
        for t in stream
    ]


def save_model(
    folder: Path,
    model: StreamClassifier,
    tokenizer: Any,
    stream: TaskStream,
    guards: Sequence[Guard],
    images: ImagePreprocessor | None = None,
    base_changed: bool = False,
) -> None:
    """Write the adapter (stock PEFT) or the encoder (stock transformers), the head, and the guards' memory.

    An adapter whose base weights changed too would not fit the base that it is loaded on: it is merged into a copy of
    them, and the encoder is written. Beside an encoder stand its tokenizer and its ``preprocessor_config.json``, as
    far as it has them.
    """
    encoder: Any = model.encoder
    base_changed |= any(isinstance(guard, FreshLoRA) and guard.merge for guard in guards)
    if isinstance(encoder, PeftModel) and base_changed:
        encoder = copy.deepcopy(encoder).merge_and_unload()
    if isinstance(encoder, PeftModel):
        if any(isinstance(guard, FreshLoRA | InfLoRA | OLoRA) for guard in guards):
            encoder = copy.deepcopy(encoder)
            merge_branches(encoder)  # one stock LoRA in place of a branch for every task
        save_adapter(encoder, folder / "adapter")
    elif isinstance(encoder, PreTrainedModel):
        encoder.save_pretrained(str(folder / "model"))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder / "model"))
        if images is not None:
            images.save_pretrained(folder / "model")
    classes = [{"key": c.key, "label": c.label, "text": c.text} for c in stream.classes]
    model.save_head(folder, classes, images.to_dict() if images is not None else None)
    savers = [guard for guard in guards if callable(getattr(guard, "save_pretrained", None))]
    for number, guard in enumerate(savers):
        alike = sum(other.name == guard.name for other in savers[:number])
        place = guard.name if not alike else f"{guard.name}-{alike + 1}"
        guard.save_pretrained(folder / "memory" / place if len(savers) > 1 else folder / "memory")  # type: ignore[attr-defined]


def save_adapter(encoder: PeftModel, folder: Path) -> None:
    """Write an adapter as stock PEFT does."""
    with warnings.catch_warnings():
        # PEFT before 0.19 looks for the base model's config, to see whether its vocabulary was changed
        warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
        encoder.save_pretrained(str(folder))


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
