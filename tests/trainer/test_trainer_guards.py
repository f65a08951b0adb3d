"""Guards inside the trainer of a stream: certificates, the choice of the energy, loss terms, optimizers."""

from __future__ import annotations

import json

import pytest
import torch
from test_trainer_matrix import poison
from trainer_helpers import differing, stream_of, weights

import growthring as gr
from growthring.errors import ConfigError, GuardError, NumericalError
from growthring.guards import CANDIDATES, Certificate, Guard
from growthring.guards.batches import evaluating

SOME = CANDIDATES[::3]  # the most and the least protective


@pytest.mark.parametrize("adapter", ["lora", "linear"])
def test_certificates_of_a_run(build, adapter):
    guard = gr.PEGP(energy=0.95, probes=4)
    run = build(stream_of(3), adapter=adapter, guards=[guard], args={"weight_decay": 0.1}).fit()
    assert [(c.task, c.task_index, c.protected_tasks) for c in run.certificates] == [
        ("animals", 0, 0),
        ("ways", 1, 1),
        ("places", 2, 2),
    ]
    assert run.certificates[0].leak is None
    assert run.certificates[0].output_change is None
    for certificate in run.certificates[1:]:
        assert 0.0 < certificate.leak <= 1e-5
        assert certificate.probes == 4 * certificate.task_index
        assert certificate.output_change is not None
        assert certificate.energy >= 0.95 - 1e-6
    free = [c.free for c in run.certificates]
    assert free == sorted(free, reverse=True)
    assert {s.kind for s in run.certificates[0].sites} == ({"linear"} if adapter == "linear" else {"lora_A", "lora_B"})


def few(keywords, labels):
    rows = [(f"{word} {tail}", label) for word, label in zip(keywords, labels, strict=True) for tail in ("the", "of")]
    return gr.Task(keywords[0], rows, rows[:2], [(f"{w} it", y) for w, y in zip(keywords, labels, strict=True)])


@pytest.mark.filterwarnings("ignore:task:UserWarning")  # these splits overlap on purpose
@pytest.mark.parametrize("adapter", ["lora", "linear"])
def test_full_energy_keeps_old_answers_and_still_learns(build, adapter):
    """Four short texts span few directions: all are protected, and there is room for the next task."""
    stream = gr.TaskStream([few(("cat", "dog"), ("red", "blue")), few(("train", "plane"), ("one", "three"))])
    changes = {}
    for energy in (1.0, 0.3):
        trainer = build(
            stream,
            adapter=adapter,
            guards=[gr.PEGP(energy=energy, probes=8)],
            args={"weight_decay": 0.1, "max_steps": 10},
        )
        ends = []
        end_task = trainer.guards[0].end_task
        trainer.guards[0].end_task = lambda *a, end_task=end_task, ends=ends, trainer=trainer: (
            ends.append(loss_of(trainer, 1)) or end_task(*a)
        )
        run = trainer.fit()
        changes[energy] = run.certificates[1].output_change
        assert run.certificates[1].free > 0
        assert ends[1] < 0.9 * ends[0]  # the second task's loss, before and after it was learned
    assert changes[1.0] < 1e-4
    assert changes[0.3] > 1e-2


def loss_of(trainer, task):
    data = trainer._data[task]["train"]
    with evaluating(trainer.model):
        return float(trainer.model(**trainer._collate([data[i] for i in range(len(data))]))["loss"])


def test_the_first_task_is_trained_as_without_a_guard(build):
    plain, guarded = build(stream_of(1)), build(stream_of(1), guards=[gr.PEGP(energy=0.9)])
    plain.fit()
    guarded.fit()
    assert differing(weights(plain), weights(guarded)) == []


def test_a_guard_changes_the_second_task(build):
    plain, guarded = build(), build(guards=[gr.PEGP(energy=0.9)])
    plain.fit()
    guarded.fit()
    assert differing(weights(plain), weights(guarded))


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 1e-2}),
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    ],
    ids=["arguments", "momentum", "adam", "adamw"],
)
def test_optimizers_do_not_leak(build, optimizer):
    run = build(optimizer=optimizer, guards=[gr.PEGP(energy=0.9)], args={"weight_decay": 0.1}).fit()
    assert 0.0 < run.certificates[1].leak <= 1e-5


def test_a_given_optimizer_is_used_with_its_own_settings(build):
    made = []

    class Spy(torch.optim.AdamW):
        def __init__(self, params, **settings):
            super().__init__(params, **settings)
            made.append(self)

    settings = {"lr": 3e-3, "weight_decay": 0.25, "betas": (0.5, 0.6)}
    build(optimizer=(Spy, settings), args={"weight_decay": 0.0, "learning_rate": 1.0}).fit()
    assert len(made) == 2  # a fresh one for each task
    assert made[0] is not made[1]
    for optimizer in made:
        assert optimizer.param_groups[0]["weight_decay"] == 0.25  # and not that of the arguments
        assert {g["lr"] for g in optimizer.param_groups} == {3e-3}
        assert {g["betas"] for g in optimizer.param_groups} == {(0.5, 0.6)}
    assert settings == {"lr": 3e-3, "weight_decay": 0.25, "betas": (0.5, 0.6)}


