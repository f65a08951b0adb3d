"""From a configuration to a trainer, and to a run folder that says how it was made."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growthring._io import write_text
from growthring.errors import ConfigError

from . import _yaml
from .adapting import make_adapter, make_full_rank, make_guards, make_optimizer
from .config import RunConfig
from .methods import get_method
from .settings import DemoStreamConfig, TaskConfig, TrainSettings
from .sites import explain_sites, sites_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from growthring.streams import Task, TaskStream
    from growthring.trainer import ContinualTrainer, RunResult

__all__ = ["PRODUCTS", "build", "build_stream", "check_folder", "read_task", "run", "trainer_settings"]

logger = logging.getLogger(__name__)

PROMPT_TEMPLATE = "a photo of a {}."
PRODUCTS = ("results.json", "adapter", "model", "memory")
"""What a finished run leaves behind, and what no other run may land on by accident."""

_TRACES = (
    "config.yaml", "log.jsonl", "report.html", "tensorboard", "head.json", "head.safetensors", "classifiers",
)  # fmt: skip
_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor"}


def build_stream(config: RunConfig) -> TaskStream:
    """Read the tasks of a configuration.

    Raises:
        DataError: A file or a row is wrong; the message names task, split and row.
        GrowthringError: The demo's data cannot be had.
    """
    from growthring.streams import TaskStream, demo_stream

    stream = config.stream
    if isinstance(stream, DemoStreamConfig):
        return demo_stream(stream.seed or 0, stream.train, stream.validation, stream.test)
    assert not isinstance(stream, str)  # RunConfig has replaced the name by what it stands for
    return TaskStream(
        [read_task(task, stream.seed or 0) for task in stream.tasks],
        scenario=stream.scenario,
        validation_fraction=stream.validation_fraction,
        seed=stream.seed or 0,
        name=stream.name,
        reference=read_task(stream.reference, stream.seed or 0) if stream.reference is not None else None,
    )


def build(
    config: RunConfig,
    *,
    progress: bool = False,
    output_dir: str | Path | None = None,
    stream: TaskStream | None = None,
    evaluate_validation: bool = False,
    evaluate_test: bool = True,
) -> ContinualTrainer:
    """Make the trainer that a configuration describes.

    Args:
        config: The configuration. Its ``threads`` are set for the whole process.
        progress: Draw progress bars on standard error.
        output_dir: Run folder; ``None`` writes nothing.
        stream: The stream of ``config``, if it was read already; several runs may share it.
        evaluate_validation: Also score the validation splits, to choose settings.
        evaluate_test: Score the test splits; searches for settings turn it off.

    Raises:
        GrowthringError: Data, model or settings cannot work; the message says what to change.
    """
    from growthring.trainer import ContinualTrainer

    method = get_method(config.method)
    stream = build_stream(config) if stream is None else stream
    for name in config.train.steps or {}:
        stream.index(name)
    if method.joint and config.train.steps and set(config.train.steps) != {task.name for task in stream}:
        raise ConfigError(
            "train.steps: the method 'joint' trains all tasks in one go; name every task, or use max_steps"
        )
    encoder, settings = trainer_settings(config, output_dir)
    return ContinualTrainer(
        encoder,
        stream,
        classifiers=config.classifiers,
        steps=config.train.steps,
        total_steps=config.train.total_steps,
        joint=method.joint,
        evaluate_validation=evaluate_validation,
        evaluate_test=evaluate_test,
        progress=progress,
        **settings,
    )


def trainer_settings(config: RunConfig, output_dir: str | Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder of a configuration, and everything that trainers of streams and of single tasks both take.

    Args:
        config: The configuration. Its ``threads`` are set for the whole process.
        output_dir: Run folder; ``None`` writes nothing.

    Raises:
        GrowthringError: Model or settings cannot work; the message says what to change.
    """
    import torch

    from growthring.streams import demo_encoder_path
    from growthring.trainer.models import load_encoder

    method = get_method(config.method)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    args = _arguments(config.train, config.seed, Path(output_dir) if output_dir is not None else None)
    encoder, tokenizer, _ = load_encoder(str(demo_encoder_path()) if config.model == "demo:minilm" else config.model)
    _check_model(config, encoder)
    return encoder, {
        "adapter": make_adapter(method, config.adapter, encoder),
        "optimizer": make_optimizer(method, config.optimizer),
        "full_rank": make_full_rank(method, config.adapter, encoder),
        "full_rank_lr": config.optimizer.full_rank_lr if config.optimizer is not None else None,
        "guards": make_guards(method, config.guard, config.adapter),
        "args": args,
        "tokenizer": tokenizer,
        "head": config.head,
        "pooling": config.pooling,
        "max_length": config.max_length,
        "image_size": config.image_size,
        "prompt_template": config.prompt_template or PROMPT_TEMPLATE,
        "seed": config.seed,
        "output_dir": output_dir,
        "method": method.name,
        "title": config.title,
        "tensorboard": config.tensorboard,
        "config": config.resolved(),
    }


