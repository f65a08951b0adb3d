"""The configuration of a run: one schema for Python, YAML files and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator, model_validator

from growthring.errors import ConfigError, nearest

from . import _yaml
from ._messages import explain
from ._method import Method
from .method_settings import TARGET_TAGS, AdapterSettings, GuardSettings, adapter_for, guard_for
from .methods import METHODS, get_method
from .optimizer_settings import OptimizerSettings, optimizer_for
from .settings import (
    DemoStreamConfig,
    Name,
    Section,
    Seed,
    StreamConfig,
    TrainSettings,
    absolute,
)

__all__ = ["DEMO_MODELS", "RunConfig", "checked", "config_schema", "load_config", "parse_config", "read_settings"]

DEMO_MODELS = ("demo:minilm",)
"""Models that the demo's assets hold."""

_TAGS = ("a name", "the demo", "own tasks", *TARGET_TAGS)
_SHOWN = 8

Checked = TypeVar("Checked", bound=Section)


def _branch(value: Any) -> str:
    if isinstance(value, Mapping):
        return "the demo" if "source" in value else "own tasks"
    return "a name" if isinstance(value, str) else "the demo" if isinstance(value, DemoStreamConfig) else "own tasks"


Stream: TypeAlias = Annotated[
    Annotated[Literal["demo"], Tag("a name")]
    | Annotated[DemoStreamConfig, Tag("the demo")]
    | Annotated[StreamConfig, Tag("own tasks")],
    Discriminator(_branch),
]


def model_place(value: str, info: ValidationInfo) -> str:
    """A folder made absolute, or a name as it is.

    Raises:
        ConfigError: It can only be a folder and there is none, or it is an unknown demo model.
    """
    if value.startswith("demo:"):
        if value not in DEMO_MODELS:
            raise ConfigError(f"there is no demo model {value!r}; {nearest(value, DEMO_MODELS)}")
        return value
    folder = Path(absolute(value, info))
    if folder.is_dir():
        return str(folder)
    if value.startswith((".", "/", "~")) or Path(value).is_absolute() or value.count("/") > 1 or "\\" in value:
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        tip = nearest(folder.name, beside) if beside else f"{folder.parent} does not exist or holds no folder"
        raise ConfigError(f"there is no folder {str(folder)!r}; {tip}")
    return value


