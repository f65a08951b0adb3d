from __future__ import annotations

import json
import re
from typing import get_args

import pytest

from growthring.backbones.module_map import ROLES
from growthring.errors import ConfigError
from growthring.guards import NullRatio
from growthring.guards.energy import KINDS, parse_energy
from growthring.recipes import method_settings
from growthring.recipes._method import SITE_KINDS, TRAINS
from growthring.recipes.methods import METHODS, get_method
from growthring.recipes.optimizer_settings import OPTIMIZER_DEFAULTS


def test_the_registry_names_every_method_of_the_demo_and_more():
    assert list(METHODS) == [
        "sequential-lora", "sequential-adapter", "sequential-prefix", "sequential-prompt", "sequential-ia3",
        "sequential-linear", "sequential-full", "joint",
        "pegp", "pegp-adapter", "pegp-prefix", "pegp-prompt", "pegp-ia3", "pegp-linear",
        "gpm", "adam-nscl", "inflora", "o-lora",
        "galore", "gorp", "gorp-full",
        "largo", "largo-f", "largo-p", "largo-d", "pissa", "milora",
        "l2-sp", "ftp", "tpgm", "spd", "digrap",
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
    if method.guard == "pegp":
        assert tuple(method.energy) == method.kinds
        parse_energy(method.energy)
    else:
        assert isinstance(method.energy, float) == (method.guard in ("inflora", "gradient-memory"))


def test_kinds_of_sites_and_roles_are_those_of_the_rooms_that_have_them():
    assert set(get_args(method_settings.Kind)) == set(KINDS)
    assert {kind for kinds in SITE_KINDS.values() for kind in kinds} == set(KINDS)
    assert set(get_args(method_settings.Role)) == {"preset", "all-linear", *ROLES}
    assert set(SITE_KINDS) == set(TRAINS) == set(method_settings.ADAPTER_DEFAULTS)


@pytest.mark.parametrize("method", METHODS.values(), ids=str)
def test_methods_with_an_optimizer_of_their_own(method):
    assert method.optimizer in (None, *OPTIMIZER_DEFAULTS)
    assert (method.full_rank_lr is not None) == (method.adapter == "lora+weights")
    assert (method.guard == "gradient-memory") == (method.optimizer == "gorp")


def test_the_published_rules_of_the_family_are_what_the_guard_makes_of_them():
    rising = parse_energy(METHODS["gpm"].energy)["linear"]
    assert [round(rising.at(task), 6) for task in (0, 1, 2, 10, 11)] == [0.97, 0.973, 0.976, 1.0, 1.0]
    assert parse_energy(METHODS["adam-nscl"].energy)["linear"] == NullRatio(10.0)


def test_an_unknown_method_offers_near_ones():
    with pytest.raises(ConfigError, match=r"no method 'pegp-liner'; did you mean 'pegp-linear'"):
        get_method("pegp-liner")
