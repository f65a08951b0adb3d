from __future__ import annotations

import json

import pytest
import yaml

from growthring.errors import ConfigError
from growthring.recipes import METHODS, _yaml, config_schema, demo_runs, load_config, parse_config
from growthring.recipes.demo import DEMO_RUNS, demo_settings
from growthring.recipes.method_settings import ADAPTER_DEFAULTS, GUARD_DEFAULTS, AdapterSettings

OWN = {"tasks": [{"name": "a", "train": "a.jsonl", "test": "b.jsonl"}, {"name": "b", "hub": {"path": "x/y"}}]}


def refused(data) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, where="run.yaml")
    return str(caught.value)


# ---------------------------------------------------------------------------------- what is wrong, where


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"method": "pgep"}, "run.yaml: method: there is no method 'pgep'; did you mean 'pegp'"),
        ({"method": "pegp", "trian": {}}, "run.yaml: trian: there is no such key; did you mean 'train'?"),
        (
            {"method": "pegp", "train": {"learning_rte": 1}},
            "run.yaml: train.learning_rte: there is no such key; did you mean 'learning_rate'?",
        ),
        (
            {"method": "pegp", "train": {"learning_rate": "fast"}},
            "run.yaml: train.learning_rate: must be a number, got 'fast' (text)",
        ),
        (
            {"method": "pegp", "train": {"batch_size": 1.5}},
            "train.batch_size: must be a whole number, got 1.5 (number)",
        ),
        ({"method": "pegp", "tensorboard": 1}, "tensorboard: must be true or false, got 1 (whole number)"),
        ({"method": "pegp", "seed": True}, "seed: must be a whole number, got True (true/false)"),
        ({"method": "pegp", "seed": None}, "seed: must be a whole number, got nothing (null)"),
        ({"method": "pegp", "seed": -1}, "seed: must be at least 0, got -1"),
        ({"method": "pegp", "train": {"warmup": 1}}, "train.warmup: must be less than 1, got 1"),
        ({"method": "pegp", "train": {"learning_rate": 0}}, "train.learning_rate: must be greater than 0, got 0"),
        ({"method": "pegp", "train": []}, "train: must be a mapping (key: value), got [] (list)"),
        (
            {"method": "pegp", "train": {"schedule": "linaer"}},
            "train.schedule: 'linaer' (text): did you mean 'linear'? (allowed: linear, cosine, constant)",
        ),
        ({"method": "pegp", "stream": "dmeo"}, "stream: 'dmeo' (text): did you mean 'demo'?"),
        ({"method": "pegp", "stream": {"source": "demo", "trian": 1}}, "stream.trian: there is no such key; did you"),
        ({"method": "pegp", "stream": {"tasks": []}}, "stream.tasks: must not be empty"),
        ({"method": "pegp", "model": "demo:minlm"}, "no demo model 'demo:minlm'; did you mean 'demo:minilm'?"),
        ({"method": "pegp", "guard": {"energy": 1.5}}, "guard.energy: energy=1.5: the share of energy to protect"),
        ({"method": "pegp", "guard": {"energy": {"lora_a": 0.5}}}, "unknown kind of site 'lora_a'; did you mean"),
        ({"method": "pegp", "adapter": {"target_modules": "all-liner"}}, "adapter.target_modules: 'all-liner' (text)"),
        ({"method": "pegp", "adapter": {"target_modules": [3]}}, "adapter.target_modules[0]: must be a text, got 3"),
        ({}, "run.yaml: method: is missing"),
        (None, "run.yaml: must be a mapping of settings (key: value), but it is empty"),
        ([1], "run.yaml: must be a mapping of settings (key: value), but it is a list"),
    ],
)
def test_one_wrong_setting_gives_one_line(data, said):
    message = refused(data)
    assert said in message
    assert "\n" not in message


def test_several_wrong_settings_are_all_named_and_misspelt_keys_come_first():
    lines = refused({"methd": "pegp", "train": {"epochs": "two"}, "seed": 1.5}).splitlines()
    assert lines[0] == "run.yaml:"
    assert lines[1].strip() == "methd: there is no such key; did you mean 'method'?"
    assert {line.strip().split(":")[0] for line in lines[2:]} == {"method", "train.epochs", "seed"}


