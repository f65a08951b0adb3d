"""Radius and Directional over DDP and FSDP2: the radii, strengths and weights of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_helpers import equal, farthest, on_ranks, share, weights
from distributed_training import wrapped
from peft import LoraConfig, get_peft_model
from torch import nn

import growthring as gr
from growthring.adapters import LargoConfig

TARGETS = ["0", "2", "4"]
CONFIGS = {
    "delta": LargoConfig(r=3, target_modules=TARGETS),
    "product": LargoConfig(r=3, alpha=6.0, form="product", target_modules=TARGETS),
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS),
    "weight": None,
}
GUARDS: dict[str, Any] = {
    "factor": lambda: gr.Radius(mu=0.2),
    "layer": lambda: gr.Radius(mu=0.2, granularity="layer", unit="anchor"),
    "component": lambda: gr.Radius(mu=0.2, granularity="component"),
    "fixed": lambda: gr.Radius(fixed=0.1),
    "directional": lambda: gr.Directional(0.3, weight=0.01),
}
CASES = [(kind, guard) for kind in CONFIGS for guard in GUARDS]
ON_FOUR = [(kind, guard) for kind in CONFIGS for guard in ("factor", "component", "directional")]
WRAPS = {"ddp": [(kind, guard) for kind in CONFIGS for guard in ("factor", "directional")], "fsdp": CASES}


def net(kind: str) -> nn.Module:
    """12 -> 10 -> 9 -> 5: rows that neither two nor four ranks share evenly, and a bias without a row for the last."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 5))
        config = CONFIGS[kind]
        return (base if config is None else get_peft_model(base, config)).double()


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, torch.sin(2.0 * x[:, :5] + step)


def run(kind: str, guard: str, wrap: str = "none", tasks: int = 2) -> dict[str, Any]:
    """Two tasks of eight steps; the state of the guard is taken in the middle of the second, as a whole."""
    regulator = GUARDS[guard]()
    model = net(kind)
    if wrap != "none":
        regulator.attach(model)  # before it is wrapped, as a run does; the anchors are those of this moment
        model, _ = wrapped_net(model, wrap)
    for task in range(tasks):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.5)
        regulator.attach(model)
        regulator.begin_task(str(task))
        regulator.bind(optimizer)
        for step in range(8):
            optimizer.zero_grad()
            x, y = rows(10 * task + step)
            (model(share(x)) - share(y)).square().mean().backward()
            regulator.before_step()
            optimizer.step()
            regulator.after_step()
        state = regulator.state_dict()
        learned = regulator.radii() if guard != "directional" else regulator.strengths()
        certificate = regulator.end_task(str(task))
    return {
        "weights": {n.removeprefix("module."): w for n, w in weights(model).items()},
        "learned": {name: list(v) if isinstance(v, tuple) else [v] for name, v in learned.items()},
        "bounds": [[d.frobenius, d.spectral, d.bound or 0.0] for d in certificate.deviations],
        "kept": certificate.kept,
        "anchors": {n: v for n, v in state["anchors"].items() if v is not None},
        "before": {n: s["before"] for n, s in state.get("strengths", {}).items() if "before" in s},
    }


def wrapped_net(model: nn.Module, wrap: str) -> Any:
    if wrap == "ddp":
        return wrapped(model, wrap)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    if wrap == "hsdp":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("copies", "shards"))
    fully_shard(model, mesh=mesh)
    return model, None


def run_all(cases: list[tuple[str, str, str]]) -> dict[str, Any]:
    return {" ".join(case): run(*case) for case in cases}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {f"{kind} {guard}": run(kind, guard) for kind, guard in CASES}


@pytest.fixture(scope="module")
def found() -> dict[int, Any]:
    two = [(*case, wrap) for wrap, cases in WRAPS.items() for case in cases]
    four = [(*case, "fsdp") for case in ON_FOUR] + [("delta", "factor", "hsdp"), ("weight", "component", "hsdp")]
    return {2: on_ranks(run_all, 2, two), 4: on_ranks(run_all, 4, four)}


RUNS = [(2, *case, wrap) for wrap, cases in WRAPS.items() for case in cases]
RUNS += [(4, *case, "fsdp") for case in ON_FOUR]
RUNS += [(4, "delta", "factor", "hsdp"), (4, "weight", "component", "hsdp")]


@pytest.mark.parametrize(("ranks", "kind", "guard", "wrap"), RUNS)
def test_as_one_process(ranks, kind, guard, wrap, alone, found):
    wanted = alone[f"{kind} {guard}"]
    for rank in found[ranks]:
        got = rank[f"{kind} {guard} {wrap}"]
        assert farthest(wanted["weights"], got["weights"]) <= 1e-12
        assert got["learned"].keys() == wanted["learned"].keys()
        for name, values in wanted["learned"].items():
            assert got["learned"][name] == pytest.approx(values, rel=1e-9, abs=1e-12)
        for ours, theirs in zip(wanted["bounds"], got["bounds"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-9)
        assert got["kept"] is wanted["kept"]
        assert got["kept"] is not False
        assert all(torch.equal(v, wanted["anchors"][n]) for n, v in got["anchors"].items())
        assert got["before"].keys() == wanted["before"].keys()
        assert not wanted["before"] or farthest(got["before"], wanted["before"]) <= 1e-12


@pytest.mark.parametrize(("ranks", "kind", "guard", "wrap"), RUNS)
def test_all_ranks_alike_bit_for_bit(ranks, kind, guard, wrap, found):
    first, *others = (rank[f"{kind} {guard} {wrap}"] for rank in found[ranks])
    for other in others:
        assert equal(first["weights"], other["weights"])
        assert first["learned"] == other["learned"]


def test_the_comparison_can_fail(alone):
    for kind in CONFIGS:
        assert farthest(alone[f"{kind} factor"]["weights"], alone[f"{kind} fixed"]["weights"]) > 1e-4
        assert farthest(alone[f"{kind} factor"]["weights"], alone[f"{kind} component"]["weights"]) > 1e-4


def refused() -> list[str]:
    """Columns are not rows, and of two meshes none is the one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    said = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placements in ([Shard(1)], [Shard(0)]):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, placements))
        try:
            gr.Radius().attach(model)
        except gr.errors.GuardError as error:
            said.append(str(error))
    return said


def test_other_ways_to_spread_tensors_are_refused():
    for columns, mixed in on_ranks(refused, 2):
        assert "0.weight is spread over ranks as" in columns
        assert "rows can be" in columns
        assert "spread over ranks in 2 ways" in mixed
