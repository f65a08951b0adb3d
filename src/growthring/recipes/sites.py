"""The site report: what happens to every trainable tensor, said before training starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growthring.trainer import ContinualTrainer

__all__ = ["TREATMENTS", "explain_sites", "group_sites", "sites_line"]

TREATMENTS = ("protected", "held", "frozen", "free")
"""What can happen to a tensor; see :class:`growthring.guards.TensorPlan`."""


def explain_sites(trainer: ContinualTrainer) -> list[dict[str, Any]]:
    """What each guard of a trainer will do with every trainable tensor; nothing is trained.

    Args:
        trainer: As :func:`build` makes it, before :meth:`~growthring.ContinualTrainer.fit`.

    Returns:
        One entry for each guard and tensor, as :class:`growthring.guards.TensorPlan` says it, with ``guard``; without
        guards one entry for each tensor, all of them free.

    Raises:
        GuardError: A guard finds nothing to protect.
    """
    from growthring.guards.plan import HOLE
    from growthring.trainer.guarding import explain

    members = range(len(trainer.stream)) if trainer.joint else (0,)
    trainer.model.head.begin([c for i in members for c in trainer.stream.class_ids(i)])
    for guard in trainer.guards:
        guard.attach(trainer.model)
    rows = explain(trainer.model, trainer.guards)
    if rows or trainer.guards:
        return rows
    why = "all tasks are trained on at once" if trainer.joint else "the method has no guard"
    cost = "" if trainer.joint else HOLE
    return [
        {
            "guard": None, "name": name, "shape": list(parameter.shape), "treatment": "free", "kinds": [],
            "condition": "", "why": why, "cost": cost,
        }
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    ]  # fmt: skip


def group_sites(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in nothing but a number in the tensor's name, as one.

    Args:
        rows: As :func:`explain_sites` gives them, or :meth:`growthring.ContinualTrainer.explain_optimizer`.

    Returns:
        Entries in the order of the rows, with ``pattern`` (numbers as ``*``) and ``count`` in place of ``name``.
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", str(row["name"]))
        same = {key: value for key, value in row.items() if key != "name"}
        found = groups.setdefault((pattern, *map(repr, same.values())), {"pattern": pattern, "count": 0, **same})
        found["count"] += 1
    return list(groups.values())


def sites_line(rows: Iterable[Mapping[str, Any]]) -> str:
    """All of it in one line: how many tensors are protected, held, frozen and free."""
    rows = list(rows)
    if not rows:
        return "sites: the guard does not say what it does with each tensor"
    parts = []
    for guard in dict.fromkeys(row["guard"] for row in rows):
        mine = [row for row in rows if row["guard"] == guard]
        counts = {one: sum(row["treatment"] == one for row in mine) for one in TREATMENTS}
        told = [f"{count} {one}{_kinds(mine, one)}" for one, count in counts.items() if count]
        parts.append(f"{guard or 'no guard'}: {', '.join(told)}")
    tensors = len({row["name"] for row in rows})
    return f"sites of {tensors} trainable tensor{'s' if tensors > 1 else ''}: {'; '.join(parts)}"


def _kinds(rows: Iterable[Mapping[str, Any]], treatment: str) -> str:
    kinds = dict.fromkeys(kind for row in rows if row["treatment"] == treatment for kind in row["kinds"])
    return f" ({', '.join(kinds)})" if kinds else ""
