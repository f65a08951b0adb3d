from __future__ import annotations

import json
import shutil

import pytest
from peft import PeftModel
from robust_helpers import LORA, OTHER, WHOLE, rows, sweep, write_rows
from transformers import AutoModel

from growthring.errors import ConfigError, DataError, GuardError
from growthring.recipes import load_robust_config, run_robust
from growthring.streams import EvaluationSet
from growthring.trainer import RobustTrainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_encoder):
    """A finished sweep: folder of the data, run folder, results."""
    folder = tmp_path_factory.mktemp("sweep")
    config = load_robust_config(sweep(folder, tiny_encoder))
    return folder, folder / "run", run_robust(config, folder / "run")


@pytest.fixture
def counted(monkeypatch):
    """What was done, in order: ``train``, ``score`` (a point) and ``open`` (a set was made)."""
    done = []
    fit, point, made = RobustTrainer.fit, RobustTrainer.point, EvaluationSet.__init__

    def counting(what, original):
        def call(self, *args, **settings):
            done.append(what)
            return original(self, *args, **settings)

        return call

    monkeypatch.setattr(RobustTrainer, "fit", counting("train", fit))
    monkeypatch.setattr(RobustTrainer, "point", counting("score", point))
    monkeypatch.setattr(EvaluationSet, "__init__", counting("open", made))
    return done


def copied(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    file = folder / "sweep.yaml"
    return folder, load_robust_config(file)


# --- what is done ----------------------------------------------------------------------------------------------------


def test_choices_are_made_by_validation_rows_alone(finished):
    _, run, results = finished
    choices = json.loads((run / "choices.json").read_text())
    assert choices["choices"] == results["choices"]
    searched, only = choices["choices"]
    scores = [one["id_validation"] for one in searched["tried"]]
    assert searched["index"] == scores.index(max(scores))
    assert searched["chosen"] == searched["tried"][searched["index"]]["setting"]
    assert (only["index"], only["tried"][0]["id_validation"]) == (0, None)  # nothing to choose from, nothing tried
    assert len(choices["models"]) == 6
    assert "test" not in json.dumps([searched["tried"], only["tried"]])


def test_all_settings_of_the_frontier_are_trained_and_of_others_the_chosen(finished):
    results = finished[2]
    assert [(row["name"], row["setting"]) for row in results["settings"]] == [
        ("sequential-lora", {"learning_rate": 1e-3}),
        ("sequential-lora", {"learning_rate": 1e-2}),
        ("sequential-linear", {"learning_rate": 5e-3}),
    ]
    assert [row["baseline"] for row in results["settings"]] == [True, True, False]
    assert sum(row["chosen"] for row in results["settings"]) == 2
    points = results["points"]
    assert len(points) == 3 * 2 * 3
    assert {point["seed"] for point in points} == {0, 1}
    assert {point["alpha"] for point in points} == {0.0, 0.5, 1.0}


def test_rows_are_means_over_seeds_and_above_is_above_the_frontier(finished):
    from growthring.evaluation import frontier

    results = finished[2]
    row = results["settings"][2]
    for number, alpha in enumerate((0.0, 0.5, 1.0)):
        place = row["curve"][number]
        mine = [p for p in results["points"] if p["name"] == row["name"] and p["alpha"] == alpha]
        assert place["id_test"] == pytest.approx(sum(p["id_test"] for p in mine) / 2)
        assert place["ood"]["far"] == pytest.approx(sum(p["ood"]["far"] for p in mine) / 2)
        assert place["ood_mean"] == pytest.approx((place["ood"]["near"] + place["ood"]["far"]) / 2)
        tests = [p["id_test"] for p in mine]
        assert place["id_test_sd"] == pytest.approx(abs(tests[0] - tests[1]) / 2**0.5)
    pairs = [(p["id_test"], p["ood_mean"]) for r in results["settings"][:2] for p in r["curve"]]
    baseline = frontier(pairs)
    assert results["frontier"] == [list(corner) for corner in baseline.corners]
    for one in results["settings"]:
        for p in one["curve"]:
            assert p["effective_robustness"] == pytest.approx(p["ood_mean"] - baseline.height(p["id_test"]))
    assert all(p["effective_robustness"] <= 1e-12 for r in results["settings"][:2] for p in r["curve"])


def test_a_point_is_what_a_trainer_of_ones_own_measures(finished, tiny_encoder):
    from growthring.recipes.runner import read_task, trainer_settings

    folder, _, results = finished
    config = load_robust_config(folder / "sweep.yaml")
    candidate = config.candidates()[1]
    encoder, settings = trainer_settings(candidate.seeded(1))
    trainer = RobustTrainer(encoder, read_task(config.task, 0), **settings)
    trainer.fit()
    near = EvaluationSet("near", str(folder / "near.jsonl"))
    for alpha, ood in trainer.curve([0.0, 0.5, 1.0], [near]).items():
        (point,) = [
            p for p in results["points"]
            if (p["seed"], p["alpha"], p["setting"]) == (1, alpha, {"learning_rate": 1e-2})
        ]  # fmt: skip
        assert point["ood"]["near"] == ood["near"]
        if alpha == 1.0:
            assert point["id_test"] == trainer.score([trainer.task])["pets"]
            assert point["deviation"] == pytest.approx(trainer.deviation(), rel=1e-5)


def test_models_stay_on_disk_and_load_without_growthring(finished, tiny_encoder):
    _, run, _ = finished
    kept = json.loads((run / "choices.json").read_text())["models"]
    for name in kept:
        assert (run / "points" / name / "weights.safetensors").is_file()
    adapted = [run / "points" / name / "adapter" for name in kept if "lora" in name]
    PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), adapted[0])
    assert {path.name for path in (run / "points").iterdir()} == set(kept)  # search seed 0 is one of the seeds


