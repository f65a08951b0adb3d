"""What is compared: adapters, guards, baselines, and the settings that the search tries for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

import _runs
import growthring as gr
from _runs import Setting
from growthring.guards import Certificate, Guard

ADAPTERS = ("lora", "adapter", "prefix", "prompt")
VARIANTS = ("unprotected", "gradient", "paper", "strict")
BASELINES = ("linear", "joint", "osf")
SAMPLES = 96
"""Training rows whose features a guard collects of each task."""
LENGTH = 8
"""Learned prefix or prompt tokens."""
ATTENTION = {
    "text": ["query", "key", "value", "attention.output.dense"],
    "image": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
UP = {"text": ["intermediate.dense"], "image": ["fc1"]}


@dataclass(frozen=True)
class Cell:
    """One place in the table.

    Attributes:
        stream: Name of the stream.
        adapter: ``"lora"``, ``"adapter"``, ``"prefix"``, ``"prompt"``; for a baseline its own name.
        variant: ``"unprotected"``, ``"gradient"``, ``"paper"``, ``"strict"``; for a baseline ``"baseline"``.
    """

    stream: str
    adapter: str
    variant: str

    def __str__(self) -> str:
        return f"{self.stream} {self.adapter} {self.variant}"

    @property
    def modality(self) -> str:
        """``"text"`` or ``"image"``."""
        return "image" if self.stream == "fashion" else "text"


_LOW_RANK = (5e-5, 2e-4, 7e-4, 2e-3, 5e-3, 1.2e-2)
_TOKENS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
_WEIGHTS = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
_IMAGE_TOKENS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RATES: Mapping[str, tuple[float, ...]] = {
    "lora": _LOW_RANK,
    "adapter": _LOW_RANK,
    "prefix": _TOKENS,
    "prompt": _TOKENS,
    "linear": _WEIGHTS,
    "osf": _WEIGHTS[1:4],
    "joint": _LOW_RANK,
}
"""Learning rates in rising order, the same for every variant of an adapter; the search starts in the middle."""
_IMAGE_WEIGHTS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
IMAGE_RATES = {
    **RATES,
    **dict.fromkeys(("prefix", "prompt"), _IMAGE_TOKENS),
    "linear": _IMAGE_WEIGHTS,
    "osf": _IMAGE_WEIGHTS[2:5],
}
"""The same for images, where a new linear head learns at the same rate."""
ENERGIES = {"text": (0.95, 0.8), "image": (0.99, 0.9)}
"""Energies that the search tries, by the wide kind of site; see :func:`energies`. In image features a few directions
hold most of the energy, so a share has to be higher to cover as many."""
NARROW = {0.99: 0.95, 0.95: 0.9, 0.9: 0.7, 0.8: 0.6}
"""Energies of narrow sites (the rank, the bottleneck, the tokens) beside them: these fill up sooner."""


def cells(streams: Iterable[str]) -> Iterator[Cell]:
    """Every cell, those of the published claim first."""
    streams = tuple(streams)
    for variant in ("unprotected", "strict"):
        yield from (Cell(stream, adapter, variant) for adapter in ADAPTERS for stream in streams)
    yield from (Cell(stream, baseline, "baseline") for baseline in ("linear", "joint") for stream in streams)
    for variant in ("gradient", "paper"):
        yield from (Cell(stream, adapter, variant) for adapter in ADAPTERS for stream in streams)
    yield from (Cell(stream, "linear", "strict") for stream in streams if stream != "fashion")  # there, minutes a run
    yield from (Cell(stream, "osf", "baseline") for stream in streams)  # last: a run takes three times as long


def next_setting(cell: Cell, scores: Mapping[Setting, float]) -> Setting | None:
    """What the search tries next of a cell, given what its settings scored; see :func:`_runs.next_setting`."""
    rates = (IMAGE_RATES if cell.modality == "image" else RATES)[cell.adapter]
    free = cell.variant in ("unprotected", "baseline")
    return _runs.next_setting(rates, (None,) if free else ENERGIES[cell.modality], scores)


def adapter(cell: Cell, tasks: int) -> PeftConfig | str:
    """What trains."""
    where = ATTENTION[cell.modality] + UP[cell.modality]
    if cell.adapter in ("lora", "joint"):
        return LoraConfig(r=8, lora_alpha=16, target_modules=where)
    if cell.adapter == "linear":
        return "linear"
    if cell.adapter == "osf":
        return OSFConfig(effective_rank=1, target_modules="all-linear")
    if cell.adapter == "adapter":
        from growthring.adapters import BottleneckConfig

        return BottleneckConfig(r=16, placement="both")
    if cell.modality == "image":
        from growthring.adapters import PrefixTokensConfig, PromptTokensConfig

        return (PrefixTokensConfig if cell.adapter == "prefix" else PromptTokensConfig)(num_tokens=LENGTH)
    kind = PrefixTuningConfig if cell.adapter == "prefix" else PromptTuningConfig
    return kind(task_type="FEATURE_EXTRACTION", num_virtual_tokens=LENGTH)


def energies(cell: Cell, energy: float) -> dict[str, float]:
    """The energy of each kind of site."""
    narrow = NARROW[energy]
    kinds = {
        "lora": {"lora_A": energy, "lora_B": narrow},
        "adapter": {"adapter_down": energy, "adapter_up": narrow},
        "prefix": {"prefix_key": energy, "prefix_value": energy},
        "prompt": {"prompt_key": energy, "prompt_value": narrow},
        "linear": {"linear": energy},
    }
    return kinds[cell.adapter]


def guards(cell: Cell, setting: Setting, tasks: int, *, watch: bool) -> list[Guard]:
    """The guards of one run.

    Args:
        cell: The cell.
        setting: Its settings.
        tasks: Tasks of the stream.
        watch: Whether an unguarded run also measures what it leaks.
    """
    if cell.adapter == "osf":
        return [OsfSchedule(tasks)]
    if cell.variant == "baseline":
        return []
    if cell.variant == "unprotected":
        return [Watch(energies(cell, ENERGIES[cell.modality][0]), samples=SAMPLES)] if watch else []
    assert setting.energy is not None
    energy = energies(cell, setting.energy)
    options: dict[str, Any] = {"samples": SAMPLES}
    if cell.variant == "gradient":
        options["project"] = "gradient"
    if cell.variant == "paper":
        figure = {"lora": "lora_B", "adapter": "adapter_up"}
        options |= {"mode": "paper"}
        if cell.adapter in figure:
            kind = figure[cell.adapter]
            options["kinds"], energy = (kind,), {kind: energy[kind]}
    return [gr.PEGP(energy, **options)]


class Watch(gr.PEGP):
    """Measures leak and drift of an unguarded run as PEGP does, and corrects nothing."""

    name = "watch"

    def before_step(self) -> None:
        """Leave the gradients."""

    def after_step(self) -> None:
        """Leave the step."""


class OsfSchedule(Guard):
    """PEFT's OSF from task to task: merge, decompose again, and keep a share ``t / n`` of the singular directions.

    A guard only in so far as it is called between the tasks; OSF projects in hooks of its own.

    Args:
        tasks: Number of tasks ``n``.
    """

    name = "osf"

    def __init__(self, tasks: int) -> None:
        self._tasks, self._done = tasks, 0
        self._model: nn.Module | None = None

    def attach(self, model: nn.Module) -> None:
        """Remember the model, whose ``encoder`` is exchanged."""
        self._model = model

    def begin_task(self, task: str | None = None) -> None:
        """Nothing to do."""

    def end_task(self, task: str | None, batches: Iterable[Any]) -> Certificate:
        """Merge what the task learned into the weights, and start the next decomposition from there."""
        assert self._model is not None
        self._done += 1
        plain = self._model.encoder.merge_and_unload()  # type: ignore[union-attr,operator]
        if self._done < self._tasks:
            config = OSFConfig(effective_rank=self._done / self._tasks, target_modules="all-linear")
            plain = get_peft_model(plain, config)
        self._model.encoder = plain
        return Certificate(
            self.name, task or "", self._done - 1, self._done - 1, None, None, 1.0, 0, 0, None, 0, 0, ()
        )

    def state_dict(self) -> dict[str, Any]:
        """Tasks done."""
        return {"done": torch.tensor(self._done)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the count."""
        self._done = int(state["done"])
