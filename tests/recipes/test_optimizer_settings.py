"""The section ``optimizer``, the modes of the gradient memory, and what they become."""

from __future__ import annotations

import inspect

import pytest

from growthring.errors import ConfigError
from growthring.optim import GORP, GaLore, GORPFactory
from growthring.recipes import METHODS, parse_config
from growthring.recipes.adapting import make_optimizer
from growthring.recipes.method_settings import PAPER_MEMORY
from growthring.recipes.optimizer_settings import OPTIMIZER_DEFAULTS

OWN = [name for name, method in METHODS.items() if method.optimizer]


def refused(data) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, where="run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", METHODS)
def test_methods_with_an_optimizer_of_their_own_have_its_settings(name):
    config, method = parse_config({"method": name}), METHODS[name]
    if name not in OWN:
        assert config.optimizer is None
        assert config.train.optimizer == "adamw"
        return
    assert config.train.optimizer is None
    expected = {**OPTIMIZER_DEFAULTS[method.optimizer], "full_rank_lr": method.full_rank_lr}
    asked = {key: value for key, value in config.optimizer if value is not None}
    assert asked == {key: value for key, value in expected.items() if value is not None}


def test_defaults_are_those_of_the_classes():
    for name, kind in (("gorp", GORP), ("galore", GaLore)):
        signature = inspect.signature(kind).parameters
        for key, default in OPTIMIZER_DEFAULTS[name].items():
            if key != "full_rank_lr":  # that is the method's
                assert default == signature[key].default, key


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"method": "pegp", "optimizer": {}},
            "optimizer: has no effect: the method 'pegp' has no optimizer of its own",
        ),
        ({"method": "joint", "optimizer": {"rank": 4}}, "or a method that has one (galore, gorp, gorp-full)"),
        (
            {"method": "gorp", "train": {"optimizer": "adamw"}},
            "train.optimizer: has no effect: the method 'gorp' has an optimizer of its own",
        ),
        ({"method": "galore", "train": {"optimizer": "sgd"}}, "train.optimizer: has no effect: the method 'galore'"),
        (
            {"method": "galore", "optimizer": {"rule": "adam"}},
            "optimizer.rule: has no effect: the method 'galore' has",
        ),
        ({"method": "galore", "optimizer": {"rotate": True}}, "optimizer.rotate: has no effect"),
        (
            {"method": "gorp-full", "optimizer": {"full_rank_lr": 0.1}},
            "optimizer.full_rank_lr: has no effect: the method 'gorp-full' trains every linear weight, all at",
        ),
        ({"method": "galore", "optimizer": {"full_rank_lr": 0.1}}, "optimizer.full_rank_lr: has no effect"),
        ({"method": "gorp", "optimizer": {"rank": 0}}, "optimizer.rank: must be at least 1, got 0"),
        ({"method": "gorp", "optimizer": {"rnak": 4}}, "optimizer.rnak: there is no such key; did you mean 'rank'?"),
        ({"method": "gorp", "optimizer": {"side": "lfet"}}, "optimizer.side: 'lfet' (text): did you mean 'left'?"),
        ({"method": "gorp", "optimizer": {"scale": 0}}, "optimizer.scale: must be greater than 0, got 0"),
        (
            {"method": "gorp", "guard": {"mode": "strict"}},
            "guard.mode: 'strict': the method 'gorp' has sound and paper",
        ),
        ({"method": "pegp-prefix", "guard": {"mode": "sound"}}, "the method 'pegp-prefix' has strict and paper"),
        ({"method": "inflora", "guard": {"mode": "sound"}}, "guard.mode: has no effect: the guard of the method"),
        ({"method": "gorp", "guard": {"probes": 3}}, "guard.probes: has no effect: the guard of the method 'gorp'"),
        ({"method": "gorp", "guard": {"energy": "auto"}}, "the gradient memory takes one number or a schedule"),
        ({"method": "pegp", "guard": {"side": "input"}}, "guard.side: has no effect: the guard of the method 'pegp'"),
        (
            {"method": "gorp", "guard": {"mode": "paper", "side": "input"}},
            "guard.side: 'input': the published rule (mode: paper) has 'output'. Remove side",
        ),
        ({"method": "gorp", "guard": {"mode": "paper", "project": "update"}}, "(mode: paper) has 'gradient'"),
        (
            {"method": "gorp", "guard": {"mode": "paper"}, "optimizer": {"side": "left"}},
            "optimizer.side: 'left': the published rule (guard.mode: paper) has 'right'. Remove side",
        ),
        (
            {"method": "gorp", "guard": {"mode": "paper"}, "optimizer": {"rotate": True}},
            "(guard.mode: paper) has False",
        ),
        ({"method": "pegp", "adapter": {"branches": "kept"}}, "adapter.branches: has no effect: the method 'pegp'"),
        ({"method": "pegp", "adapter": {"full_rank": "mlp"}}, "adapter.full_rank: has no effect: the method 'pegp'"),
        (
            {"method": "pegp", "adapter": {"target_modules": "preset"}},
            "preset is GORP's choice, and the method is 'peg",
        ),
        ({"method": "gorp-full", "adapter": {"r": 4}}, "adapter: has no effect: the method 'gorp-full' trains every"),
        ({"method": "gorp", "adapter": {"branches": "merge"}}, "'merge' (text): did you mean 'merged'?"),
        (
            {"method": "gorp", "adapter": {"tower": "text", "target_modules": ["q"], "full_rank": ["k"]}},
            "adapter.tower: has no effect beside a list of target_modules and of full_rank",
        ),
    ],
)
def test_a_setting_without_effect_is_an_error(data, said):
    assert said in refused(data)


