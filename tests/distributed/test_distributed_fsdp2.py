"""FSDP2: matrices whose rows are spread over ranks take the steps of one process."""

from __future__ import annotations

import pytest
import torch
from distributed_helpers import LIMIT, equal, farthest, on_ranks
from distributed_training import train, train_all

from growthring.subspace import RANGE_FINDERS

RIGHT = {"side": "right"}  # what "auto" takes where rows are spread, whatever the shape
DECAY = RIGHT | {"weight_decay": 0.1}
SHORT = {"steps": 10, "dtype": torch.float64}
LONG = {finder: {"options": DECAY | {"range_finder": finder}} for finder in RANGE_FINDERS}
CASES = LONG | {
    **{
        f"{finder} with memory": SHORT | {"options": DECAY | {"range_finder": finder}, "memory": "exact"}
        for finder in RANGE_FINDERS
    },
    "published memory": SHORT | {"options": RIGHT, "memory": "published"},
    **{rule: SHORT | {"options": DECAY | {"rule": rule}} for rule in ("momentum", "adafactor", "shared")},
    "all refreshes at once": SHORT | {"options": RIGHT | {"stagger": False, "rotate": False, "range_finder": "gram"}},
    "GaLore": SHORT | {"options": RIGHT | {"kind": "galore", "scale": 1.0, "weight_decay": 0.1}},
    "layer-wise": SHORT | {"options": DECAY, "layerwise": True},
    "clipped": SHORT | {"options": RIGHT, "clip": 0.1},
    "NaN": SHORT | {"options": RIGHT, "broken": 6},
    "NaN where a basis is due": SHORT | {"options": RIGHT | {"stagger": False}, "broken": 8},
    # squares leave the range of float32; momentum keeps to gradients as they are
    "tiny gradients": {"options": RIGHT | {"rule": "momentum", "lr": 1e23, "eps": 1e30}, "scale": 1e-25, "steps": 10},
    "huge gradients": {"options": RIGHT | {"rule": "momentum", "lr": 1e-27}, "scale": 1e25, "steps": 10},
}
ON_FOUR = ("warm", "full", "warm with memory", "gram with memory", "adafactor", "shared", "NaN where a basis is due")


def sharded(case):
    return case | {"wrap": "fsdp", "options": {k: v for k, v in case["options"].items() if k != "side"}}


@pytest.fixture(scope="module")
def one_process():
    return {name: train(**case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found():
    """Results of every rank, by number of ranks."""
    on_four = {name: sharded(CASES[name]) for name in ON_FOUR}
    return {
        2: on_ranks(train_all, 2, {name: sharded(case) for name, case in CASES.items()}),
        4: on_ranks(train_all, 4, on_four | {"HSDP": sharded(CASES["full with memory"]) | {"wrap": "hsdp"}}),
    }


RUNS = [(2, case, case) for case in CASES] + [(4, case, case) for case in ON_FOUR] + [(4, "HSDP", "full with memory")]


@pytest.mark.parametrize(("ranks", "case", "alone"), RUNS)
def test_same_weights_as_one_process(ranks, case, alone, one_process, found):
    limit = 1e-12 if CASES[alone].get("dtype") == torch.float64 else LIMIT
    for rank in found[ranks]:
        assert farthest(one_process[alone]["weights"], rank[case]["weights"]) <= limit


@pytest.mark.parametrize(("ranks", "case", "alone"), RUNS)
def test_all_ranks_hold_one_state(ranks, case, alone, one_process, found):
    """Bases bit for bit; and what is counted is counted as in one process."""
    first, *others = (rank[case] for rank in found[ranks])
    assert all(equal(first["state"], other["state"]) for other in others)
    expected = one_process[alone]["state"]
    assert expected.keys() == first["state"].keys()
    for key in expected:
        if key.rpartition(".")[2] in ("step", "side", "refreshes", "skipped"):
            assert torch.equal(expected[key], first["state"][key]), key


@pytest.mark.parametrize(("ranks", "case"), [(2, "NaN"), (2, "NaN where a basis is due"), (4, ON_FOUR[-1])])
def test_a_nan_on_one_rank_is_skipped_and_said_on_all(ranks, case, found):
    for rank in found[ranks]:
        assert int(rank[case]["state"]["tall.weight.skipped"]) == 1
        assert int(rank[case]["state"]["wide.weight.skipped"]) == 0
        assert len(rank[case]["said"]) == 1


def test_the_comparison_can_fail(one_process):
    """Runs that differ in their range finder or in clipping are far apart."""
    one = one_process["warm"]["weights"]
    for other in ("full", "randomized"):
        assert farthest(one, one_process[other]["weights"]) > 100 * LIMIT
    assert farthest(one_process["clipped"]["weights"], train(**CASES["clipped"] | {"clip": None})["weights"]) > 1e-6
