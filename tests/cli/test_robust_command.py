from __future__ import annotations

import json
import random

import pytest
import yaml

from growthring.recipes import robust_schema


@pytest.fixture
def sweep(tmp_path, tiny_encoder):
    """A function that writes ``sweep.yaml`` and its data, and returns its path."""
    draw = random.Random(0)
    for name, count in (("train", 24), ("validation", 12), ("test", 12), ("far", 14)):
        words = "the a of to and in".split() if name != "far" else "long down day did get".split()  # noqa: SIM905
        rows = [
            {"text": f"{name} {' '.join(draw.sample(words, 4))} {word} {number}", "label": label}
            for number in range(count // 2)
            for word, label in (("cat", "x"), ("dog", "y"))
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(**changes):
        config = {
            "model": str(tiny_encoder),
            "task": {"name": "pets", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}},
            "ood": [{"name": "far", "test": "far.jsonl"}],
            "methods": [{"method": "sequential-lora", "title": "LoRA"}, {"method": "largo-p"}],
            "frontier": ["sequential-lora"],
            "wise": [0.5],
            "seeds": [0],
            "train": {"max_steps": 2, "batch_size": 8},
            "max_length": 16,
        }
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(config | changes), encoding="utf-8")
        return file

    return write


def test_a_sweep_says_what_it_does_and_leaves_a_page(cli, refused, sweep, tmp_path):
    result = cli("robust", sweep(), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "1/2 train sequential-lora (learning_rate 0.001, seed 0)" in result.stderr
    assert "2/2 score largo-p" in result.stderr
    assert "LoRA" in result.stdout
    assert "OOD mean" in result.stdout
    assert (tmp_path / "run" / "report.html").stat().st_size > 1_000_000
    again = cli("robust", sweep(), "--out", tmp_path / "run", "--quiet")
    assert again.stdout == result.stdout
    assert again.stderr == ""
    assert "a robustness sweep, not a run; its page is report.html" in refused("report", tmp_path / "run")


def test_json_is_json_and_nothing_else(cli, sweep, tmp_path):
    result = cli("robust", sweep(), "--json", "--out", tmp_path / "run")
    assert json.loads(result.stdout) == json.loads((tmp_path / "run" / "results.json").read_text())
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_folder_has_the_name_of_the_file(cli, sweep, tmp_path):
    assert cli("robust", sweep(), "-q").exit_code == 0
    assert (tmp_path / "runs" / "sweep" / "choices.json").is_file()


def test_schema(cli):
    assert json.loads(cli("robust", "--schema").stdout) == robust_schema()


def test_wrong_input_is_one_message(refused, cli, sweep, tmp_path):
    assert "did you mean 'sweep.yaml'" in refused("robust", sweep().with_name("sweeep.yaml"))
    assert "frontier: there is no method 'lora' here" in refused("robust", sweep(frontier=["lora"]))
    (tmp_path / "far.jsonl").write_text('{"text": "a cat", "label": "z"}\n', encoding="utf-8")
    assert "the label 'z' is none of task 'pets'" in refused("robust", sweep(), "--out", tmp_path / "run", "-q")
    nothing = cli("robust")
    assert nothing.exit_code == 2
    assert "--schema" in nothing.stderr
