from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import growthring
import growthring.recipes.runner
from growthring.recipes import METHODS, config_schema, load_config

SOURCE = Path(growthring.__file__).parent


# ------------------------------------------------------------------------------------------ small commands


def test_help_names_the_commands_and_each_has_an_example(cli):
    result = cli("--help")
    assert result.exit_code == 0
    for command in ("demo", "run", "robust", "sites", "methods", "report", "schema", "export"):
        assert command in result.stdout
        assert f"growthring {command}" in cli(command, "--help").stdout


def test_version(cli):
    assert cli("--version").stdout == f"growthring {growthring.__version__}\n"


def test_methods_as_json_is_json_and_nothing_else(cli):
    listed = json.loads(cli("methods", "--json").stdout)
    assert [one["name"] for one in listed] == list(METHODS)
    assert {"title", "summary", "paper", "guarantee", "cost", "learning_rate"} <= set(listed[0])
    (one,) = json.loads(cli("methods", "pegp", "--json").stdout)
    assert one["paper"] == {"title": METHODS["pegp"].paper.title, "arxiv": "2405.13383"}


def test_methods_for_people(cli):
    table = cli("methods").stdout
    assert all(name in table for name in METHODS)
    words = " ".join(cli("methods", "pegp-linear").stdout.split())
    assert METHODS["pegp-linear"].avoid_when in words
    assert "2405.13383" in words
    assert "linear 0.97, rising to 1 over 11 tasks" in cli("methods", "gpm").stdout
    assert "linear all above 10 times the smallest" in cli("methods", "adam-nscl").stdout
    assert " 0.95" in cli("methods", "inflora").stdout
    words = " ".join(cli("methods", "gorp").stdout.split())
    assert "optimizer gorp" in words
    assert "learning rate 0.001, 0.0001 for the weights beside LoRA unless given" in words


def test_schema_is_the_schema_of_the_configuration(cli):
    assert json.loads(cli("schema").stdout) == config_schema()


