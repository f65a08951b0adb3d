"""A sequence of tasks, and which labels compete with which when it is learned."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from growthring.errors import ConfigError, DataError, nearest
from growthring.streams._splits import shuffled
from growthring.streams.task import SPLITS, Task

__all__ = ["ClassEntry", "Scenario", "TaskStream"]

Scenario = Literal["task", "class", "online-class", "domain"]


@dataclass(frozen=True)
class ClassEntry:
    """One row of a stream's table of classes; its place in the table is the global class id.

    Attributes:
        key: Unique: ``"task/label"`` in scenario ``"task"``, the label itself in the others.
        label: The label as it stands in the examples.
        text: The label in words.
        tasks: Indices of the tasks that have it.
    """

    key: str
    label: str
    text: str
    tasks: tuple[int, ...]


class TaskStream:
    """Tasks in the order in which they are learned; immutable.

    Args:
        tasks: At least one :class:`Task`, with unique names.
        scenario: ``"task"``: the task of a test example is known and its labels are the candidates. ``"class"``: all
            labels seen so far are candidates; equal labels of two tasks are one class. ``"online-class"``: the same,
            and each task's training rows are seen once, in the order of :meth:`pass_order`. ``"domain"``: all tasks
            share one set of labels.
        validation_fraction: Share of the training rows to carve, stratified, for tasks without a validation split.
            Default 0.1.
        seed: Chooses the carved rows and the order of an online pass; both depend on the seed and the task's name,
            not on the order of the tasks.
        name: Name of the stream.
        reference: A task whose inputs stand for what the model knows before the first task. It is never trained on
            and has no place in ``tasks``; guards may protect its inputs, and its test rows are scored among its own
            labels. Default ``None``.

    Attributes:
        tasks: Tuple of tasks, each with a validation split.
        reference: As given.
        classes: Tuple of :class:`ClassEntry`, in order of first appearance.
        scenario: As given.
        seed: As given.
        name: As given.

    Raises:
        DataError: No task, a name used twice, texts in one task and images in another, label sets that differ in
            scenario ``"domain"``, or labels that cannot be told apart in the shared label space.
        ConfigError: Unknown scenario, wrong fraction or seed.

    Warns:
        UserWarning: Only one task; or, in a class-incremental stream, classes that come again in a later task.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        scenario: Scenario = "task",
        validation_fraction: float = 0.1,
        seed: int = 0,
        name: str = "stream",
        reference: Task | None = None,
    ) -> None:
        if scenario not in get_args(Scenario):
            raise ConfigError(
                f"stream {name!r}: no scenario {scenario!r}; {nearest(str(scenario), get_args(Scenario))}"
            )
        tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        if not tasks:
            raise DataError(f"stream {name!r} has no tasks. Give at least two.")
        first_at: dict[str, int] = {}
        for index, task in enumerate(tasks):
            if not isinstance(task, Task):
                raise DataError(
                    f"stream {name!r}: item {index} is {type(task).__name__}, not a Task. Wrap it in Task(...)."
                )
            # Names become file names, and some file systems do not tell a from A.
            first = first_at.setdefault(task.name.casefold(), index)
            if first != index:
                raise DataError(
                    f"stream {name!r}: tasks {first} and {index} are both named {task.name!r}. Give each its own name."
                )
        if len(tasks) == 1:
            warnings.warn(
                f"stream {name!r} has one task, {tasks[0].name!r}: there is nothing to forget. Give at least two.",
                UserWarning,
                stacklevel=2,
            )
        if reference is not None:
            self._check_reference(name, reference, first_at)
        self._check_modality(name, [*tasks, *([reference] if reference is not None else [])])
        self.name = name
        self.reference = reference
        self.scenario: Scenario = scenario
        self.seed = seed
        self.validation_fraction = validation_fraction
        self.tasks = tuple(task.carve_validation(validation_fraction, seed) for task in tasks)
        if scenario == "domain":
            self._check_shared_labels()
        self.classes = self._table()
        self._ids = {entry.key: number for number, entry in enumerate(self.classes)}
        self._fingerprint: str | None = None
        if self.class_incremental:
            self._warn_of_repeats()

    @property
    def modality(self) -> Literal["text", "image"]:
        """What the inputs of every task are."""
        return self.tasks[0].modality

    @property
    def class_incremental(self) -> bool:
        """Whether the label set grows and the task of a test example is unknown."""
        return self.scenario in ("class", "online-class")

    @property
    def online(self) -> bool:
        """Whether each training row is seen once, in the order of :meth:`pass_order`."""
        return self.scenario == "online-class"

    def pass_order(self, task_index: int) -> list[int]:
        """Return the order in which one pass goes over a task's training rows.

        It is drawn from the stream's seed, the task's name and the rows' content: the same on every machine, whatever
        the order of the file, of the tasks, or the seed of the training.

        Args:
            task_index: The task.

        Returns:
            Each row number of ``tasks[task_index].train`` once.
        """
        task = self.tasks[task_index]
        return shuffled(task.train, self.seed, f"{task.name}/pass")

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, item: int | str) -> Task:
        return self.tasks[self.index(item) if isinstance(item, str) else item]

    def __repr__(self) -> str:
        return f"TaskStream({self.name!r}, scenario={self.scenario!r}, tasks={[task.name for task in self.tasks]})"

    def index(self, name: str) -> int:
        """Return the place of the task with this name.

        Raises:
            ConfigError: There is none; the message offers near names.
        """
        names = [task.name for task in self.tasks]
        if name not in names:
            raise ConfigError(f"stream {self.name!r} has no task {name!r}; {nearest(str(name), names)}")
        return names.index(name)

    def order(self, order: Sequence[str] | Sequence[int]) -> TaskStream:
        """Return the same tasks, with the same splits, in another order.

        Args:
            order: Every task once, by name or by index.

        Raises:
            ConfigError: A task is missing, twice, or unknown.
        """
        places = [self.index(item) if isinstance(item, str) else int(item) for item in order]
        if sorted(places) != list(range(len(self))):
            raise ConfigError(
                f"stream {self.name!r}: an order must hold each of its {len(self)} tasks once, by name "
                f"({', '.join(task.name for task in self.tasks)}) or index (0 to {len(self) - 1}); got {list(order)}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # given when this stream was made
            return TaskStream(
                [self.tasks[place] for place in places],
                scenario=self.scenario,
                validation_fraction=self.validation_fraction,
                seed=self.seed,
                name=self.name,
                reference=self.reference,
            )

    def class_ids(self, task_index: int) -> list[int]:
        """Return the global class ids of a task's labels, in the order of ``task.labels``."""
        task = self.tasks[task_index]
        return [self._ids[self._key(task, label)] for label in task.labels]

    def candidates(self, task_index: int, seen: int) -> list[int]:
        """Return the global class ids among which a test example of a task is classified.

        Args:
            task_index: The task that the example is from.
            seen: Number of tasks learned so far; 0 for the untouched model.

        Returns:
            Class-incremental scenarios: the classes of the first ``max(seen, task_index + 1)`` tasks, so that a task
            not yet learned is asked with the label space it will have when it is. Other scenarios: the task's own
            classes.
        """
        if not self.class_incremental:
            return self.class_ids(task_index)
        task_index %= len(self)
        return [number for number, entry in enumerate(self.classes) if entry.tasks[0] < max(seen, task_index + 1)]

    def encode(self, task_index: int, split: str) -> list[int]:
        """Return the global class id of each example.

        Args:
            task_index: The task.
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            ConfigError: There is no such split.
        """
        if split not in SPLITS:
            raise ConfigError(f"no split {split!r}; {nearest(str(split), SPLITS)}")
        ids = self.class_ids(task_index)
        return [ids[place] for place in self.tasks[task_index].encode(split)]

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of scenario, task order, names, labels, label texts and every row of every split.

        Two streams with the same fingerprint hold the same data: of images the pixels count, not how they are stored.
        The seed of an online stream and the reference count too; the name of the stream does not.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()

            def add(value: Any) -> None:  # JSON quotes line breaks, so lines cannot run into each other
                digest.update(json.dumps(value, ensure_ascii=True).encode() + b"\n")

            add(["growthring-stream", 1, self.scenario])
            if self.online:
                add(["pass order", self.seed])
            for task in (*self.tasks, *([self.reference] if self.reference is not None else [])):
                if task is self.reference:
                    add(["reference"])
                add([task.name, list(task.labels), [task.label_texts[label] for label in task.labels]])
                for split, examples in task.splits().items():
                    add([split, len(examples), *(["image"] if examples.modality == "image" else [])])
                    for row in zip(examples.keys, examples.labels, strict=True):
                        add(row)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _key(self, task: Task, label: str) -> str:
        return f"{task.name}/{label}" if self.scenario == "task" else label

    @staticmethod
    def _check_reference(name: str, reference: Any, taken: Mapping[str, int]) -> None:
        if not isinstance(reference, Task):
            raise DataError(f"stream {name!r}: reference is {type(reference).__name__}, not a Task or None.")
        if reference.name.casefold() in taken:
            raise DataError(
                f"stream {name!r}: the reference has the name of task {taken[reference.name.casefold()]}, "
                f"{reference.name!r}. Rename it; if it is that task, leave it out of one of the two places."
            )

    @staticmethod
    def _check_modality(name: str, tasks: Sequence[Task]) -> None:
        for task in tasks[1:]:
            if task.modality != tasks[0].modality:
                raise DataError(
                    f"stream {name!r}: task {tasks[0].name!r} holds {tasks[0].modality}s and task {task.name!r} holds "
                    f"{task.modality}s. One model reads one kind: make two streams."
                )

    def _warn_of_repeats(self) -> None:
        again = [entry for entry in self.classes if len(entry.tasks) > 1]
        if again:
            shown = "; ".join(
                f"{entry.key!r} in {', '.join(repr(self.tasks[i].name) for i in entry.tasks)}" for entry in again[:3]
            )
            more = f"; and {len(again) - 3} more" if len(again) > 3 else ""
            warnings.warn(
                f"stream {self.name!r}: {len(again)} of {len(self.classes)} classes come in more than one task "
                f"({shown}{more}) and are one class each. If they mean different things, rename them; if they are "
                f"meant to come again, know that the later task rehearses them.",
                UserWarning,
                stacklevel=3,
            )

    def _check_shared_labels(self) -> None:
        first = self.tasks[0]
        for task in self.tasks[1:]:
            missing, extra = set(first.labels) - set(task.labels), set(task.labels) - set(first.labels)
            if missing or extra:
                raise DataError(
                    f"stream {self.name!r}: in scenario 'domain' all tasks share one set of labels, but task "
                    f"{task.name!r} differs from {first.name!r}: missing {sorted(missing)}, extra {sorted(extra)}. "
                    f"Rename labels, pass the same labels=[...] to every task, or use scenario='class'."
                )

    def _table(self) -> tuple[ClassEntry, ...]:
        entries: dict[str, ClassEntry] = {}
        for index, task in enumerate(self.tasks):
            for label in task.labels:
                key, text = self._key(task, label), task.label_texts[label]
                old = entries.get(key)
                if old is not None and old.text != text:
                    raise DataError(
                        f"stream {self.name!r}: label {label!r} means {old.text!r} in task "
                        f"{self.tasks[old.tasks[0]].name!r} and {text!r} in task {task.name!r}, but in scenario "
                        f"{self.scenario!r} it is one class. Give both the same label_texts, or rename one label."
                    )
                entries[key] = ClassEntry(key, label, text, (*(old.tasks if old else ()), index))
        if self.scenario != "task":
            by_text: dict[str, ClassEntry] = {}
            for entry in entries.values():
                twin = by_text.setdefault(entry.text, entry)
                if twin is not entry:
                    raise DataError(
                        f"stream {self.name!r}: the classes {twin.key!r} and {entry.key!r} have the same label text "
                        f"{entry.text!r} and could not be told apart in scenario {self.scenario!r}. "
                        f"Change one in the label_texts of task {self.tasks[entry.tasks[0]].name!r}."
                    )
        return tuple(entries.values())
