"""The accuracy matrix of a run: its shape, what may influence it, and what must not."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from trainer_helpers import arguments, differing, stream_of, weights

import growthring as gr
from growthring.errors import ConfigError

SCENARIOS = ("task", "class", "domain")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_one_row_per_task_and_one_for_the_untouched_model(build, scenario):
    trainer = build(stream_of(3, scenario), evaluate_validation=True)
    by_hand = [_accuracy(trainer, task, "test", seen=0) for task in range(3)]

    run = trainer.fit()

    assert run.matrix.rows == ("untouched", "animals", "ways", "places")
    assert run.matrix.tasks == ("animals", "ways", "places")
    for matrix in (run.matrix, run.macro_f1, run.validation):
        assert matrix.values.shape == (4, 3)
        assert not np.isnan(matrix.values).any()  # columns of tasks not seen yet are measured too
    assert run.matrix.to_list()[0] == by_hand
    assert run.matrix.to_list()[-1] == [_accuracy(trainer, task, "test", seen=3) for task in range(3)]
    assert run.validation.to_list()[-1] == [_accuracy(trainer, task, "validation", seen=3) for task in range(3)]


def _accuracy(trainer, task, split, seen):
    true = trainer.stream.encode(task, split)
    return float(np.mean(np.array(trainer.predict(task, split, seen=seen)) == np.array(true)))


def test_a_stream_is_learned_and_forgotten(build):
    """At a rough learning rate and without a guard: every task is learned, the first is lost."""
    run = build(stream_of(2, train=64), args={"max_steps": 30}, adapter="linear").fit()
    matrix = run.matrix.values
    assert matrix[1, 0] >= 0.9
    assert matrix[2, 1] >= 0.9 or matrix[2, 0] < matrix[1, 0]
    assert run.to_dict()["metrics"]["learning_accuracy"] > matrix[0].mean() + 0.2


@pytest.mark.parametrize("head", ["label-text", "linear"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_predictions_do_not_depend_on_order_or_batch_size(build, tiny_encoder, scenario, head):
    def shuffled(rows):
        rows = list(rows)
        random.Random(5).shuffle(rows)
        return rows

    ordered = stream_of(2, scenario, train=16, test=60, change=sorted)
    other = stream_of(2, scenario, train=16, test=60, change=shuffled)
    assert ordered[0].test.texts != other[0].test.texts
    one = build(ordered, head=head, args={"max_steps": 2}, eval_batch_size=1)
    many = build(other, head=head, args={"max_steps": 2}, eval_batch_size=256)

    first, second = one.fit(), many.fit()

    assert first.matrix == second.matrix
    assert first.macro_f1 == second.macro_f1
    assert len({v for row in first.matrix.to_list() for v in row}) > 1
    for task in range(2):
        by_text = [
            dict(zip(t.stream[task].test.texts, t.predict(task, batch_size=size), strict=True))
            for t, size in ((one, 1), (one, 256), (one, 7), (many, 256))
        ]
        assert all(found == by_text[0] for found in by_text)


def test_predictions_come_in_the_order_of_the_examples(build):
    trainer = build()
    texts = trainer.stream[0].test.texts
    device, candidates = trainer.device, torch.tensor(trainer.stream.candidates(0, 1))
    trainer.model.eval()
    alone = []
    for text in texts:  # one by one, unpadded, with the tokenizer itself
        tokens = trainer.tokenizer(text, return_tensors="pt").to(device)
        with torch.no_grad():
            logits = trainer.model(tokens["input_ids"], tokens["attention_mask"])["logits"][0]
        alone.append(int(candidates[logits[candidates].argmax()]))
    assert trainer.predict(0, seen=1) == alone
    assert len(set(alone)) > 1


def test_an_unknown_split_is_refused(build):
    with pytest.raises(ConfigError, match="no split 'validaton'; did you mean 'validation'"):
        build().predict(0, "validaton")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_candidates_follow_the_scenario(build, scenario):
    trainer = build(stream_of(3, scenario), head="linear")
    ids = [trainer.stream.class_ids(task) for task in range(3)]
    with torch.no_grad():  # the last class of the table beats all others wherever it is a candidate
        trainer.model.head.initial.zero_()
    trainer.model.head.forward = lambda features: torch.arange(float(len(trainer.stream.classes))).expand(
        features.shape[0], -1
    )
    found = [{*trainer.predict(task, seen=1)} for task in range(3)]
    if scenario == "class":  # all classes up to the task's own
        assert found == [{ids[0][-1]}, {ids[1][-1]}, {ids[2][-1]}]
        assert {*trainer.predict(0, seen=3)} == {ids[2][-1]}
    else:
        assert found == [{max(own)} for own in ids]
        assert {*trainer.predict(0, seen=3)} == {max(ids[0])}


def poison(rows):
    """Every test label wrong."""
    labels = sorted({label for _, label in rows})
    return [(text, labels[1 - labels.index(label)]) for text, label in rows]


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_the_test_split_never_influences_training(build, head):
    clean, poisoned = (
        build(head=head, evaluate_validation=True),
        build(stream_of(change=poison), head=head, evaluate_validation=True),
    )
    first, second = clean.fit(), poisoned.fit()
    assert differing(weights(clean), weights(poisoned)) == []
    assert first.validation == second.validation
    np.testing.assert_allclose(first.matrix.values, 1 - second.matrix.values)


def test_validation_is_carved_from_train_and_not_trained_on(build):
    stream = stream_of(train=40)
    run = build(stream).fit()
    for task, described in zip(stream, run.tasks, strict=True):
        assert described["train"] + described["validation"] == 40
        assert described["validation"] >= 2
        assert described["test"] == 20
        assert not {*task.train.texts} & {*task.validation.texts}

    trained = []
    trainer = build(stream, args={"max_steps": -1, "num_train_epochs": 1, "dataloader_num_workers": 0})
    inner = trainer._collate
    trainer._collate = lambda rows: trained.extend(tuple(r["inputs"]) for r in rows) or inner(rows)
    trainer._train([0], "animals", _Silent(), _Silent(), 0)
    held_out = {tuple(tokens) for tokens in trainer._data[0]["validation"].inputs}
    assert sorted(trained) == sorted(map(tuple, trainer._data[0]["train"].inputs))
    assert not held_out & {*trained}


class _Silent:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_scoring_can_be_turned_off(build):
    run = build(evaluate_test=False, evaluate_validation=True).fit()
    found = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert found["matrix"] == []
    assert len(found["validation_matrix"]) == 3


def test_one_task_alone(build):
    run = build(stream_of(1)).fit()
    assert run.matrix.values.shape == (2, 1)
    assert run.to_dict()["metrics"]["bwt"] is None


def test_joint_trains_on_all_tasks_at_once(build):
    stream = stream_of(3)
    run = build(stream, joint=True).fit()
    assert run.matrix.rows == ("untouched", "joint")
    assert run.matrix.values.shape == (2, 3)
    metrics = run.to_dict()["metrics"]
    assert metrics["aa"] == pytest.approx(run.matrix.values[-1].mean())
    assert [metrics[k] for k in ("bwt", "fwt", "forgetting", "learning_accuracy")] == [None] * 4
    assert [t["name"] for t in run.timings["tasks"]] == ["joint"]
    assert run.timings["tasks"][0]["steps"] == 12


def test_a_model_object_and_its_folder_give_the_same_run(build, tiny_encoder):
    from transformers import AutoModel

    by_name, by_object = build(), build(model=AutoModel.from_pretrained(tiny_encoder))
    assert by_name.fit().matrix == by_object.fit().matrix
    assert differing(weights(by_name), weights(by_object)) == []


def test_the_model_is_left_ready_for_use(build, lora):
    """Evaluation mode at the end; dropout acts in training only."""
    trainer = build(adapter=lora(lora_dropout=0.5))
    modes = []

    class Watch(gr.guards.base.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            modes.append(all(m.training for m in kwargs["model"].modules()))

    trainer.callbacks.append(Watch())
    before = trainer.predict(0)
    assert before == trainer.predict(0)
    trainer.fit()
    assert modes == [True] * 8
    assert not any(m.training for m in trainer.model.modules())


def test_predict_restores_the_mode_of_every_module(build):
    trainer = build()
    trainer.model.train()
    frozen = trainer.model.encoder.get_base_model().embeddings
    frozen.eval()
    trainer.predict(0)
    assert trainer.model.training
    assert not frozen.training


def test_a_trainer_runs_once(build):
    trainer = build()
    trainer.fit()
    with pytest.raises(ConfigError, match="was run already; make a new one"):
        trainer.fit()


def test_nothing_is_printed(build, tmp_path, capfd):
    build(output_dir=tmp_path / "run").fit()
    assert capfd.readouterr().out == ""


def test_bars_are_drawn_on_standard_error_when_asked(build, capfd):
    build(progress=True, title="tiny bars").fit()
    captured = capfd.readouterr()
    assert captured.out == ""


def test_default_arguments(tiny_encoder, lora):
    trainer = gr.ContinualTrainer(tiny_encoder, stream_of(train=16), adapter=lora(), steps={"animals": 1, "ways": 2})
    assert trainer.seed == 42
    assert [t["steps"] for t in trainer.fit().timings["tasks"]] == [1, 2]


def test_long_texts_are_cut_where_the_model_ends(build):
    """The tiny model has 64 positions; max_length is 128 by default."""
    long = [(" ".join(["cat"] * 200), "red"), (" ".join(["dog"] * 150), "blue"), ("cat", "red"), ("dog", "blue")]
    task = gr.Task("long", long, [("dog dog", "blue"), ("cat cat", "red")], [("the dog", "blue"), ("the cat", "red")])
    with pytest.warns(UserWarning, match="nothing to forget"):
        stream = gr.TaskStream([task])
    trainer = build(stream, args={"max_steps": 1})
    assert max(map(len, trainer._data[0]["train"].inputs)) == 64
    trainer.fit()


def test_arguments_are_not_changed(tiny_encoder, lora):
    args, config = arguments(), lora()
    before, adapter_before = args.to_dict(), config.to_dict()
    gr.ContinualTrainer(tiny_encoder, stream_of(), adapter=config, args=args).fit()
    assert args.to_dict() == before
    assert config.to_dict() == adapter_before
