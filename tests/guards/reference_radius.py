"""Radius and Directional as their equations say, one ball after the other, with dense deviations, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 1e-3


@dataclass
class Ball:
    """Members are ``(parameter, start, index)``; of a product ``dense`` gives ``D``, and the member is scaled."""

    name: str
    members: list[tuple[nn.Parameter, Tensor, Any]]
    dense: Callable[[], Tensor] | None = None
    unit: float = 1.0
    gamma: float = 0.0
    m: float = 0.0
    v: float = 0.0
    k: int = 0
    started: bool = False
    before: list[Tensor] = field(default_factory=list)
    h: float = 0.0

    def moved(self) -> list[Tensor]:
        return [(p.detach() - start)[index] for p, start, index in self.members]

    def whole(self) -> Tensor:
        """Everything whose norm is the ball's size."""
        if self.dense is not None:
            return self.dense().detach().clone()
        return torch.cat([part.flatten() for part in self.moved()])


class RadiusReference:
    def __init__(self, balls: list[Ball], *, mu=0.1, kappa=1.0, unit="step", first=0.5, betas=(0.9, 0.999)) -> None:
        self.balls, self.mu, self.kappa, self.unit, self.first, self.betas = balls, mu, kappa, unit, first, betas

    def before_step(self) -> None:
        for ball in self.balls:
            ball.before = [ball.whole()]
            n = float(ball.before[0].norm())
            dot = sum(float((p.grad[index] * (p.detach() - start)[index]).sum()) for p, start, index in ball.members)
            ball.h = dot / n if n > 0 else 0.0

    def after_step(self) -> None:
        for ball in self.balls:
            c = ball.whole()
            n, step, old = float(c.norm()), float((c - ball.before[0]).norm()), float(ball.before[0].norm())
            if step == 0.0:
                continue
            if not ball.started:
                ball.gamma = old + self.first * (n - old) if n > old else n
            else:
                h = self.kappa * ball.h if ball.h > 0 else ball.h
                b1, b2 = self.betas
                ball.k += 1
                ball.m, ball.v = b1 * ball.m + (1 - b1) * h, b2 * ball.v + (1 - b2) * h * h
                direction = ball.m / (1 - b1**ball.k) / (math.sqrt(ball.v / (1 - b2**ball.k)) + 1e-30)
                unit = {"step": step, "absolute": 1.0, "anchor": ball.unit}[self.unit]
                ball.gamma = min(max(ball.gamma - self.mu * unit * direction, FLOOR * n), n)
            ball.started = True
            ratio = min(1.0, ball.gamma / n)
            for p, start, index in ball.members:
                with torch.no_grad():
                    p[index] = start[index] + ratio * (p - start)[index]


def balls_of(model: nn.Module, granularity: str) -> list[Ball]:
    """The balls of a net of deviation_helpers, found by hand."""
    found: list[Ball] = []
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "largo_B") or hasattr(m, "lora_B")]
    if not layers:
        return _plain(model, granularity)
    for name, layer in layers:
        s, label = layer.scaling["default"], f"{name}.default"
        if hasattr(layer, "lora_B") or layer.largo_form["default"] == "product":
            largo = hasattr(layer, "largo_B")
            b = (layer.largo_B if largo else layer.lora_B)["default"].weight
            a = layer.largo_A0["default"] if largo else layer.lora_A["default"].weight
            unit = float(layer.get_base_layer().weight.norm())
            zero = torch.zeros_like(b)
            if granularity == "component":
                for i in range(b.shape[1]):
                    index = (slice(None), slice(i, i + 1))
                    dense = lambda b=b, a=a, i=i, s=s: s * b[:, i : i + 1] @ a[i : i + 1]  # noqa: E731
                    found.append(Ball(f"{label}[{i}]", [(b, zero, index)], dense, unit))
            else:
                found.append(Ball(label, [(b, zero, ...)], lambda b=b, a=a, s=s: s * b @ a, unit))
            continue
        a, b = layer.largo_A["default"].weight, layer.largo_B["default"].weight
        a0, b0 = layer.largo_A0["default"], layer.largo_B0["default"]
        za, zb = torch.zeros_like(a), torch.zeros_like(b)
        if granularity == "component":
            for i in range(a.shape[0]):
                column = (slice(None), i)
                unit = math.hypot(float(a0[i].norm()), float(b0[:, i].norm()))
                found.append(Ball(f"{label}[{i}]", [(a, za, (i,)), (b, zb, column)], unit=unit))
        elif granularity == "layer":
            unit = math.hypot(float(a0.norm()), float(b0.norm()))
            found.append(Ball(label, [(a, za, ...), (b, zb, ...)], unit=unit))
        else:
            found.append(Ball(f"{name}.largo_A.default.weight", [(a, za, ...)], unit=float(a0.norm())))
            found.append(Ball(f"{name}.largo_B.default.weight", [(b, zb, ...)], unit=float(b0.norm())))
    return found


def _plain(model: nn.Module, granularity: str) -> list[Ball]:
    found: dict[str, Ball] = {}
    for name, p in model.named_parameters():
        start = p.detach().clone()
        if granularity == "component" and p.ndim > 1:
            for i in range(len(p)):
                found[f"{name}[{i}]"] = Ball(f"{name}[{i}]", [(p, start, (i,))], unit=float(start[i].norm()))
            continue
        label = name.rpartition(".")[0] if granularity == "layer" else name
        ball = found.setdefault(label, Ball(label, [], unit=0.0))
        ball.members.append((p, start, ...))
        ball.unit = math.hypot(ball.unit, float(start.norm()))
    return list(found.values())


class DirectionalReference:
    """One tensor after another."""

    def __init__(
        self, parameters: list[nn.Parameter], starts: list[Tensor], lr: float, mu: float, weight: float
    ) -> None:
        self.rows: list[dict[str, Any]] = [
            {"p": p, "start": s, "omega": 0.0, "m": 0.0, "v": 0.0, "k": 0}
            for p, s in zip(parameters, starts, strict=True)
        ]
        self.lr, self.mu, self.weight = lr, mu, weight

    def before_step(self) -> None:
        for row in self.rows:
            p = row["p"]
            c, g = p.detach() - row["start"], p.grad
            if row.get("corr") is not None:
                h = self.lr * float(((g + self.weight * c) * row["corr"]).sum())
                row["k"] += 1
                row["m"], row["v"] = 0.9 * row["m"] + 0.1 * h, 0.999 * row["v"] + 0.001 * h * h
                direction = row["m"] / (1 - 0.9 ** row["k"]) / (math.sqrt(row["v"] / (1 - 0.999 ** row["k"])) + 1e-30)
                row["omega"] = min(max(row["omega"] - self.mu * direction, 0.0), 1.0)
            d, size = float((g * c).sum()), float((c * c).sum())
            row["corr"] = d / size * c if d < 0 and size > 0 else None
            if row["corr"] is not None:
                g.sub_(row["omega"] * row["corr"])
            g.add_(self.weight * c)

    def after_step(self) -> None:
        pass
