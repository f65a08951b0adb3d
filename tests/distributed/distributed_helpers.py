"""Functions on several processes of this machine over gloo, and a small model that they train."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import get_context, start_processes

from growthring.optim import GORP, GaLore
from growthring.subspace import Subspace

LIMIT = 1e-6
STEPS = 25
BATCH = 32


# --- processes ----------------------------------------------------------------------------------------------------


def on_ranks(function: Callable[..., Any], ranks: int, *args: Any, seconds: float = 150.0) -> list[Any]:
    """What ``function(*args)`` returns on each of ``ranks`` processes of one process group.

    The function belongs to a module, and returns tensors, numbers, strings, lists and dicts. The first rank that
    fails ends the others and fails the test with its traceback; so does the end of the time.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        method = "forkserver" if sys.platform == "linux" else "spawn"
        if method == "forkserver":  # torch is imported once, not once for each process
            get_context(method).set_forkserver_preload(["growthring.optim", "torch.distributed.fsdp", "torch._dynamo"])
        context = start_processes(
            _work, (function, ranks, port, folder, args), nprocs=ranks, join=False, start_method=method
        )
        end = time.monotonic() + seconds
        try:
            while not context.join(timeout=max(0.1, end - time.monotonic()), grace_period=1.0):
                if time.monotonic() > end:
                    pytest.fail(f"{function.__name__} on {ranks} ranks has not come to an end in {seconds:g} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(ranks)]


def _work(rank: int, function: Callable[..., Any], ranks: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.save(function(*args), Path(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- a model, its data, its optimizer -----------------------------------------------------------------------------


class Net(nn.Module):
    """Matrices 6 x 9 (a convolution), 20 x 24, 30 x 20, 5 x 30; biases and a norm.

    On 4 ranks the rows of none but the second are spread evenly, and the last rank has none of the fourth.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.look = nn.Conv1d(3, 6, 3)
            self.wide = nn.Linear(24, 20)
            self.norm = nn.LayerNorm(20)
            self.tall = nn.Linear(20, 30)
            self.head = nn.Linear(30, 5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.look(x).flatten(1)))
        return self.head(torch.tanh(self.tall(torch.tanh(x))))


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The global batch of a step, labelled by a teacher.

    Gradients then have a spectrum, of rank well above that of the subspaces. Of noise Adam makes full steps, whose
    signs hang on the last bit.
    """
    generator, fixed = torch.Generator().manual_seed(step), torch.Generator().manual_seed(99)
    teacher = torch.randn(18, 5, generator=fixed, dtype=torch.float64) * 0.8 ** torch.arange(5)
    x = torch.randn(BATCH, 18, generator=generator, dtype=torch.float64) * 0.9 ** torch.arange(18)
    return x.view(BATCH, 3, 6).to(dtype), (x @ teacher).to(dtype)


def share(tensor: Tensor) -> Tensor:
    """This rank's part of a global batch; all of it in one process."""
    if not dist.is_initialized():
        return tensor
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step, dtype)
    return (model(share(x)).to(dtype) - share(y)).square().mean()


def optimizer_for(model: nn.Module, options: dict[str, Any] | None = None) -> GORP:
    """GORP by the options of a case, of which ``kind`` says which class."""
    options = {"lr": 1e-2, "rank": 3, "refresh": 4} | (options or {})
    kind = {"gorp": GORP, "galore": GaLore}[options.pop("kind", "gorp")]
    return kind(model.named_parameters(), **options)


def space(dim: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Subspace:
    subspace = Subspace(dim, dtype=dtype)
    subspace.grow(torch.randn(rank, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype), energy=1.0)
    return subspace


def protect(optimizer: GORP, *, exact: bool = True) -> None:
    """A memory of inputs and outputs for every matrix of 20 rows or more; of outputs alone for the others."""
    spaces = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.ndim > 1:
                m, n = p.shape[0], p[0].numel()
                spaces[p] = (space(n, 5, n) if m >= 20 else None, space(m, 2, m + 1))
    assert optimizer.protect(spaces, exact=exact) == set(spaces)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    full = getattr(tensor.detach(), "full_tensor", None)
    return tensor.detach().clone() if full is None else full()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def state_of(optimizer: GORP) -> dict[str, Tensor]:
    """The whole state by the names of parameters."""
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            found |= {f"{name.removeprefix('module.')}.{key}": whole(v) for key, v in optimizer.state[p].items()}
    return found


def farthest(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors of the same names and shapes."""
    assert one.keys() == two.keys()
    assert all(one[k].shape == two[k].shape for k in one), {k: (one[k].shape, two[k].shape) for k in one}
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