def test_the_path_of_a_task_counts_from_zero_as_yaml_lists_do():
    stream = {"tasks": [OWN["tasks"][0], {"name": 2024, "hub": {"path": "x/y", "splits": {"tran": "train"}}}]}
    message = refused({"method": "pegp", "stream": stream})
    assert "stream.tasks[1].name: must be a text, got 2024 (whole number); put it in quotes: '2024'" in message
    assert "stream.tasks[1].hub.splits.tran: 'tran' (text): did you mean 'train'?" in message


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            {"name": "a", "train": "x.csv"},
            "stream.tasks[0]: task 'a' lacks test: give files for train and test, or hub",
        ),
        ({"name": "a", "train": "x.csv", "test": "y.csv", "hub": {"path": "p"}}, "names both hub and train, test"),
        ({"name": "a", "hub": {"path": "p"}, "text": "t", "image": "i"}, "the text column 't' and holds images; drop"),
    ],
)
def test_a_task_has_one_source_and_one_kind_of_input(task, said):
    assert said in refused({"method": "joint", "stream": {"tasks": [task]}})


# -------------------------------------------------------------------------- settings that would do nothing


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"method": "joint", "guard": {}}, "guard: has no effect: the method 'joint' has no guard"),
        (
            {"method": "pegp-linear", "adapter": {"r": 4}},
            "adapter: has no effect: the method 'pegp-linear' trains every linear",
        ),
        ({"method": "sequential-full", "adapter": {}}, "trains every parameter and has no adapter"),
        (
            {"method": "pegp", "adapter": {"tokens": 4}},
            "adapter.tokens: has no effect: the method 'pegp' trains a LoRA adapter, which has the settings r, alpha,",
        ),
        ({"method": "pegp-prefix", "adapter": {"r": 4}}, "adapter.r: has no effect: the method 'pegp-prefix' trains"),
        ({"method": "pegp-ia3", "adapter": {"r": 4}}, "IA3 scales, which has the settings tower"),
        ({"method": "pegp", "guard": {"mode": "paper"}}, "guard.mode: has no effect: for a LoRA adapter"),
        ({"method": "gpm", "guard": {"mode": "strict"}}, "guard.mode: has no effect: for every linear weight"),
        ({"method": "o-lora", "guard": {"energy": 0.9}}, "guard.energy: has no effect: the guard of the method"),
        ({"method": "pegp", "guard": {"weight": 0.9}}, "guard.weight: has no effect: the guard of the method 'pegp'"),
        (
            {"method": "inflora", "guard": {"energy": "auto"}},
            "InfLoRA takes one number or a schedule {start, end, tasks}: 'auto'",
        ),
        ({"method": "inflora", "guard": {"energy": {"lora_A": 0.9}}}, "InfLoRA takes one number or a schedule"),
        ({"method": "pegp", "guard": {"kinds": ["ia3"]}}, "guard.kinds.ia3: has no effect"),
        (
            {"method": "pegp", "guard": {"kinds": ["lora_A"], "energy": {"lora_B": 0.5}}},
            "guard.energy.lora_B: has no effect: with these settings the method 'pegp' protects lora_A",
        ),
        (
            {"method": "pegp-prefix", "head": "label-text", "guard": {"mode": "paper", "energy": {"prefix_value": 1}}},
            "guard.energy.prefix_value: has no effect: with these settings the method 'pegp-prefix' protects prefix_k",
        ),
        ({"method": "pegp", "adapter": {"tower": "text", "target_modules": ["q"]}}, "adapter.tower: has no effect"),
        ({"method": "pegp", "image_size": 32}, "image_size: has no effect: the stream holds texts"),
        ({"method": "pegp", "prompt_template": "{}"}, "prompt_template: has no effect: the stream holds texts"),
        ({"method": "pegp", "classifiers": ["head", "head"]}, "classifiers: head stands there twice"),
        (
            {"method": "pegp", "stream": {**OWN, "scenario": "online-class"}, "train": {"epochs": 2}},
            "train.epochs: 2: in an online-class stream each training row is seen once",
        ),
        ({"method": "pegp", "guard": {"energy": {"linear": 0.5}}}, "guard.energy.linear: has no effect"),
        ({"method": "pegp-linear", "guard": {"energy": {"lora_A": 0.5}}}, "guard.energy.lora_A: has no effect"),
        ({"method": "pegp", "train": {"epochs": 2, "max_steps": 10}}, "train: epochs and max_steps are two budgets"),
        (
            {"method": "pegp", "train": {"total_steps": 9, "max_steps": 10}},
            "max_steps and total_steps are two budgets",
        ),
        ({"method": "pegp", "train": {"total_steps": 9, "steps": {"a": 1}}}, "steps has no place beside it"),
        (
            {"method": "pegp", "stream": OWN, "train": {"steps": {"c": 1}}},
            "train.steps.c: the stream has no such task",
        ),
    ],
)
def test_a_setting_without_effect_is_an_error(data, said):
    assert said in refused(data)