def test_a_given_optimizer_takes_from_the_arguments_what_it_is_not_given(build, tmp_path):
    folder = tmp_path / "run"
    args = {"weight_decay": 0.5, "learning_rate": 2e-3}
    build(stream_of(1), optimizer=(torch.optim.AdamW, {}), args=args, output_dir=folder).fit()
    by_name = build(stream_of(1), args=args | {"optim": "adamw_torch"}, output_dir=tmp_path / "other")
    by_name.fit()
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("run", "other")]
    assert logs[0] == logs[1]
    assert "0.002" in logs[0]


class Toy(Guard):
    """Adds a constant and a pull towards zero to the loss, and notes what it is called with."""

    name = "toy"

    def __init__(self, pull=0.0, add=0.0):
        self.pull, self.add, self.calls = pull, add, []

    def attach(self, model):
        self.model = model
        self.calls.append("attach")

    def begin_task(self, task=None):
        self.calls.append("begin")

    def loss(self, outputs, batch):
        assert "logits" in outputs
        assert {"labels", "task_ids"} <= set(batch)
        if not self.pull and not self.add:
            return None
        return self.add + self.pull * sum((p**2).sum() for p in self.model.parameters() if p.requires_grad)

    def before_step(self):
        self.calls.append("before")

    def after_step(self):
        self.calls.append("after")

    def end_task(self, task, batches):
        self.calls.append(f"end {task}")
        self.examples = sum(len(b["labels"]) for b in batches)
        return Certificate(self.name, task, 0, 0, None, None, 1.0, 1, 1, None, 0, 0, ())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_guard_is_called_in_order(build):
    guard = Toy()
    run = build(stream_of(2, train=24), guards=[guard], args={"max_steps": 2}).fit()
    steps = ["before", "after"] * 2
    assert guard.calls == ["attach"] + [
        call for task in ("animals", "ways") for call in ("attach", "begin", *steps, f"end {task}")
    ]
    assert guard.examples == run.tasks[1]["train"]  # fewer than the 512 that are offered
    assert [c.guard for c in run.certificates] == ["toy", "toy"]


def test_loss_terms_of_guards_are_added(build, tmp_path):
    def losses(guards, name, **args):
        trainer = build(stream_of(1), guards=guards, output_dir=tmp_path / name, args={"max_steps": 2} | args)
        trainer.fit()
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["event"] == "log"], weights(trainer)

    plain, end = losses([], "plain")
    nothing, end2 = losses([Toy()], "nothing")
    shifted, end3 = losses([Toy(add=5.0), Toy(add=2.0)], "shifted")
    accumulated, _ = losses([Toy(add=5.0)], "accumulated", gradient_accumulation_steps=2)
    pulled, end4 = losses([Toy(pull=1.0)], "pulled")
    assert nothing == plain
    assert differing(end, end2) == []
    assert shifted == pytest.approx([v + 7.0 for v in plain], abs=1e-4)
    assert differing(end, end3) == []  # a constant has no gradient
    assert 5.0 < accumulated[0] < 6.5  # a mean over the accumulated batches, not a sum
    assert pulled[0] > plain[0] + 1.0
    assert differing(end, end4)


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_the_energy_is_chosen_on_validation_data_alone(build, head):
    def once(stream):
        guard = gr.PEGP(energy="auto", candidates=SOME, samples=32)
        trainer = build(stream, guards=[guard], head=head, evaluate_validation=True, args={"max_steps": 6})
        run = trainer.fit()
        return guard.energy, weights(trainer), run

    energy, end, run = once(stream_of(3, validation=12))
    energy2, end2, run2 = once(stream_of(3, validation=12, change=poison))
    assert energy == energy2
    assert energy in SOME
    assert differing(end, end2) == []
    assert run.validation == run2.validation
    assert run.matrix != run2.matrix
    assert run.to_dict()["notes"] == [f"pegp: energy chosen on validation data: {energy}"]
    assert run.timings["tasks"][1]["tune_seconds"] > 0
    assert ["tune_seconds" in t for t in run.timings["tasks"]] == [False, True, False]


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_trials_leave_no_trace(build, head):
    """``auto`` ends where the same energy, given from the start, ends: bit for bit, head and all."""
    stream = stream_of(2, validation=12)
    auto = gr.PEGP(energy="auto", candidates=SOME, samples=32)
    trainer = build(stream, guards=[auto], head=head)
    run = trainer.fit()
    for energy in SOME:
        given = gr.PEGP(energy=energy, samples=32)
        other = build(stream, guards=[given], head=head)
        other_run = other.fit()
        assert (differing(weights(trainer), weights(other)) == []) == (energy == auto.energy)
        if energy == auto.energy:
            assert run.matrix == other_run.matrix
            assert [c.leak for c in run.certificates] == [c.leak for c in other_run.certificates]
            assert run.certificates[1].sites == other_run.certificates[1].sites