def test_a_tower_still_decides_where_one_of_two_lists_is_open():
    config = parse_config({"method": "gorp", "adapter": {"tower": "text", "target_modules": ["q"]}})
    assert (config.adapter.tower, config.adapter.full_rank) == ("text", "preset")


def test_the_paper_mode_fixes_what_the_paper_does():
    sound, paper = (parse_config({"method": "gorp", "guard": {"mode": mode}}) for mode in ("sound", "paper"))
    assert {name: getattr(paper.guard, name) for name in PAPER_MEMORY} == PAPER_MEMORY
    assert (paper.optimizer.side, paper.optimizer.rotate) == ("right", False)
    assert (sound.guard.side, sound.guard.source, sound.guard.project) == ("input", "gradient", "update")
    assert (sound.optimizer.side, sound.optimizer.rotate) == ("auto", True)
    assert parse_config({"method": "gorp"}) == sound


@pytest.mark.parametrize(
    "data",
    [
        {"method": "gorp"},
        {"method": "gorp", "guard": {"mode": "paper", "energy": {"start": 0.9, "end": 1.0, "tasks": 3}}},
        {"method": "gorp", "adapter": {"branches": "kept", "full_rank": ["x"]}, "optimizer": {"full_rank_lr": 1e-5}},
        {"method": "gorp-full", "guard": {"side": "both"}, "optimizer": {"side": "two-sided", "rule": "momentum"}},
        {"method": "galore", "optimizer": {"rank": 4, "range_finder": "warm"}},
    ],
)
def test_the_resolved_configuration_reads_back_equal(data):
    config = parse_config(data)
    assert parse_config(config.resolved()) == config


def test_the_settings_become_an_optimizer():
    assert make_optimizer(METHODS["pegp"], None) is None
    config = parse_config({"method": "gorp", "optimizer": {"rank": 4, "scale": 2.0, "full_rank_lr": 1e-5}})
    kind, settings = make_optimizer(METHODS["gorp"], config.optimizer)
    assert kind is GORPFactory
    assert settings["optimizer"] is GORP
    assert (settings["rank"], settings["scale"], settings["refresh"]) == (4, 2.0, 10)
    assert "full_rank_lr" not in settings, "the trainer gives it to those weights"
    assert make_optimizer(METHODS["galore"], parse_config({"method": "galore"}).optimizer)[1]["optimizer"] is GaLore
