"""One task's training: its arguments, its number of steps, and a Trainer that refuses to fail silently."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from growthring.errors import ConfigError, GuardError, NumericalError
from growthring.guards import Guard
from growthring.streams import TaskStream

from .optimizing import Optimizer, resolve, separate

__all__ = [
    "Budget",
    "StreamTrainer",
    "bit_sums",
    "blend",
    "check_arguments",
    "check_changed",
    "frozen",
    "task_arguments",
]

logger = logging.getLogger(__name__)

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse, or warn of, what would have no effect or another one than its name says.

    Raises:
        ConfigError: On label smoothing, which would compare an example with all tasks' classes.

    Warns:
        UserWarning: If ``report_to`` names trackers, which are not used.
    """
    if args.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor={args.label_smoothing_factor}: the Trainer would smooth over the classes of all "
            "tasks, and a new task would push down old ones; leave it at 0"
        )
    trackers = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or ())
    if set(trackers) - {"none"}:
        warnings.warn(
            f"report_to={trackers} is not used: every task would start a run of its own. Use tensorboard=True, or "
            "give a callback with callbacks=[...]",
            stacklevel=3,
        )


class Budget:
    """Optimizer steps of each task.

    Args:
        stream: The stream.
        args: Arguments with ``max_steps`` or ``num_train_epochs`` of a task.
        steps: Steps of single tasks, by name.
        total: Steps of the whole stream, shared equally; the first tasks get one more where it does not divide.

    Raises:
        ConfigError: If a task is unknown or has no step, both ``steps`` and ``total`` are given, or an online stream
            would be gone through more than once.
    """

    def __init__(
        self, stream: TaskStream, args: TrainingArguments, steps: Mapping[str, int] | None, total: int | None
    ) -> None:
        if steps and total is not None:
            raise ConfigError("total_steps shares the whole budget over all tasks, so steps has no place beside it")
        if total is not None and total < len(stream):
            raise ConfigError(f"total_steps={total} leaves less than one step for each of {len(stream)} tasks")
        for name, count in (steps or {}).items():
            stream.index(name)
            if count < 1:
                raise ConfigError(f"steps: task {name!r} has {count}; a task takes at least 1 step")
        self._args = args
        self._given: dict[int, int] = {stream.index(name): count for name, count in (steps or {}).items()}
        if total is not None:
            share, rest = divmod(total, len(stream))
            self._given = {index: share + (index < rest) for index in range(len(stream))}
        self.by_task = {stream[i].name: count for i, count in sorted(self._given.items())}
        """Steps given for single tasks."""
        self._online = stream.online
        if stream.online:
            self._check_one_pass(stream)

    def max_steps(self, members: Sequence[int], rows: Sequence[int]) -> int:
        """What ``TrainingArguments.max_steps`` has to be to train on some tasks at once; -1 where epochs decide.

        Args:
            members: The tasks.
            rows: Training examples of each.
        """
        if not any(i in self._given for i in members):
            steps = self._args.max_steps * len(members)
            return self._capped(steps, members, rows) if steps > 0 else -1
        total = sum(self._given.get(i, self._default(n)) for i, n in zip(members, rows, strict=True))
        return self._capped(total, members, rows)

    def _capped(self, steps: int, members: Sequence[int], rows: Sequence[int]) -> int:
        """Several tasks at once have fewer incomplete batches: an online stream is not begun again to fill them up."""
        return min(steps, self._passes(sum(rows), 1)) if self._online and len(members) > 1 else steps

    def planned(self, max_steps: int, rows: int) -> int:
        """Optimizer steps that a training of ``rows`` examples takes."""
        return max_steps if max_steps > 0 else self._epochs(rows)

    def _check_one_pass(self, stream: TaskStream) -> None:
        for index, task in enumerate(stream):
            rows = len(task.splits()["train"])
            wanted, once = self.planned(self.max_steps([index], [rows]), rows), self._passes(rows, 1)
            if wanted > once:
                raise ConfigError(
                    f"the stream is {stream.scenario}: each training row is seen once. Task {task.name!r} has {rows} "
                    f"rows, which is {once} steps, and the budget is {wanted}. Set num_train_epochs=1 or fewer steps, "
                    "or choose the scenario 'class'"
                )

    def _default(self, rows: int) -> int:
        return self._args.max_steps if self._args.max_steps > 0 else self._epochs(rows)

    def _epochs(self, rows: int) -> int:
        return self._passes(rows, self._args.num_train_epochs)

    def _passes(self, rows: int, epochs: float) -> int:
        size = self._args.train_batch_size * max(1, self._args.world_size)
        batches = rows // size if self._args.dataloader_drop_last else -(-rows // size)
        updates = max(1, -(-batches // self._args.gradient_accumulation_steps))
        return math.ceil(epochs * updates)


def task_arguments(
    args: TrainingArguments,
    seed: int,
    max_steps: int,
    folder: Path | None,
    optimizer: Optimizer | None,
    in_order: bool = False,
) -> TrainingArguments:
    """A copy of ``args`` for one task: seeded, with its number of steps, and without what the stream does itself.

    ``in_order`` trains on the rows as they come, unshuffled.
    """
    args = copy.deepcopy(args)
    if in_order:
        args.train_sampling_strategy = "sequential"
    args.seed, args.data_seed, args.max_steps = seed, seed, max_steps
    args.save_strategy, args.eval_strategy, args.report_to = "no", "no", []
    args.eval_on_start = args.load_best_model_at_end = args.push_to_hub = False
    args.disable_tqdm, args.remove_unused_columns, args.label_names = True, False, ["labels"]
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type == "cuda"
    # the Trainer insists on a folder that exists, and then writes nothing there
    args.output_dir = str(folder) if folder is not None else tempfile.gettempdir()
    if optimizer is not None and "weight_decay" in optimizer[1]:
        # the Trainer puts its own weight decay into the parameter groups, where it would win over the optimizer's
        args.weight_decay = optimizer[1]["weight_decay"]
    return args


class StreamTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that adds guards' loss terms, and refuses an empty optimizer and a loss that is not a number.

    Args:
        task: Name of the task, for messages.
        guards: The guards.
        apart: Parameters with a learning rate of their own, and that rate; ``None`` for one rate for all.
        **kwargs: As for ``transformers.Trainer``.
    """

    def __init__(
        self,
        *,
        task: str,
        guards: Sequence[Guard],
        apart: tuple[Sequence[nn.Parameter], float] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("optimizer_cls_and_kwargs") is not None:  # the Trainer takes entries out of the dictionary
            kwargs["optimizer_cls_and_kwargs"] = resolve(kwargs["optimizer_cls_and_kwargs"], kwargs["args"])
        super().__init__(**kwargs)
        self._apart = apart
        self.remove_callback(PrinterCallback)  # the run's own log keeps these lines
        self._task = task
        self._guards = [g for g in guards if type(g).loss is not Guard.loss]

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's loss and the guards' terms.

        Raises:
            NumericalError: If it is not finite.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for guard in self._guards:
            term = guard.loss(outputs, inputs)
            if term is not None:
                loss = loss + term
        if not bool(torch.isfinite(loss.detach()).all()):
            raise NumericalError(
                f"task {self._task!r}, step {self.state.global_step + 1}: the loss is {float(loss.detach().mean())}. "
                f"Lower the learning rate ({self._get_learning_rate():g} now), clip gradients (max_grad_norm), or "
                "train in float32"
            )
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            GuardError: If nothing in it can be trained.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise GuardError("the optimizer has no trainable parameter; every weight would stay as it is")
        if self._apart is not None:
            separate(optimizer, *self._apart)
        return optimizer

    def run(self) -> int:
        """Train, and leave the model as it was before ``accelerate`` wrapped its forward; returns the steps taken.

        Raises:
            NumericalError: If a trained weight is not finite at the end.
        """
        self.train()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("_is_accelerate_prepared", None)  # else the next task would train without the wrapper
        broken = [n for n, p in self.model.named_parameters() if p.requires_grad and not _finite(p)]
        if broken:
            raise NumericalError(
                f"task {self._task!r}: after step {self.state.global_step} {len(broken)} trained tensors hold NaN or "
                f"infinity (the first: {broken[0]}). Lower the learning rate ({self._get_learning_rate():g} now) or "
                "clip gradients (max_grad_norm)"
            )
        return int(self.state.global_step)


@contextlib.contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, these parameters do not train."""
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


@torch.no_grad()
def blend(parameters: Mapping[str, Tensor], guarded: Mapping[str, Tensor], weight: float) -> None:
    """``theta <- (1 - weight) * guarded + weight * theta``, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(torch.lerp(guarded[name], parameter, weight))


def check_changed(
    changed: Iterable[str], trained: Iterable[str], guards: Sequence[Guard], name: str, steps: int
) -> None:
    """Warn if a task changed nothing because guards left it nothing to move; refuse it if there is no such reason.

    Raises:
        GuardError: If no weight changed.
    """
    changed, encoder = set(changed), {n for n in trained if n.startswith("encoder.")}
    if changed & encoder or (changed and not encoder):
        return
    if any(callable(e := getattr(g, "exhausted", None)) and e() for g in guards):
        logger.warning("task %r changed nothing: no free direction is left", name)
    elif any(getattr(g, "tasks", ()) for g in guards):
        logger.warning(
            "task %r changed nothing%s: what its inputs use lies within what the guards protect. Lower the energy, "
            "widen the adapter (a larger rank), or adapt more layers",
            name,
            " but the head" if changed else "",
        )
    elif changed:
        logger.warning("task %r changed the head and nothing in the encoder, although parts of it train", name)
    else:
        raise GuardError(
            f"task {name!r} took {steps} steps and no weight changed: the learning rate may be 0, or the trained "
            "part may not be used in the forward pass"
        )


def bit_sums(parameters: Iterable[Tensor]) -> list[int]:
    """The sum of each tensor's bit patterns, read as integers: it tells cheaply whether anything has changed."""
    return [int(p.detach().contiguous().view(_SIGNED[p.element_size()]).sum(dtype=torch.int64)) for p in parameters]


def _finite(parameter: Tensor) -> bool:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return bool(torch.isfinite(parameter.detach().sum(dtype=wide)))
