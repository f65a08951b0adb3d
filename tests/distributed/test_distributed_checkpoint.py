"""``torch.distributed.checkpoint`` with one number of ranks and another, off a refresh boundary."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_helpers import LIMIT, Net, equal, farthest, loss_of, on_ranks, optimizer_for, state_of, weights
from distributed_training import shard
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from growthring.optim import GORP

CUT, END = 7, 14
# 4 matrices, a refresh in 6 steps, staggered: none is due in the step after the cut
OPTIONS = {"side": "right", "refresh": 6, "weight_decay": 0.1}
CASES = {"adam": OPTIONS, "adafactor": OPTIONS | {"rule": "adafactor", "range_finder": "full"}}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def start(case: str) -> tuple[Net, GORP]:
    """A model, sharded where there are ranks, and a fresh optimizer with a second group, of AdamW."""
    model = Net()
    if dist.is_initialized():
        shard(model)
    optimizer = optimizer_for(model, CASES[case])
    names, members = optimizer.param_groups[0]["param_names"], optimizer.param_groups[0]["params"]
    where = names.index("head.weight")
    optimizer.add_param_group({"params": [(names.pop(where), members.pop(where))], "rank": None, "lr": 3e-3})
    return model, optimizer


def run(model: Net, optimizer: GORP, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def result(model: Net, optimizer: GORP) -> dict[str, Any]:
    return {"weights": weights(model), "state": state_of(optimizer)}


def straight(case: str) -> dict[str, Any]:
    """Train without a break."""
    model, optimizer = start(case)
    run(model, optimizer, 0, END)
    return result(model, optimizer)


def save(folder: str) -> dict[str, Any]:
    """Train up to the cut and save, in three ways; then go on."""
    found = {}
    for case in CASES:
        model, optimizer = start(case)
        run(model, optimizer, 0, CUT)
        for kind, options in (("nested", None), ("flat", FLAT)):
            parts = get_state_dict(model, optimizer, options=options)
            dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=f"{folder}/{case}-{kind}")
        parts = get_state_dict(model, optimizer, options=FULL)
        if dist.get_rank() == 0:
            torch.save(parts, f"{folder}/{case}-full.pt")
        run(model, optimizer, CUT, END)
        found[case] = result(model, optimizer)
    return found


def resume(folder: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Load into a fresh optimizer, and train to the end."""
    found = {}
    for case in CASES:
        for kind in kinds:
            torch.manual_seed(1)
            model, optimizer = start(case)
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()  # what is loaded counts
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                load(f"{folder}/{case}-{kind}", kind, model, optimizer)
            run(model, optimizer, CUT, END)
            found[f"{case}, {kind}"] = result(model, optimizer) | {
                "said": [str(w.message) for w in caught if "GORP" in str(w.message)]
            }
    return found


def load(path: str, kind: str, model: Net, optimizer: GORP) -> None:
    if kind == "full":
        ours = not dist.is_initialized() or dist.get_rank() == 0
        parts = torch.load(f"{path}.pt", weights_only=True) if ours else ({}, {})
        options = BROADCAST if dist.is_initialized() else StateDictOptions(full_state_dict=True)
    else:
        options = FLAT if kind == "flat" else None
        parts = get_state_dict(model, optimizer, options=options)
        states = dict(zip(("model", "optimizer"), parts, strict=True))
        dcp.load(states, checkpoint_id=path)
        parts = (states["model"], states["optimizer"])
    set_model_state_dict(model, parts[0], options=options)
    set_optimizer_state_dict(model, optimizer, parts[1], options=options)


KINDS = ("nested", "flat", "full")


@pytest.fixture(scope="module")
def one_process():
    return {case: straight(case) for case in CASES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and uninterrupted runs, by the number of ranks that saved."""
    folders = {ranks: str(tmp_path_factory.mktemp(f"by-{ranks}")) for ranks in (2, 4)}
    return {ranks: (folder, on_ranks(save, ranks, folder)) for ranks, folder in folders.items()}


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 2)])
def test_other_numbers_of_ranks_go_on_as_one_process(before, after, saved, one_process):
    folder, uninterrupted = saved[before]
    for rank in on_ranks(resume, after, folder, KINDS):
        assert len(rank) == len(CASES) * len(KINDS)
        for name, found in rank.items():
            case = name.split(",")[0]
            assert found["said"] == []
            assert farthest(one_process[case]["weights"], found["weights"]) <= LIMIT
            for key, value in one_process[case]["state"].items():
                if key.rpartition(".")[2] in ("step", "side", "refreshes", "skipped"):
                    assert torch.equal(value, found["state"][key]), key
            if before == after:
                assert equal(uninterrupted[0][case]["weights"], found["weights"])
                assert equal(uninterrupted[0][case]["state"], found["state"])


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_were(kind, saved, one_process):
    for name, found in resume(saved[2][0], (kind,)).items():
        case = name.split(",")[0]
        assert found["said"] == []
        assert farthest(one_process[case]["weights"], found["weights"]) <= LIMIT


def test_the_checkpoint_counts(saved, one_process):
    """The same last steps from a fresh state are far away."""
    model, optimizer = start("adam")
    run(model, optimizer, 0, CUT)
    optimizer.state.clear()
    run(model, optimizer, CUT, END)
    assert farthest(one_process["adam"]["weights"], weights(model)) > 1e-3


def test_a_fresh_optimizer_is_given_a_state_in_silence():
    """Pytest makes errors of warnings."""
    model, optimizer = start("adam")
    before = weights(model)
    get_optimizer_state_dict(model, optimizer)
    assert equal(before, weights(model))
    state = state_of(optimizer)
    assert all(int(v) == 0 for k, v in state.items() if k.rpartition(".")[2] in ("refreshes", "skipped"))
    assert all(int(v) == 0 for k, v in state.items() if k == "tall.weight.step")
    run(model, optimizer, 0, 3)
    assert farthest(before, weights(model)) > 1e-3


def test_zero_gradients_count_at_any_other_rate():
    model, optimizer = start("adam")
    for times in (1, 2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert int(optimizer.state[model.tall.weight]["skipped"]) == times
