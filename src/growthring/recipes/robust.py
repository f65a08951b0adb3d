"""A robustness sweep: choose on validation rows, write that down, train, and only then look at other domains."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growthring._io import write_json, write_text
from growthring.errors import ConfigError, DataError, GuardError
from growthring.evaluation import RobustPoint, SealedSets

from . import _yaml
from .methods import get_method
from .robust_config import Candidate, DomainConfig, RobustConfig
from .robust_results import summarise
from .runner import read_task, trainer_settings

if TYPE_CHECKING:
    from growthring.streams import EvaluationSet, Examples, Task
    from growthring.trainer import LinearProbe, RobustTrainer

__all__ = ["Progress", "run_robust"]

WEIGHTS = "weights.safetensors"

Progress = Callable[[str, int, int], None]
"""Called before each piece of work: what it is, its number from 0, and how many there are in this stage."""

_SAME_START = ("lora", "largo", "linear", "full", "ia3", "bottleneck")
"""Adapters that leave the features of the untouched model as they are, so that one probe serves all."""

_NO_PART = ("stream", "title", "threads", "output", "tensorboard")
"""Settings that tell no training from another; of the stream the rows count, wherever they lie."""

_HOLDS = {"point.json": ("id_validation", "seconds"), "scores.json": ("of", "points")}
"""What is read of the files of a point."""

_AGAIN = "remove its folder to train it again"


@dataclass(frozen=True)
class _Point:
    """One training: a candidate with a seed, and its folder."""

    candidate: Candidate
    seed: int
    folder: Path

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; ``None`` if it is not there."""
        file = self.folder / name
        if not file.is_file():
            return None
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} cannot be read as JSON: {error}; {_AGAIN}") from None
        if absent := [key for key in _HOLDS[name] if key not in found]:
            raise DataError(f"{file} lacks {absent[0]}; {_AGAIN}")
        return found