def run(
    config: RunConfig,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
    stream: TaskStream | None = None,
) -> RunResult:
    """Learn the stream of a configuration and write a run folder.

    The folder gets ``config.yaml`` (every setting), ``results.json``, ``log.jsonl``, ``adapter/`` (stock PEFT) or
    ``model/``, ``head.*``, ``memory/`` of a guard, and ``report.html``.

    Args:
        config: The configuration.
        output: Run folder; default ``config.output``, else ``runs/<method>``.
        overwrite: Replace what an earlier run left in the folder. Other files in it are never touched.
        progress: Draw progress bars on standard error.
        stream: The stream of ``config``, if it was read already.

    Returns:
        The result; its ``folder`` is the run folder.

    Raises:
        ConfigError: The folder holds a run and ``overwrite`` is off, or it cannot be written.
        GrowthringError: Data, model or settings cannot work.
    """
    from growthring.report import optimizer_line

    folder = Path(output or config.output or Path("runs") / config.method)
    check_folder(folder, overwrite=overwrite)
    config = RunConfig.model_validate({**config.resolved(), "output": str(folder)})
    trainer = build(config, progress=progress, output_dir=folder, stream=stream)
    sites, plans = explain_sites(trainer), trainer.explain_optimizer()  # what cannot work says so before anything goes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*PRODUCTS, *_TRACES):
            _remove(folder / name)
        write_text(folder / "config.yaml", _yaml.dump(config.resolved()))
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written: {error.strerror or error}; choose another"
        ) from error
    logger.info("%s", sites_line(sites))
    if plans:
        logger.info("%s", optimizer_line(plans))
    result = trainer.fit()
    result.report(folder / "report.html")
    return result


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a run already.

    Raises:
        ConfigError: It does, and ``overwrite`` is off; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; the run needs a folder")
    held = [name for name in PRODUCTS if (folder / name).exists()]
    if held and not overwrite:
        raise ConfigError(
            f"{folder} already holds {', '.join(held)}; choose another folder, or overwrite it (--overwrite)"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_task(task: TaskConfig, seed: int) -> Task:
    """The task that a configuration describes, rows of limits drawn with ``seed``."""
    from growthring.streams import Task

    columns: dict[str, Any] = {"text": task.text} if task.image is None else {"image": task.image}
    columns |= {"label": task.label, "labels": task.labels, "label_texts": task.label_texts}
    if task.hub is not None:
        splits = {str(key): split for key, split in task.hub.splits.items()}
        made = Task.from_hub(task.name, task.hub.path, config=task.hub.config, splits=splits, **columns)
    else:
        made = Task(task.name, task.train, task.test, task.validation, **columns)
    if task.limit is None:
        return made
    return made.limit(train=task.limit.train, validation=task.limit.validation, test=task.limit.test, seed=seed)


def _arguments(train: TrainSettings, seed: int, folder: Path | None) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    accelerator = torch.accelerator.is_available()
    if train.precision == "fp16" and not accelerator:
        raise ConfigError("train.precision: 'fp16' needs a GPU and there is none here; use bf16 or fp32")
    schedule = "constant_with_warmup" if train.schedule == "constant" and train.warmup else train.schedule
    return TrainingArguments(
        output_dir=str(folder or Path(tempfile.gettempdir()) / "growthring"),  # nothing is written there
        learning_rate=train.learning_rate,
        per_device_train_batch_size=train.batch_size,
        num_train_epochs=train.epochs if train.epochs is not None else 1.0,
        max_steps=train.max_steps or -1,
        weight_decay=train.weight_decay,
        lr_scheduler_type=schedule,
        warmup_steps=train.warmup,  # below 1: a share of the steps
        max_grad_norm=train.max_grad_norm,
        gradient_accumulation_steps=train.gradient_accumulation,
        optim=_OPTIMIZERS[train.optimizer or "adamw"],
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        use_cpu=not accelerator,
        dataloader_pin_memory=accelerator,
        seed=seed,
        save_strategy="no",
        logging_steps=10,
        logging_first_step=True,
        disable_tqdm=True,
        report_to=[],
    )


def _check_model(config: RunConfig, encoder: nn.Module) -> None:
    """Refuse settings that have no effect on a model of this kind."""
    from growthring.trainer.encoders import kind_of

    reads, name = kind_of(encoder), type(encoder).__name__
    if config.prompt_template is not None and reads != "dual":
        raise ConfigError(
            f"prompt_template: has no effect: {name} is no dual encoder and reads no class prompts. Remove it"
        )
    energy = config.guard.energy if config.guard is not None else None
    label_text = config.head == "label-text" or (config.head == "auto" and reads != "image")
    named = [*(energy if isinstance(energy, Mapping) else ()), *((config.guard and config.guard.kinds) or ())]
    if label_text and "linear" in named and "linear" not in get_method(config.method).kinds:
        raise ConfigError(
            "guard: the kind linear has no effect: the only linear weight that could train is a linear head, and the "
            "head compares with label texts. Remove linear, or choose head: linear"
        )
