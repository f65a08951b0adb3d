"""L2-SP, FTP, TPGM and SPD on several processes are those of one: the same weights, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_helpers import Net, farthest, loss_of, on_ranks, share, weights
from distributed_helpers import batch as global_batch
from distributed_training import wrapped
from torch import Tensor

from growthring.guards import FTP, L2SP, SPD, TPGM

CASES: dict[str, Any] = {
    "ftp-rows": lambda: FTP(1e-2, exclude=None),
    "ftp-tensor": lambda: FTP(1e-2, norm="tensor", exclude=None),
    "spd": lambda: SPD(exclude=None),
    "l2-sp": lambda: L2SP(0.05, exclude=None),
    "l2-sp-gradient": lambda: L2SP(0.05, exclude=None),
    "tpgm": lambda: TPGM(4, mu=3e-3, exclude=None),
}


class Scored(Net):
    """Returns its loss when it is given labels."""

    def __init__(self) -> None:
        super().__init__(torch.float64)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(x)
        return out if labels is None else {"loss": (out + labels).square().mean()}


def train(case: str, wrap: str) -> dict[str, Any]:
    """Twelve steps, a state that is put down and taken up again after six of them, and the end of the task."""
    scored = Scored()
    model, _ = wrapped(scored, wrap) if wrap else (scored, None)
    guard = CASES[case]()
    guard.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for step in range(12):
        if step == 6:
            state, guard = guard.state_dict(), CASES[case]()
            guard.attach(model)
            guard.load_state_dict(state)
        optimizer.zero_grad()
        loss = loss_of(model, step, torch.float64) * (1 if step < 8 else -0.3)
        if case == "l2-sp":
            loss = loss + guard.loss(None, {})
        loss.backward()
        if case == "l2-sp-gradient":
            guard.add_gradient()
        guard.before_step()
        optimizer.step()
        guard.after_step()
    x, y = global_batch(99, torch.float64)
    certificate = guard.end_task("one", [{"x": share(x), "labels": share(y)}])
    told = {one.name: one.frobenius for one in certificate.deviations}
    return {"weights": weights(scored), "told": told, "kept": certificate.kept is not False}


def all_of(wrap: str) -> dict[str, Any]:
    return {case: train(case, wrap) for case in CASES}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return all_of("")


@pytest.mark.parametrize(("ranks", "wrap"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_several_processes_train_what_one_does(ranks, wrap, one_process):
    for found in on_ranks(all_of, ranks, wrap):
        for case in CASES:
            assert farthest(found[case]["weights"], one_process[case]["weights"]) < 1e-10, case
            assert found[case]["told"] == pytest.approx(one_process[case]["told"], rel=1e-8, abs=1e-10)
            assert found[case]["kept"]


def test_the_cases_differ(one_process):
    """Negative control: each rule does something, so that equal weights say something."""
    names = [name for name in CASES if name != "l2-sp-gradient"]
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            assert farthest(one_process[one]["weights"], one_process[two]["weights"]) > 1e-4
    assert farthest(one_process["l2-sp"]["weights"], one_process["l2-sp-gradient"]["weights"]) < 1e-12