def run_robust(
    config: RobustConfig, output: str | Path | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Run a sweep, or go on with one.

    1. Search: every setting of every method that has several is trained with ``search_seed``; the validation rows of
       the task choose (the first in the configuration, of equals).
    2. The choices are written to ``choices.json``.
    3. Chosen settings, and all settings of ``frontier`` methods, are trained with every seed and kept on disk.
    4. The other domains are opened, once, and every model is scored on them and on the task's test rows.

    What is finished is not done again: a sweep that was interrupted goes on where it was, and a longer configuration
    in the same folder trains what is new, until the domains were opened; then only the same choices pass.

    Args:
        config: The configuration.
        output: Folder; default ``config.output``, else ``runs/robust``.
        progress: Called before each training and each scoring.

    Returns:
        What ``results.json`` in the folder holds.

    Raises:
        ConfigError: The folder holds something else, or cannot be written.
        GuardError: The domains were opened before, after other choices.
        GrowthringError: Data, model or settings cannot work; the message says what to change.
    """
    return _Sweep(config, Path(output or config.output or "runs/robust"), progress or (lambda *_: None)).run()


class _Sweep:
    def __init__(self, config: RobustConfig, folder: Path, progress: Progress) -> None:
        self.config, self.folder, self._progress = config, folder, progress
        self._check_folder()
        self.candidates = config.candidates()
        self.task = _with_validation(read_task(config.task, config.data_seed), config)
        self._rows = _fingerprint(self.task)
        self._probe: LinearProbe | None = None
        self.sealed = SealedSets(
            {domain.name: _loader(domain, config.data_seed) for domain in config.ood}, folder / "choices.json"
        )

    def run(self) -> dict[str, Any]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "opened.json").is_file():  # else only if the choices pass
                self._write_config()
        except OSError as error:
            raise ConfigError(
                f"the folder {self.folder} cannot be written: {error.strerror or error}; choose another"
            ) from error
        choices = self._search()
        final = self._finals(choices)
        self._write_choices(choices, final)
        self._write_config()
        for number, point in enumerate(final):
            self._train(point, "train", number, len(final))
        self._prune(final)
        sets = self.sealed.open()
        for loaded in sets.values():
            loaded.check(self.task)
        scored = []
        for number, point in enumerate(final):
            scored.append((point.candidate, self._score(point, sets, number, len(final))))
        results = summarise(self.config, self.task, sets, scored, choices)
        write_json(self.folder / "results.json", results)
        return results

    # --- stages -------------------------------------------------------------------------------------------------

    def _search(self) -> list[dict[str, Any]]:
        """For every method its choice, and what it was chosen from."""
        by_entry = [[c for c in self.candidates if c.entry == place] for place in range(len(self.config.methods))]
        tried = [self._point(c, self.config.search_seed) for several in by_entry if len(several) > 1 for c in several]
        for number, point in enumerate(tried):
            self._train(point, "search", number, len(tried))
        choices = []
        for entry, several in zip(self.config.methods, by_entry, strict=True):
            scores: list[float | None] = [None]
            if len(several) > 1:
                scores = [self._known(self._point(c, self.config.search_seed))["id_validation"] for c in several]
            best = max(range(len(several)), key=lambda i: (scores[i] or 0.0, -i))
            choices.append(
                {
                    "name": entry.key,
                    "method": entry.method,
                    "chosen": several[best].chosen,
                    "index": best,
                    "tried": [
                        {"setting": c.chosen, "id_validation": score} for c, score in zip(several, scores, strict=True)
                    ],
                }
            )
        return choices

    def _finals(self, choices: Sequence[Mapping[str, Any]]) -> list[_Point]:
        """Every training whose model is scored in the end."""
        chosen: list[Candidate] = []
        for place, (entry, choice) in enumerate(zip(self.config.methods, choices, strict=True)):
            several = [c for c in self.candidates if c.entry == place]
            chosen += several if entry.key in self.config.frontier else [several[choice["index"]]]
        return [self._point(candidate, seed) for candidate in chosen for seed in self.config.seeds]

    def _write_config(self) -> None:
        write_text(self.folder / "config.yaml", _yaml.dump(self.config.resolved()))

    def _write_choices(self, choices: Sequence[Mapping[str, Any]], final: Sequence[_Point]) -> None:
        """Write the choices; where the domains were opened after others, those stay, and an error says so."""
        place = self.folder / "choices.json"
        before = place.read_text(encoding="utf-8") if place.is_file() else None
        write_json(
            place,
            {
                "by": "accuracy on the validation rows of the task",
                "task": self.task.name,
                "search_seed": self.config.search_seed,
                "choices": list(choices),
                "models": [point.folder.name for point in final],
                "domains": list(self.sealed.names),
            },
        )
        try:
            self.sealed.check()  # before hours of training that no set would be opened for
        except GuardError:
            if before is not None:
                write_text(place, before)
            raise

    def _train(self, point: _Point, stage: str, number: int, total: int) -> None:
        """Train one point, unless it is there; what is there is whole, since ``point.json`` is written last."""
        if point.read("point.json") is not None and (stage == "search" or (point.folder / WEIGHTS).is_file()):
            return
        self._progress(f"{stage} {self._label(point)}", number, total)
        trainer = self._trainer(point, trained=True)
        trainer.fit()
        if point.seed in self.config.seeds:
            trainer.save(point.folder)
        write_json(
            point.folder / "point.json",
            {
                "method": point.candidate.config.method,
                "seed": point.seed,
                "setting": point.candidate.chosen,
                "id_validation": trainer.score([self.task], "validation")[self.task.name],
                "looks": [list(look) for look in trainer.looks],
                "deviation": trainer.deviation(),
                "trained": trainer.trained,
                "seconds": trainer.seconds,
            },
        )

    def _score(self, point: _Point, sets: Mapping[str, EvaluationSet], number: int, total: int) -> list[RobustPoint]:
        """The trained model and its way there, measured everywhere."""
        alphas = sorted({*self.config.wise, 1.0})
        stamp = {"alphas": alphas, "domains": {name: _digest(loaded.test) for name, loaded in sets.items()}}
        stamp["task"] = _digest(self.task.test)
        known, about = point.read("scores.json"), self._known(point)
        if known is None or known["of"] != stamp:
            self._progress(f"score {self._label(point)}", number, total)
            trainer = self._trainer(point, trained=False)
            try:
                trainer.restore(point.folder)
            except DataError as error:
                raise DataError(f"{error}; {_AGAIN}") from None
            trainer.seconds = about["seconds"]
            setting = point.candidate.chosen
            with warnings.catch_warnings():  # what there is to say of a set was said when it was opened
                warnings.filterwarnings("ignore", message="evaluation set ", category=UserWarning)
                points = [trainer.point(sets, alpha=alpha, setting=setting).to_dict() for alpha in alphas]
            known = {"of": stamp, "points": points}
            write_json(point.folder / "scores.json", known)
        return [RobustPoint.from_dict(one) for one in known["points"]]

    # --- pieces -------------------------------------------------------------------------------------------------

    def _trainer(self, point: _Point, *, trained: bool) -> RobustTrainer:
        from growthring.trainer import RobustTrainer

        config, start = point.candidate.seeded(point.seed), point.candidate.start
        encoder, settings = trainer_settings(config)
        given: Any = start
        probing = start in (None, "probe") and config.head == "linear"
        shared = get_method(config.method).adapter in _SAME_START
        if probing and not trained:
            given = "scratch"  # restored in a moment
        elif probing and shared and self._probe is not None:
            given = self._probe
        every = self.config.evaluate_every
        made = RobustTrainer(encoder, self.task, start=given, evaluate_every=every, evaluate_test=False, **settings)
        if probing and shared:
            self._probe = made.probe or self._probe
        return made

    def _point(self, candidate: Candidate, seed: int) -> _Point:
        """The folder's name tells one training from any other: its settings and its rows are in it."""
        config = candidate.seeded(seed).resolved()
        about = {k: v for k, v in config.items() if k not in _NO_PART}
        about |= {"start": candidate.start, "evaluate_every": self.config.evaluate_every, "rows": self._rows}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        return _Point(candidate, seed, self.folder / "points" / f"{candidate.config.method}-{digest}-seed{seed}")

    def _known(self, point: _Point) -> dict[str, Any]:
        found = point.read("point.json")
        assert found is not None  # it was trained before
        return found

    def _label(self, point: _Point) -> str:
        entry = self.config.methods[point.candidate.entry]
        setting = ", ".join(f"{name} {value}" for name, value in point.candidate.chosen.items())
        return f"{entry.key} ({setting}, seed {point.seed})"

    def _prune(self, final: Sequence[_Point]) -> None:
        """Drop the weights of settings that were tried and not chosen; what was measured of them stays."""
        kept = {point.folder for point in final}
        for candidate in self.candidates:
            point = self._point(candidate, self.config.search_seed)
            if point.folder not in kept:
                (point.folder / WEIGHTS).unlink(missing_ok=True)
                shutil.rmtree(point.folder / "adapter", ignore_errors=True)

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file; the sweep needs a folder")
        held = self.folder / "results.json"
        if held.is_file() and not (self.folder / "choices.json").is_file():
            raise ConfigError(f"{self.folder} holds the results of something else; choose another folder")


def _with_validation(task: Task, config: RobustConfig) -> Task:
    return task.carve_validation(config.validation_fraction, config.data_seed)


def _fingerprint(task: Task) -> str:
    """A hash of everything that training sees."""
    splits = task.splits()
    about = [list(task.labels), task.label_texts, _digest(splits["train"]), _digest(splits["validation"])]
    return hashlib.sha256(json.dumps(about, ensure_ascii=True).encode()).hexdigest()


def _digest(rows: Examples) -> str:
    digest = hashlib.sha256()
    for row in zip(rows.keys, rows.labels, strict=True):
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _loader(domain: DomainConfig, seed: int) -> Callable[[], EvaluationSet]:
    def load() -> EvaluationSet:
        from growthring.streams import EvaluationSet

        rows: Any = domain.test
        if domain.hub is not None:
            from datasets import load_dataset

            hub = domain.hub
            try:
                rows = load_dataset(hub.path, hub.config, split=hub.split)
            except (OSError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"domain {domain.name!r}: datasets.load_dataset({hub.path!r}, {hub.config!r}, "
                    f"split={hub.split!r}) failed: {type(error).__name__}: {error}"
                ) from error
        image = domain.image
        if image is None and domain.test is not None and Path(domain.test).is_dir():
            image = "image"
        columns: dict[str, Any] = {"text": domain.text or "text"} if image is None else {"image": image}
        made = EvaluationSet(domain.name, rows, label=domain.label, **columns)
        return made if domain.limit is None else made.limit(domain.limit, seed)

    return load
