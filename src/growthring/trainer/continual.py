"""``ContinualTrainer``: a model, a stream of tasks, and what guards it, on ``transformers.Trainer``."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainingArguments, set_seed

from growthring.errors import ConfigError, GuardError
from growthring.evaluation import BASE_ROW
from growthring.guards import PEGP, Certificate, Guard, Radius
from growthring.guards.anchored_guard import AnchoredGuard
from growthring.streams import TaskStream

from .analytic import check_classifiers
from .building import build
from .classifier import LinearHead
from .data import EncodedSplit, balanced_batches
from .folder import check_config, describe_tasks, resolved_config, save_model
from .full_rank import describe, rate_apart, unfreeze
from .guarding import check_one_pass, explain, guard_callbacks, merge_weight, prepares, undecided
from .logs import Bars, RunLog, StepCallback
from .optimizing import Optimizer, check_optimizer, explain_optimizer
from .reference import Reference, zero_shot_figures
from .result import RunResult
from .scoring import Scorer, Tables
from .starting import start_adapters
from .steps import (
    Budget,
    StreamTrainer,
    bit_sums,
    blend,
    check_arguments,
    check_changed,
    frozen,
    task_arguments,
)

__all__ = ["ContinualTrainer"]

logger = logging.getLogger(__name__)

MAX_SEED = 4_000_000
"""Largest seed: every task has one of its own, and numpy takes 32 bits."""


class ContinualTrainer:
    """Learns a stream of classification tasks, of texts or of images, one after another; measures what is kept.

    Every task is one run of ``transformers.Trainer`` with a fresh optimizer; guards correct every step; after every
    task each guard consolidates and one row of the accuracy matrix is filled. Test data are only ever scored.

    Args:
        model: A ``transformers`` encoder, a PEFT model around one, or the name or folder of one. Text encoders and
            decoder language models without a head, image encoders (ViT, DINOv2), and dual encoders (``CLIPModel``,
            ``VisionTextDualEncoderModel``), which classify images by their similarity to class prompts.
        stream: The tasks.
        adapter: A PEFT config (wrapped around the model, seeded), ``"linear"`` for all linear weights of the encoder,
            ``"full"`` for all its parameters, or ``None`` for what ``model`` already trains.
        optimizer: ``None`` for the optimizer that ``args`` names, ``(class, keyword arguments)``, or ``(factory,
            keyword arguments)``, called as ``factory()(model, **keywords)``; learning rate and weight decay are those
            of ``args`` where left out.
        full_rank: Linear weights of the base model that train themselves, beside a LoRA adapter: names (or ends of
            names) of layers, a role of :data:`growthring.backbones.ROLES`, or ``"all-linear"``. A role and
            ``"all-linear"`` leave out the layers that LoRA adapts; a layer named by itself trains in both ways. The
            run folder then holds the whole model with LoRA merged, in ``model/``, in place of ``adapter/``.
        full_rank_lr: Learning rate of these weights; default: that of everything else. GORP's paper has 1e-5 beside
            1e-3 for LoRA.
        guards: Guards, in the order in which they act.
        args: ``TrainingArguments``; one task's training. ``max_steps`` or ``num_train_epochs`` are per task.
        tokenizer: Default: that of ``model``'s name or folder.
        head: ``"label-text"``: similarity to embedded label names, which works before any training; for a dual
            encoder to class prompts, which its text tower reads. ``"linear"``: a head that grows with the classes.
            ``"auto"`` (default): label texts where the model reads text, else linear. Whether tasks share classes is
            the stream's scenario.
        pooling: ``"mean"``, ``"cls"`` or ``"last"``; ``"auto"`` (default): what the sentence encoder says, else last
            for decoders, the class token for image encoders that have one, and the mean for all others.
        max_length: Tokens kept of a text; default 128.
        image_size: Pixels of each side of the images that the model is given; positions are interpolated. Default:
            what the preprocessing says, else the model's own size.
        image_processor: How pixel values are made: an :class:`~growthring.trainer.ImagePreprocessor`, a mapping like
            ``preprocessor_config.json``, or a ``transformers`` image processor. Default: the file of ``model``'s
            folder.
        prompt_template: Class prompt of a dual encoder, with ``{}`` for the class name.
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
        classifiers: Who answers, all from the same features in the same run: ``"head"`` (default), the trained head;
            ``"prototype"``, the nearest class mean by cosine; ``"ridge"``, ridge regression on random features
            (RanPAC). The last two learn from one pass over a task's training rows when it ends, and forget nothing of
            their own. The first one fills the main matrix; all of them are in :attr:`RunResult.views`.

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
        optimizer: Optimizer | None = None,
        full_rank: str | Sequence[str] | None = None,
        full_rank_lr: float | None = None,
        guards: Sequence[Guard] = (),
        args: TrainingArguments | None = None,
        tokenizer: Any = None,
        head: str = "auto",
        pooling: str = "auto",
        max_length: int = 128,
        image_size: int | None = None,
        image_processor: Any = None,
        prompt_template: str = "a photo of a {}.",
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
        classifiers: Sequence[str] = ("head",),
    ) -> None:
        if joint and guards:
            raise ConfigError(
                "joint=True trains on all tasks at once: there is no earlier task to guard; drop the guards"
            )
        if tensorboard and output_dir is None:
            raise ConfigError("tensorboard=True writes into the run folder: give output_dir")
        if args is None:
            args = TrainingArguments(learning_rate=1e-3, logging_steps=10, report_to=[])
            args.num_train_epochs = 1 if stream.online else args.num_train_epochs
        check_arguments(args)
        check_optimizer(optimizer, args)
        self.args = copy.deepcopy(args)
        self.seed = self.args.seed if seed is None else seed
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed={self.seed}: it must be between 0 and {MAX_SEED}")
        self.stream, self.guards, self.joint, self.optimizer = stream, list(guards), joint, optimizer
        self.method, self.title = method, title or method
        self.folder = Path(output_dir) if output_dir is not None else None
        self.tensorboard, self.progress, self.callbacks = tensorboard, progress, list(callbacks)
        self._splits = ["test"] * evaluate_test + ["validation"] * evaluate_validation
        classifiers = check_classifiers(classifiers)
        merge_weight(self.guards)
        check_one_pass(stream, self.guards)
        self._budget = Budget(stream, self.args, steps, total_steps)
        self._notes: list[str] = []
        self._fitted = False
        set_seed(self.seed)
        self.device = self.args.device
        built = build(
            model, stream, adapter=adapter, tokenizer=tokenizer, head=head, pooling=pooling, max_length=max_length,
            image_size=image_size, image_processor=image_processor, prompt_template=prompt_template,
            device=self.device, seed=self.seed, output=self.folder,
        )  # fmt: skip
        self.model, self.tokenizer, self._collate, self._data = built.model, built.tokenizer, built.collate, built.data
        self._max_length = built.max_length
        self._whole = {} if full_rank is None else unfreeze(self.model.encoder, full_rank)
        self._apart = rate_apart(self._whole, full_rank_lr)
        self.config = check_config(config or {}) or resolved_config(
            method, adapter, built, self.args, self._budget.by_task, optimizer, self.guards
        ) | {"full_rank": describe(self._whole, full_rank_lr), "classifiers": list(classifiers)}
        self._scorer = Scorer(self.model, stream, self._data, self._collate, eval_batch_size, classifiers, self.seed)
        self._reference = Reference(stream, built, self.guards, eval_batch_size)
        self._zero_shot = built.head == "label-text" and classifiers[0] == "head" and not joint
        self._check_trainable()
        rows = EncodedSplit.join([splits["train"] for splits in self._data[: len(self._data) if joint else 1]])
        start_adapters(self.model, lambda: balanced_batches(rows, 256, 32, self._collate, self.seed))

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
        tables = Tables(names, self._splits, self._scorer.views)
        certificates: list[Certificate] = []
        timings: list[dict[str, Any]] = []
        log = self._open_folder()
        try:
            with Bars(len(rounds), self.title, self.progress) as bars:
                self._prepare(rounds[0])
                for guard in self.guards:
                    guard.attach(self.model)  # a guard that cannot work says so before anything is computed
                sites = explain(self.model, self.guards)
                plans = self.explain_optimizer()
                tables.add_row(BASE_ROW, 0, self._scorer, log, bars, 0)
                self._reference.score(log)
                certificates += self._reference.protect(self.seed, log, bars)
                done = 0
                for number, members in enumerate(rounds):
                    name = "joint" if self.joint else names[number]
                    spent: dict[str, Any] = {"name": name}
                    if any(prepares(g) for g in self.guards):
                        clock = time.perf_counter()
                        self._prepare_guards(number, name, bars)
                        spent["prepare_seconds"] = time.perf_counter() - clock
                    if number == 1 and any(undecided(g) for g in self.guards):
                        spent["tune_seconds"] = self._tune_guards(log, bars)
                    clock = time.perf_counter()
                    taken = self._train(members, name, log, bars, done)
                    done += taken
                    spent |= {"steps": taken, "train_seconds": time.perf_counter() - clock}
                    clock = time.perf_counter()
                    certificates += self._consolidate(number, name, log, bars)
                    spent["consolidate_seconds"] = time.perf_counter() - clock
                    if self._scorer.learns:
                        clock = time.perf_counter()
                        self._learn(members, name, log, bars)
                        spent["classifier_seconds"] = time.perf_counter() - clock
                    clock = time.perf_counter()
                    tables.add_row(name, members[-1] + 1, self._scorer, log, bars, done)
                    self._reference.score(log)
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
            views=tables.views(),
            sites=sites,
            optimizer=plans,
            full_rank=list(self._whole),
            reference=self._reference.accuracies or None,
            mtil=zero_shot_figures(tables.accuracy("test")) if self._zero_shot else None,
        )
        if self.folder is not None:
            result.save(self.folder / "results.json")  # before weights, which may fail to be written
            images = self._collate.images
            save_model(self.folder, self.model, self.tokenizer, self.stream, self.guards, images, bool(self._whole))
            for classifier in self._scorer.analytic.values():
                classifier.save_pretrained(self.folder / "classifiers")
        return result

    def predict(
        self,
        task_index: int,
        split: str = "test",
        *,
        seen: int | None = None,
        batch_size: int | None = None,
        classifier: str | None = None,
        given: str | None = None,
    ) -> list[int]:
        """Predicted class ids of one split, in the order of its examples.

        Args:
            task_index: The task.
            split: ``"train"``, ``"validation"`` or ``"test"``.
            seen: Tasks learned so far; decides the candidates in class-incremental streams. Default: all.
            batch_size: Examples at once; it does not change the answer.
            classifier: One of those that this trainer was made with; default: the first.
            given: ``"classes seen"`` or ``"task"``: what the classifier is told; default: as the scenario says.

        Raises:
            ConfigError: There is no such split, classifier or view, or the classifier has learned none of the
                task's classes.
        """
        seen = len(self.stream) if seen is None else seen
        return self._scorer.predict(task_index, split, seen, batch_size, classifier, given)

    def explain_optimizer(self) -> list[dict[str, Any]]:
        """How the optimizer treats every parameter, as its ``explain`` says it; empty if it does not.

        Returns:
            One entry for each parameter as :class:`~growthring.optim.ParameterPlan` has it. Nothing is trained.
        """
        with torch.random.fork_rng():
            return explain_optimizer(self.model, self.optimizer, self.args)

    # --- building -----------------------------------------------------------------------------------------------

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
        self._prepare(members)
        if self._nothing_to_learn(members):
            self._skip(name, trial)
            return 0
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        before = dict(zip(trained, bit_sums(trained.values()), strict=True))
        guarded = members[-1] > 0 or self.stream.reference is not None  # else nothing is guarded yet
        weight = merge_weight(self.guards) if guarded else 0.0
        start = {n: p.detach().clone() for n, p in trained.items()} if weight else {}
        taken = self._run(members, name, log, bars, done, self.guards, trial)
        if weight:
            strict = {n: p.detach().clone() for n, p in trained.items()}
            unmoved = {n for n in trained if torch.equal(strict[n], start[n])}
            held = {
                site["name"] for site in explain(self.model, self.guards) if site.get("treatment") == "held"
            } & unmoved
            blend(trained, start, 0.0)
            with frozen(trained[n] for n in held):
                taken += self._run(members, f"{name}: without guards", log, bars, done + taken, [], trial)
            blend(trained, strict, weight)
        after = dict(zip(trained, bit_sums(trained.values()), strict=True))
        check_changed((n for n in trained if before[n] != after[n]), trained, self.guards, name, taken)
        return taken

    def _run(
        self,
        members: Sequence[int],
        name: str,
        log: RunLog,
        bars: Bars,
        done: int,
        guards: Sequence[Guard],
        trial: bool,
    ) -> int:
        """One run of the Trainer over the training rows of some tasks."""
        index = members[-1]
        rows: Dataset[Any] = EncodedSplit.join([self._data[i]["train"] for i in members])
        in_order = self.stream.online and len(members) == 1
        if in_order:
            rows = Subset(rows, self.stream.pass_order(index))
        sizes = [len(self._data[i]["train"]) for i in members]
        max_steps = self._budget.max_steps(members, sizes)
        trainer = StreamTrainer(
            task=name,
            guards=guards,
            apart=self._apart,
            model=self.model,
            args=task_arguments(self.args, self.seed * 1000 + index, max_steps, self.folder, self.optimizer, in_order),
            train_dataset=rows,
            data_collator=self._collate,
            optimizer_cls_and_kwargs=self.optimizer,
            callbacks=[
                *guard_callbacks(guards),
                StepCallback(log, bars, name, index, done),
                *([] if trial else self.callbacks),
            ],
        )
        bars.task(name, self._budget.planned(max_steps, sum(sizes)))
        return trainer.run()

    def _nothing_to_learn(self, members: Sequence[int]) -> bool:
        """Whether the loss is constant: each task has one class to choose from, and no guard adds a term."""
        single = all(len(self.stream.class_ids(i)) == 1 for i in members)
        return single and all(type(g).loss is Guard.loss for g in self.guards)

    def _skip(self, name: str, trial: bool) -> None:
        """Pass over the training of a task that has one class; guards begin it, so that they can end it."""
        if not trial:
            message = (
                f"task {name!r} has one class: the loss compares a task's own classes only, so it is constant, and no "
                "step is taken. Prototypes and the ridge classifier learn the class nevertheless (classifiers=)"
            )
            warnings.warn(message, UserWarning, stacklevel=4)
            self._notes.append(message)
        for guard in self.guards:
            guard.attach(self.model)
            guard.begin_task(name)

    def _sample(self, number: int, guard: Guard) -> list[dict[str, Tensor]]:
        """Rows of a task for a guard to look at, drawn evenly over the classes: training rows unless it says else."""
        samples, split = getattr(guard, "samples", 256), getattr(guard, "split", "train")
        return balanced_batches(self._data[number][split], samples, 32, self._collate, self.seed * 1000 + number)

    def _prepare_guards(self, number: int, name: str, bars: Bars) -> None:
        """Let guards that want to see a task before it trains see it."""
        for guard in self.guards:
            if prepares(guard):
                bars.task(f"{name}: preparing", None)
                guard.prepare(name, self._sample(number, guard))

    def _consolidate(self, number: int, name: str, log: RunLog, bars: Bars) -> list[Certificate]:
        certificates = []
        for guard in self.guards:
            bars.task(f"{name}: consolidating", None)
            certificate = guard.end_task(name, self._sample(number, guard))
            said = {k: v for k, v in certificate.to_dict().items() if k not in ("sites", "deviations")}
            log.write("certificate", **said)
            certificates.append(certificate)
        return certificates

    def _learn(self, members: Sequence[int], name: str, log: RunLog, bars: Bars) -> None:
        """Let the classifiers that are not trained learn from the features of finished tasks."""
        bars.task(f"{name}: classifiers", None)
        for index in members:
            for classifier, chosen in self._scorer.learn(index).items():
                log.write("classifier", classifier=classifier, task=self.stream[index].name, **chosen)

    def _tune_guards(self, log: RunLog, bars: Bars) -> float:
        """At the first boundary, let guards with ``energy='auto'`` try the second task; returns the seconds taken."""
        clock = time.perf_counter()
        self._prepare([1])  # before the copy: the head's rows for the second task start from scratch in every trial
        kept = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        kept |= {n: b.detach().clone() for n, b in self.model.named_buffers()}
        learned = copy.deepcopy(self._scorer.analytic)
        radii = [(g, g.state_dict()) for g in self.guards if isinstance(g, Radius | AnchoredGuard)]

        def trial(candidate: object) -> float:
            self._train([1], f"{self.stream[1].name}: trying", RunLog(None), bars, 0, trial=True)
            if self._scorer.learns:
                self._scorer.learn(1)
            score = sum(self._scorer.main_score(i, "validation", 2) for i in (0, 1)) / 2
            self._scorer.analytic = copy.deepcopy(learned)
            log.write("trial", candidate=str(candidate), validation_accuracy=score)
            with torch.no_grad():
                for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                    if name in kept:
                        tensor.copy_(kept[name])
            for guard, state in radii:
                guard.load_state_dict(state)
            return score

        for guard in self.guards:
            if isinstance(guard, PEGP) and undecided(guard):
                chosen = f"{guard.name}: energy chosen on validation data: {guard.tune(trial)}"
                logger.info(chosen)
                self._notes.append(chosen)
        return time.perf_counter() - clock
