"""Classifiers that are computed from features in one pass, with no gradient: nearest class means, and a ridge head.

Both keep sums over examples and nothing else, so their memory does not grow with the number of examples or tasks, the
order of examples and tasks does not change them, and a class that was learned is never unlearned by a later one. What
they cannot do is follow an encoder that goes on training: statistics of earlier tasks are those of the features as
they were when the task ended.
"""

from __future__ import annotations

import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from growthring._io import write_with
from growthring.errors import ConfigError, DataError, NumericalError, nearest
from growthring.subspace import SecondMoment

__all__ = [
    "CLASSIFIERS",
    "AnalyticClassifier",
    "Classifier",
    "PrototypeClassifier",
    "RidgeClassifier",
    "check_classifiers",
    "held_out",
    "make_classifiers",
]

Classifier = Literal["head", "prototype", "ridge"]
CLASSIFIERS: tuple[Classifier, ...] = ("head", "prototype", "ridge")

WIDTH = 2048
"""Default number of random features, chosen by measuring: on 150 intents with a 384-dimensional encoder 512, 1024,
2048 and 4096 gave 90.6, 92.6, 93.0 and 94.2 % (nearest class means 91.4 %), and one core solves for the weights once
in 0.02, 0.06, 0.3 and 1.2 s; about five solutions are needed a task."""

RIDGES = tuple(range(-8, 5))
"""Ridges that are tried: ``10^(e/2)`` times the mean eigenvalue of the second moment. From 1e-4 on, the linear system
is solved to nine digits and more, whatever the order of the examples."""

_START = -2
_FORMAT = {"format": "growthring.classifier", "format_version": "1"}


