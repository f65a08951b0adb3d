"""The fast guard beside the slow twin, weight by weight, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from guard_helpers import OPTIMIZERS, default_loss, lora_mlp, mlp, rows, trainable
from reference_pegp import ReferencePEGP
from torch import Tensor, nn

from growthring.guards import PEGP

LINEAR = ("0", "2", "4")


def linear_features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        first = model[1](model[0](x))
        return {"0.weight": x, "2.weight": first, "4.weight": model[3](model[2](first))}


def lora_features(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Written out from the forward pass: h = W x + b + s B A x, layer by layer."""
    found: dict[str, Tensor] = {}
    root = model.base_model.model
    with torch.no_grad():
        for index, activation in ((0, root[1]), (2, root[3]), (4, None)):
            layer = root[index]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            name = f"base_model.model.{index}"
            found[f"{name}.lora_A.default.weight"] = x
            found[f"{name}.lora_B.default.weight"] = x @ a.T
            x = x @ layer.base_layer.weight.T + layer.base_layer.bias + layer.scaling["default"] * (x @ a.T) @ b.T
            x = x if activation is None else activation(x)
    return found


@pytest.mark.parametrize("kind", ["linear", "lora"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adafactor"])
@pytest.mark.parametrize("energy", [1.0, 0.8])
def test_three_tasks_beside_the_twin(kind: str, optimizer: str, energy: float) -> None:
    fast = mlp(torch.float64, bias=False) if kind == "linear" else lora_mlp(torch.float64)
    slow = copy.deepcopy(fast)
    features = linear_features if kind == "linear" else lora_features
    guard = PEGP(energy)
    guard.attach(fast)
    twin = ReferencePEGP({n: p for n, p in slow.named_parameters() if p.requires_grad})
    for task in range(3):
        x = rows(3, 20, seed=task, dtype=torch.float64)
        guard.begin_task()
        twin.begin()
        ours = OPTIMIZERS[optimizer](trainable(fast))
        theirs = OPTIMIZERS[optimizer](list(twin.weights.values()))
        moved = 0.0
        for _ in range(25):
            for model, opt, keeper in ((fast, ours, guard), (slow, theirs, twin)):
                opt.zero_grad()
                default_loss(model, x).backward()
                keeper.before_step()
                opt.step()
                keeper.after_step()
            for (name, a), (_, b) in zip(fast.named_parameters(), slow.named_parameters(), strict=True):
                # below 0.999 the features' products are float32, so the chosen directions agree to 1e-7
                limit = 1e-11 if energy == 1.0 else 1e-6
                torch.testing.assert_close(a, b, rtol=limit, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(float((w - twin.anchor[n]).detach().norm()) for n, w in twin.weights.items())
        assert moved > 1e-3
        certificate = guard.end_task(None, [x])
        twin.remember(features(slow, x), dict.fromkeys(twin.weights, energy))
        assert {s.name: s.rank for s in certificate.sites} == {n: u.shape[1] for n, u in twin.basis.items()}


def test_the_twin_itself_forgets_without_its_update_projection() -> None:
    """The comparison above has teeth: leaving the second line out makes the two differ."""
    fast, x = mlp(torch.float64, bias=False), rows(3, 20, 0, torch.float64)
    slow = copy.deepcopy(fast)
    guard = PEGP(1.0)
    guard.consolidate(fast, [x])
    guard.begin_task()
    twin = ReferencePEGP(dict(slow.named_parameters()))
    twin.remember(linear_features(slow, x), dict.fromkeys(twin.weights, 1.0))
    twin.begin()
    for model, keeper in ((fast, guard), (slow, twin)):
        opt = OPTIMIZERS["adam"](trainable(model))
        for _ in range(5):
            opt.zero_grad()
            default_loss(model, rows(3, 20, 1, torch.float64)).backward()
            keeper.before_step()
            opt.step()
            if keeper is guard:
                keeper.after_step()
    assert float((fast[0].weight - slow[0].weight).detach().abs().max()) > 1e-3


def test_one_basis_is_shared_and_takes_the_highest_threshold() -> None:
    """Sites of one input keep the basis that the most demanding of them asks for."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(12, 4, bias=False), nn.Linear(12, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], -1)

    model = Two()
    x = rows(30, 12, 3) * torch.linspace(3.0, 0.1, 12)
    guard = PEGP(0.9)
    certificate = guard.consolidate(model, [x])
    assert {s.rank for s in certificate.sites} == {certificate.sites[0].rank}
    assert len(guard.state_dict()["memory"]["spaces"]) == 1
    sigma = torch.linalg.svdvals(x.double()).square()
    expected = int((sigma.cumsum(0) / sigma.sum() < 0.9).sum()) + 1
    assert certificate.sites[0].rank == expected
    assert certificate.energy >= 0.9