class RunConfig(Section):
    """Everything that decides the outcome of a run, with the method's defaults filled in.

    Settings that have no effect for the chosen method are refused rather than ignored. Relative paths in a file start
    at the file's folder; ``output`` starts at the current one.

    Example:
        ```python
        config = gr.RunConfig(method="pegp", stream="demo", train={"learning_rate": 3e-3})
        result = gr.run(config, "runs/mine")
        ```
    """

    model: Name = Field(
        default="demo:minilm",
        description="demo:minilm, or the folder or hub name of a text encoder, an image encoder or a dual encoder.",
    )
    stream: Stream = Field(default="demo", description="demo, or the tasks to learn.")
    method: Name = Field(
        description="How to learn them; growthring methods lists the names.", json_schema_extra={"enum": list(METHODS)}
    )
    title: Name | None = Field(
        default=None, description="What tables and pages call this run. Default: the method's title."
    )
    adapter: AdapterSettings | None = Field(default=None, description="The adapter, for methods that have one.")
    guard: GuardSettings | None = Field(default=None, description="The guard, for methods that have one.")
    optimizer: OptimizerSettings | None = Field(
        default=None, description="The projected optimizer, for methods that have one of their own."
    )
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(), description="How each task is trained.")
    head: Literal["auto", "label-text", "linear"] = Field(
        default="auto",
        description="label-text: similarity to embedded label names (class prompts for a dual encoder). linear: a "
        "head that grows with the classes. auto: label-text where the model reads text.",
    )
    classifiers: list[Literal["head", "prototype", "ridge"]] = Field(
        default=["head"],
        min_length=1,
        description="Who answers, from the same features in the same run: the trained head, the nearest class mean, "
        "ridge regression on random features. The first one fills the main matrix.",
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
    seed: Seed = Field(default=0, description="Seed of data order, adapter initialisation and dropout.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: what PyTorch chooses.")
    output: Name | None = Field(
        default=None, description="Run folder. Default: runs/<name of the file>, or runs/<method>."
    )
    tensorboard: bool = Field(default=False, description="Write TensorBoard event files into the run folder.")

    _place = field_validator("model")(model_place)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        return get_method(value).name

    @field_validator("output")
    @classmethod
    def _no_file(cls, value: str | None) -> str | None:
        if value is not None and Path(value).is_file():
            raise ConfigError(f"{value!r} is a file; name a folder")
        return value

    @model_validator(mode="after")
    def _fill(self) -> RunConfig:
        """Check what depends on the method, then write its defaults in."""
        method = get_method(self.method)
        values: dict[str, Any] = {"title": self.title or method.title, "stream": self._filled_stream()}
        values["adapter"] = adapter_for(method, self.adapter)
        images = isinstance(values["stream"], StreamConfig) and values["stream"].images
        linear = self.head == "linear" or (self.head == "auto" and images)  # of an image encoder, that is
        values["guard"] = guard_for(method, self.guard, linear_head=linear)
        paper = method.guard == "gradient-memory" and values["guard"].mode == "paper"
        values["optimizer"] = optimizer_for(method, self.optimizer, paper=paper)
        values["train"] = self._filled_train(method)
        self._check_stream(values["stream"])
        self._check_steps(values["stream"])
        for name, value in values.items():
            object.__setattr__(self, name, value)
        return self

    def _filled_train(self, method: Method) -> TrainSettings:
        if method.optimizer is not None and self.train.optimizer is not None:
            raise ConfigError(
                f"train.optimizer: has no effect: the method {method.name!r} has an optimizer of its own, whose "
                "settings stand under optimizer. Remove train.optimizer"
            )
        plain = None if method.optimizer is not None else self.train.optimizer or "adamw"
        rate = self.train.learning_rate or method.learning_rate
        return self.train.model_copy(update={"learning_rate": rate, "optimizer": plain})

    def _filled_stream(self) -> DemoStreamConfig | StreamConfig:
        stream = DemoStreamConfig(source="demo") if isinstance(self.stream, str) else self.stream
        return stream if stream.seed is not None else stream.model_copy(update={"seed": self.seed})

    def _check_stream(self, stream: DemoStreamConfig | StreamConfig) -> None:
        """Refuse what has no effect, or cannot work, on a stream of this kind."""
        twice = {name for name in self.classifiers if self.classifiers.count(name) > 1}
        if twice:
            raise ConfigError(f"classifiers: {', '.join(sorted(twice))} stands there twice; name each once")
        images = isinstance(stream, StreamConfig) and stream.images
        for name in ("image_size", "prompt_template"):
            if getattr(self, name) is not None and not images:
                raise ConfigError(f"{name}: has no effect: the stream holds texts. Remove {name}")
        epochs = self.train.epochs
        if isinstance(stream, StreamConfig) and stream.scenario == "online-class" and epochs and epochs > 1:
            raise ConfigError(
                f"train.epochs: {epochs:g}: in an online-class stream each training row is seen once; at most 1 is "
                "allowed, or choose the scenario class"
            )

    def _check_steps(self, stream: DemoStreamConfig | StreamConfig) -> None:
        steps = self.train.steps or {}
        if isinstance(stream, DemoStreamConfig) or not steps:
            return
        names = [task.name for task in stream.tasks]
        for name in steps:
            if name not in names:
                raise ConfigError(f"train.steps.{name}: the stream has no such task; {nearest(name, names)}")

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as plain data that :func:`load_config` reads back to an equal one."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    """Plain data; keys that hold nothing because nothing is their default are left out."""
    if isinstance(value, Section):
        fields = ((name, field.default, getattr(value, name)) for name, field in type(value).model_fields.items())
        return {name: _plain(one) for name, default, one in fields if one is not None or default is not None}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def parse_config(data: Any, *, where: str = "configuration", base: str | Path | None = None) -> RunConfig:
    """Check plain data.

    Args:
        data: A mapping as :class:`RunConfig` describes.
        where: What messages call it, for example a file name.
        base: Folder at which relative paths start; default the current one.

    Raises:
        ConfigError: With every wrong key: its path, what came in, and what is allowed.
    """
    return checked(RunConfig, data, where=where, base=base, least="method: pegp")


def checked(kind: type[Checked], data: Any, *, where: str, base: str | Path | None, least: str) -> Checked:
    """Plain data as a section; arguments as for :func:`parse_config`.

    Args:
        kind: The section.
        data: A mapping.
        where: What messages call it.
        base: Folder at which relative paths start.
        least: The shortest data that would do, for a message.

    Raises:
        ConfigError: With every wrong key.
    """
    if not isinstance(data, Mapping):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{where}: must be a mapping of settings (key: value), but it is {what}. The least: {least}")
    try:
        return kind.model_validate(dict(data), context={"base": Path(base) if base else None})
    except ValidationError as error:
        # Unknown keys first: a misspelt key is often the reason why another one is missing.
        errors = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        found = [explain(one, kind, _TAGS) for one in errors]
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        lines = found[:_SHOWN] + more
        raise ConfigError(f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{where}:", *lines])) from None


def load_config(path: str | Path, **overrides: Any) -> RunConfig:
    """Read a configuration file.

    Args:
        path: A YAML or JSON file. A key that is there twice is refused; ``1e-3`` is a number.
        **overrides: Top-level settings that replace those of the file, for example ``seed=1``; ``None`` leaves the
            file's.

    Raises:
        ConfigError: The file cannot be read or a setting is wrong; see :func:`parse_config`.
    """
    file, data = read_settings(path)
    if isinstance(data, Mapping):
        data = {**data, **{key: value for key, value in overrides.items() if value is not None}}
    return parse_config(data, where=str(file), base=file.parent)


def read_settings(path: str | Path) -> tuple[Path, Any]:
    """The file, and the plain data in it.

    Raises:
        ConfigError: It cannot be read, or is no YAML or JSON.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        inside = file / "config.yaml"
        tip = f"did you mean {str(inside)!r}?" if inside.is_file() else "name a YAML or JSON file"
        raise ConfigError(f"{file}: this is a folder; {tip}")
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir() if p.is_file()] if file.parent.is_dir() else []
        tip = f"; {nearest(file.name, beside)}" if beside and len(beside) <= 50 else ""
        raise ConfigError(f"{file}: there is no such file{tip}")
    try:
        data = _yaml.parse(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return file, data


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors and other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
