"""``ContinualTrainer``: a model, a stream of tasks, and what guards it, on ``transformers.Trainer``."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from growthring.errors import ConfigError, GuardError, nearest
from growthring.evaluation import BASE_ROW, AccuracyMatrix, accuracy, confusion, macro_f1
from growthring.guards import PEGP, Certificate, Guard
from growthring.streams import TaskStream

from .classifier import HEADS, POOLINGS, LabelTextHead, LinearHead, Pooling, TextClassifier, find_pooling, pool
from .data import Collator, EncodedSplit, balanced_batches, encode_stream, evaluation_batches
from .logs import Bars, RunLog, StepCallback
from .models import freeze_all_but, load_encoder
from .result import RunResult

__all__ = ["ContinualTrainer"]

logger = logging.getLogger(__name__)


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
        optimizer: ``None`` for the optimizer that ``args`` names, or ``(class, keyword arguments)``.
        guards: Guards, in the order in which they act.
        args: ``TrainingArguments``; one task's training. ``max_steps`` or ``num_train_epochs`` are per task.
        tokenizer: Default: that of ``model``'s name or folder.
        head: ``"label-text"`` (default): similarity to embedded label names, which works before any training.
            ``"linear"``: a head that grows with the classes. Whether tasks share classes is the stream's scenario.
        pooling: ``"auto"`` (default: what the sentence encoder says, else mean), ``"mean"``, ``"cls"`` or ``"last"``.
        max_length: Tokens kept of a text; default 128.
        steps: Optimizer steps of each task, by name; overrides ``args`` for those tasks.
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
        callbacks: Further ``TrainerCallback`` objects, given to every task's Trainer.
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
        if total_steps is not None and total_steps < len(stream):
            raise ConfigError(f"total_steps={total_steps} leaves less than one step for each of {len(stream)} tasks")
        for name in steps or {}:
            stream.index(name)
        self.stream, self.guards, self.joint = stream, list(guards), joint
        self.args = copy.deepcopy(args) if args is not None else TrainingArguments(learning_rate=1e-3, report_to=[])
        self.seed = self.args.seed if seed is None else seed
        self.optimizer, self.steps, self.total_steps = optimizer, dict(steps or {}), total_steps
        self.method, self.title = method, title or method
        self.folder = Path(output_dir) if output_dir is not None else None
        self.evaluate_validation, self.evaluate_test = evaluate_validation, evaluate_test
        self.eval_batch_size, self.tensorboard, self.progress = eval_batch_size, tensorboard, progress
        self.callbacks, self.config = list(callbacks), dict(config or {})
        set_seed(self.seed)
        encoder, self.tokenizer, source = load_encoder(model, tokenizer)
        self._collate = Collator(self._pad_id())
        self._data = encode_stream(stream, self.tokenizer, max_length)
        how = find_pooling(source) if pooling == "auto" else cast(Pooling, pooling)
        self.device = self.args.device
        encoder = encoder.to(self.device)
        built = self._head(head, encoder, how, max_length)
        encoder = self._adapt(encoder, adapter)
        self.model = TextClassifier(
            encoder, built, how, [stream.class_ids(i) for i in range(len(stream))], len(stream.classes)
        )
        self.model.to(self.device)
        self._check_trainable(head)

    # --- running ------------------------------------------------------------------------------------------------

    def fit(self) -> RunResult:
        """Learn the whole stream.

        Returns:
            The matrix, the certificates and everything measured; also written to the run folder, if there is one.
        """
        start = time.perf_counter()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        names = [task.name for task in self.stream]
        tables = {split: (AccuracyMatrix(names), AccuracyMatrix(names)) for split in self._splits()}
        certificates: list[Certificate] = []
        rows: list[dict[str, Any]] = []
        log = RunLog(self.folder, self.tensorboard)
        rounds = [list(range(len(names)))] if self.joint else [[i] for i in range(len(names))]
        try:
            with Bars(len(rounds), self.title, self.progress) as bars:
                self._fill_row(tables, BASE_ROW, 0, log, bars, 0)
                done = 0
                for number, members in enumerate(rounds):
                    name = "joint" if self.joint else names[number]
                    spent: dict[str, Any] = {"name": name}
                    if number == 1:
                        spent["tune_seconds"] = self._tune_guards(log, bars)
                    clock = time.perf_counter()
                    taken = self._train(members, name, log, bars, done)
                    done += taken
                    spent |= {"steps": taken, "train_seconds": time.perf_counter() - clock}
                    clock = time.perf_counter()
                    certificates += self._consolidate(number, name, log, bars)
                    spent["consolidate_seconds"] = time.perf_counter() - clock
                    clock = time.perf_counter()
                    self._fill_row(tables, name, members[-1] + 1, log, bars, done)
                    spent["evaluate_seconds"] = time.perf_counter() - clock
                    rows.append(spent)
                    bars.task_done()
        finally:
            log.close()
        test = tables.get("test") or (AccuracyMatrix(names), AccuracyMatrix(names))
        result = RunResult(
            name=self.folder.name if self.folder else self.method,
            method=self.method,
            title=self.title,
            scenario=self.stream.scenario,
            seed=self.seed,
            tasks=self._describe_tasks(),
            matrix=test[0],
            macro_f1=test[1],
            validation=tables["validation"][0] if "validation" in tables else None,
            certificates=certificates,
            timings={"total_seconds": time.perf_counter() - start, "tasks": rows},
            config=self._resolved(),
            seeds={"everything": self.seed, "stream": self.stream.seed},
            folder=self.folder,
        )
        if self.folder is not None:
            self._save(result)
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
        """
        data = self._data[task_index][split]
        candidates = torch.tensor(
            self.stream.candidates(task_index, len(self.stream) if seen is None else seen), device=self.device
        )
        predicted = [0] * len(data)
        was = self.model.training
        self.model.eval()
        with torch.no_grad():
            for rows, batch in evaluation_batches(data, batch_size or self.eval_batch_size, self._collate):
                logits = self.model(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))[
                    "logits"
                ]
                best = candidates[logits[:, candidates].argmax(-1)]
                for row, label in zip(rows, best.tolist(), strict=True):
                    predicted[row] = label
        self.model.train(was)
        return predicted

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
        split = EncodedSplit(tokens, [0] * len(tokens), [0] * len(tokens))
        vectors: list[Tensor] = [torch.empty(0)] * len(tokens)
        encoder.eval()
        with torch.no_grad():
            for rows, batch in evaluation_batches(split, self.eval_batch_size, self._collate):
                mask = batch["attention_mask"].to(self.device)
                hidden = encoder(input_ids=batch["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
                unit = nn.functional.normalize(pool(hidden, mask, pooling).float(), dim=-1)
                for row, vector in zip(rows, unit, strict=True):
                    vectors[row] = vector
        return LabelTextHead(torch.stack(vectors))

    def _adapt(self, encoder: nn.Module, adapter: PeftConfig | str | None) -> nn.Module:
        if isinstance(adapter, PeftConfig):
            if isinstance(encoder, PeftModel):
                raise ConfigError("the model already has an adapter; give adapter=None to train that one")
            rank = getattr(adapter, "r", None)
            width = int(getattr(encoder.config, "hidden_size", 0))
            if isinstance(rank, int) and width and rank > width:
                raise ConfigError(f"adapter rank {rank} is larger than the model's width {width}; choose r <= {width}")
            return get_peft_model(encoder, adapter)
        if adapter is not None:
            freeze_all_but(encoder, adapter)
        return encoder

    def _check_trainable(self, head: str) -> None:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable and head == "label-text":
            raise GuardError(
                "nothing is trainable: give adapter=LoraConfig(...), adapter='linear' or a model with parameters that "
                "require gradients (a PEFT model loaded for inference needs is_trainable=True)"
            )
        count = sum(p.numel() for p in trainable)
        total = sum(p.numel() for p in self.model.parameters())
        logger.info("training %d of %d parameters in %d tensors", count, total, len(trainable))

    # --- one task -----------------------------------------------------------------------------------------------

    def _arguments(self, members: Sequence[int], seed: int) -> TrainingArguments:
        args = copy.deepcopy(self.args)
        args.seed, args.data_seed = seed, seed
        args.save_strategy, args.eval_strategy, args.report_to = "no", "no", []
        args.disable_tqdm, args.remove_unused_columns, args.label_names = True, False, ["labels"]
        args.dataloader_pin_memory = args.dataloader_pin_memory and self.device.type == "cuda"
        if self.folder is not None:
            args.output_dir = str(self.folder)
        budgets = [self._budget(i) for i in members]
        if all(b is not None for b in budgets):
            args.max_steps = sum(b for b in budgets if b is not None)
        elif args.max_steps > 0:
            args.max_steps *= len(members)
        return args

    def _budget(self, index: int) -> int | None:
        if self.stream[index].name in self.steps:
            return self.steps[self.stream[index].name]
        if self.total_steps is not None:
            share, rest = divmod(self.total_steps, len(self.stream))
            return share + (index < rest)
        return None

    def _train(self, members: Sequence[int], name: str, log: RunLog, bars: Bars, done: int) -> int:
        """Train on the given tasks; returns the number of optimizer steps."""
        index = members[-1]
        seed = self.seed * 1000 + index
        set_seed(seed)  # the head's new rows are drawn here
        self.model.head.begin([c for i in members for c in self.stream.class_ids(i)])
        before = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        if not before:
            raise GuardError(f"task {name!r}: no parameter is trainable")
        data = EncodedSplit.join([self._data[i]["train"] for i in members])
        trainer = _StreamTrainer(
            guards=self.guards,
            model=self.model,
            args=self._arguments(members, seed),
            train_dataset=data,
            data_collator=self._collate,
            optimizer_cls_and_kwargs=self.optimizer,
            callbacks=[
                *(g.callback() for g in self.guards),
                StepCallback(log, bars, name, index, done),
                *self.callbacks,
            ],
        )
        trainer.remove_callback(PrinterCallback)  # the run's own log keeps these lines
        bars.task(name, trainer.planned_steps(data))
        trainer.train()
        taken = int(trainer.state.global_step)
        if all(torch.equal(p, before[n]) for n, p in self.model.named_parameters() if n in before):
            self._complain_unchanged(name, taken)
        return taken

    def _complain_unchanged(self, name: str, steps: int) -> None:
        if any(isinstance(g, PEGP) and g.exhausted() for g in self.guards):
            logger.warning("task %r changed nothing: no free direction is left", name)
            return
        raise GuardError(
            f"task {name!r} took {steps} steps and no weight changed: the learning rate may be 0, or the trained part "
            "may not be used in the forward pass"
        )

    def _consolidate(self, number: int, name: str, log: RunLog, bars: Bars) -> list[Certificate]:
        certificates = []
        for guard in self.guards:
            bars.task(f"{name}: consolidating", None)
            samples = getattr(guard, "samples", 512)
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
        start = {n: p.detach().clone() for n, p in self.model.named_parameters()}

        def trial(candidate: object) -> float:
            quiet = RunLog(None)
            self._train([1], f"{self.stream[1].name}: trying", quiet, bars, 0)
            score = (self._score(0, "validation", 2)[0] + self._score(1, "validation", 2)[0]) / 2
            log.write("trial", candidate=str(candidate), validation_accuracy=score)
            with torch.no_grad():
                for n, p in self.model.named_parameters():
                    p.copy_(start[n]) if n in start else None
            return score

        for guard in self.guards:
            if isinstance(guard, PEGP) and guard.energy == "auto":
                logger.info("energy chosen on validation data: %s", guard.tune(trial))
        return time.perf_counter() - clock

    # --- scoring ------------------------------------------------------------------------------------------------

    def _splits(self) -> list[str]:
        return ["test"] * self.evaluate_test + ["validation"] * self.evaluate_validation

    def _score(self, task_index: int, split: str, seen: int) -> tuple[float, float]:
        counts = confusion(
            self._data[task_index][split].labels, self.predict(task_index, split, seen=seen), len(self.stream.classes)
        )
        return accuracy(counts), macro_f1(counts)

    def _fill_row(
        self,
        tables: Mapping[str, tuple[AccuracyMatrix, AccuracyMatrix]],
        name: str,
        seen: int,
        log: RunLog,
        bars: Bars,
        step: int,
    ) -> None:
        for split, (accuracies, f1s) in tables.items():
            bars.task(f"{name}: scoring", len(self.stream))
            scores = []
            for index in range(len(self.stream)):
                scores.append(self._score(index, split, seen))
                bars.step()
            accuracies.append_row(name, [s[0] for s in scores])
            f1s.append_row(name, [s[1] for s in scores])
            log.write("row", split=split, row=name, accuracy=[s[0] for s in scores], macro_f1=[s[1] for s in scores])
            log.scalars({f"{split}/{t.name}": s[0] for t, s in zip(self.stream, scores, strict=True)}, step)

    # --- writing ------------------------------------------------------------------------------------------------

    def _describe_tasks(self) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "labels": list(t.labels), **{split: len(rows) for split, rows in t.splits().items()}}
            for t in self.stream
        ]

    def _resolved(self) -> dict[str, Any]:
        if self.config:
            return self.config
        kept = (
            "learning_rate",
            "weight_decay",
            "max_steps",
            "num_train_epochs",
            "per_device_train_batch_size",
            "lr_scheduler_type",
            "warmup_steps",
            "optim",
        )
        values = {k: getattr(self.args, k) for k in kept}
        return {
            "method": self.method,
            "train": {
                k: str(getattr(v, "value", v)) if not isinstance(v, int | float) else v for k, v in values.items()
            },
        }

    def _save(self, result: RunResult) -> None:
        assert self.folder is not None
        if isinstance(self.model.encoder, PeftModel):
            self.model.encoder.save_pretrained(str(self.folder / "adapter"))
        elif isinstance(self.model.encoder, PreTrainedModel):
            self.model.encoder.save_pretrained(str(self.folder / "model"))
            self.tokenizer.save_pretrained(str(self.folder / "model"))
        classes = [{"key": c.key, "label": c.label, "text": c.text} for c in self.stream.classes]
        self.model.save_head(self.folder, classes)
        for guard in self.guards:
            if isinstance(guard, PEGP):
                guard.save_pretrained(self.folder / "memory")
        result.save(self.folder / "results.json")


class _StreamTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that adds guards' loss terms and refuses an empty optimizer."""

    def __init__(self, *, guards: Sequence[Guard], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._guards = [g for g in guards if type(g).loss is not Guard.loss]

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for guard in self._guards:
            term = guard.loss(outputs, inputs)
            if term is not None:
                loss = loss + term
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise GuardError("the optimizer has no trainable parameter; every weight would stay as it is")
        return optimizer

    def planned_steps(self, data: EncodedSplit) -> int:
        """Optimizer steps this run will take on one process."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = -(-len(data) // self.args.train_batch_size)
        return int(max(1, -(-batches // self.args.gradient_accumulation_steps)) * self.args.num_train_epochs)
