"""One run read in several ways: other classifiers, and with the task told or not."""

from __future__ import annotations

import json

import pytest
import torch
from trainer_helpers import stream_of, weights

import growthring as gr
from growthring.errors import ConfigError
from growthring.evaluation import metrics
from growthring.trainer import PrototypeClassifier, RidgeClassifier, analytic
from growthring.trainer.analytic import held_out
from growthring.trainer.data import evaluation_batches, inputs_of

ALL = ("head", "prototype", "ridge")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """Few random features, for speed; the default is tried in its own tests."""
    monkeypatch.setattr(analytic, "WIDTH", 64)


def keys(run):
    return [(view.classifier, view.given) for view in run.views]


def features_of(trainer, index, split):
    """``(n, d)`` features and labels, one example at a time."""
    data = trainer._data[index][split]
    found = torch.zeros(len(data), 32)
    trainer.model.eval()
    with torch.no_grad():
        for rows, batch in evaluation_batches(data, 1, trainer._collate):
            found[rows] = trainer.model.embed(**inputs_of(batch))
    return found, torch.tensor(data.labels)


@pytest.mark.parametrize(
    ("scenario", "told"),
    [("class", ["classes seen", "task"]), ("task", ["task"]), ("domain", ["classes seen"])],
)
def test_the_scenario_decides_what_is_told(build, scenario, told):
    run = build(stream_of(2, scenario), classifiers=("head", "prototype")).fit()
    assert keys(run) == [(name, given) for given in told for name in ("head", "prototype")]
    assert run.views[0].matrix == run.matrix
    assert run.view().matrix == run.matrix
    assert run.view("prototype").given == told[0]


def test_the_head_alone_changes_nothing_and_costs_one_view(build):
    plain, read = build(stream_of(3, "class")), build(stream_of(3, "class"), classifiers=ALL)
    first, second = plain.fit(), read.fit()
    assert keys(first) == [("head", "classes seen"), ("head", "task")]
    assert first.matrix == second.matrix
    assert first.view("head", "task").matrix == second.view("head", "task").matrix
    ours, theirs = weights(plain), weights(read)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "classifier_seconds" not in first.timings["tasks"][0]
    assert second.timings["tasks"][0]["classifier_seconds"] > 0


def test_task_incremental_figures_are_those_of_masked_logits(build):
    """The view with the task told, cell by cell from the model; and never below the one without."""
    trainer = build(stream_of(3, "class"))
    run = trainer.fit()
    for index in range(3):
        found, labels = features_of(trainer, index, "test")
        logits = trainer.model.logits(found)
        own = torch.tensor(trainer.stream.class_ids(index))
        right = (own[logits[:, own].argmax(1)] == labels).double().mean()
        assert run.view("head", "task").matrix.values[-1, index] == pytest.approx(float(right))
    free, told = run.view("head", "classes seen").matrix.values, run.view("head", "task").matrix.values
    assert (told >= free).all()
    assert (told[:, 2] > free[:, 2]).any() or (told[-1] > free[-1]).any()  # else this test could not fail


@pytest.mark.parametrize("batch_size", [1, 7])
def test_analytic_classifiers_are_those_of_the_features(build, batch_size):
    """After the last task nothing moves any more: what they learned then, and answer, can be computed from scratch."""
    trainer = build(stream_of(2, "class"), classifiers=("ridge", "prototype"), eval_batch_size=batch_size)
    run = trainer.fit()
    means, learned = PrototypeClassifier(32, 4), trainer._scorer.analytic
    means.update(*features_of(trainer, 1, "train"))
    torch.testing.assert_close(learned["prototype"].means[2:], means.means[2:], rtol=1e-4, atol=1e-5)
    assert learned["ridge"].counts.tolist() == learned["prototype"].counts.tolist()
    held = [held_out(task.splits()["train"].keys) for task in trainer.stream]
    assert learned["ridge"]._held_count == sum(int(h.sum()) for h in held) > 0
    rows, labels = features_of(trainer, 1, "test")
    for name, given, among in (
        ("ridge", "classes seen", [0, 1, 2, 3]),
        ("prototype", "classes seen", [0, 1, 2, 3]),
        ("ridge", "task", [2, 3]),
    ):
        best = torch.tensor(among)[learned[name].scores(rows)[:, among].argmax(1)]
        expected = float((best == labels).double().mean())
        assert run.view(name, given).matrix.values[-1, 1] == pytest.approx(expected)
        assert trainer.predict(1, classifier=name, given=given) == best.tolist()
    assert run.matrix == run.view("ridge", "classes seen").matrix


def test_what_a_classifier_cannot_name_is_not_measured(build):
    run = build(stream_of(3, "class"), classifiers=ALL).fit()
    for name in ("prototype", "ridge"):
        for given in ("classes seen", "task"):
            cells = run.view(name, given).matrix.to_list()
            assert [[v is None for v in row] for row in cells] == [
                [True, True, True],
                [False, True, True],
                [False, False, True],
                [False, False, False],
            ]
        found = run.view(name).metrics
        assert found.aa is not None
        assert found.bwt is not None
        assert found.fwt is None
    domain = build(stream_of(2, "domain"), classifiers=("prototype",)).fit()
    assert [[v is None for v in row] for row in domain.matrix.to_list()] == [[True, True], [False] * 2, [False] * 2]


