"""``ContinualTrainer``: a model, a stream of tasks, and what guards it, on ``transformers.Trainer``."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments, set_seed

from growthring.errors import ConfigError, GuardError, nearest
from growthring.evaluation import BASE_ROW
from growthring.guards import PEGP, Certificate, Guard
from growthring.streams import TaskStream

from .classifier import HEADS, POOLINGS, LabelTextHead, LinearHead, Pooling, TextClassifier, find_pooling, pool
from .data import Collator, EncodedSplit, balanced_batches, encode_stream, evaluation_batches
from .folder import check_config, check_folder, describe_tasks, resolved_config, save_model
from .logs import Bars, RunLog, StepCallback
from .models import adapt, hidden_states, load_encoder, usable_length
from .result import RunResult
from .scoring import Scorer, Tables
from .steps import Budget, StreamTrainer, bit_sums, check_arguments, task_arguments

__all__ = ["ContinualTrainer"]

logger = logging.getLogger(__name__)

MAX_SEED = 4_000_000
"""Largest seed: every task has one of its own, and numpy takes 32 bits."""


class ContinualTrainer:
    """Learns a stream of text-classification tasks, one after another, and measures what is kept.

    Every task is one run of ``transformers.Trainer`` with a fresh optimizer; guards correct every step; after every
    task each guard consolidates and one row of the accuracy matrix is filled. Test data are only ever scored.

    Args:
        model: A ``transformers`` encoder (its outputs have ``last_hidden_state``), a PEFT model around one, or the
            name or folder of one.
        stream: The tasks.
        adapter: A PEFT config (wrapped around the model, seeded), ``"linear"`` for all linear weights of the encoder,
            ``"full"`` for all its parameters, or ``None`` for what ``model`` already trains.
        optimizer: ``None`` for the optimizer that ``args`` names, or ``(class, keyword arguments)``; learning rate and
            weight decay are those of ``args`` where left out.
        guards: Guards, in the order in which they act.
        args: ``TrainingArguments``; one task's training. ``max_steps`` or ``num_train_epochs`` are per task.
        tokenizer: Default: that of ``model``'s name or folder.
        head: ``"label-text"`` (default): similarity to embedded label names, which works before any training.
            ``"linear"``: a head that grows with the classes. Whether tasks share classes is the stream's scenario.
        pooling: ``"auto"`` (default: what the sentence encoder says, else mean), ``"mean"``, ``"cls"`` or ``"last"``.
        max_length: Tokens kept of a text; default 128.
        steps: Optimizer steps of single tasks, by name; overrides ``args`` for those tasks.
        total_steps: Optimizer steps of the whole stream, shared equally over its tasks; overrides ``args``.
        joint: Train on all tasks at once instead, with the sum of their budgets: the upper bound.
        seed: Seed of data order, adapter initialisation and dropout; default ``args.seed``.
        output_dir: Run folder; ``None`` writes nothing.
        method: Name of the method, for the results.
        title: The method in words.
        evaluate_validation: Also score the validation splits (for choosing settings); default False.
        evaluate_test: Score the test splits; default True. Searches for settings turn it off.
        eval_batch_size: Default 64. It does not change results.
        tensorboard: Write TensorBoard event files; default False.
        progress: Draw progress bars on standard error; default False.
        callbacks: Further ``TrainerCallback`` objects, given to every task's Trainer (not to trials of a guard).
        config: Recorded in the results as the resolved configuration.

    Raises:
        ConfigError: On settings that cannot work, each with what is allowed.
        GuardError: If a guard finds nothing to protect, nothing is trainable, or a task left every weight unchanged.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        stream: TaskStream,
        *,
        adapter: PeftConfig | str | None = None,
        optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        guards: Sequence[Guard] = (),
        args: TrainingArguments | None = None,
        tokenizer: Any = None,
        head: str = "label-text",
        pooling: str = "auto",
        max_length: int = 128,
        steps: Mapping[str, int] | None = None,
        total_steps: int | None = None,
        joint: bool = False,
        seed: int | None = None,
        output_dir: str | Path | None = None,
        method: str = "custom",
        title: str | None = None,
        evaluate_validation: bool = False,
        evaluate_test: bool = True,
        eval_batch_size: int = 64,
        tensorboard: bool = False,
        progress: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        for what, value, allowed in (("head", head, HEADS), ("pooling", pooling, ("auto", *POOLINGS))):
            if value not in allowed:
                raise ConfigError(f"{what}={value!r}: {nearest(str(value), allowed)}")
        if joint and guards:
            raise ConfigError(
                "joint=True trains on all tasks at once: there is no earlier task to guard; drop the guards"
            )
        if tensorboard and output_dir is None:
            raise ConfigError("tensorboard=True writes into the run folder: give output_dir")
        if args is None:
            args = TrainingArguments(learning_rate=1e-3, logging_steps=10, report_to=[])
        check_arguments(args)
        self.args = copy.deepcopy(args)
        self.seed = self.args.seed if seed is None else seed
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed={self.seed}: it must be between 0 and {MAX_SEED}")
        self.stream, self.guards, self.joint, self.optimizer = stream, list(guards), joint, optimizer
        self.method, self.title = method, title or method
        self.folder = Path(output_dir) if output_dir is not None else None
        self.tensorboard, self.progress, self.callbacks = tensorboard, progress, list(callbacks)
        self._splits = ["test"] * evaluate_test + ["validation"] * evaluate_validation
        self._budget = Budget(stream, self.args, steps, total_steps)
        self._notes: list[str] = []
        self._fitted = False
        set_seed(self.seed)
        encoder, self.tokenizer, source = load_encoder(model, tokenizer)
        check_folder(self.folder, source)
        max_length = usable_length(encoder, self.tokenizer, max_length)
        self._collate = Collator(self._pad_id())
        self._data = encode_stream(stream, self.tokenizer, max_length)
        how = find_pooling(source) if pooling == "auto" else cast(Pooling, pooling)
        self.config = check_config(config or {}) or resolved_config(
            method, adapter, head, how, max_length, self.args, self._budget.by_task, optimizer, self.guards
        )
        self.device = self.args.device
        encoder = encoder.to(self.device)
        built = self._head(head, encoder, how, max_length)
        set_seed(self.seed)  # the adapter's first weights do not depend on the kind of head
        encoder = adapt(encoder, adapter)
        self.model = TextClassifier(
            encoder, built, how, [stream.class_ids(i) for i in range(len(stream))], len(stream.classes)
        )
        self.model.to(self.device)
        self._scorer = Scorer(self.model, stream, self._data, self._collate, eval_batch_size)
        self._check_trainable()

    # --- running ------------------------------------------------------------------------------------------------

    def fit(self) -> RunResult:
        """Learn the whole stream, once.

        Returns:
            The matrix, the certificates and everything measured; also written to the run folder, if there is one.

        Raises:
            ConfigError: If this trainer was run before: its model is no longer untouched.
            NumericalError: If the loss or a weight stops being a number.
        """
        if self._fitted:
            raise ConfigError("this ContinualTrainer was run already; make a new one, with a fresh model")
        self._fitted = True
        start = time.perf_counter()
        names = [task.name for task in self.stream]
        rounds = [list(range(len(names)))] if self.joint else [[i] for i in range(len(names))]
        tables = Tables(names, self._splits)
        certificates: list[Certificate] = []
        timings: list[dict[str, Any]] = []
        log = self._open_folder()
        try:
            with Bars(len(rounds), self.title, self.progress) as bars:
                self._prepare(rounds[0])
                for guard in self.guards:
                    guard.attach(self.model)  # a guard that cannot work says so before anything is computed
                tables.add_row(BASE_ROW, 0, self._scorer, log, bars, 0)
                done = 0
                for number, members in enumerate(rounds):
                    name = "joint" if self.joint else names[number]
                    spent: dict[str, Any] = {"name": name}
                    if number == 1 and any(_undecided(g) for g in self.guards):
                        spent["tune_seconds"] = self._tune_guards(log, bars)
                    clock = time.perf_counter()
                    taken = self._train(members, name, log, bars, done)
                    done += taken
                    spent |= {"steps": taken, "train_seconds": time.perf_counter() - clock}
                    clock = time.perf_counter()
                    certificates += self._consolidate(number, name, log, bars)
                    spent["consolidate_seconds"] = time.perf_counter() - clock
                    clock = time.perf_counter()
                    tables.add_row(name, members[-1] + 1, self._scorer, log, bars, done)
                    spent["evaluate_seconds"] = time.perf_counter() - clock
                    timings.append(spent)
                    bars.task_done()
        finally:
            log.close()
            self.model.eval()
        result = RunResult(
            name=self.folder.resolve().name if self.folder else self.method,
            method=self.method,
            title=self.title,
            scenario=self.stream.scenario,
            seed=self.seed,
            tasks=describe_tasks(self.stream),
            matrix=tables.accuracy("test"),
            macro_f1=tables.macro_f1("test"),
            validation=tables.accuracy("validation") if "validation" in self._splits else None,
            certificates=certificates,
            timings={"total_seconds": time.perf_counter() - start, "tasks": timings},
            config=self.config,
            seeds={"everything": self.seed, "stream": self.stream.seed},
            folder=self.folder,
            notes=self._notes,
        )
        if self.folder is not None:
            save_model(self.folder, self.model, self.tokenizer, self.stream, self.guards)
            result.save(self.folder / "results.json")
        return result

    def predict(
        self, task_index: int, split: str = "test", *, seen: int | None = None, batch_size: int | None = None
    ) -> list[int]:
        """Predicted class ids of one split, in the order of its examples.

        Args:
            task_index: The task.
            split: ``"train"``, ``"validation"`` or ``"test"``.
            seen: Tasks learned so far; decides the candidates in class-incremental streams. Default: all.
            batch_size: Examples at once; it does not change the answer.

        Raises:
            ConfigError: There is no such split.
        """
        return self._scorer.predict(task_index, split, len(self.stream) if seen is None else seen, batch_size)

    # --- building -----------------------------------------------------------------------------------------------

    def _pad_id(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None:
                return int(value)
        raise ConfigError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")

    def _head(self, head: str, encoder: nn.Module, pooling: Pooling, max_length: int) -> LabelTextHead | LinearHead:
        if head == "linear":
            return LinearHead(int(encoder.config.hidden_size), len(self.stream.classes))  # type: ignore[union-attr,arg-type]
        texts = [entry.text for entry in self.stream.classes]
        tokens = self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self._check_label_tokens(tokens)
        split = EncodedSplit(tokens, [0] * len(tokens), [0] * len(tokens))
        vectors: list[Tensor] = [torch.empty(0)] * len(tokens)
        encoder.eval()
        with torch.no_grad():
            for rows, batch in evaluation_batches(split, 64, self._collate):
                mask = batch["attention_mask"].to(self.device)
                hidden = hidden_states(encoder, batch["input_ids"].to(self.device), mask)
                for row, vector in zip(rows, F.normalize(pool(hidden, mask, pooling).float(), dim=-1), strict=True):
                    vectors[row] = vector
        return LabelTextHead(torch.stack(vectors))

    def _check_label_tokens(self, tokens: Sequence[list[int]]) -> None:
        """Classes of one task with the same tokens get the same vector: nothing could be learned."""
        for index, task in enumerate(self.stream):
            first: dict[tuple[int, ...], str] = {}
            for label, number in zip(task.labels, self.stream.class_ids(index), strict=True):
                other = first.setdefault(tuple(tokens[number]), label)
                if other != label:
                    raise ConfigError(
                        f"task {task.name!r}: the tokenizer makes the same of the label texts of {other!r} and "
                        f"{label!r}; give label_texts in words that it knows, or use head='linear'"
                    )

    def _check_trainable(self) -> None:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        probing = isinstance(self.model.head, LinearHead) and not isinstance(self.model.encoder, PeftModel)
        if not trainable and not probing:
            raise GuardError(
                "nothing is trainable: give adapter=LoraConfig(...), adapter='linear' or a model with parameters that "
                "require gradients (a PEFT model loaded for inference needs is_trainable=True)"
            )
        count = sum(p.numel() for p in trainable)
        total = sum(p.numel() for p in self.model.parameters())
        logger.info("training %d of %d parameters in %d tensors", count, total, len(trainable))

    def _open_folder(self) -> RunLog:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "results.json").unlink(missing_ok=True)  # those of an earlier run, whose log goes too
        return RunLog(self.folder, self.tensorboard)

    # --- one task -----------------------------------------------------------------------------------------------

    def _prepare(self, members: Sequence[int]) -> None:
        """Let the head have rows for the classes of some tasks, and train those."""
        self.model.head.begin([c for i in members for c in self.stream.class_ids(i)])

    def _train(
        self, members: Sequence[int], name: str, log: RunLog, bars: Bars, done: int, trial: bool = False
    ) -> int:
        """Train on the given tasks; returns the number of optimizer steps."""
        index = members[-1]
        seed = self.seed * 1000 + index
        self._prepare(members)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        before = dict(zip(trained, bit_sums(trained.values()), strict=True))
        data = EncodedSplit.join([self._data[i]["train"] for i in members])
        max_steps = self._budget.max_steps(members, [len(self._data[i]["train"]) for i in members])
        trainer = StreamTrainer(
            task=name,
            guards=self.guards,
            model=self.model,
            args=task_arguments(self.args, seed, max_steps, self.folder, self.optimizer),
            train_dataset=data,
            data_collator=self._collate,
            optimizer_cls_and_kwargs=self.optimizer,
            callbacks=[
                *(g.callback(loss_added=True) for g in self.guards),
                StepCallback(log, bars, name, index, done),
                *([] if trial else self.callbacks),
            ],
        )
        bars.task(name, self._budget.planned(max_steps, len(data)))
        taken = trainer.run()
        after = dict(zip(trained, bit_sums(trained.values()), strict=True))
        self._check_changed({n for n in trained if before[n] != after[n]}, set(trained), name, taken)
        return taken

    def _check_changed(self, changed: set[str], trained: set[str], name: str, steps: int) -> None:
        encoder = {n for n in trained if n.startswith("encoder.")}
        if changed & encoder or (changed and not encoder):
            return
        if any(isinstance(g, PEGP) and g.exhausted() for g in self.guards):
            logger.warning("task %r changed nothing: no free direction is left", name)
        elif changed:
            logger.warning("task %r changed the head and nothing in the encoder, although parts of it train", name)
        else:
            raise GuardError(
                f"task {name!r} took {steps} steps and no weight changed: the learning rate may be 0, or the trained "
                "part may not be used in the forward pass"
            )

    def _consolidate(self, number: int, name: str, log: RunLog, bars: Bars) -> list[Certificate]:
        certificates = []
        for guard in self.guards:
            bars.task(f"{name}: consolidating", None)
            samples = getattr(guard, "samples", 256)
            batches = balanced_batches(
                self._data[number]["train"], samples, 32, self._collate, self.seed * 1000 + number
            )
            certificate = guard.end_task(name, batches)
            log.write("certificate", **{k: v for k, v in certificate.to_dict().items() if k != "sites"})
            certificates.append(certificate)
        return certificates

    def _tune_guards(self, log: RunLog, bars: Bars) -> float:
        """At the first boundary, let guards with ``energy='auto'`` try the second task; returns the seconds taken."""
        clock = time.perf_counter()
        self._prepare([1])  # before the copy: the head's rows for the second task start from scratch in every trial
        kept = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        kept |= {n: b.detach().clone() for n, b in self.model.named_buffers()}

        def trial(candidate: object) -> float:
            self._train([1], f"{self.stream[1].name}: trying", RunLog(None), bars, 0, trial=True)
            score = sum(self._scorer.score(i, "validation", 2)[0] for i in (0, 1)) / 2
            log.write("trial", candidate=str(candidate), validation_accuracy=score)
            with torch.no_grad():
                for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                    if name in kept:
                        tensor.copy_(kept[name])
            return score

        for guard in self.guards:
            if isinstance(guard, PEGP) and _undecided(guard):
                chosen = f"{guard.name}: energy chosen on validation data: {guard.tune(trial)}"
                logger.info(chosen)
                self._notes.append(chosen)
        return time.perf_counter() - clock


def _undecided(guard: Guard) -> bool:
    return isinstance(guard, PEGP) and guard.energy == "auto"
