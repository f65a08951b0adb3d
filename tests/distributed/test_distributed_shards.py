"""Matrices of odd shapes as row shards, with gradients as they are given; and what no shard can be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import LIMIT, Net, farthest, loss_of, on_ranks, optimizer_for, protect, weights
from distributed_training import shard, train
from torch import Tensor, nn

from growthring.errors import ConfigError, GrowthringError, NumericalError
from growthring.optim import GORP, gorp

SHAPES = [(1, 8), (3, 5), (4, 9), (9, 4), (2, 3, 2, 2), (5,), (1,)]
ODD = [
    {"rank": rank, "rule": rule, "range_finder": finder}
    for rank, rule, finder in [
        (1, "shared", "warm"), (1, "adafactor", "full"), (1, "adam", "gram"), (2, "adam", "randomized"),
        (2, "momentum", "full"), (3, "shared", "gram"), (4, "adafactor", "warm"),
    ]
]  # fmt: skip


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def placed(tensor: Tensor, how: str) -> Tensor:
    """As a DTensor over all ranks, where there are any: ``"shard"`` by rows, ``"columns"``, ``"copy"``."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    place = {"shard": Shard(0), "columns": Shard(1), "copy": Replicate()}[how]
    return distribute_tensor(tensor, init_device_mesh("cpu", (dist.get_world_size(),)), [place])


def step_through(options: dict[str, Any], weight: str = "shard", gradient: str = "shard") -> dict[str, Tensor]:
    """Eight steps; gradients of every third are zero for one parameter."""
    params = [nn.Parameter(placed(normal(s, i), weight)) for i, s in enumerate(SHAPES)]
    named = [(str(i), p) for i, p in enumerate(params)]
    optimizer = GORP(named, lr=1e-2, refresh=3, side="right", weight_decay=0.1, **options)
    for step in range(8):
        for i, p in enumerate(params):
            here = "shard" if p.ndim == 1 and gradient == "columns" else gradient
            p.grad = placed(normal(tuple(p.shape), 100 * step + i + 7) * (1 if step % 3 or i != 2 else 0), here)
        optimizer.step()
    return weights(nn.ParameterDict(named))


def odd() -> dict[str, Any]:
    found = {f"odd {i}": step_through(options) for i, options in enumerate(ODD)}
    return found | {
        "copies": step_through(ODD[3], weight="copy", gradient="copy"),
        "gradients placed as columns": step_through(ODD[3], gradient="columns"),
        "whole gradients": step_through(ODD[3], gradient="copy"),
    }


@pytest.mark.filterwarnings("ignore:.*are skipped, and their basis and moments stay:UserWarning")
def test_odd_shapes_and_placements_take_the_steps_of_one_process():
    expected = [step_through(options) for options in ODD]
    for rank in on_ranks(odd, 4):
        for i in range(len(ODD)):
            assert farthest(expected[i], rank[f"odd {i}"]) <= 1e-12, ODD[i]
        for name in ("copies", "gradients placed as columns", "whole gradients"):
            assert farthest(expected[3], rank[name]) <= 1e-12, name


# --- weights of few bits ------------------------------------------------------------------------------------------