def test_classes_to_come_do_not_compete_before_their_time(build):
    """After one of two tasks a prototype can answer with classes of that task alone."""
    trainer = build(stream_of(2, "class"), classifiers=("prototype",))
    trainer._scorer.learn(0)
    assert set(trainer.predict(0, seen=1)) <= {0, 1}
    assert set(trainer.predict(0, seen=2)) <= {0, 1}
    with pytest.raises(ConfigError, match="'prototype' has learned no class of 'ways'"):
        trainer.predict(1, seen=2)
    trainer._scorer.learn(1)
    assert set(trainer.predict(1, seen=2, given="task")) <= {2, 3}


def test_results_hold_every_view(build, tmp_path):
    run = build(stream_of(2, "class"), classifiers=ALL, output_dir=tmp_path / "run", evaluate_validation=True).fit()
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [(v["classifier"], v["given"]) for v in found["views"]] == keys(run)
    assert found["views"][0]["matrix"] == found["matrix"]
    assert found["views"][0]["validation_matrix"] == found["validation_matrix"]
    for view, stored in zip(run.views, found["views"], strict=True):
        assert stored["metrics"] == metrics(view.matrix).to_dict()
        assert len(stored["validation_matrix"]) == 3
    assert found["config"]["classifiers"] == list(ALL)
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "view" for event in events) == 3 * 2 * 5
    chosen = [event for event in events if event["event"] == "classifier"]
    assert [(event["classifier"], event["task"]) for event in chosen] == [
        ("prototype", "animals"), ("ridge", "animals"), ("prototype", "ways"), ("ridge", "ways"),
    ]  # fmt: skip
    assert all(event["ridge"] > 0 for event in chosen if event["classifier"] == "ridge")


def test_classifiers_are_saved_and_answer_alike(build, tmp_path):
    trainer = build(stream_of(2, "class"), classifiers=ALL, output_dir=tmp_path / "run")
    trainer.fit()
    rows, _ = features_of(trainer, 0, "test")
    for kind in (PrototypeClassifier, RidgeClassifier):
        again = kind.from_pretrained(tmp_path / "run" / "classifiers")
        assert torch.equal(again.scores(rows), trainer._scorer.analytic[kind.name].scores(rows))
    assert sorted(p.name for p in (tmp_path / "run" / "classifiers").iterdir()) == [
        "prototype.safetensors", "ridge.safetensors",
    ]  # fmt: skip


def test_without_test_data_views_hold_validation_figures_alone(build):
    run = build(
        stream_of(2, "class"), classifiers=("head", "ridge"), evaluate_test=False, evaluate_validation=True
    ).fit()
    view = run.view("ridge", "task")
    assert len(view.matrix) == 0
    assert view.metrics is None
    assert len(view.validation) == 3
    assert view.to_dict()["metrics"] == {}


def test_test_rows_teach_nothing(build):
    """Turning the labels of every test row round turns accuracies, not weights: they come from training rows."""

    def turned(rows):
        names = sorted({label for _, label in rows})
        return [(text, names[1 - names.index(label)]) for text, label in rows]

    plain, other = (build(stream_of(2, "class", change=c), classifiers=("ridge",)) for c in (None, turned))
    first, second = plain.fit(), other.fit()
    assert torch.equal(plain._scorer.analytic["ridge"].weights, other._scorer.analytic["ridge"].weights)
    assert first.matrix != second.matrix


def test_a_joint_run_learns_all_tasks_at_once(build):
    run = build(stream_of(2, "class"), classifiers=ALL, joint=True).fit()
    assert [[v is None for v in row] for row in run.view("ridge").matrix.to_list()] == [[True] * 2, [False] * 2]


def test_trials_are_scored_by_the_main_classifier_and_leave_no_trace(build, tmp_path):
    guard = gr.PEGP(energy="auto", candidates=(0.5, 0.9), samples=32)
    trainer = build(stream_of(3, "class"), guards=[guard], classifiers=("ridge",), output_dir=tmp_path / "run")
    trainer.fit()
    counts = trainer._scorer.analytic["ridge"].counts
    assert counts.tolist() == [sum(y == c for d in trainer._data for y in d["train"].labels) for c in range(6)]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "trial" for event in events) == 2


def test_unknown_views_are_refused(build):
    with pytest.raises(ConfigError, match="did you mean 'prototype'"):
        build(classifiers=("prototypes",))
    trainer = build(stream_of(2, "task"), classifiers=("head",))
    run = trainer.fit()
    with pytest.raises(ConfigError, match="classifier='ridge': allowed: head in this run"):
        trainer.predict(0, classifier="ridge")
    with pytest.raises(ConfigError, match="given='classes seen'"):
        trainer.predict(0, given="classes seen")
    with pytest.raises(ConfigError, match=r"no view \('ridge', None\); views: \('head', 'task'\)"):
        run.view("ridge")