def test_the_energy_of_linear_weights_counts_when_a_linear_head_is_guarded_too():
    config = parse_config({"method": "pegp", "head": "linear", "guard": {"energy": {"linear": 0.5}}})
    assert config.guard.energy == {"linear": 0.5}


def test_a_folder_holds_images_and_a_file_texts(tmp_path):
    (tmp_path / "train").mkdir()
    tasks = [
        {"name": "a", "train": "train", "test": "test"},
        {"name": "b", "train": "x.csv", "test": "y.csv", "image": "file"},
    ]
    stream = parse_config({"method": "pegp", "stream": {"tasks": tasks}, "image_size": 8}, base=tmp_path).stream
    assert [(task.text, task.image) for task in stream.tasks] == [(None, "image"), (None, "file")]
    assert [(task.text, task.image) for task in parse_config({"method": "pegp", "stream": OWN}).stream.tasks] == [
        ("text", None), ("text", None),
    ]  # fmt: skip
    tasks[0]["text"] = "body"
    with pytest.raises(ConfigError, match=r"'body' and holds images \(train is the folder .*train\); drop text"):
        parse_config({"method": "pegp", "stream": {"tasks": tasks}}, base=tmp_path)


# ---------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_defaults_are_filled_in(name):
    method, config = METHODS[name], parse_config({"method": name, "seed": 3})
    assert config.train.learning_rate == method.learning_rate
    assert config.train.epochs == 1.0
    assert config.title == method.title
    asked = {key for key, value in (config.adapter or AdapterSettings()) if value is not None}
    found = {"alpha"} if method.adapter == "largo" else set()  # it is r
    assert asked == {key for key, value in ADAPTER_DEFAULTS[method.adapter].items() if value is not None} | found
    assert (config.adapter is not None) == bool(ADAPTER_DEFAULTS[method.adapter])
    assert (config.guard is not None) == (method.guard is not None)
    if method.guard is not None:
        assert config.guard.energy == method.to_dict()["energy"]
        assert set(config.resolved()["guard"]) <= set(GUARD_DEFAULTS[method.guard])
    assert config.stream.source == "demo"
    assert config.stream.seed == 3


def test_a_step_budget_takes_the_place_of_epochs():
    assert parse_config({"method": "pegp", "train": {"max_steps": 3}}).train.epochs is None


ROUND_TRIPS = [
    *({"method": name} for name in METHODS),
    {"method": "pegp", "stream": OWN, "train": {"total_steps": 7, "learning_rate": 1e-5}, "threads": 2},
    {"method": "pegp", "stream": {"source": "demo", "train": None, "seed": 5}, "seed": 2},
    {"method": "pegp", "guard": {"energy": {"lora_A": {"start": 0.9, "end": 1, "tasks": 3}, "lora_B": 0.5}}},
    {"method": "pegp", "guard": {"energy": "auto"}, "adapter": {"target_modules": ["query", "value"]}},
    {"method": "pegp-adapter", "adapter": {"r": 4, "mode": "sequential"}, "guard": {"mode": "paper", "merge": 0.5}},
    {"method": "pegp-prompt", "adapter": {"tokens": 3, "tower": "image"}, "guard": {"kinds": ["prompt_key"]}},
    {"method": "adam-nscl", "guard": {"energy": {"times": 30}, "project": "gradient", "unprotected": "freeze"}},
    {"method": "o-lora", "guard": {"weight": 2, "norm": "squared"}, "classifiers": ["ridge", "head"]},
    {"method": "largo-f", "adapter": {"r": 4, "init": "minor", "form": "residual"}, "guard": {"granularity": "layer"}},
    {"method": "tpgm", "guard": {"iterations": 3, "norm": "tensor", "mu": 0.5, "samples": 7}},
    {
        "method": "inflora",
        "stream": {
            "tasks": [{"name": "a", "train": "a.csv", "test": "b.csv", "image": "file"}],
            "scenario": "online-class",
            "reference": {"name": "known", "hub": {"path": "x/y"}, "image": "image"},
        },
        "image_size": 28,
        "prompt_template": "a {} in the wild",
        "head": "label-text",
    },
]


@pytest.mark.parametrize("data", ROUND_TRIPS)
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_the_resolved_configuration_reads_back_equal(data, form, tmp_path):
    config = parse_config(data, base=tmp_path / "elsewhere")
    plain = config.resolved()
    file = tmp_path / f"config.{form}"
    file.write_text(_yaml.dump(plain) if form == "yaml" else json.dumps(plain), encoding="utf-8")
    again = load_config(file)
    assert again == config
    assert again.resolved() == plain


