"""One pass over the rows, tasks of one class, guards that look ahead, and a free copy merged in."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from trainer_helpers import KEYWORDS, sentences, stream_of, weights

import growthring as gr
from growthring.errors import ConfigError, GuardError
from growthring.guards import Certificate, Guard
from growthring.trainer import analytic
from growthring.trainer.data import Collator


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setattr(analytic, "WIDTH", 64)


class Nothing(Guard):
    """Keeps a diary and protects nothing."""

    name = "nothing"

    def __init__(self):
        self.diary = []

    def attach(self, model):
        self.model = model
        self.diary.append("attach")

    def begin_task(self, task=None):
        self.diary.append("begin")

    def end_task(self, task, batches):
        self.diary.append("end")
        done = sum(entry == "end" for entry in self.diary) - 1
        return Certificate(self.name, task, done, done, None, None, 0.0, 0, 0, None, 0, 0, ())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def single_class_stream(classes=("animals", "ways", "places"), labels=1, **settings):
    """Tasks of ``labels`` classes each, class-incremental."""
    tasks = []
    for name, (first, second) in KEYWORDS.items():
        if name not in classes:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            words, names = ([first], [f"{name}-x"]) if labels == 1 else ([first, second], [f"{name}-x", f"{name}-y"])
            rows = [sentences(words, names, count, split) for count, split in ((24, "train"), (10, "test"))]
            tasks.append(gr.Task(name, *rows, labels=names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return gr.TaskStream(tasks, scenario="class", **settings)


def online(tasks=2, **settings):
    return stream_of(tasks, "online-class", **settings)


# --- one pass --------------------------------------------------------------------------------------------------------


class Seen(Collator):
    """Remembers which rows were collated while the model trained."""

    def __init__(self, collate, model):
        super().__init__(collate.pad_id, collate.images)
        self.model, self.rows = model, []

    def __call__(self, rows):
        if self.model.training:
            self.rows += [(row["task_ids"], tuple(row["inputs"])) for row in rows]
        return super().__call__(rows)


def watched(build, stream, **settings):
    trainer = build(stream, **settings)
    trainer._collate = Seen(trainer._collate, trainer.model)
    trainer.fit()
    return trainer, trainer._collate.rows


@pytest.mark.parametrize("seed", [1, 2])
def test_every_row_is_seen_once_in_the_order_of_the_stream(build, seed):
    args = {"max_steps": -1, "num_train_epochs": 1}
    trainer, rows = watched(build, online(), args=args, seed=seed)
    expected = []
    for index in range(2):
        data = trainer._data[index]["train"]
        expected += [(index, tuple(data.inputs[i])) for i in trainer.stream.pass_order(index)]
    assert rows == expected  # whatever the seed of the training
    _, shuffled = watched(build, stream_of(2, "class"), args=args, seed=seed)  # the control
    assert shuffled != expected
    assert sorted(shuffled) == sorted(expected)


def test_fewer_steps_stop_early_and_accumulation_is_counted(build):
    trainer, rows = watched(build, online(), args={"max_steps": 2})
    for index in range(2):  # two batches of eight, and one that is fetched ahead
        order = [tuple(trainer._data[index]["train"].inputs[i]) for i in trainer.stream.pass_order(index)]
        assert [row for task, row in rows if task == index] == order[:24]
    args = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}
    trainer, rows = watched(build, online(), args=args)
    assert len(rows) == sum(len(d["train"]) for d in trainer._data)


def test_more_than_one_pass_is_refused(build):
    for settings in (
        {"args": {"max_steps": -1, "num_train_epochs": 2}},
        {"args": {"max_steps": 5}},
        {"args": {"max_steps": 1}, "steps": {"ways": 9}},
        {"args": {"max_steps": 1}, "total_steps": 11},
    ):
        with pytest.raises(ConfigError, match=r"online-class: each training row is seen once.* num_train_epochs=1"):
            build(online(), **settings)
    for settings in ({"energy": "auto"}, {"merge": 0.5}):
        with pytest.raises(ConfigError, match=rf"online-class: .* seen once, and {next(iter(settings))}\b.*scenario"):
            build(online(), args={"max_steps": 4}, guards=[gr.PEGP(**settings)])
    build(online(), args={"max_steps": 4})  # 29 rows in batches of 8
    build(stream_of(2, "class"), args={"max_steps": 5})


def test_the_default_arguments_are_one_pass(tiny_encoder, lora):
    trainer = gr.ContinualTrainer(tiny_encoder, online(), adapter=lora())
    assert trainer.args.num_train_epochs == 1
    other = gr.ContinualTrainer(tiny_encoder, stream_of(2, "class"), adapter=lora())
    assert other.args.num_train_epochs > 1


def test_online_runs_are_read_like_class_incremental_ones(build):
    run = build(online(), args={"max_steps": 2}, classifiers=("head", "prototype")).fit()
    assert run.scenario == "online-class"
    assert [(v.classifier, v.given) for v in run.views] == [
        ("head", "classes seen"), ("prototype", "classes seen"), ("head", "task"), ("prototype", "task"),
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [{"max_steps": -1, "num_train_epochs": 1}, {"max_steps": 4}])
def test_a_joint_online_run_is_one_shuffled_pass(build, budget):
    """29 rows are four batches of eight, not all of them full; three times 29 are eleven, not twelve."""
    trainer, rows = watched(build, online(3), args=budget, joint=True)
    assert len(rows) == len(set(rows)) == sum(len(d["train"]) for d in trainer._data)
    tasks = [task for task, _ in rows]
    assert tasks != sorted(tasks)


# --- tasks of one class ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_a_task_of_one_class_warns_and_the_run_goes_on(build, head, tmp_path):
    guard = gr.PEGP(energy=0.9)
    classifiers = ("prototype", "ridge", "head")
    trainer = build(
        single_class_stream(), head=head, guards=[guard], classifiers=classifiers, output_dir=tmp_path / "run"
    )
    before = weights(trainer)
    with pytest.warns(UserWarning, match=r"'(animals|ways|places)' has one class: .* no step is taken"):
        run = trainer.fit()
    after = weights(trainer)
    # A of an untrained LoRA, whose B is zero, is moved out of what the guard protects: no output sees it
    kept = [n for n in before if n.startswith("encoder.") and "lora_A" not in n]
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert [t["steps"] for t in run.timings["tasks"]] == [0, 0, 0]
    assert len(run.certificates) == 3
    assert all("one class" in note for note in run.notes)
    assert run.view("prototype").matrix.values[-1].mean() > 0.5  # it still learned what there was to learn
    assert json.loads((tmp_path / "run" / "results.json").read_text())["notes"] == run.notes


def test_a_task_of_two_classes_between_single_ones_trains(build):
    names = ("animals", "ways")
    single, double = single_class_stream(names), single_class_stream(names, labels=2)
    stream = gr.TaskStream([single[0], double[1]], scenario="class")
    with pytest.warns(UserWarning, match="'animals' has one class"):
        run = build(stream, head="linear").fit()
    assert [t["steps"] for t in run.timings["tasks"]] == [0, 4]
    assert len(run.notes) == 1


def test_a_guard_with_a_loss_of_its_own_trains_a_single_class(build):
    class Decay(Nothing):
        def loss(self, outputs, batch):
            return sum(p.square().sum() for p in self.model.parameters() if p.requires_grad)

    run = build(single_class_stream(("animals", "ways")), guards=[Decay()]).fit()
    assert [t["steps"] for t in run.timings["tasks"]] == [4, 4]


# --- guards ----------------------------------------------------------------------------------------------------------


def test_prepare_comes_between_attach_and_begin_with_training_rows(build):
    seen = []

    class Ahead(Nothing):
        samples = 12

        def prepare(self, task, batches):
            self.diary.append("prepare")
            seen.append((task, [dict(batch) for batch in batches]))

    guard = Ahead()
    trainer = build(guards=[guard, Nothing()])
    run = trainer.fit()
    assert guard.diary == ["attach", *["prepare", "attach", "begin", "end"] * 2]
    assert [task for task, _ in seen] == ["animals", "ways"]
    for index, (_, batches) in enumerate(seen):
        assert sum(len(batch["labels"]) for batch in batches) == 12
        assert all((batch["task_ids"] == index).all() for batch in batches)
        known = {tuple(row) for row in trainer._data[index]["train"].inputs}
        rows = [r[m.bool()] for b in batches for r, m in zip(b["input_ids"], b["attention_mask"], strict=True)]
        assert {tuple(row.tolist()) for row in rows} <= known
    assert all(timing["prepare_seconds"] >= 0 for timing in run.timings["tasks"])


def test_prepare_may_change_what_trains(build):
    """A guard that frees one tensor only: that one moves, and the run is not refused for the others."""

    class Chooses(Nothing):
        def prepare(self, task, batches):
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("layer.1.output.dense.lora_B" in name)

    trainer = build(guards=[Chooses()])
    before = weights(trainer)
    trainer.fit()
    after = weights(trainer)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == ["encoder.base_model.model.encoder.layer.1.output.dense.lora_B.default.weight"]


def test_prepare_is_called_once_where_energies_are_tried(build):
    class Ahead(Nothing):
        def prepare(self, task, batches):
            self.diary.append(task)

    guard = Ahead()
    build(guards=[gr.PEGP(energy="auto", candidates=(0.5, 0.9), samples=32), guard]).fit()
    assert [entry for entry in guard.diary if entry in ("animals", "ways")] == ["animals", "ways"]


@pytest.mark.parametrize("exhausted", [True, False])
def test_any_guard_may_say_that_nothing_is_left(build, exhausted):
    class Freeze(Nothing):
        def begin_task(self, task=None):
            super().begin_task(task)
            self.kept = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

        @torch.no_grad()
        def after_step(self):
            for name, parameter in self.model.named_parameters():
                if name in self.kept:
                    parameter.copy_(self.kept[name])

        def exhausted(self):
            return exhausted

    trainer = build(guards=[Freeze()])
    if exhausted:
        assert len(trainer.fit().certificates) == 2
    else:
        with pytest.raises(GuardError, match="no weight changed"):
            trainer.fit()


class Saved(Nothing):
    name = "saved"

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        (folder / "guard.json").write_text("{}", encoding="utf-8")
        return folder

    def settings(self):
        return {"strength": 2, "kinds": ("a", "b")}


@pytest.mark.parametrize(
    ("guards", "places"),
    [
        (lambda: [Saved(), Nothing()], ["memory"]),
        (lambda: [Saved(), gr.PEGP(energy=0.9)], ["memory/pegp", "memory/saved"]),
        (lambda: [Saved(), Saved()], ["memory/saved", "memory/saved-2"]),
        (lambda: [Nothing()], []),
    ],
)
def test_every_guard_that_can_be_saved_is(build, tmp_path, guards, places):
    run = build(guards=guards(), output_dir=tmp_path / "run").fit()
    found = sorted(
        str(p.parent.relative_to(tmp_path / "run")) for p in (tmp_path / "run").glob("memory/**/guard.json")
    )
    assert found == places
    for guard in run.config["guards"]:
        assert guard["name"] != "saved" or guard == {"name": "saved", "strength": 2, "kinds": ["a", "b"]}


def test_results_say_what_guards_do_with_every_tensor(build):
    class Says(Nothing):
        def explain(self, model):
            from growthring.guards.base import SiteCertificate

            name = next(n for n, p in model.named_parameters() if p.requires_grad)
            return (SiteCertificate(name, "any", 4, 1, 3, 0.5, 0.6, None, None),)  # any dataclass will do

    run = build(guards=[Nothing(), Says()]).fit()
    (row,) = run.sites
    assert row["guard"] == "nothing"
    assert row["name"].endswith("lora_A.default.weight")
    assert row["rank"] == 1
    assert run.to_dict()["sites"] == run.sites


# --- merging ---------------------------------------------------------------------------------------------------------


def second_task_of(build, guards, adapter="linear", **settings):
    """Trained weights after the first task and after the second, and the run."""
    trainer = build(guards=guards, adapter=adapter, args={"max_steps": 3, "learning_rate": 1e-3}, **settings)
    kept = {}

    class Keep(Nothing):
        def end_task(self, task, batches):
            kept[task] = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
            return super().end_task(task, batches)

    trainer.guards.append(Keep())
    run = trainer.fit()
    return kept["animals"], kept["ways"], run


def test_a_free_copy_is_merged_in_from_the_second_task_on(build):
    strict_start, strict, kept = second_task_of(build, [gr.PEGP(energy=0.9)])
    start, merged, run = second_task_of(build, [gr.PEGP(energy=0.9, merge=0.25)])
    assert all(torch.equal(start[n], strict_start[n]) for n in start)  # the first task has nothing to merge
    free_start, free, _ = second_task_of(build, [])
    assert all(torch.equal(start[n], free_start[n]) for n in start)
    for name in merged:
        expected = 0.75 * strict[name] + 0.25 * free[name]
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(merged[n], strict[n], atol=1e-6) for n in merged)
    assert [t["steps"] for t in run.timings["tasks"]] == [3, 6]
    leaks = [c.leak for c in (*kept.certificates, *run.certificates) if c.guard == "pegp" and c.leak is not None]
    assert leaks[0] < 1e-5 < 1e-2 < leaks[1]  # the certificate says what merging costs


def test_what_is_held_is_not_moved_by_merging_either(build):
    start, merged, run = second_task_of(build, [gr.PEGP(energy=0.9, merge=0.5)], adapter="full")
    held = {site["name"] for site in run.sites if site["treatment"] == "held"}
    assert any("LayerNorm" in name for name in held)
    assert any(name.endswith(".bias") for name in start)
    assert all(torch.equal(start[name], merged[name]) for name in held)
    moved = {name for name in start if not torch.equal(start[name], merged[name])}
    assert moved == {site["name"] for site in run.sites if site["treatment"] == "protected"}


def test_a_new_block_of_the_head_is_merged_too(build):
    """Its rows are new in the second task: no guard holds them, and the free copy trains them."""
    _, strict, _ = second_task_of(build, [gr.PEGP(energy=0.9)], head="linear")
    _, merged, _ = second_task_of(build, [gr.PEGP(energy=0.9, merge=0.5)], head="linear")
    name = "head.blocks.1.weight"
    assert not torch.equal(strict[name], merged[name])


def test_two_guards_cannot_both_merge(build):
    with pytest.raises(ConfigError, match="pegp, other all have merge"):
        build(guards=[gr.PEGP(energy=0.9, merge=0.5), type("Other", (Nothing,), {"name": "other", "merge": 0.5})()])
    build(guards=[gr.PEGP(energy=0.9, merge=0.5), type("Other", (Nothing,), {"merge": lambda self: None})()])