class AnalyticClassifier(ABC):
    """What both kinds share: they are updated with features and labels, and score features.

    Args:
        dim: Feature dimension ``d``.
        classes: Number of classes ``C`` that there will ever be; class ids are ``0..C-1``.

    Raises:
        ConfigError: If one of them is below 1.
    """

    name: ClassVar[str]

    def __init__(self, dim: int, classes: int) -> None:
        if dim < 1 or classes < 1:
            raise ConfigError(f"{type(self).__name__}(dim={dim}, classes={classes}): both must be at least 1")
        self.dim, self.classes = dim, classes
        self.counts = torch.zeros(classes, dtype=torch.int64)
        """Examples of every class so far, ``(C,)``."""

    def knows(self, classes: Sequence[int]) -> list[int]:
        """Those of some class ids that have had an example, in the order given."""
        return [c for c in classes if int(self.counts[c]) > 0]

    def update(self, features: Tensor, labels: Tensor, held_out: Tensor | None = None) -> None:
        """Learn from a batch.

        Args:
            features: ``(n, d)``, any floating dtype and device.
            labels: ``(n,)`` class ids.
            held_out: ``(n,)`` bool: examples that choose settings; they are learned from as well, once these are
                chosen. Default: none.

        Raises:
            DataError: If shapes do not fit, or a label is no class id.
            NumericalError: If a feature is NaN or infinite; nothing is learned then.
        """
        rows, ids = self._checked(features), labels.detach().cpu().long()
        kept = torch.zeros(len(rows), dtype=torch.bool) if held_out is None else held_out.detach().cpu().bool()
        if ids.shape != (len(rows),) or kept.shape != ids.shape:
            raise DataError(
                f"{len(rows)} rows of features need as many labels and held_out flags; got shapes "
                f"{tuple(ids.shape)} and {tuple(kept.shape)}"
            )
        if len(rows) == 0:
            return
        if int(ids.min()) < 0 or int(ids.max()) >= self.classes:
            raise DataError(f"labels must lie in 0..{self.classes - 1}; got {int(ids.min())}..{int(ids.max())}")
        self._learn(rows, ids, kept)
        self.counts += torch.bincount(ids, minlength=self.classes)

    def scores(self, features: Tensor) -> Tensor:
        """``(n, C)`` float64 scores on the CPU, larger is better; only those of :meth:`knows` mean anything.

        Args:
            features: ``(n, d)``.

        Raises:
            DataError: If the dimension is another one.
            NumericalError: If a feature is NaN or infinite.
        """
        return self._score(self._checked(features))

    def describe(self) -> dict[str, float]:
        """What was chosen so far, for the log."""
        return {}

    @abstractmethod
    def _learn(self, rows: Tensor, labels: Tensor, held_out: Tensor) -> None: ...

    @abstractmethod
    def _score(self, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything that was learned, as tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave, of a classifier of the same sizes."""

    def _sizes(self) -> dict[str, int]:
        return {"dim": self.dim, "classes": self.classes}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``<name>.safetensors`` into a folder; the way back is :meth:`from_pretrained`."""
        path = Path(folder) / f"{self.name}.safetensors"
        meta = {**_FORMAT, "classifier": self.name, "sizes": json.dumps(self._sizes())}
        tensors = {key: value.contiguous() for key, value in self.state_dict().items()}
        return write_with(path, lambda temporary: save_file(tensors, temporary, metadata=meta))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AnalyticClassifier:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            DataError: If there is no such file, or it is not whole or of another kind.
        """
        path = Path(folder) / f"{cls.name}.safetensors"
        if not path.is_file():
            raise DataError(f"{folder} holds no {cls.name} classifier: it has no {path.name}")
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                if {**_FORMAT, "classifier": cls.name}.items() - meta.items():
                    raise ValueError("it is of another kind or format")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            made = cls(**json.loads(meta["sizes"]))
            made.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a whole {cls.name} classifier: {error}") from error
        return made

    def _checked(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise DataError(f"features must be (n, {self.dim}); got {tuple(features.shape)}")
        rows = features.detach().cpu().to(torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise NumericalError(
                f"features of shape {tuple(features.shape)} hold NaN or infinity: the encoder has diverged; lower "
                "the learning rate or train in float32"
            )
        return rows


class PrototypeClassifier(AnalyticClassifier):
    """Nearest class mean by cosine: ``argmax_c cos(f, mean of the features of class c)``.

    Args:
        dim: Feature dimension ``d``.
        classes: Number of classes ``C``.
    """

    name = "prototype"

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes)
        self._sums = torch.zeros(classes, dim, dtype=torch.float64)

    @property
    def means(self) -> Tensor:
        """``(C, d)`` float64 means; zero where there was no example."""
        return self._sums / self.counts.clamp_min(1).unsqueeze(1)

    def _learn(self, rows: Tensor, labels: Tensor, held_out: Tensor) -> None:
        self._sums.index_add_(0, labels, rows)

    def _score(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) @ F.normalize(self.means, dim=-1).T

    def state_dict(self) -> dict[str, Tensor]:
        """Sums ``(C, d)`` and counts ``(C,)``."""
        return {"sums": self._sums.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over sums and counts."""
        _fits(state, {"sums": (self.classes, self.dim), "counts": (self.classes,)})
        self._sums, self.counts = state["sums"].clone(), state["counts"].clone()


class RidgeClassifier(AnalyticClassifier):
    """Ridge regression of one-hot labels on random features, in closed form (RanPAC, arXiv 2307.02251).

    ``h = relu(f R)`` with a fixed Gaussian ``R`` (``d x M``); ``G = sum h h^T``, ``Q = sum h y^T``; the weights are
    ``(G + lambda I)^-1 Q``. ``lambda`` is a multiple of the mean eigenvalue of ``G``: the multiple with the least
    squared error on the held-out examples when the others are fitted. That error needs no example either,
    ``n - 2 tr(W^T Q_held) + tr(W^T G_held W)``, so it is over all tasks so far. The weights are then fitted to all
    examples, the held-out ones included. Everything is float64 and on the CPU.

    Args:
        dim: Feature dimension ``d``.
        classes: Number of classes ``C``.
        width: Random features ``M``; default 2048. Memory is ``2 M^2`` floats, a solution ``M^3 / 3`` multiply-adds.
        seed: Seed of ``R``; default 0.

    Raises:
        ConfigError: If a size is below 1.
    """

    name = "ridge"

    def __init__(self, dim: int, classes: int, *, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__(dim, classes)
        if width < 1:
            raise ConfigError(f"RidgeClassifier(width={width}): it must be at least 1")
        self.width, self.seed = width, seed
        generator = torch.Generator().manual_seed(seed)
        self._projection = torch.randn(dim, width, generator=generator, dtype=torch.float32)
        self._moments = {side: SecondMoment(width, form="gram") for side in ("fitted", "held")}
        self._cross = {side: torch.zeros(width, classes, dtype=torch.float64) for side in ("fitted", "held")}
        self._held_count = 0
        self._solution: tuple[Tensor, float, float] | None = None

    @property
    def weights(self) -> Tensor:
        """``(M, C)`` float64 weights; solved for when first asked for after an update."""
        return self._solved()[0]

    @property
    def ridge(self) -> float:
        """The chosen ``lambda``."""
        return self._solved()[1]

    def lift(self, features: Tensor) -> Tensor:
        """``h = relu(f R)``: ``(n, d)`` to ``(n, M)`` float64."""
        return (features.detach().cpu().to(torch.float64) @ self._projection.to(torch.float64)).relu()

    def describe(self) -> dict[str, float]:
        """The chosen ``ridge``, and ``held_out_error``, the mean squared error behind the choice (NaN: no example)."""
        _, ridge, error = self._solved()
        return {"ridge": ridge, "held_out_error": error}

    def _learn(self, rows: Tensor, labels: Tensor, held_out: Tensor) -> None:
        lifted = self.lift(rows)
        for side, chosen in (("fitted", ~held_out), ("held", held_out)):
            part = lifted[chosen]
            self._moments[side].update(part)
            self._cross[side].index_add_(1, labels[chosen], part.T)
        self._held_count += int(held_out.sum())
        self._solution = None

    def _score(self, rows: Tensor) -> Tensor:
        return self.lift(rows) @ self.weights

    def _solved(self) -> tuple[Tensor, float, float]:
        if self._solution is None:
            moments = {side: _symmetric(moment.matrix()) for side, moment in self._moments.items()}
            multiple, error = self._choose(moments)
            total = moments["fitted"] + moments["held"]
            ridge = multiple * self._scale(total)
            self._solution = (_solve(total, self._cross["fitted"] + self._cross["held"], ridge), ridge, error)
        return self._solution

    def _scale(self, moment: Tensor) -> float:
        return float(moment.trace()) / self.width

    def _choose(self, moments: Mapping[str, Tensor]) -> tuple[float, float]:
        """The multiple of the mean eigenvalue, and its error; downhill over the grid from a fixed start."""
        if not self._held_count or self._scale(moments["fitted"]) == 0:
            return 10 ** (_START / 2), math.nan
        errors: dict[int, float] = {}

        def error(place: int) -> float:
            if place not in errors:
                ridge = 10 ** (place / 2) * self._scale(moments["fitted"])
                weights = _solve(moments["fitted"], self._cross["fitted"], ridge)
                wrong = float((weights * (moments["held"] @ weights - 2 * self._cross["held"])).sum())
                errors[place] = 1 + wrong / self._held_count
            return errors[place]

        place = _START
        while True:
            best = min((p for p in (place, place - 1, place + 1) if p in RIDGES), key=error)
            if best == place:
                return 10 ** (place / 2), errors[place]
            place = best

    def _sizes(self) -> dict[str, int]:
        return {**super()._sizes(), "width": self.width, "seed": self.seed}

    def state_dict(self) -> dict[str, Tensor]:
        """Projection, lower triangles of both second moments, cross products and counts."""
        below = torch.tril_indices(self.width, self.width)
        state = {"projection": self._projection.clone(), "counts": self.counts.clone()}
        state["held_count"] = torch.tensor(self._held_count)
        for side, moment in self._moments.items():
            state[f"{side}.moment"] = moment.matrix()[below[0], below[1]]
            state[f"{side}.rows"] = torch.tensor(moment.count)
            state[f"{side}.cross"] = self._cross[side].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave; the weights come out the same, bit for bit."""
        width, triangle = self.width, self.width * (self.width + 1) // 2
        shapes: dict[str, tuple[int, ...]] = {"projection": (self.dim, width), "counts": (self.classes,)}
        shapes |= {"held_count": (), "fitted.moment": (triangle,), "held.moment": (triangle,)}
        shapes |= {"fitted.cross": (width, self.classes), "held.cross": (width, self.classes)}
        _fits(state, shapes)
        below = torch.tril_indices(width, width)
        self._projection, self.counts = state["projection"].clone(), state["counts"].clone()
        self._held_count, self._solution = int(state["held_count"]), None
        for side in ("fitted", "held"):
            matrix = torch.zeros(width, width, dtype=torch.float64)
            matrix[below[0], below[1]] = state[f"{side}.moment"]
            moment = SecondMoment(width, form="gram").state_dict()
            trace = matrix.trace().reshape(1)
            moment["numbers"] = torch.cat([trace, trace.new_zeros(1)])
            moment["sizes"][-1] = state[f"{side}.rows"]
            self._moments[side] = SecondMoment.from_state_dict({**moment, "matrix": _symmetric(matrix)})
            self._cross[side] = state[f"{side}.cross"].clone()


def held_out(keys: Sequence[str], share: int = 5) -> Tensor:
    """Which examples choose settings: about one in ``share``, by a checksum of the input itself.

    The choice depends on the example alone, so not on the order of examples, batches or tasks; and equal inputs are
    on the same side.

    Args:
        keys: What tells one input from another: the text, or a hash of an image.
        share: Default 5.

    Returns:
        ``(len(keys),)`` bool.
    """
    return torch.tensor([zlib.crc32(key.encode("utf-8", "surrogatepass")) % share == 0 for key in keys]).bool()


def check_classifiers(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` as a tuple.

    Raises:
        ConfigError: If a name is unknown or given twice, or there is none.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in CLASSIFIERS:
            raise ConfigError(f"classifiers: {name!r}: {nearest(str(name), CLASSIFIERS)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"classifiers={list(names)}: give at least one of {', '.join(CLASSIFIERS)}, each once")
    return names


def make_classifiers(names: Sequence[str], dim: int, classes: int, seed: int) -> dict[str, AnalyticClassifier]:
    """The analytic ones among ``names``, empty."""
    made: dict[str, AnalyticClassifier] = {}
    for name in names:
        if name == "prototype":
            made[name] = PrototypeClassifier(dim, classes)
        elif name == "ridge":
            made[name] = RidgeClassifier(dim, classes, width=WIDTH, seed=seed)
    return made


def _symmetric(matrix: Tensor) -> Tensor:
    """The lower triangle and its mirror image: products of matrices need not be symmetric in the last bit."""
    return matrix.tril() + matrix.tril(-1).T


def _solve(moment: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """``(G + lambda I)^-1 Q``; zero where there is nothing in ``G``."""
    if ridge == 0:
        return torch.zeros_like(cross)
    system = moment.clone()
    system.diagonal().add_(ridge)
    solution: Tensor = torch.cholesky_solve(cross, torch.linalg.cholesky(system))
    return solution


def _fits(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[Any, ...]]) -> None:
    for key, shape in shapes.items():
        if tuple(state[key].shape) != tuple(shape):
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, not {tuple(shape)}")
