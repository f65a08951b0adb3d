"""The parts of a run's configuration. Types are strict: ``"3"`` is not a number and ``1`` is not ``true``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from growthring.errors import ConfigError

__all__ = [
    "DemoStreamConfig",
    "HubConfig",
    "LimitConfig",
    "Section",
    "StreamConfig",
    "TaskConfig",
    "TrainSettings",
]

Rows: TypeAlias = Annotated[int, Field(gt=0)]
Name: TypeAlias = Annotated[str, Field(min_length=1)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=4_000_000)]

SplitName: TypeAlias = Literal["train", "validation", "test"]


def _train_and_test() -> dict[SplitName, str]:
    return {"train": "train", "test": "test"}


def absolute(path: str, info: ValidationInfo) -> str:
    """``path`` made absolute from the folder of the configuration file, or from the current one."""
    base = (info.context or {}).get("base") or Path.cwd()
    return str((Path(base) / Path(path).expanduser()).resolve())


class Section(BaseModel):
    """A part of a configuration: no unknown keys, no silent conversions, no change after it was checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class HubConfig(Section):
    """A data set of the Hugging Face hub."""

    path: Name = Field(description="Name on the hub, for example SetFit/sst2.")
    config: str | None = Field(default=None, description="Configuration of the data set, if it has several.")
    splits: dict[SplitName, str] = Field(
        default_factory=_train_and_test,
        description="Which split of the data set is train, test and (optional) validation.",
    )


class LimitConfig(Section):
    """Largest number of rows of each split; drawn with the stream's seed, stratified by label."""

    train: Rows | None = Field(default=None, description="Training rows; all if left out.")
    validation: Rows | None = Field(default=None, description="Validation rows; all if left out.")
    test: Rows | None = Field(default=None, description="Test rows; all if left out.")


class TaskConfig(Section):
    """One task: files, or a data set of the hub."""

    name: Name = Field(description="Name of the task, unique in the stream.")
    train: Name | None = Field(
        default=None,
        description="Training rows: a jsonl, json, csv, tsv or parquet file (.gz too); of images also a folder that "
        "holds one folder a class.",
    )
    test: Name | None = Field(default=None, description="Test rows, in such a file or folder.")
    validation: Name | None = Field(default=None, description="Validation rows; split off train if left out.")
    hub: HubConfig | None = Field(default=None, description="A data set of the hub, in place of files.")
    text: Name | None = Field(default=None, description="Name of the text column. Default: text.")
    image: Name | None = Field(
        default=None, description="Name of the image column (arrays or paths of image files), in place of text."
    )
    label: Name = Field(default="label", description="Name of the label column.")
    labels: list[str] | None = Field(
        default=None, description="The labels in the order wanted; default: those of train."
    )
    label_texts: dict[str, str] | None = Field(
        default=None, description="What a label means in words, for the label-text head."
    )
    limit: LimitConfig | None = Field(default=None, description="Largest number of rows of each split.")

    _absolute = field_validator("train", "test", "validation")(lambda path, info: path and absolute(path, info))

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        files = [key for key in ("train", "test", "validation") if getattr(self, key) is not None]
        if self.hub is not None and files:
            raise ConfigError(f"task {self.name!r} names both hub and {', '.join(files)}; give one of the two")
        missing = [key for key in ("train", "test") if getattr(self, key) is None]
        if self.hub is None and missing:
            raise ConfigError(
                f"task {self.name!r} lacks {' and '.join(missing)}: give files for train and test, or hub"
            )
        self._fill_columns()
        return self

    def _fill_columns(self) -> None:
        """A folder can only hold images; everything else holds texts unless it says otherwise."""
        column = "image" if self.image is None and self.train and Path(self.train).is_dir() else self.image
        if column is not None and self.text is not None:
            why = "" if self.image else f" (train is the folder {self.train})"
            raise ConfigError(
                f"task {self.name!r} names the text column {self.text!r} and holds images{why}; drop text"
            )
        object.__setattr__(self, "image", column)
        object.__setattr__(self, "text", self.text or "text" if column is None else None)


class StreamConfig(Section):
    """Tasks of one's own, in the order in which they are learned."""

    tasks: list[TaskConfig] = Field(min_length=1, description="The tasks, in order.")
    name: Name = Field(default="stream", description="Name of the stream.")
    scenario: Literal["task", "class", "online-class", "domain"] = Field(
        default="task",
        description="task: the task of a test example is known. class: all labels seen so far compete. "
        "online-class: the same, and each training row is seen once. domain: all tasks share one set of labels.",
    )
    reference: TaskConfig | None = Field(
        default=None,
        description="What the model can do before the first task: guarded and scored, never trained on.",
    )
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of train split off where no validation rows are given."
    )
    seed: Seed | None = Field(
        default=None,
        description="Chooses the rows split off, the rows of limits and the order of an online pass; default: the "
        "run's seed.",
    )

    @property
    def images(self) -> bool:
        """Whether the tasks hold images."""
        return any(task.image is not None for task in self.tasks)


class DemoStreamConfig(Section):
    """The demo's five text tasks, with so many rows of each."""

    source: Literal["demo"] = Field(description="Always demo.")
    train: Rows | None = Field(default=600, description="Training rows a task; null for all there are.")
    validation: Rows | None = Field(default=200, description="Validation rows a task.")
    test: Rows | None = Field(default=500, description="Test rows a task.")
    seed: Seed | None = Field(default=None, description="Draws the rows; default: the run's seed.")


class TrainSettings(Section):
    """How each task is trained."""

    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate. Default: that of the method."
    )
    batch_size: int = Field(default=16, ge=1, description="Examples a step and device.")
    epochs: float | None = Field(
        default=None, gt=0, description="Passes over each task's training rows. Default 1, unless steps are given."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps of each task, in place of epochs.")
    total_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps of the whole stream, shared equally over its tasks."
    )
    steps: dict[str, Rows] | None = Field(default=None, description="Optimizer steps of single tasks, by name.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Learning rate over each task's steps."
    )
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each task's steps over which the learning rate rises."
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to this norm; 0 does not clip.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches whose gradients make one step.")
    optimizer: Literal["adamw", "sgd", "adafactor"] | None = Field(
        default=None,
        description="Optimizer, for methods without one of their own; fresh for each task. Default adamw.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Arithmetic of the forward and backward pass."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> TrainSettings:
        given = [key for key in ("epochs", "max_steps", "total_steps") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are two budgets for the same thing; give one of them")
        if self.total_steps is not None and self.steps:
            raise ConfigError(
                "total_steps shares the whole budget over all tasks, so steps has no place beside it; drop one"
            )
        if not given:
            object.__setattr__(self, "epochs", 1.0)
        return self
