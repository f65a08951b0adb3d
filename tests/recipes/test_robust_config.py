from __future__ import annotations

import json

import pytest
from robust_helpers import LORA, WHOLE, sweep

from growthring.errors import ConfigError
from growthring.recipes import RobustConfig, load_robust_config, parse_robust_config, robust_schema


@pytest.fixture
def load(tmp_path, tiny_encoder):
    def load(**changes):
        return load_robust_config(sweep(tmp_path, tiny_encoder, **changes))

    return load


def test_every_combination_is_a_candidate_in_order(load):
    radius = {"method": "largo-f", "learning_rate": [1e-3, 3e-3], "guard": {"mu": [0.1, 0.3], "kappa": 0.5}}
    config = load(methods=[LORA, radius, {"method": "largo-p"}])
    found = [(c.entry, c.chosen) for c in config.candidates()]
    assert found == [
        (0, {"learning_rate": 1e-3}),
        (0, {"learning_rate": 1e-2}),
        (1, {"learning_rate": 1e-3, "mu": 0.1}),
        (1, {"learning_rate": 1e-3, "mu": 0.3}),
        (1, {"learning_rate": 3e-3, "mu": 0.1}),
        (1, {"learning_rate": 3e-3, "mu": 0.3}),
        (2, {"learning_rate": config.candidates()[-1].config.train.learning_rate}),
    ]
    last = config.candidates()[5].config
    assert (last.guard.mu, last.guard.kappa, last.train.learning_rate, last.train.max_steps) == (0.3, 0.5, 3e-3, 4)
    assert config.candidates()[0].config.adapter.r == 4
    assert config.candidates()[5].seeded(7).seed == 7


def test_it_reads_back_what_it_resolves_to(load, tmp_path):
    config = load(methods=[LORA, {"method": "largo-f", "guard": {"mu": [0.1, 0.3]}, "start": "scratch"}])
    assert parse_robust_config(config.resolved()) == config
    json.dumps(config.resolved(), allow_nan=False)
    assert robust_schema()["properties"]["methods"]["items"]["$ref"].endswith("RobustMethod")
    assert isinstance(config, RobustConfig)


def test_optimizers_of_methods_have_settings(load):
    config = load(methods=[{"method": "galore", "optimizer": {"rank": 4}}], frontier=[])
    assert config.candidates()[0].config.optimizer.rank == 4
    with pytest.raises(ConfigError, match=r"methods\[0\] \(sequential-lora\): optimizer: has no effect"):
        load(methods=[{**LORA, "optimizer": {"rank": 4}}], frontier=[])


def test_a_list_of_kinds_is_one_value(load):
    config = load(methods=[{"method": "pegp", "guard": {"kinds": ["lora_A"]}}], frontier=[])
    (only,) = config.candidates()
    assert only.config.guard.kinds == ["lora_A"]
    assert "kinds" not in only.chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frontier": ["sequential-lra"]}, "frontier: there is no method 'sequential-lra' here; did you mean"),
        ({"methods": []}, "methods: must not be empty"),
        ({"ood": []}, "ood: must not be empty"),
        ({"seeds": []}, "seeds: must not be empty"),
        ({"methods": [LORA, LORA]}, "methods: 'sequential-lora' is there twice; give one of them another name"),
        ({"seeds": [1, 1]}, "seeds: '1' is there twice"),
        ({"wise": [0.5, 1.5]}, r"wise\[1\]: must be at most 1"),
        ({"metods": 1}, "metods: there is no such key; did you mean 'methods'"),
        ({"methods": [{"method": "sequential-lra"}]}, r"methods\[0\].method: .*did you mean"),
        ({"methods": [{"method": "joint"}]}, "trains on all tasks of a stream; here is one task"),
        ({"methods": [{"method": "inflora"}]}, "makes a branch for every task of a stream"),
        ({"methods": [{"method": "gorp"}]}, "makes a branch for every task of a stream"),
        (
            {"methods": [LORA, {"method": "pegp", "guard": {"mu": 1}}]},
            r"methods\[1\] \(pegp\): guard.mu: has no effec",
        ),
        ({"methods": [{**LORA, "guard": {"mu": 1}}]}, r"methods\[0\] \(sequential-lora\): guard: has no effect"),
        ({"methods": [{**LORA, "guard": {"mu": []}}]}, r"methods\[0\]: guard.mu: the list is empty"),
        ({"methods": [{**LORA, "learning_rate": []}]}, "learning_rate: must not be empty"),
        ({"methods": [{**LORA, "learning_rate": [1e-3, 1e-3]}]}, "holds a value twice"),
        ({"methods": [{**LORA, "learning_rate": [0.0]}]}, "must be greater than 0"),
        ({"methods": [{**LORA, "start": "label-text"}]}, "a linear head starts from probe or scratch"),
        ({"methods": [{**LORA, "start": "probe"}], "head": "label-text"}, "a head of label texts starts from them"),
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate: has no place here: it is for methods"),
        ({"train": {"total_steps": 5}}, "train.total_steps: has no place here: it is for streams"),
        ({"ood": [{"name": "pets", "test": "far.jsonl"}]}, "'pets' is the name of the task"),
        ({"ood": [{"name": "a/b", "test": "far.jsonl"}]}, r"ood\[0\].name: domain name 'a/b': it becomes a file name"),
        ({"ood": [{"name": " far", "test": "far.jsonl"}]}, "a domain name must be a string without white space"),
        ({"ood": [{"name": "far"}]}, "give test .a file. or hub, one of the two"),
        ({"ood": [{"name": "far", "test": "f", "text": "a", "image": "b"}]}, "one or the other"),
        ({"ood": [{"name": "far", "test": "f"}] * 2}, "ood: 'far' is there twice"),
        ({"evaluate_every": 0}, "evaluate_every: must be at least 1"),
        ({"image_size": 8}, "image_size: has no effect: the stream holds texts"),
        ({"model": "./nowhere"}, "there is no folder"),
    ],
)
def test_wrong_settings_say_what_to_change(load, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(**{"frontier": []} | changes)


def test_a_file_that_holds_nothing(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("")
    with pytest.raises(ConfigError, match="it is empty"):
        load_robust_config(file)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_robust_config(tmp_path / "none.yaml")


def test_methods_may_have_names(load):
    config = load(methods=[LORA, {**LORA, "name": "large", "adapter": {"r": 8}}, WHOLE], frontier=["large"])
    assert [entry.key for entry in config.methods] == ["sequential-lora", "large", "sequential-linear"]
    untitled = {**LORA, "learning_rate": [1e-3], "title": None}
    several = load(methods=[untitled, {**untitled, "name": "large"}, {**untitled, "name": "b", "title": "B"}])
    assert [one.config.title for one in several.candidates()] == ["Sequential LoRA", "large", "B"]  # told apart
