"""Layer-wise mode in two processes: FSDP2 as it is, coordinates averaged by the optimizer, DDP refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from optim_helpers import tiny_batch
from torch import nn

from growthring.errors import ConfigError
from growthring.optim import GORP, LayerWise

RANKS = 2


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(12, 21), nn.Tanh(), nn.Linear(21, 21), nn.Tanh(), nn.Linear(21, 5)]
        return nn.Sequential(*layers).double()


def train(model, rows, **options):
    """Ten clipped steps of two micro-batches; the norm and the whole gradients that were kept, of each step."""
    optimizer = GORP(model.parameters(), lr=0.01, rank=3, refresh=4, side="right", **options)
    mode, seen = LayerWise(optimizer, max_norm=0.05), []
    for k in range(10):
        x, y = tiny_batch(16, seed=k, dtype=torch.float64)
        for part in rows:
            (nn.functional.cross_entropy(model(x[part]), y[part]) / 2).backward()
        kept = sum(p.grad is not None for p in model.parameters() if p.ndim == 2)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((mode.norm, kept))
    return seen


def worker(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    rows = [range(rank, 8, RANKS), range(8 + rank, 16, RANKS)]
    found = {}
    sharded, mesh = net(), init_device_mesh("cpu", (RANKS,))
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    seen = train(sharded, rows)
    found["fsdp2"] = seen, [p.full_tensor().detach() for p in sharded.parameters()]
    plain = net()
    seen = train(plain, rows, average_over=dist.group.WORLD)
    found["average_over"] = seen, [p.detach() for p in plain.parameters()]
    wrapped = DistributedDataParallel(net())
    with pytest.raises(ConfigError, match=r"DDP averages gradients after the hooks.*average_over"):
        LayerWise(GORP(wrapped.parameters(), rank=3))
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("how", ["fsdp2", "average_over"])
def test_two_processes_take_the_steps_of_one(found, how):
    one = net()
    wanted = train(one, [range(8), range(8, 16)])
    assert [kept for _, kept in wanted] == [3, 0, 1, 1, 1, 0, 1, 1, 1, 0]
    for of_rank in found:
        seen, weights = of_rank[how]
        assert [kept for _, kept in seen] == [kept for _, kept in wanted]
        assert [norm for norm, _ in seen] == pytest.approx([norm for norm, _ in wanted], rel=1e-9)
        for a, b in zip(one.parameters(), weights, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=0, atol=1e-9)