def test_relative_data_paths_start_at_the_file_and_output_at_the_current_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "encoder").mkdir()
    data = {"method": "pegp", "model": "encoder", "stream": OWN, "output": "out"}
    (tmp_path / "deep" / "c.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    config = load_config(tmp_path / "deep" / "c.yaml")
    assert config.stream.tasks[0].train == str(tmp_path.resolve() / "deep" / "a.jsonl")
    assert config.model == str(tmp_path.resolve() / "deep" / "encoder")
    assert config.output == "out"


def test_a_model_folder_that_is_not_there_offers_its_neighbours(tmp_path):
    (tmp_path / "minilm").mkdir()
    with pytest.raises(ConfigError, match=r"model: there is no folder .*minilmm'; did you mean 'minilm'\?"):
        parse_config({"method": "pegp", "model": "./minilmm"}, base=tmp_path)
    assert parse_config({"method": "pegp", "model": "org/name"}, base=tmp_path).model == "org/name"


def test_overrides_replace_the_files_settings_and_the_streams_seed_follows(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("method: pegp\nseed: 1\n", encoding="utf-8")
    assert load_config(file, seed=None).seed == 1
    config = load_config(file, seed=4)
    assert (config.seed, config.stream.seed) == (4, 4)


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E3", 1000.0), ("-2e+4", -2e4), ("1.5e3", 1500.0), (".5e1", 5.0), ("1.0e-3", 1e-3), ("3", 3)],
)
def test_yaml_reads_numbers_as_people_write_them(text, value):
    read = _yaml.parse(f"x: {text}")["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["e3", "1e", "1e3x", "bert-1e3", "'1e3'"])
def test_yaml_leaves_words_alone(text):
    assert _yaml.parse(f"x: {text}")["x"] == text.strip("'")


def test_yaml_never_makes_objects():
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        _yaml.parse("x: !!python/object/apply:os.getcwd []")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: pegp\nseed: 1\nmethod: joint\n", "line 3: the key 'method' is there twice (first on line 1)"),
        ("method: pegp\ntrain:\n  epochs: 1\n  epochs: 2\n", "line 4: the key 'epochs' is there twice"),
        ('{"method": "pegp", "seed": 1, "seed": 2}', "the key 'seed' is there twice"),
        ("method: [pegp\n", "line 2, column 1: not YAML"),
        ("", "but it is empty"),
    ],
)
def test_a_broken_file_is_named_with_the_line(text, said, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_yaml_merge_keys_and_anchors_still_work():
    text = "a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n"
    assert _yaml.parse(text)["b"] == {"x": 1, "y": 3}


def test_a_missing_file_a_folder_and_bytes_that_are_no_text(tmp_path):
    (tmp_path / "stream.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'stream.yaml'"):
        load_config(tmp_path / "steam.yaml")
    with pytest.raises(ConfigError, match="this is a folder; name a YAML"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "stream.yaml")


# ------------------------------------------------------------------------------------------------ schema

JSON_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}


def walk(node):
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def test_the_schema_is_json_schema_and_describes_every_key():
    schema = json.loads(json.dumps(config_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for node in walk(schema):
        if isinstance(node.get("type"), str):
            assert node["type"] in JSON_TYPES
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
    for model in (schema, *schema["$defs"].values()):
        assert model["additionalProperties"] is False
        for name, key in model["properties"].items():
            target = schema["$defs"].get(key.get("$ref", "").removeprefix("#/$defs/"), {})
            assert key.get("description") or target.get("description"), name
    assert schema["properties"]["method"]["enum"] == list(METHODS)
    assert schema["required"] == ["method"]


# -------------------------------------------------------------------------------------------------- demo


def test_the_demo_runs_share_data_and_take_their_settings_from_the_file():
    settings, runs = demo_settings(), dict(demo_runs(seed=2, threads=1))
    assert list(runs) == list(DEMO_RUNS)
    assert len({str(config.stream) for config in runs.values()}) == 1
    for name, config in runs.items():
        assert config.train.learning_rate == settings[name]["learning_rate"]
        assert config.stream.train == settings["train_rows"]
        assert (config.seed, config.stream.seed, config.threads) == (2, 2, 1)
    assert len({config.title for config in runs.values()}) == len(runs)


def test_a_sweep_may_override_settings_of_one_run():
    settings = demo_settings()
    settings["pegp"] = {"learning_rate": 0.5, "energy": {"lora_A": 0.25}, "epochs": 3}
    config = dict(demo_runs(settings=settings))["pegp"]
    assert (config.train.learning_rate, config.train.epochs, config.guard.energy) == (0.5, 3, {"lora_A": 0.25})
