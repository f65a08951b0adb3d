"""What a run writes while it goes on: JSON lines, TensorBoard, and two progress bars."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from growthring.errors import ConfigError

__all__ = ["Bars", "RunLog", "StepCallback"]


class RunLog:
    """Appends events to ``log.jsonl`` and, when asked for, scalars to TensorBoard.

    Args:
        folder: The run folder, or ``None`` to write nothing.
        tensorboard: Write event files to ``folder/tensorboard``.

    Raises:
        ConfigError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        self._board: Any = None
        if tensorboard and folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "TensorBoard logs need the package tensorboard: pip install 'growthring[tracking]'"
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"))
        self._file = (folder / "log.jsonl").open("w", encoding="utf-8") if folder is not None else None

    def write(self, event: str, **values: Any) -> None:
        """One line of JSON; a number that is none (mixed precision skips such steps) becomes ``null``."""
        if self._file is not None:
            kept = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self._file.write(json.dumps({"event": event, **kept}, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers for TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Bars:
    """A bar over tasks and a bar over the steps of the current one, on standard error.

    Args:
        tasks: Number of tasks.
        title: What the task bar says.
        show: Draw them; a bar that is not shown costs nothing.
    """

    def __init__(self, tasks: int, title: str, show: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
            transient=True,
        )
        self._tasks = self._progress.add_task(title, total=tasks)
        self._steps = self._progress.add_task("", total=None)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def task(self, name: str, steps: int | None) -> None:
        """A new activity of ``steps`` steps begins."""
        self._progress.reset(self._steps, total=steps, description=f"  {name}")

    def step(self) -> None:
        """One step is done."""
        self._progress.advance(self._steps)

    def task_done(self) -> None:
        """One task is done."""
        self._progress.advance(self._tasks)


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the step bar and copies the Trainer's log lines into the run's log.

    Args:
        log: The run's log.
        bars: The bars.
        task: Name of the current task.
        task_index: Its index.
        offset: Steps done in earlier tasks.
    """

    def __init__(self, log: RunLog, bars: Bars, task: str, task_index: int, offset: int) -> None:
        self._log, self._bars, self._task, self._index, self._offset = log, bars, task, task_index, offset

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the step bar."""
        self._bars.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep loss, gradient norm and learning rate."""
        kept = {k: float(v) for k, v in (logs or {}).items() if k in ("loss", "grad_norm", "learning_rate", "epoch")}
        if "loss" not in kept:
            return
        step = self._offset + state.global_step
        self._log.write(
            "log", task=self._task, task_index=self._index, step=state.global_step, global_step=step, **kept
        )
        self._log.scalars({f"train/{k}": v for k, v in kept.items() if k != "epoch"}, step)