# --- in what order ---------------------------------------------------------------------------------------------------


def test_domains_are_opened_when_everything_is_trained(tmp_path, tiny_encoder, counted):
    config = load_robust_config(sweep(tmp_path, tiny_encoder))
    stages = []
    run_robust(config, tmp_path / "run", progress=lambda what, number, total: stages.append((what, number, total)))
    first = counted.index("open")
    assert set(counted[:first]) == {"train"}
    assert "train" not in counted[first:]
    assert counted.count("train") == 6
    assert [what.split(" ")[0] for what, _, _ in stages] == ["search"] * 2 + ["train"] * 4 + ["score"] * 6
    assert stages[0] == ("search sequential-lora (learning_rate 0.001, seed 0)", 0, 2)


def test_a_domain_that_cannot_be_read_is_not_touched_before_the_end(tmp_path, tiny_encoder, counted):
    config = load_robust_config(sweep(tmp_path, tiny_encoder))
    (tmp_path / "far.jsonl").unlink()
    with pytest.raises(DataError, match=r"far\.jsonl"):
        run_robust(config, tmp_path / "run")
    assert counted.count("train") == 6
    assert not (tmp_path / "run" / "results.json").exists()
    write_rows(tmp_path / "far.jsonl", rows(30, 9, OTHER))
    results = run_robust(config, tmp_path / "run")
    assert counted.count("train") == 6
    assert [domain["rows"] for domain in results["domains"]] == [24, 20]


def test_labels_and_rows_of_domains_are_checked_when_they_are_opened(tmp_path, tiny_encoder):
    config = load_robust_config(sweep(tmp_path, tiny_encoder, methods=[WHOLE], frontier=[], seeds=[0]))
    write_rows(tmp_path / "far.jsonl", [{"text": "a cat", "label": "z"}] * 3)
    with pytest.raises(DataError, match="the label 'z' is none of task 'pets'"):
        run_robust(config, tmp_path / "run")
    shutil.copy(tmp_path / "test.jsonl", tmp_path / "far.jsonl")
    with pytest.raises(DataError, match="20 of its 20 texts are test rows of task 'pets'"):
        run_robust(config, tmp_path / "run")


# --- again -----------------------------------------------------------------------------------------------------------


def test_rows_of_the_task_in_a_domain_are_told_once(tmp_path, tiny_encoder):
    file = sweep(tmp_path, tiny_encoder, methods=[WHOLE], frontier=[], wise=[])
    write_rows(tmp_path / "near.jsonl", rows(24, 3) + rows(48, 0)[:4])
    with pytest.warns(UserWarning, match="some are rows of task") as told:
        run_robust(load_robust_config(file), tmp_path / "run")
    assert len([one for one in told if "evaluation set 'near'" in str(one.message)]) == 1


