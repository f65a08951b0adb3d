from __future__ import annotations

import json
import re

import pytest

from growthring.errors import ConfigError
from growthring.recipes.methods import METHODS, get_method


def test_the_registry_names_every_method_of_the_demo_and_more():
    assert list(METHODS) == [
        "sequential-lora", "sequential-linear", "sequential-full", "joint", "pegp", "pegp-linear",
    ]  # fmt: skip
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("method", METHODS.values(), ids=str)
def test_every_method_says_what_it_is(method):
    for text in (method.title, method.summary, method.guarantee, method.cost, method.use_when, method.avoid_when):
        assert len(text) > 10
    if method.paper is not None:
        assert re.fullmatch(r"\d{4}\.\d{5}", method.paper.arxiv)
    assert json.loads(json.dumps(method.to_dict()))["name"] == method.name


@pytest.mark.parametrize("method", METHODS.values(), ids=str)
def test_energies_are_given_exactly_for_the_kinds_a_guard_protects(method):
    kinds = {"lora": {"lora_A", "lora_B"}, "linear": {"linear"}}
    assert set(method.energy) == (kinds[method.adapter] if method.guard else set())


def test_an_unknown_method_offers_near_ones():
    with pytest.raises(ConfigError, match=r"no method 'pegp-liner'; did you mean 'pegp-linear'"):
        get_method("pegp-liner")
