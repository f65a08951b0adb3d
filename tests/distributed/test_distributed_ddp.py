"""DDP, and averages of coordinates in the place of gradients: the steps of one process on the global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import BATCH, LIMIT, Net, equal, farthest, loss_of, on_ranks, optimizer_for, weights
from distributed_training import train, train_all, wrapped
from torch import nn

import growthring as gr
from growthring.errors import ConfigError
from growthring.optim import GORP
from growthring.subspace import RANGE_FINDERS

SHORT = {"steps": 10, "dtype": torch.float64}
LONG = {finder: {"options": {"weight_decay": 0.1, "range_finder": finder}} for finder in RANGE_FINDERS}
CASES = LONG | {
    "two-sided": SHORT | {"options": {"side": "two-sided"}},
    "adafactor": SHORT | {"options": {"rule": "adafactor", "weight_decay": 0.1}, "memory": "exact"},
    "GaLore": SHORT | {"options": {"kind": "galore", "scale": 1.0, "weight_decay": 0.1}},
    "AdamW only": SHORT | {"options": {"rank": None, "weight_decay": 0.1}},
}
WRAPS = ("ddp", "local")
ON_FOUR = ("warm", "two-sided", "adafactor")


def spread(cases: Any, wrap: str) -> dict[str, Any]:
    return {f"{name}, {wrap}": CASES[name] | {"wrap": wrap} for name in cases}


@pytest.fixture(scope="module")
def one_process():
    return {name: train(**case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found():
    """Results of every rank, by number of ranks."""
    special = {
        **{f"idle {what}": SHORT | {"wrap": "local", "options": {}, "idle": what} for what in ("zero", "none")},
        "layer-wise": SHORT | {"wrap": "local", "options": {}, "layerwise": True},
        "not layer-wise": SHORT | {"wrap": "local", "options": {}},
        "NaN": SHORT | {"wrap": "local", "options": {}, "broken": 6},
    }
    two, four = ({**spread(names, "ddp"), **spread(names, "local")} for names in (CASES, ON_FOUR))
    return {2: on_ranks(train_all, 2, two | special), 4: on_ranks(train_all, 4, four)}


RUNS = [(2, case, wrap) for case in CASES for wrap in WRAPS] + [(4, case, wrap) for case in ON_FOUR for wrap in WRAPS]


@pytest.mark.parametrize(("ranks", "case", "wrap"), RUNS)
def test_same_weights_as_one_process(ranks, case, wrap, one_process, found):
    limit = 1e-12 if CASES[case].get("dtype") == torch.float64 else LIMIT
    for rank in found[ranks]:
        assert farthest(one_process[case]["weights"], rank[f"{case}, {wrap}"]["weights"]) <= limit


@pytest.mark.parametrize(("ranks", "case", "wrap"), RUNS)
def test_all_ranks_hold_one_state(ranks, case, wrap, one_process, found):
    """Bases, moments and weights bit for bit, by construction."""
    first, *others = (rank[f"{case}, {wrap}"] for rank in found[ranks])
    for other in others:
        assert equal(first["state"], other["state"])
        assert equal(first["weights"], other["weights"])
    assert first["state"].keys() == one_process[case]["state"].keys()


@pytest.mark.parametrize(("ranks", "case"), [(r, c) for r, c, wrap in RUNS if wrap == "local"])
def test_averaged_coordinates_take_the_steps_of_ddp(ranks, case, found):
    one = found[ranks][0]
    limit = 1e-12 if CASES[case].get("dtype") == torch.float64 else LIMIT
    assert farthest(one[f"{case}, ddp"]["weights"], one[f"{case}, local"]["weights"]) <= limit


def test_a_rank_without_a_gradient_counts_as_one_with_zeros(found):
    for rank in found[2]:
        assert equal(rank["idle zero"]["weights"], rank["idle none"]["weights"])
        assert farthest(rank["idle zero"]["weights"], rank["not layer-wise"]["weights"]) > 1e-3


def test_layer_wise_coordinates_are_averaged(found):
    for rank in found[2]:
        assert farthest(rank["layer-wise"]["weights"], rank["not layer-wise"]["weights"]) <= 1e-12


def test_a_nan_on_one_rank_is_skipped_and_said_on_all(found):
    for rank in found[2]:
        assert int(rank["NaN"]["state"]["tall.weight.skipped"]) == 1
        assert int(rank["NaN"]["state"]["wide.weight.skipped"]) == 0
        assert len(rank["NaN"]["said"]) == 1


def two_tasks(wrap: str) -> dict[str, Any]:
    """A memory of the gradients of one task, kept in the next."""
    model, quiet = wrapped(Net(torch.float64), wrap)
    memory, found = gr.GradientMemory(energy=0.9, side="both"), {}
    for task in range(2):
        over = {"average_over": dist.group.WORLD} if wrap == "local" else {}
        optimizer = optimizer_for(model, over)
        memory.attach(model.module if wrap != "none" else model)
        memory.begin_task(str(task))
        memory.bind(optimizer)
        for step in range(6):
            optimizer.zero_grad()
            with quiet():
                loss_of(model, step + 10 * task, torch.float64).backward()
            memory.before_step()
            optimizer.step()
            memory.after_step()
        certificate = memory.end_task(str(task))
        found[f"free {task}"] = certificate.free
    return {"weights": weights(model), "leak": certificate.leak} | found


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_memory_over_two_tasks_is_that_of_one_process(wrap):
    alone = two_tasks("none")
    first, second = on_ranks(two_tasks, 2, wrap)
    assert equal(first["weights"], second["weights"])
    assert farthest(alone["weights"], first["weights"]) <= 1e-12
    assert (alone["free 0"], alone["free 1"]) == (first["free 0"], first["free 1"])
    assert first["free 1"] < first["free 0"]
    assert first["leak"] <= 1e-12


# --- what goes over the wire --------------------------------------------------------------------------------------

SIZE, RANK, REFRESH, RUN = 64, 4, 10, 20


def count_bytes() -> dict[str, int]:
    """Bytes that this rank puts into all-reduces in :data:`RUN` steps of four matrices and one bias."""
    counts = {}
    for wrap in WRAPS:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=i == 3) for i in range(4)))
        parallel = nn.parallel.DistributedDataParallel(model)
        over = dist.group.WORLD if wrap == "local" else None
        optimizer = GORP(model.parameters(), lr=1e-3, rank=RANK, refresh=REFRESH, average_over=over)
        counts[wrap] = 0
        real = dist.all_reduce

        def counting(tensor, *args, wrap=wrap, real=real, **options):
            counts[wrap] += tensor.numel() * tensor.element_size()
            return real(tensor, *args, **options)

        def hook(_, bucket, wrap=wrap):
            counts[wrap] += bucket.buffer().numel() * bucket.buffer().element_size()
            work = dist.group.WORLD.allreduce([bucket.buffer().div_(dist.get_world_size())])
            return work.get_future().then(lambda done: done.value()[0])

        parallel.register_comm_hook(None, hook)
        dist.all_reduce = counting
        try:
            for _ in range(RUN):
                optimizer.zero_grad()
                x = torch.randn(BATCH, SIZE)
                if wrap == "ddp":
                    parallel(x).square().mean().backward()
                else:
                    with parallel.no_sync():
                        parallel(x).square().mean().backward()
                optimizer.step()
        finally:
            dist.all_reduce = real
    return counts


def test_bytes_on_the_wire():
    """``m r`` for ``m n``, but where a basis is due; and a byte for each parameter."""
    for counts in on_ranks(count_bytes, 2):
        assert counts["ddp"] == 4 * RUN * (4 * SIZE**2 + SIZE)
        due = 4 + sum(step % REFRESH == 0 for i in range(4) for step in range(1 + i, RUN + i))  # staggered
        whole, thin = due * SIZE**2, (4 * RUN - due) * SIZE * RANK
        assert counts["local"] == 4 * (whole + thin + RUN * SIZE) + 5 * RUN
        assert counts["local"] < 0.25 * counts["ddp"]


# --- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 0, "world", object()])
def test_only_a_process_group_is_taken(value):
    with pytest.raises(ConfigError, match=r"average_over=.*process group .*WORLD"):
        GORP([nn.Parameter(torch.zeros(9, 9))], average_over=value)


def test_it_is_no_option_of_a_group():
    with pytest.raises(ConfigError, match="'average_over'"):
        GORP([{"params": [nn.Parameter(torch.zeros(9, 9))], "average_over": None}])


def refusals() -> list[str]:
    from torch.distributed.fsdp import fully_shard

    said = []
    model = nn.Linear(9, 9)
    fully_shard(model)
    model(torch.ones(2, 9)).sum().backward()
    others = dist.new_group([0])
    for act in (
        lambda: GORP(model.parameters(), rank=2, average_over=dist.group.WORLD).step(),
        lambda: GORP(nn.Linear(9, 9).parameters(), rank=2, average_over=others),
    ):
        try:
            act()
        except ConfigError as error:
            said.append(str(error))
    return said


def test_shards_and_groups_of_others_are_refused():
    first, second = on_ranks(refusals, 2)
    assert len(first) == 1
    assert "is a DTensor" in first[0]
    assert len(second) == 2
    assert "that this process belongs to" in second[1]