def test_a_finished_sweep_is_read_again_wherever_it_lies(finished, tmp_path, tiny_encoder, counted):
    folder, config = copied(finished, tmp_path)
    (folder / "run" / "results.json").unlink()
    results = run_robust(config, folder / "run")
    assert "train" not in counted
    assert "score" not in counted
    assert results["settings"] == finished[2]["settings"]


def test_an_interrupted_sweep_goes_on(finished, tmp_path, tiny_encoder, counted, monkeypatch):
    config = load_robust_config(sweep(tmp_path, tiny_encoder))
    save = RobustTrainer.save
    calls = []

    def torn(self, folder):
        save(self, folder)
        calls.append(folder)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RobustTrainer, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        run_robust(config, tmp_path / "run")
    results = run_robust(config, tmp_path / "run")
    assert counted.count("train") == 7  # six, and the one that was torn once more
    clean = [
        [{k: v for k, v in place.items() if k != "seconds"} for row in one["settings"] for place in row["curve"]]
        for one in (results, finished[2])
    ]
    assert clean[0] == clean[1]


def test_scoring_goes_on_too(tmp_path, tiny_encoder, counted, monkeypatch):
    config = load_robust_config(sweep(tmp_path, tiny_encoder, methods=[LORA], frontier=[], seeds=[0, 1, 2]))
    restore = RobustTrainer.restore

    def torn(self, folder):
        if counted.count("score") == 6:
            raise KeyboardInterrupt
        restore(self, folder)

    monkeypatch.setattr(RobustTrainer, "restore", torn)
    with pytest.raises(KeyboardInterrupt):
        run_robust(config, tmp_path / "run")
    assert counted.count("score") == 6
    monkeypatch.setattr(RobustTrainer, "restore", restore)
    run_robust(config, tmp_path / "run")
    assert counted.count("score") == 9


def test_after_opening_only_the_same_choices_pass(tmp_path, tiny_encoder, counted):
    settings = {"methods": [WHOLE], "frontier": [], "seeds": [0], "wise": []}
    run_robust(load_robust_config(sweep(tmp_path, tiny_encoder, **settings)), tmp_path / "run")
    trained = counted.count("train")
    kept = [(tmp_path / "run" / name).read_bytes() for name in ("choices.json", "config.yaml", "results.json")]
    longer = load_robust_config(sweep(tmp_path, tiny_encoder, **settings | {"seeds": [0, 1]}))
    with pytest.raises(GuardError, match="not what they were when the sets were opened"):
        run_robust(longer, tmp_path / "run")
    assert counted.count("train") == trained  # said before anything more was trained
    run_robust(longer, tmp_path / "other")
    other = settings | {"train": {"max_steps": 5, "batch_size": 8}}  # nothing to choose, but other models
    with pytest.raises(GuardError, match="not what they were"):
        run_robust(load_robust_config(sweep(tmp_path, tiny_encoder, **other)), tmp_path / "run")
    now = [(tmp_path / "run" / name).read_bytes() for name in ("choices.json", "config.yaml", "results.json")]
    assert now == kept  # what the answers were seen after is still on record


def test_before_opening_a_sweep_may_grow(tmp_path, tiny_encoder, counted):
    small = load_robust_config(sweep(tmp_path, tiny_encoder, methods=[LORA], frontier=[], seeds=[0]))
    (tmp_path / "far.jsonl").write_text("")
    with pytest.raises(DataError):
        run_robust(small, tmp_path / "run")
    pruned = [p for p in (tmp_path / "run" / "points").iterdir() if not (p / "weights.safetensors").is_file()]
    assert counted.count("train") == 2
    assert len(pruned) == 1  # what was tried and not chosen has lost its weights
    (tmp_path / "run" / "opened.json").unlink()  # as if it had been stopped a moment before
    larger = load_robust_config(sweep(tmp_path, tiny_encoder, methods=[LORA], seeds=[0]))
    results = run_robust(larger, tmp_path / "run")
    assert counted.count("train") == 3  # the frontier needs the pruned one again
    assert len(results["settings"]) == 2