def few_bits() -> dict[str, dict[str, float]]:
    """How far FSDP2 is from one process that is given the same gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    kinds = {
        "bf16 in forward": (torch.float32, {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}),
        "reduced in float32": (
            torch.float32,
            {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        ),
        "bf16 weights": (torch.bfloat16, {}),
    }
    found = {}
    for kind, (dtype, options) in kinds.items():
        model, alone = Net(dtype), Net(dtype)
        shard(model, **options)
        settings = {"weight_decay": 0.1, "side": "right", "range_finder": "full"}
        one, other = optimizer_for(model, settings), optimizer_for(alone, settings)
        protect(one)
        protect(other)
        for step in range(10):
            one.zero_grad()
            loss_of(model, step, dtype).backward()
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                q.grad = p.grad.full_tensor()
            one.step()
            other.step()
        bases = {k: s["basis"].dtype for k, s in enumerate(one.state.values()) if "basis" in s}
        found[kind] = {
            "off": farthest(weights(model), weights(alone)),
            "largest": max(float(w.abs().max()) for w in weights(alone).values()),
            "float32 bases": float(set(bases.values()) == {torch.float32}),
        }
    return found


def test_mixed_precision_and_bf16_weights():
    for rank in on_ranks(few_bits, 2):
        for kind, one in rank.items():
            # a sum of float32 may fall on the other side of a rounding to bf16: one unit in its last of 8 bits
            limit = LIMIT if kind != "bf16 weights" else one["largest"] * 2**-8
            assert one["off"] <= limit, kind
            assert one["float32 bases"]


# --- parameters that are replaced ---------------------------------------------------------------------------------


def replaced() -> dict[str, Tensor]:
    """As accelerate does it: the optimizer first, then shards in the places of its parameters."""
    model = Net(torch.float64)
    optimizer = optimizer_for(model, {"weight_decay": 0.1})
    optimizer.load_state_dict(optimizer.state_dict())
    names = [name for name, _ in model.named_parameters()]
    for group in optimizer.param_groups:
        group["params"] = [torch.empty(1) for _ in group["params"]]
    shard(model)
    ours = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [ours[name] for name in names]
    protect(optimizer)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(model, step, torch.float64).backward()
        optimizer.step()
    assert {p.side for p in optimizer.explain() if p.treatment == "projected"} == {"right"}
    return weights(model)


def test_parameters_are_replaced_by_shards():
    options = {"side": "right", "weight_decay": 0.1}
    alone = train(options, dtype=torch.float64, steps=10, memory="exact")["weights"]
    for rank in on_ranks(replaced, 2):
        assert farthest(alone, rank) <= 1e-12


def test_what_was_protected_does_not_get_lost_in_silence():
    model = Net()
    optimizer = optimizer_for(model)
    protect(optimizer)
    model.tall.weight.requires_grad_(False)
    loss_of(model, 0).backward()
    optimizer.step()  # a frozen one is still there
    twin = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = list(twin.parameters())
    loss_of(twin, 0).backward()
    with pytest.raises(ConfigError, match=r"4 protected parameters .*Call protect\(\) after prepare\(\)"):
        optimizer.step()
    optimizer.protect({})
    optimizer.step()


# --- errors ---------------------------------------------------------------------------------------------------------


def failing_owner() -> list[str]:
    """One rank cannot find its range; nobody hangs, and the optimizer can be used again."""
    said = []
    model = Net()
    shard(model)
    real = gorp.dense_range
    for finder in ("full", "gram"):
        optimizer = optimizer_for(model, {"range_finder": finder})
        optimizer.zero_grad()
        loss_of(model, 0).backward()

        def failing(*args, **options):
            if dist.get_rank() == 1:
                raise torch.linalg.LinAlgError("did not converge")
            return real(*args, **options)

        gorp.dense_range = failing
        try:
            optimizer.step()
        except (GrowthringError, torch.linalg.LinAlgError) as error:
            said.append(f"{type(error).__name__}: {error}".lstrip("_"))
        gorp.dense_range = real
        optimizer.step()
    return said


def test_a_failing_owner_fails_all_ranks():
    first, second, third = on_ranks(failing_owner, 3)
    for said in (first, third):
        assert len(said) == 2
        assert all(line.startswith(f"{NumericalError.__name__}: rank 1 could not find the range") for line in said)
    assert second == ["LinAlgError: did not converge"] * 2


def refusals() -> dict[str, str]:
    def attempt(options: dict[str, Any], place: str = "shard", state: dict[str, Any] | None = None) -> str:
        p = nn.Parameter(placed(normal((6, 8), 0), place))
        p.grad = placed(normal((6, 8), 1), place)
        try:
            optimizer = GORP([p], rank=2, **options)
            if state is not None:
                optimizer.load_state_dict(state)
            optimizer.step()
        except ConfigError as error:
            return str(error)
        return ""

    plain = nn.Parameter(normal((6, 8), 0))
    plain.grad = normal((6, 8), 1)
    left = GORP([plain], rank=2, side="left")
    left.step()
    tall = nn.Parameter(placed(normal((8, 6), 0), "columns"))
    tall.grad = placed(normal((8, 6), 1), "columns")
    before = weights(nn.ParameterDict({"tall": tall}))
    GORP([{"params": [tall], "rank": None}]).step()
    return {
        **{side: attempt({"side": side}) for side in ("left", "two-sided", "right", "auto")},
        "columns": attempt({}, place="columns"),
        "left before": attempt({}, state=left.state_dict()),
        "AdamW": "" if farthest(before, weights(nn.ParameterDict({"tall": tall}))) > 1e-4 else "no step",
    }


def test_what_shards_cannot_do_is_refused():
    for said in on_ranks(refusals, 2):
        for side in ("left", "two-sided"):
            assert f"side='{side}'" in said[side]
            assert "Use side='right'" in said[side]
        assert "Shard(dim=1)" in said["columns"]
        assert "rank=None" in said["columns"]
        assert "Train with side='right' from the start" in said["left before"]
        assert said["right"] == said["auto"] == said["AdamW"] == ""


def flat_parameters() -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for keep in (False, True):
        for first in (False, True):
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            early = GORP(model.parameters(), rank=2) if first else None
            parallel = FullyShardedDataParallel(model, use_orig_params=keep, device_id=torch.device("cpu"))
            try:
                optimizer = early or GORP(parallel.parameters(), rank=2)
                optimizer.param_groups[0]["params"] = list(parallel.parameters())
                parallel(torch.ones(2, 8)).sum().backward()
                optimizer.step()
                said.append("")
            except ConfigError as error:
                said.append(str(error))
    return said


def test_fsdp1_is_refused():
    for said in on_ranks(flat_parameters, 2):
        assert len(said) == 4
        assert all("FSDP1" in line and "FSDP2 (fully_shard)" in line for line in said)


@pytest.mark.parametrize("attribute", ["ds_id", "ds_shape"])
def test_deepspeed_zero_3_is_refused(attribute):
    p = nn.Parameter(torch.zeros(0))
    setattr(p, attribute, 3)
    with pytest.raises(ConfigError, match=r"DeepSpeed ZeRO.*Use DDP or FSDP2"):
        GORP([nn.Parameter(torch.zeros(9, 9)), p])


def test_deepspeed_zero_1_and_2_are_refused():
    """They put one flat parameter in the place of each group's, once the optimizer is there."""
    optimizer = GORP([{"params": [nn.Parameter(torch.ones(9, 9))]}, {"params": [nn.Parameter(torch.ones(9))]}])
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    with pytest.raises(ConfigError, match=r"group 0 had matrices and now has flat parameters only \(one of 81"):
        optimizer.step()


# --- the harness --------------------------------------------------------------------------------------------------


def breaks_down() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank has had enough")
    dist.barrier()


def hangs() -> None:
    if dist.get_rank() == 1:
        dist.barrier()
    torch.manual_seed(0)
    dist.recv(torch.zeros(1), src=1)


def test_a_rank_that_fails_fails_the_test():
    with pytest.raises(Exception, match="this rank has had enough"):
        on_ranks(breaks_down, 2)


def test_ranks_that_wait_for_ever_fail_the_test():
    with pytest.raises(pytest.fail.Exception, match=r"hangs on 2 ranks has not come to an end in 4 s"):
        on_ranks(hangs, 2, seconds=4.0)
