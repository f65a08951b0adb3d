"""Gradients with a clear spectrum, small models, and short ways to step an optimizer in tests of ``optim``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RULES = ("adam", "momentum", "adafactor", "shared")
SIDES = ("right", "left", "two-sided")
# Both axes of two-sided coordinates are rank axes, which "shared" refuses; a test of bad input asserts the message.
PAIRS = [(rule, side) for rule in RULES for side in SIDES if (rule, side) != ("shared", "two-sided")]


def orthonormal(rows: int, columns: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    """Random orthonormal columns ``(rows, columns)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0].to(dtype)


def spectrum_gradients(shape, steps: int, *, seed: int = 0, dtype=torch.float64, drift: float = 0.15) -> list[Tensor]:
    """``steps`` matrices with singular values near ``0.8^i`` and slowly turning bases plus a little noise."""
    m, n = shape
    k = min(m, n)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    left, right = normal(m, k), normal(n, k)
    values = 0.8 ** torch.arange(k, dtype=torch.float64)
    series = []
    for _ in range(steps):
        left = left + drift * normal(m, k)
        right = right + drift * normal(n, k)
        u, v = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
        series.append(((u * values) @ v.T * (1 + 0.1 * normal(1)) + 1e-3 * normal(m, n)).to(dtype))
    return series


def parameters(shapes, *, seed: int = 0, dtype=torch.float64, size: float = 1.0) -> list[nn.Parameter]:
    """Normal weights of standard deviation ``size``; small ones where the rounding of the weights would show."""
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter((size * torch.randn(tuple(s), generator=generator, dtype=torch.float64)).to(dtype))
        for s in shapes
    ]


def matrix(m=12, n=8, dtype=torch.float32, seed=0) -> nn.Parameter:
    """One normal float32 weight."""
    return nn.Parameter(torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(shape, steps, seed=0) -> list[Tensor]:
    """Normal float32 gradients, without any structure."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def run(optimizer, params, series) -> None:
    """Step through ``series[parameter][step]`` (``None``: no gradient in that step)."""
    for gradients in zip(*series, strict=True):
        for p, g in zip(params, gradients, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def snapshot(params) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def states(optimizer) -> list[tuple[str, Tensor]]:
    """Every tensor of the optimizer's state, named, in a fixed order."""
    found = []
    for number, entry in sorted(optimizer.state_dict()["state"].items()):
        found += [(f"{number}.{key}", value) for key, value in sorted(entry.items())]
    return found


def assert_same_state(one, two) -> None:
    a, b = states(one), states(two)
    assert [k for k, _ in a] == [k for k, _ in b]
    for (key, x), (_, y) in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype, key
            assert torch.equal(x, y), key
        else:
            assert x == y, key


def tiny_net(seed: int = 0, dtype=torch.float32) -> nn.Sequential:
    """Two linear layers with biases around a norm: 2-D and 1-D parameters, m > n, m < n."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 5)).to(dtype)


def tiny_batch(rows: int, seed: int = 0, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=generator).to(dtype), torch.randint(0, 5, (rows,), generator=generator)


def train(model, optimizer, steps: int, *, start: int = 0, rows: int = 16) -> list[float]:
    """``steps`` plain steps; step ``k`` always sees the same batch."""
    losses = []
    for k in range(start, start + steps):
        x, y = tiny_batch(rows, seed=k, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