def test_folders_that_hold_something_else(tmp_path, tiny_encoder):
    config = load_robust_config(sweep(tmp_path, tiny_encoder))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="results of something else"):
        run_robust(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="is a file"):
        run_robust(config, tmp_path / "far.jsonl")
    torn = tmp_path / "torn"
    run_robust(load_robust_config(sweep(tmp_path, tiny_encoder, methods=[WHOLE], frontier=[], seeds=[0])), torn)
    (point,) = (torn / "points").iterdir()
    (point / "weights.safetensors").write_text("torn")
    for file, text, message in (
        ("scores.json", "{}", "scores.json lacks of"),
        ("scores.json", None, "weights.safetensors cannot be read"),
        ("point.json", "{}", "point.json lacks id_validation"),
        ("point.json", "{", "point.json cannot be read as JSON"),
    ):
        if text is None:
            (point / file).unlink()
        else:
            (point / file).write_text(text)
        with pytest.raises(DataError, match=f"{message}.*; remove its folder to train it again"):
            run_robust(load_robust_config(tmp_path / "sweep.yaml"), torn)


# --- other methods and inputs ----------------------------------------------------------------------------------------


def test_without_a_frontier_nothing_is_above_it(tmp_path, tiny_encoder):
    config = load_robust_config(sweep(tmp_path, tiny_encoder, methods=[WHOLE], frontier=[], seeds=[3], wise=[]))
    results = run_robust(config, tmp_path / "run")
    (row,) = results["settings"]
    assert results["frontier"] is None
    assert [place["effective_robustness"] for place in row["curve"]] == [None]
    assert row["curve"][0]["id_test_sd"] == 0.0


def test_readings_of_largo_and_early_stopping(tmp_path, tiny_encoder):
    methods = [
        {"method": "largo-f", "guard": {"mu": [0.1, 0.3]}, "adapter": {"r": 4}},
        {"method": "largo-p", "adapter": {"r": 4}, "start": "scratch"},
    ]
    changes = {"methods": methods, "frontier": [], "seeds": [1], "evaluate_every": 2}
    config = load_robust_config(sweep(tmp_path, tiny_encoder, **changes))
    results = run_robust(config, tmp_path / "run")
    assert [row["name"] for row in results["settings"]] == ["largo-f", "largo-p"]
    assert "mu" in results["settings"][0]["setting"]
    for row in results["settings"]:
        start, half, end = row["curve"]
        assert start["deviation"] == pytest.approx(0.0, abs=1e-6)
        assert half["deviation"] == pytest.approx(end["deviation"] / 2, rel=1e-4)
    point = json.loads((next((tmp_path / "run" / "points").glob("largo-p-*")) / "point.json").read_text())
    assert [step for step, _ in point["looks"]] == [2, 4]
    assert not list((tmp_path / "run" / "points").glob("*seed0/weights.safetensors"))  # tried, with another seed


def test_images_in_class_folders(image_world, tmp_path):
    import yaml

    images = image_world / "images"
    shutil.copytree(images / "fruit" / "test", tmp_path / "far")
    import numpy as np
    from PIL import Image

    for number, file in enumerate((tmp_path / "far").rglob("*.png")):
        darker = np.asarray(Image.open(file)) // 2 + number % 3
        Image.fromarray(darker.astype(np.uint8)).save(file)
    config = {
        "model": str(image_world / "my-vit"),
        "task": {"name": "fruit", "train": str(images / "fruit" / "train"), "test": str(images / "fruit" / "test")},
        "ood": [{"name": "dark", "test": "far"}],
        "methods": [LORA],
        "seeds": [0],
        "train": {"max_steps": 2, "batch_size": 8},
    }
    file = tmp_path / "images.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    results = run_robust(load_robust_config(file), tmp_path / "run")
    assert results["domains"] == [{"name": "dark", "rows": 12}]
    assert 0 <= results["settings"][0]["curve"][-1]["ood"]["dark"] <= 1


def test_other_rows_are_other_trainings_and_other_scores(finished, tmp_path, counted):
    folder, config = copied(finished, tmp_path)
    write_rows(folder / "test.jsonl", rows(30, 55))
    run_robust(config, folder / "run")
    assert "train" not in counted
    assert counted.count("score") == 18
    write_rows(folder / "train.jsonl", rows(48, 56))
    (folder / "run" / "opened.json").unlink()
    run_robust(config, folder / "run")
    assert counted.count("train") == 6
