"""How many steps each task takes."""

from __future__ import annotations

import json

import pytest
import torch
from trainer_helpers import arguments, stream_of, weights

from growthring.errors import ConfigError
from growthring.trainer.steps import Budget


def steps(run):
    return {t["name"]: t["steps"] for t in run.timings["tasks"]}


ROWS = 29  # training rows left of 32 after three were carved for validation


def test_rows():
    assert [len(task.train) for task in stream_of()] == [ROWS, ROWS]


@pytest.mark.parametrize(
    ("args", "settings", "expected"),
    [
        ({"max_steps": 3}, {}, (3, 3)),
        ({"max_steps": -1, "num_train_epochs": 2}, {}, (8, 8)),  # 29 rows of 8: 4 batches
        ({"max_steps": -1, "num_train_epochs": 0.5}, {}, (2, 2)),
        ({"max_steps": -1, "num_train_epochs": 0.6}, {}, (3, 3)),
        ({"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3}, {}, (2, 2)),
        ({"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True}, {}, (3, 3)),
        ({"max_steps": 3, "gradient_accumulation_steps": 2}, {}, (3, 3)),
        ({"max_steps": 3}, {"steps": {"ways": 1}}, (3, 1)),
        ({"max_steps": -1, "num_train_epochs": 1}, {"steps": {"animals": 2}}, (2, 4)),
        ({"max_steps": 9}, {"total_steps": 5}, (3, 2)),
        ({}, {"total_steps": 2}, (1, 1)),
        ({"max_steps": 3}, {"joint": True}, (6,)),
        ({}, {"joint": True, "total_steps": 5}, (5,)),
        ({}, {"joint": True, "steps": {"animals": 2, "ways": 1}}, (3,)),
        ({"max_steps": 3}, {"joint": True, "steps": {"animals": 2}}, (5,)),
        ({"max_steps": -1, "num_train_epochs": 1}, {"joint": True, "steps": {"animals": 2}}, (6,)),
        ({"max_steps": -1, "num_train_epochs": 1}, {"joint": True}, (8,)),  # 58 rows of 8
    ],
)
def test_steps_taken(build, args, settings, expected, monkeypatch):
    planned = []
    from growthring.trainer import logs

    monkeypatch.setattr(
        logs.Bars, "task", lambda self, name, count: planned.append(count) if "scoring" not in name else None
    )
    trainer = build(args=args, **settings)
    taken = []

    class Count(logs.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            taken.append(state.global_step)

    trainer.callbacks.append(Count())
    run = trainer.fit()
    assert tuple(steps(run).values()) == expected
    assert len(taken) == sum(expected)
    assert tuple(planned) == expected  # what the bar was told


def test_accumulated_batches_are_averaged(build):
    """Four batches of two, accumulated, are one batch of eight: the same step up to rounding."""
    steps = []
    for size, count in ((8, 1), (2, 4)):
        args = {"max_steps": 2, "optim": "sgd", "per_device_train_batch_size": size}
        trainer = build(stream_of(1), args=args | {"gradient_accumulation_steps": count}, adapter="linear")
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # its masks depend on the size of a batch
        start = weights(trainer)
        trainer.fit()
        steps.append({n: w - start[n] for n, w in weights(trainer).items() if not torch.equal(w, start[n])})
    whole, parts = steps
    assert len(whole) == 12
    for name, step in whole.items():
        torch.testing.assert_close(parts[name], step, rtol=1e-3, atol=1e-3 * float(step.abs().max()))


def test_the_schedule_starts_afresh_for_every_task(build, tmp_path):
    build(output_dir=tmp_path / "run", args={"lr_scheduler_type": "linear", "max_steps": 4}).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["event"] == "log"]
    assert rates[:4] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert rates[4:] == rates[:4]
    assert [line["step"] for line in lines if line["event"] == "log"] == [1, 2, 3, 4] * 2
    assert [line["global_step"] for line in lines if line["event"] == "log"] == [*range(1, 9)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 1}, "total_steps=1 leaves less than one step for each of 2 tasks"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"steps": {"animal": 3}}, "no task 'animal'; did you mean 'animals'"),
        ({"steps": {"animals": 0}}, "task 'animals' has 0; a task takes at least 1 step"),
        ({"steps": {"animals": 2}, "total_steps": 4}, "steps has no place beside it"),
    ],
)
def test_budgets_that_cannot_work(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_a_total_is_shared_with_the_rest_to_the_first():
    budget = Budget(stream_of(3), arguments(), None, 8)
    assert budget.by_task == {"animals": 3, "ways": 3, "places": 2}
    assert budget.max_steps([0, 1, 2], [9, 9, 9]) == 8