def test_light_commands_exit_as_they_should_and_load_nothing_heavy():
    code = f"""
        import sys, types
        package = types.ModuleType("growthring")  # in place of the public face, which may import everything
        package.__path__ = [{str(SOURCE)!r}]
        sys.modules["growthring"] = package
        from growthring.cli import main
        for words, code in (["--help"], 0), (["methods", "--json"], 0), (["schema"], 0), (["methods", "jont"], 2):
            sys.argv = ["growthring", *words]
            try:
                main()
            except SystemExit as end:
                assert end.code == code, (words, end.code)
        heavy = {{"torch", "transformers", "peft", "datasets", "plotly"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------- the site report


def test_sites_for_people(cli, tiny_stream, tmp_path):
    result = cli("sites", tiny_stream("pegp"))
    assert result.exit_code == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[0] == "PEGP on LoRA (pegp)"
    assert "sites of 24 trainable tensors: pegp: 24 protected (lora_A, lora_B)" in lines
    assert "condition: dA x = 0 for the old inputs x of the layer" in lines
    assert ["2", "8", "x", "32", "attention.self.query.lora_A.default.weight"] in [line.split() for line in lines]
    assert lines[-1] == "All names begin with encoder.base_model.model.encoder.layer.*."
    assert set(os.listdir(tmp_path)) == {"data", "stream.yaml"}, "nothing is written"


def test_sites_without_a_guard_say_what_that_costs(cli, tiny_stream):
    words = " ".join(cli("sites", tiny_stream("sequential-adapter")).stdout.split())
    assert "no guard: 16 free" in words
    assert "why: the method has no guard cost: old outputs may change through it, by any amount" in words


def test_sites_say_how_an_optimizer_of_the_method_treats_tensors(cli, tiny_stream):
    file = tiny_stream("gorp", optimizer={"rank": 4})
    result = cli("sites", file)
    assert result.exit_code == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "optimizer: 2 projected (rank 4), 8 as AdamW" in lines
    place = lines.index("projected, basis on the right")
    assert lines[place + 1].startswith("why: 4 of 32 input directions")
    assert lines[place + 2].split() == ["2", "64", "x", "32", "intermediate.dense.weight"]
    values = json.loads(cli("sites", file, "--json").stdout)
    assert len(values["optimizer"]) == 10
    assert {"name", "shape", "treatment", "side", "rank", "why"} == set(values["optimizer"][0])
    assert json.loads(cli("sites", tiny_stream("pegp"), "--json").stdout)["optimizer"] == []


def test_sites_as_json_name_every_tensor_and_nothing_else(cli, tiny_stream):
    result = cli("sites", tiny_stream("pegp-prompt"), "--json", "--seed", 3)
    values = json.loads(result.stdout)
    assert (values["method"], values["title"]) == ("pegp-prompt", "PEGP on prompts")
    (tensor,) = values["tensors"]
    assert tensor["kinds"] == ["prompt_key", "prompt_value"]
    assert tensor["treatment"] == "protected"
    assert "see output_change" in tensor["why"]
    assert "1 protected" in values["summary"]
    assert result.stderr == ""


def test_sites_refuse_what_a_run_would_refuse(refused, tiny_stream):
    assert "guard: has no effect" in refused("sites", tiny_stream("joint", guard={"samples": 3}))
    assert "no linear layer 'vaule'" in refused("sites", tiny_stream(adapter={"target_modules": ["vaule"]}))
    assert "--seed -1" in refused("sites", tiny_stream(), "--seed=-1")
    assert "there is no such file" in refused("sites", "nowhere.yaml")


# ----------------------------------------------------------------------------------------------- a real run


def test_run_writes_a_folder_and_says_where_the_page_is(cli, tiny_stream, tmp_path):
    file = tiny_stream("pegp", name="mine.yaml")
    result = cli("run", file)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "runs" / "mine"
    assert {"config.yaml", "results.json", "log.jsonl", "report.html", "adapter", "memory"} <= set(os.listdir(folder))
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(stored["matrix"]) == len(stored["tasks"]) + 1
    assert str(folder / "report.html") in result.stdout
    assert "PEGP on LoRA: accuracy in %" in result.stdout
    assert "2 tasks (animals, traffic)" in result.stderr
    assert set(os.listdir(tmp_path)) == {"data", "mine.yaml", "runs"}, "no stray files"


def test_run_as_json_prints_the_results_and_nothing_else(cli, tiny_stream, tmp_path):
    result = cli("run", tiny_stream("sequential-linear"), "--out", "there", "--seed", 5, "--json", "--quiet")
    stored = json.loads((tmp_path / "there" / "results.json").read_text(encoding="utf-8"))
    assert json.loads(result.stdout) == stored
    assert stored["seed"] == 5
    assert result.stderr == ""
    assert load_config(tmp_path / "there" / "config.yaml").seed == 5


def test_a_second_run_needs_overwrite(cli, refused, tiny_stream):
    file = tiny_stream("pegp", output="here")
    assert cli("run", file).exit_code == 0
    assert "here already holds results.json, adapter, memory" in refused("run", file)
    assert cli("run", file, "--overwrite").exit_code == 0


def test_report_over_one_run_several_runs_and_a_folder_of_runs(cli, refused, tiny_stream, tmp_path):
    for method in ("pegp", "joint"):
        assert cli("run", tiny_stream(method), "--out", f"all/{method}", "-q").exit_code == 0
    (tmp_path / "all" / "pegp" / "report.html").unlink()
    assert cli("report", "all/pegp").exit_code == 0
    assert "PEGP on LoRA" in (tmp_path / "all" / "pegp" / "report.html").read_text(encoding="utf-8")

    assert "say --out FILE" in refused("report", "all/pegp", "all/joint")
    result = cli("report", "all/pegp", "all/joint/results.json", "--out", "both.html")
    assert result.exit_code == 0
    both = (tmp_path / "both.html").read_text(encoding="utf-8")
    for title in ("PEGP on LoRA", "Joint training (upper bound)"):
        assert title in both
        assert title in result.stdout

    assert cli("report", "all").exit_code == 0
    assert "2 methods" in (tmp_path / "all" / "report.html").read_text(encoding="utf-8")


def test_the_installed_entry_point_as_a_process(tiny_stream, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    command = [sys.executable, "-m", "growthring", "run", str(tiny_stream("sequential-full")), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "sequential-full"
    noise = [line for line in done.stderr.splitlines() if line.strip() and "run folder" not in line]
    assert noise == [], "other libraries are silent, and bars are drawn on terminals only"


# --------------------------------------------------------------------------------------------- wrong input


def test_wrong_settings_of_a_file(refused, tiny_stream):
    for changes, said in (
        ({"method": "pegpp"}, "stream.yaml: method: there is no method 'pegpp'; did you mean 'pegp'"),
        ({"trian": {"epochs": 1}}, "stream.yaml: trian: there is no such key; did you mean 'train'?"),
        ({"train": {"epochs": "1"}}, "stream.yaml: train.epochs: must be a number, got '1' (text)"),
        ({"model": "./nowhere"}, "stream.yaml: model: there is no folder"),
        ({"model": "nobody/nothing"}, "model 'nobody/nothing' could not be loaded"),
        ({"guard": {"energy": 0}}, "stream.yaml: guard.energy: energy=0: the share of energy"),
        ({"adapter": {"target_modules": ["vaule"]}}, "the model has no linear layer 'vaule'; did you mean 'value'"),
        ({"adapter": {"r": 64}}, "adapter rank 64 is larger than the model's width 32"),
        (
            {"train": {"steps": {"animal": 2}}},
            "train.steps.animal: the stream has no such task; did you mean 'animals'",
        ),
    ):
        assert said in refused("run", tiny_stream(**changes)), said


def test_wrong_data(refused, tiny_stream, tmp_path):
    file = tiny_stream()
    target = tmp_path / "data" / "traffic-test.jsonl"
    right = target.read_text(encoding="utf-8")
    target.write_text(right.replace('"south"', '"suoth"'), encoding="utf-8")
    message = refused("run", file)
    assert "task 'traffic', test split" in message
    assert "'suoth'" in message
    assert "south" in message
    target.write_text(right.replace('"label"', '"lable"'), encoding="utf-8")
    assert "there is no label column 'label'; did you mean 'lable'?" in refused("run", file)
    target.rename(target.with_name("trafic-test.jsonl"))
    assert "there is no such file. did you mean 'trafic-test.jsonl'" in refused("run", file)


def test_wrong_names_of_files_and_methods(refused, tiny_stream, tmp_path):
    tiny_stream(name="stream.yaml")
    assert "steam.yaml: there is no such file; did you mean 'stream.yaml'?" in refused("run", "steam.yaml")
    assert "there is no method 'jont'; did you mean 'joint'?" in refused("methods", "jont")
    assert "dat: there is no such run folder or file; did you mean 'data'?" in refused("report", "dat")
    assert "data: this folder holds no results.json" in refused("report", "data")
    assert "this is no results.json" in refused("report", _write(tmp_path / "x.json", "{}"))
    assert "cannot be read as JSON" in refused("report", _write(tmp_path / "x.json", "{"))
    assert "--out data: this is a folder" in refused("report", "x.json", "--out", "data")


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument"),
        (["run", "x.yaml", "--sed", "1"], "--seed"),
        (["run", "x.yaml", "--seed", "one"], "--seed"),
        (["run", "x.yaml", "--seed", "-1"], "--seed"),
        (["-v", "-q", "methods"], "contradict"),
    ],
)
def test_wrong_usage_is_exit_code_two(cli, words, said):
    result = cli(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_log_level_in_the_environment(refused, monkeypatch):
    monkeypatch.setenv("GROWTHRING_LOG", "wraning")
    assert "GROWTHRING_LOG='wraning': did you mean 'warning'?" in refused("methods")


# ----------------------------------------------------------------------------------- unexpected, and loud


def test_an_unexpected_error_is_one_message_unless_debugging(cli, tiny_stream, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(growthring.recipes.runner, "run", broken)
    result = cli("run", tiny_stream())
    assert result.exit_code == 1
    assert "unexpected error: ZeroDivisionError: a bug" in result.stderr
    assert "--debug" in result.stderr
    result = cli("run", tiny_stream(), "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_is_130(cli, tiny_stream, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(growthring.recipes.runner, "run", interrupted)
    result = cli("run", tiny_stream())
    assert result.exit_code == 130
    assert "stopped" in result.stderr


@pytest.mark.parametrize(
    ("words", "level", "seen"),
    [([], "", False), (["-v"], "", True), ([], "info", True), (["-q"], "info", False)],
)
def test_the_log_is_shown_when_asked_for(cli, tiny_stream, monkeypatch, words, level, seen):
    monkeypatch.setenv("GROWTHRING_LOG", level)
    result = cli("run", tiny_stream(), *words)
    assert result.exit_code == 0, result.stderr
    assert ("info: training" in result.stderr) == seen


def test_warnings_of_growthring_are_one_line(cli, tiny_stream, tmp_path):
    file = tiny_stream()
    config = load_config(file)
    one = {"tasks": [config.stream.tasks[0].model_dump(exclude_none=True)]}
    result = cli("run", tiny_stream(stream=one))
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "nothing to forget" in line]
    assert line.startswith("warning: stream 'stream' has one task")
    assert "nothing to forget" not in cli("run", tiny_stream(stream=one), "--quiet", "--overwrite").stderr
