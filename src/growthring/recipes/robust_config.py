"""The configuration of a robustness sweep: one task, sets of other domains, and the methods that are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from growthring.errors import ConfigError, nearest

from .config import RunConfig, checked, model_place, read_settings
from .method_settings import AdapterSettings
from .methods import METHODS, get_method
from .optimizer_settings import OptimizerSettings
from .settings import Name, Rows, Section, Seed, TaskConfig, TrainSettings, absolute

__all__ = [
    "Candidate",
    "DomainConfig",
    "RobustConfig",
    "RobustMethod",
    "load_robust_config",
    "parse_robust_config",
    "robust_schema",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]

_BRANCHING = ("inflora", "o-lora")


class DomainHub(Section):
    """A split of a data set of the Hugging Face hub."""

    path: Name = Field(description="Name on the hub.")
    config: str | None = Field(default=None, description="Configuration of the data set, if it has several.")
    split: Name = Field(default="test", description="The split that is scored.")


class DomainConfig(Section):
    """Labelled rows of another domain. They are read once, when every choice has been written down."""

    name: Name = Field(description="Name of the domain.")
    test: Name | None = Field(
        default=None,
        description="Rows: a jsonl, json, csv, tsv or parquet file (.gz too); of images also a folder that holds one "
        "folder a class.",
    )
    hub: DomainHub | None = Field(default=None, description="A data set of the hub, in place of a file.")
    text: Name | None = Field(default=None, description="Name of the text column. Default: text.")
    image: Name | None = Field(default=None, description="Name of the image column, in place of text.")
    label: Name = Field(default="label", description="Name of the label column; labels are those of the task.")
    limit: Rows | None = Field(default=None, description="Largest number of rows, stratified by label.")

    _absolute = field_validator("test")(lambda path, info: path and absolute(path, info))

    @field_validator("name")
    @classmethod
    def _names_a_file(cls, name: str) -> str:
        """Checked here, since the set itself is only made when all is trained."""
        from growthring.streams._checks import check_name

        check_name(name, "domain")
        return name

    @model_validator(mode="after")
    def _one_source(self) -> DomainConfig:
        if (self.test is None) == (self.hub is None):
            raise ConfigError(f"domain {self.name!r}: give test (a file) or hub, one of the two")
        if self.text is not None and self.image is not None:
            raise ConfigError(
                f"domain {self.name!r} names a text and an image column; its inputs are one or the other"
            )
        return self


class RobustMethod(Section):
    """A method, and the settings among which the validation rows choose."""

    method: Name = Field(
        description="A method that growthring methods lists.", json_schema_extra={"enum": list(METHODS)}
    )
    name: Name | None = Field(default=None, description="What it is called here, unique. Default: the method.")
    title: Name | None = Field(
        default=None, description="What tables and pages call it. Default: name, else the method's title."
    )
    learning_rate: Annotated[list[Rate], Field(min_length=1)] | None = Field(
        default=None, description="Learning rates to choose from. Default: that of the method alone."
    )
    adapter: AdapterSettings | None = Field(default=None, description="The adapter, for methods that have one.")
    guard: dict[str, Any] | None = Field(
        default=None,
        description="Settings of the guard; a list is a list of values to choose from (kinds, which is a list itself, "
        "is one value).",
    )
    optimizer: OptimizerSettings | None = Field(
        default=None, description="The projected optimizer, for methods that have one of their own."
    )
    start: Literal["probe", "scratch", "label-text"] | None = Field(
        default=None,
        description="Where the head starts: logistic regression on the features of the untouched model (probe), small "
        "random rows (scratch). Default: probe for a linear head, label-text for that of this name.",
    )

    @field_validator("method")
    @classmethod
    def _one_task(cls, value: str) -> str:
        method = get_method(value)
        if method.joint or method.guard in _BRANCHING or method.adapter == "lora+weights":
            why = "trains on all tasks of a stream" if method.joint else "makes a branch for every task of a stream"
            raise ConfigError(f"the method {value!r} {why}; here is one task. Choose a method for single tasks")
        return method.name

    @model_validator(mode="after")
    def _some_to_choose_from(self) -> RobustMethod:
        lists = {f"guard.{k}": v for k, v in (self.guard or {}).items() if isinstance(v, list)}
        for name, values in {"learning_rate": self.learning_rate, **lists}.items():
            if values is not None and not values:
                raise ConfigError(f"{name}: the list is empty; give at least one value")
            if values is not None and any(value in values[:place] for place, value in enumerate(values)):
                raise ConfigError(f"{name}: {values} holds a value twice; name each once")
        return self

    @property
    def key(self) -> str:
        """What it is called."""
        return self.name or self.method

    def grid(self) -> Iterator[tuple[float, dict[str, Any] | None]]:
        """Every combination of learning rate and guard settings, in the order given."""
        guard = {
            name: value if isinstance(value, list) and name != "kinds" else [value]
            for name, value in (self.guard or {}).items()
        }
        for rate in self.learning_rate or [get_method(self.method).learning_rate]:
            for values in itertools.product(*guard.values()):
                yield rate, dict(zip(guard, values, strict=True)) if self.guard is not None else None


@dataclass(frozen=True)
class Candidate:
    """One setting of one method.

    Attributes:
        entry: Place of the method in the sweep.
        config: Everything that decides its training, with the seed of the search.
        start: Where the head starts.
        chosen: What of it was up for choice.
    """

    entry: int
    config: RunConfig
    start: str | None
    chosen: dict[str, Any]

    def seeded(self, seed: int) -> RunConfig:
        """The configuration of the training with this seed."""
        return self.config.model_copy(update={"seed": seed})


class RobustConfig(Section):
    """A robustness sweep: what is trained on one task, chosen on its validation rows, and scored on other domains.

    Example:
        ```python
        config = load_robust_config("robust.yaml")
        results = run_robust(config, "runs/robust")
        ```
    """

    model: Name = Field(
        default="demo:minilm",
        description="demo:minilm, or the folder or hub name of a text encoder, an image encoder or a dual encoder.",
    )
    task: TaskConfig = Field(description="The task that is trained on.")
    ood: list[DomainConfig] = Field(min_length=1, description="The other domains, which are only scored, at the end.")
    methods: list[RobustMethod] = Field(
        min_length=1, description="The methods, each with its settings to choose from."
    )
    frontier: list[Name] = Field(
        default=[],
        description="Names of the methods that make the frontier: all their settings are trained with all seeds, and "
        "their WiSE curves count.",
    )
    wise: list[Fraction] = Field(
        default=[0.0, 0.2, 0.4, 0.6, 0.8],
        description="Places between start (0) and trained model (1) that are scored too; the trained model always is.",
    )
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default=[0, 1, 2], description="Seeds of the training.")
    search_seed: Seed = Field(default=0, description="Seed with which settings are tried.")
    data_seed: Seed = Field(
        default=0, description="Draws the rows of limits, and validation rows where the task has none."
    )
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of train split off where no validation rows are given."
    )
    train: TrainSettings = Field(
        default_factory=lambda: TrainSettings(),
        description="How each point is trained; learning rates are the methods'.",
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between two looks at the validation rows; the weights that are best there stay. "
        "Default: the last ones.",
    )
    head: Literal["linear", "label-text"] = Field(
        default="linear", description="linear: a linear head. label-text: similarity to embedded label names."
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        default="auto", description="How token vectors become one."
    )
    max_length: int = Field(default=128, ge=3, description="Tokens kept of a text.")
    image_size: int | None = Field(
        default=None, ge=1, description="Pixels of each side of the images that the model is given. Default: its own."
    )
    prompt_template: Name | None = Field(
        default=None, description="Class prompt of a dual encoder, with {} for the class. Default: a photo of a {}."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: what PyTorch chooses.")
    output: Name | None = Field(default=None, description="Folder. Default: runs/<name of the file>.")

    _place = field_validator("model")(model_place)

    @model_validator(mode="after")
    def _fits(self) -> RobustConfig:
        for what, names in (
            ("methods", [entry.key for entry in self.methods]),
            ("ood", [domain.name for domain in self.ood]),
            ("seeds", [str(seed) for seed in self.seeds]),
            ("frontier", self.frontier),
            ("wise", [f"{alpha:g}" for alpha in self.wise]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                more = "; give one of them another name" if what in ("methods", "ood") else "; name it once"
                raise ConfigError(f"{what}: {twice[0]!r} is there twice{more}")
        if self.task.name in [domain.name for domain in self.ood]:
            raise ConfigError(f"ood: {self.task.name!r} is the name of the task; a domain is something else")
        for name in self.frontier:
            keys = [entry.key for entry in self.methods]
            if name not in keys:
                raise ConfigError(f"frontier: there is no method {name!r} here; {nearest(name, keys)}")
        for entry in self.methods:
            if entry.start is not None and (entry.start == "label-text") != (self.head == "label-text"):
                raise ConfigError(
                    f"methods: {entry.key!r} has start: {entry.start}, and head is {self.head}: a head of label texts "
                    "starts from them and does not train, a linear head starts from probe or scratch"
                )
        for key in ("learning_rate", "total_steps", "steps"):
            if getattr(self.train, key) is not None:
                where = "methods, each has its own" if key == "learning_rate" else "streams; give max_steps or epochs"
                raise ConfigError(f"train.{key}: has no place here: it is for {where}. Remove it")
        if self.output is not None and Path(self.output).is_file():
            raise ConfigError(f"output: {self.output!r} is a file; name a folder")
        self.candidates()
        return self

    def candidates(self) -> list[Candidate]:
        """Every setting of every method, in the order given.

        Raises:
            ConfigError: One cannot work; the message says which.
        """
        shared = {
            "model": self.model,
            "stream": {"tasks": [self.task], "validation_fraction": self.validation_fraction, "seed": self.data_seed},
            **{key: getattr(self, key) for key in ("head", "pooling", "max_length", "image_size", "prompt_template")},
            "threads": self.threads,
        }
        train = {k: v for k, v in self.train.model_dump().items() if v is not None and k != "learning_rate"}
        if self.train.max_steps is not None:
            train.pop("epochs", None)
        found: list[Candidate] = []
        for place, entry in enumerate(self.methods):
            for rate, guard in entry.grid():
                data = {**shared, "method": entry.method, "title": entry.title or entry.name, "adapter": entry.adapter}
                data["optimizer"] = entry.optimizer
                data |= {"guard": guard, "train": {**train, "learning_rate": rate}}
                config = checked(RunConfig, data, where=f"methods[{place}] ({entry.key})", base=None, least="")
                several = {
                    name: value
                    for name, value in (guard or {}).items()
                    if isinstance((entry.guard or {})[name], list) and name != "kinds"
                }
                found.append(
                    Candidate(entry=place, config=config, start=entry.start, chosen={"learning_rate": rate, **several})
                )
        return found

    def resolved(self) -> dict[str, Any]:
        """Every setting that is not left to a default of nothing, as plain data that reads back to an equal one."""
        return self.model_dump(mode="json", exclude_none=True)


def parse_robust_config(data: Any, *, where: str = "configuration", base: str | Path | None = None) -> RobustConfig:
    """Check plain data.

    Args:
        data: A mapping as :class:`RobustConfig` describes.
        where: What messages call it, for example a file name.
        base: Folder at which relative paths start; default the current one.

    Raises:
        ConfigError: With every wrong key: its path, what came in, and what is allowed.
    """
    return checked(RobustConfig, data, where=where, base=base, least="task, ood and methods")


def load_robust_config(path: str | Path) -> RobustConfig:
    """Read a configuration file, YAML or JSON.

    Raises:
        ConfigError: The file cannot be read or a setting is wrong.
    """
    file, data = read_settings(path)
    return parse_robust_config(data, where=str(file), base=file.parent)


def robust_schema() -> dict[str, Any]:
    """The JSON Schema of a sweep's configuration file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RobustConfig.model_json_schema()}
