"""``RobustTrainer``: one task, the best weights by its own validation rows, and how the model does elsewhere."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from growthring._io import write_with
from growthring.errors import ConfigError, DataError, nearest
from growthring.evaluation import RobustPoint
from growthring.guards import FreshLoRA, InfLoRA, OLoRA
from growthring.guards.batches import evaluating
from growthring.streams import EvaluationSet, Task, TaskStream

from .best import BestWeights
from .classifier import LinearHead
from .continual import ContinualTrainer
from .data import EncodedSplit, evaluation_batches, inputs_of
from .folder import save_adapter
from .interpolation import Interpolation
from .probe import LinearProbe, fit_linear_probe
from .result import RunResult

__all__ = ["STARTS", "RobustTrainer"]

STARTS = ("probe", "scratch", "label-text")
"""Where the head starts."""

Sets = Mapping[str, Any] | Sequence[Any]


class RobustTrainer:
    """Fine-tunes a pretrained model on one task, and measures it there and on sets of other domains.

    The task is trained as :class:`~growthring.ContinualTrainer` trains the only task of a stream. Nothing of another
    domain is given to it: sets are only passed to :meth:`score` and :meth:`curve`, afterwards.

    Args:
        model: A ``transformers`` encoder, a PEFT model around one, or the name or folder of one.
        task: The task; without validation rows some are split off its training rows.
        head: ``"linear"`` (default) or ``"label-text"``, as for :class:`~growthring.ContinualTrainer`.
        start: Where the head starts. ``"probe"`` (default for a linear head): logistic regression on the features of
            the untouched model, its regularisation chosen on the validation rows (LP-FT). ``"scratch"``: small random
            rows. ``"label-text"`` (and only that) for the head of this name. A
            :class:`~growthring.trainer.LinearProbe`: that one, to fit it once for several runs.
        evaluate_every: Optimizer steps between two looks at the validation rows; the weights with the highest
            accuracy there, of several the earliest, are those that stay. ``None`` (default): the last ones stay.
        validation_fraction: Share of the training rows split off where the task has no validation rows.
        eval_batch_size: Examples at once when scoring.
        **settings: Everything else that :class:`~growthring.ContinualTrainer` takes: ``adapter``, ``optimizer``,
            ``guards``, ``args``, ``seed``, ``output_dir``, ``pooling``, ``evaluate_test`` and so on.

    Attributes:
        task: The task, with validation rows.
        model: The encoder with its head.
        tokenizer: ``None`` for image encoders.
        probe: The logistic regression that the head started from, if any.
        result: What :meth:`fit` returned.
        looks: ``(step, validation accuracy)`` of every look; empty without ``evaluate_every``.

    Raises:
        ConfigError: On settings that cannot work, each with what is allowed.
        GuardError: As :class:`~growthring.ContinualTrainer`.

    Example:
        ```python
        trainer = RobustTrainer("my-encoder", task, adapter=LoraConfig(...), args=args, evaluate_every=50)
        trainer.fit()
        trainer.score([other_domain])            # {"other": 0.81}
        trainer.curve([0.0, 0.5, 1.0], [other_domain])
        ```
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        task: Task,
        *,
        head: str = "linear",
        start: str | LinearProbe | None = None,
        evaluate_every: int | None = None,
        validation_fraction: float = 0.1,
        eval_batch_size: int = 64,
        **settings: Any,
    ) -> None:
        for name in ("stream", "joint", "steps", "total_steps", "classifiers", "evaluate_validation"):
            if name in settings:
                raise ConfigError(f"{name}= is for streams; a RobustTrainer trains one task, once")
        if not isinstance(task, Task):
            raise ConfigError(f"task must be a Task, got {type(task).__name__}; of a stream give one: stream['name']")
        start = _check_start(start, head)
        whole = isinstance(evaluate_every, int) and not isinstance(evaluate_every, bool)
        if evaluate_every is not None and not (whole and evaluate_every >= 1):
            raise ConfigError(f"evaluate_every={evaluate_every!r}: give a number of steps, at least 1, or None")
        self._guards = list(settings.get("guards", ()))
        for guard in self._guards:
            if isinstance(guard, FreshLoRA | InfLoRA | OLoRA):
                raise ConfigError(
                    f"the guard {guard.name!r} makes a branch for every task of a stream; here is one task"
                )
        seed = settings.get("seed")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* has one task", category=UserWarning)
            stream = TaskStream(
                [task], validation_fraction=validation_fraction, seed=0 if seed is None else seed, name=task.name
            )
        self.task = stream[0]
        callbacks = list(settings.pop("callbacks", ()))
        self._best = BestWeights(evaluate_every, self._look, self._guards) if evaluate_every is not None else None
        if self._best is not None:
            callbacks.append(self._best)
        self._trainer = ContinualTrainer(
            model,
            stream,
            head=head,
            evaluate_validation=True,
            eval_batch_size=eval_batch_size,
            callbacks=callbacks,
            **settings,
        )
        self.model, self.tokenizer, self.seed = self._trainer.model, self._trainer.tokenizer, self._trainer.seed
        self._batch_size = eval_batch_size
        self._trainer._prepare([0])  # the head's rows
        self.probe: LinearProbe | None = None
        if isinstance(start, LinearProbe):
            self.probe = start
        elif start == "probe":
            self.probe = self.fit_probe()
        if self.probe is not None:
            self._install(self.probe)
        self._between = Interpolation(self.model)
        self._sets: dict[int, tuple[Any, EncodedSplit]] = {}
        self.result: RunResult | None = None
        self.seconds = 0.0
        if self._best is not None:
            self._best.watch(self.model)

    @property
    def looks(self) -> list[tuple[int, float]]:
        """``(step, validation accuracy)`` of every look so far."""
        return list(self._best.looks) if self._best is not None else []

    @property
    def trained(self) -> int:
        """Number of trained parameters, the head's included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def fit(self) -> RunResult:
        """Train on the task, once; with ``evaluate_every`` the best weights stay.

        Returns:
            As :meth:`growthring.ContinualTrainer.fit`: row 0 of its matrices is the start, row 1 the trained model.
        """
        clock = time.perf_counter()
        self.result = self._trainer.fit()
        self.seconds = time.perf_counter() - clock
        return self.result

    # --- scoring ------------------------------------------------------------------------------------------------

    def score(self, sets: Sets, split: str = "test") -> dict[str, float]:
        """Accuracy on some sets; all classes of the task compete.

        Args:
            sets: :class:`~growthring.streams.EvaluationSet` objects or tasks, in a sequence or a mapping of names.
            split: Of this trainer's own task, the split to score; of all others it is ``"test"``.

        Returns:
            Accuracy by name.

        Raises:
            DataError: A set holds another kind of inputs, a label that the task does not have, or rows of the task.
            ConfigError: There is no such split, or an item is no set.
        """
        data = self._encoded(sets, split)
        with evaluating(self.model):
            return {name: self._accuracy(rows) for name, rows in data.items()}

    @contextlib.contextmanager
    def interpolated(self, alpha: float) -> Iterator[None]:
        """Inside, the model is at a place between its start and what was trained (WiSE-FT).

        Plain weights and the head are ``(1 - alpha) * start + alpha * trained``. Of an adapter that adds a matrix
        ``D`` to a weight, ``alpha * D`` is added, which is the same of the weight; the factors are not touched.

        Args:
            alpha: From 0, the start, to 1, the trained model.

        Raises:
            ConfigError: ``alpha`` is outside; or the adapter did not start at the pretrained weights.
        """
        with self._between(alpha):
            yield

    def curve(self, alphas: Sequence[float], sets: Sets, split: str = "test") -> dict[float, dict[str, float]]:
        """:meth:`score` at several places between start and trained model.

        Returns:
            ``{alpha: {name: accuracy}}``.
        """
        data = self._encoded(sets, split)
        found: dict[float, dict[str, float]] = {}
        for alpha in alphas:
            with self.interpolated(alpha), evaluating(self.model):
                found[float(alpha)] = {name: self._accuracy(rows) for name, rows in data.items()}
        return found

    def point(
        self, sets: Sets = (), *, alpha: float = 1.0, setting: Mapping[str, Any] | None = None, test: bool = True
    ) -> RobustPoint:
        """Everything measured of the model, or of a place between its start and it.

        Args:
            sets: Sets of other domains.
            alpha: See :meth:`interpolated`.
            setting: What was chosen for the method, as plain values.
            test: Whether to score the task's test rows.
        """
        with self.interpolated(alpha):
            inside = {
                split: self.score([self.task], split)[self.task.name] for split in ["validation"] + ["test"] * test
            }
            ood = self.score(sets)
            deviation = self.deviation()
        return RobustPoint(
            method=self._trainer.method,
            seed=self.seed,
            id_validation=inside["validation"],
            id_test=inside.get("test"),
            ood=ood,
            alpha=alpha,
            setting=dict(setting or {}),
            deviation=deviation,
            trained=self.trained,
            seconds=self.seconds,
        )

    def deviation(self) -> float | None:
        """``||W - W0||_F`` over all weights of the encoder that were adapted or trained; the head does not count.

        ``None`` for adapters that add no matrix to a weight (prefixes, prompts, bottlenecks).
        """
        return self._between.deviation()

    def _encoded(self, sets: Sets, split: str) -> dict[str, EncodedSplit]:
        if isinstance(sets, EvaluationSet | Task | str):
            raise ConfigError(f"sets: give a list of sets or a mapping of names, got one {type(sets).__name__}")
        named = list(sets.values()) if isinstance(sets, Mapping) else list(sets)
        own = self._trainer._data[0]
        if split not in own:
            raise ConfigError(f"no split {split!r}; {nearest(str(split), own)}")
        if isinstance(sets, Mapping):
            names = list(map(str, sets))
        else:
            names = [str(getattr(item, "name", type(item).__name__)) for item in named]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"sets: the name {twice[0]!r} is there twice; give each its own")
        return {
            name: own[split] if self._is_own(item) else self._encode(item)
            for name, item in zip(names, named, strict=True)
        }

    def _is_own(self, item: Any) -> bool:
        return isinstance(item, Task) and item.test is self.task.test

    def _encode(self, item: Any) -> EncodedSplit:
        """A set as the model takes it; kept, since it is scored again at other places."""
        if id(item) not in self._sets:
            made = EvaluationSet.of(item)
            made.check(self.task)
            ids = dict(zip(self.task.labels, self._trainer.stream.class_ids(0), strict=True))
            labels = [ids[label] for label in made.test.labels]
            length = self._trainer._max_length
            inputs = made.test.inputs
            if made.modality == "text":
                inputs = self.tokenizer(list(inputs), truncation=True, max_length=length)["input_ids"]
            self._sets[id(item)] = (item, EncodedSplit(inputs, labels, [0] * len(labels)))
        return self._sets[id(item)][1]

    def _accuracy(self, rows: EncodedSplit) -> float:
        right = 0
        device = self.model.allowed.device
        for numbers, batch in evaluation_batches(rows, self._batch_size, self._trainer._collate):
            answers = self.model.logits(self.model.embed(**inputs_of(batch, device))).argmax(-1).tolist()
            right += sum(rows.labels[n] == answer for n, answer in zip(numbers, answers, strict=True))
        return right / len(rows)

    def _look(self) -> float:
        with evaluating(self.model):
            return self._accuracy(self._trainer._data[0]["validation"])

    # --- on disk --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write what was trained: ``weights.safetensors`` for :meth:`restore`, and ``adapter/`` of a PEFT model."""
        tensors = {f"start.{n}": t for n, t in self._between.start.items() if n.startswith("head.")}
        state = self.model.state_dict()
        tensors |= {name: state[name] for name in self._kept_names(state)}
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        write_with(Path(folder) / "weights.safetensors", lambda place: save_file(tensors, place))
        if isinstance(self.model.encoder, PeftModel):
            save_adapter(self.model.encoder, Path(folder) / "adapter")

    def restore(self, folder: str | Path) -> None:
        """Take over what :meth:`save` wrote; this trainer must have been made with the same settings.

        Raises:
            DataError: The file is missing or damaged, or holds other tensors than this model trains.
        """
        file = Path(folder) / "weights.safetensors"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
        start = {n.removeprefix("start."): tensors.pop(n) for n in list(tensors) if n.startswith("start.")}
        wanted = self.model.state_dict()
        names = set(self._kept_names(wanted))
        wrong = sorted(names ^ tensors.keys()) or [n for n in tensors if tensors[n].shape != wanted[n].shape]
        if wrong:
            raise DataError(
                f"{file} does not fit this model: {len(wrong)} tensors differ (the first: {wrong[0]}). Make the "
                "trainer with the settings that the file was written with"
            )
        self.model.load_state_dict(tensors, strict=False)
        self._between.start.update({n: t.to(self.model.allowed.device) for n, t in start.items()})

    def _kept_names(self, state: Mapping[str, Tensor]) -> list[str]:
        """Names of trained tensors, and of what an adapter keeps beside them."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        for place, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                own = (n for n, _ in module.named_buffers() if not n.startswith("base_layer."))
                names += [f"{place}.{n}" for n in own if f"{place}.{n}" in state]
        return names

    # --- the start ----------------------------------------------------------------------------------------------

    def fit_probe(self) -> LinearProbe:
        """Logistic regression on the features of the model as it is; give it to other trainers as ``start=``."""
        ids = self._trainer.stream.class_ids(0)
        train, held = (self._trainer._data[0][split] for split in ("train", "validation"))
        return fit_linear_probe(self._features(train), train.labels, self._features(held), held.labels, len(ids))

    def _features(self, rows: EncodedSplit) -> Tensor:
        made: list[Tensor] = [torch.empty(0)] * len(rows)
        device = self.model.allowed.device
        with evaluating(self.model):
            for numbers, batch in evaluation_batches(rows, self._batch_size, self._trainer._collate):
                features = self.model.embed(**inputs_of(batch, device)).cpu()
                for number, one in zip(numbers, features, strict=True):
                    made[number] = one
        return torch.stack(made)

    def _install(self, probe: LinearProbe) -> None:
        assert isinstance(self.model.head, LinearHead)
        (weight,) = self.model.head.parameters()
        if probe.weight.shape != weight.shape:
            raise ConfigError(
                f"start: the probe's weight is {tuple(probe.weight.shape)} and the head's {tuple(weight.shape)}; fit "
                "it on the same task and encoder"
            )
        with torch.no_grad():
            weight.copy_(probe.weight)


def _check_start(start: str | LinearProbe | None, head: str) -> str | LinearProbe:
    """Where the head starts.

    Raises:
        ConfigError: There is no such start, or the head has none of its kind.
    """
    if head not in ("linear", "label-text"):
        raise ConfigError(f"head={head!r}: {nearest(str(head), ('linear', 'label-text'))}")
    if start is None:
        return "probe" if head == "linear" else "label-text"
    if not isinstance(start, LinearProbe) and start not in STARTS:
        raise ConfigError(f"start={start!r}: {nearest(str(start), STARTS)}")
    if (start == "label-text") != (head == "label-text"):
        raise ConfigError(
            f"start={start!r} with head={head!r}: a head of label texts starts from them and does not train, a linear "
            "head starts from 'probe' or 'scratch'"
        )
    return start