def test_every_trial_starts_from_the_same_weights(build, tmp_path):
    starts, steps = [], []

    class Watch(gr.PEGP):
        def attach(self, model):
            super().attach(model)
            self.model = model

        def begin_task(self, task=None):
            super().begin_task(task)
            starts.append({n: p.detach().clone() for n, p in self.model.named_parameters()})

    class Mine(gr.guards.base.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    guard = Watch(energy="auto", candidates=SOME, samples=32)
    folder = tmp_path / "run"
    build(guards=[guard], head="linear", output_dir=folder, callbacks=[Mine()]).fit()
    assert len(starts) == 4  # two tasks and two trials
    assert differing(starts[1], starts[2]) == []
    assert differing(starts[1], starts[3]) == []
    assert steps == [1, 2, 3, 4] * 2  # the user's callbacks see tasks, not trials
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trials = [line for line in lines if line["event"] == "trial"]
    assert [t["candidate"] for t in trials] == [str(c) for c in SOME]
    assert all(0.0 <= t["validation_accuracy"] <= 1.0 for t in trials)
    assert {line["task"] for line in lines if line["event"] == "log"} == {"animals", "ways"}
    best = max(t["validation_accuracy"] for t in trials)
    assert str(guard.energy) == next(t["candidate"] for t in trials if t["validation_accuracy"] == best)


def test_auto_with_one_task_has_nothing_to_choose(build):
    run = build(stream_of(1), guards=[gr.PEGP(energy="auto")]).fit()
    assert "not chosen yet" in run.certificates[0].notes[0]
    assert run.notes == []


def test_a_full_memory_is_told_and_not_an_error(build, lora, caplog):
    """What goes into the attention's output layer spans its whole space after a task."""
    guard = gr.PEGP(energy=1.0, samples=64)
    trainer = build(stream_of(2, train=64), adapter=lora(target_modules=["attention.output.dense"]), guards=[guard])
    with pytest.warns(UserWarning, match="no free direction is left"):
        run = trainer.fit()
    assert [c.free for c in run.certificates] == [0, 0]
    assert "task 'ways' changed nothing: no free direction is left" in caplog.text


def test_a_loss_that_is_no_number_stops_the_run(build, tmp_path):
    class Bad(Toy):
        def loss(self, outputs, batch):
            self.seen = getattr(self, "seen", 0) + 1
            return torch.tensor(float("nan" if self.seen == 7 else 0.0))

    folder = tmp_path / "run"
    with pytest.raises(NumericalError, match=r"task 'ways', step 3: the loss is nan. Lower the learning rate \(0.01"):
        build(guards=[Bad()], output_dir=folder).fit()
    assert not (folder / "results.json").exists()
    for line in (folder / "log.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_weight_that_is_no_number_stops_the_run(build):
    """The last step may spoil the weights without any loss to tell of it."""

    class Spoil(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))

    trainer = build(optimizer=(Spoil, {"lr": 0.1}), args={"max_steps": 1})
    with pytest.raises(NumericalError, match="after step 1 1 trained tensors hold NaN or infinity"):
        trainer.fit()


def test_a_huge_learning_rate_ends_in_a_clear_error_or_in_numbers(build):
    trainer = build(args={"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0.0}, adapter="linear")
    with pytest.raises((NumericalError, GuardError)):
        trainer.fit()


def test_guards_go_with_a_model_object_of_ones_own(build, tiny_encoder, lora):
    from peft import get_peft_model
    from transformers import AutoModel

    model = get_peft_model(AutoModel.from_pretrained(tiny_encoder), lora(target_modules=["query", "value"]))
    run = build(model=model, adapter=None, guards=[gr.PEGP(energy=0.9)]).fit()
    assert len(run.certificates[1].sites) == 8
    assert run.certificates[1].leak <= 1e-5


def test_full_fine_tuning_holds_what_nothing_protects(build):
    run = build(adapter="full", guards=[gr.PEGP(energy=0.9)], args={"weight_decay": 0.1}).fit()
    assert run.certificates[1].held > 10
    assert run.certificates[1].leak <= 1e-5


def test_wrong_energies_are_refused_at_once():
    with pytest.raises(ConfigError):
        gr.PEGP(energy=1.5)
