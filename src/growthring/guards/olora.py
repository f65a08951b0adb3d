"""O-LoRA: the new branch is pushed to read other directions than the earlier branches.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023,
arXiv 2310.14152. Every task trains a LoRA pair of its own with

    loss = task loss + weight * sum over layers and earlier tasks i of | A_i A_t^T |,

the sum of absolute values of the entries (the released code, behind the published figures) or of their squares (the
paper's equation). ``A`` is PEFT's ``lora_A``, the factor that sees the input.

It is about weights, not about inputs: nothing keeps ``B_t A_t x`` from being large for an old input ``x``, and the
penalty is weighed against the loss. So there is no promise to keep: the certificate says how much overlap is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from growthring.errors import ConfigError, nearest
from growthring.subspace import Subspace

from .base import Certificate, GuardCallback, SiteCertificate
from .branch_guard import BranchGuard
from .branches import Branches
from .penalty import PenaltyCallback, add_gradient
from .plan import HOLE, Treatment

__all__ = ["OLoRA"]

NORMS = ("l1", "squared")


class OLoRA(BranchGuard):
    """Gives every task a LoRA branch and penalises its overlap with the branches of earlier tasks.

    The model must be a ``PeftModel`` with plain LoRA on linear layers. For every task call :meth:`prepare` before the
    optimizer is made; :class:`~growthring.ContinualTrainer` does. A branch that the model brings along counts as an
    earlier task. In a plain ``transformers.Trainer``, whose callbacks cannot add to the loss, ``guard.callback()``
    adds the penalty's gradient right before the step instead, after clipping.

    Args:
        weight: ``lambda_1`` of the paper, at least 0; published values are 0.5 to 5. Default 0.5.
        norm: ``"l1"`` (default; the released code) or ``"squared"`` (the paper's equation).

    Raises:
        ConfigError: On a negative weight or another norm.

    Example:
        ```python
        guard = gr.OLoRA(weight=0.5)
        guard.attach(model)
        for name, loader in tasks.items():
            guard.prepare(name, loader)
            Trainer(model, args, train_dataset=loader.dataset, callbacks=[guard.callback()]).train()
            guard.end_task(name, loader)
        ```
    """

    name = "o-lora"
    plans: Mapping[str, tuple[Treatment, str, str, str]] = {
        "A": ("free", "", "a loss term pushes its rows away from those of earlier branches, no condition does", HOLE),
        "B": ("free", "", "nothing keeps it", HOLE),
    }

    def __init__(self, weight: float = 0.5, *, norm: str = "l1") -> None:
        super().__init__()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < float("inf"):
            raise ConfigError(f"OLoRA(weight={weight!r}): must be a number, at least 0")
        if norm not in NORMS:
            raise ConfigError(f"OLoRA(norm={norm!r}): {nearest(str(norm), NORMS)}")
        self.weight, self.norm = float(weight), norm
        self._old: list[tuple[list[str], Tensor]] = []  # layers of one shape, and their earlier rows stacked

    # --- the contract -------------------------------------------------------------------------------------------

    def begin_task(self, task: str | None = None) -> None:
        """See to it that all branches are active, and stack the rows of the earlier ones."""
        super().begin_task(task)
        self._stack(self._attached())

    def penalty(self) -> Tensor:
        """Overlap of the current branch with the earlier ones, without its weight; 0 for the first task."""
        branches, total = self._attached(), torch.zeros(())
        for layers, old in self._old:
            new = torch.stack([branches.layers[name].lora_A[self.current].weight for name in layers])
            with torch.autocast(new.device.type, enabled=False):
                entries = old.to(new.device) @ new.to(old.dtype).mT
                part = entries.abs().sum() if self.norm == "l1" else entries.square().sum()
            total = total.to(part.device) + part
        return total

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor | None:
        """``weight * penalty()``; ``None`` while there is no earlier branch. It does not depend on the arguments."""
        return self.weight * self.penalty() if self._old and self.current else None

    def add_gradient(self) -> None:
        """Add the gradient of :meth:`loss` to what a backward pass left: for loops that cannot add to the loss."""
        term = self.loss(None, {})
        if term is None:
            return
        branches = self._attached()
        new = [branches.layers[name].lora_A[self.current].weight for layers, _ in self._old for name in layers]
        add_gradient(term, new)

    def callback(self, *, loss_added: bool = False) -> GuardCallback:
        """A ``TrainerCallback``.

        Args:
            loss_added: The Trainer adds :meth:`loss` to its own. Otherwise (default) the callback adds the gradient
                before every step, after clipping.
        """
        return (GuardCallback if loss_added else PenaltyCallback)(self, loss_added=True)

    def end_task(self, task: str | None, batches: Iterable[Any]) -> Certificate:
        """Measure the overlap that is left; ``batches`` are not read, since nothing of the data is kept.

        Returns:
            A certificate without a verdict (``leak`` and ``kept`` are ``None``, ``energy`` is 0: no input is
            protected). The ``leak`` of a site is the share of its update ``B_t A_t`` in the row space of the earlier
            ``A``; the notes have the penalty.
        """
        branches = self._attached()
        index, branch = len(self.tasks), self.current
        task = task or f"task-{index + 1}"
        earlier = self._earlier(branches)
        notes: list[str] = []
        sites: list[SiteCertificate] = []
        entries = total = 0.0
        for layer, f in branches.factors(branch) if branch else ():
            rows, leak = f.a.detach().double(), None
            if layer in earlier:
                old = earlier[layer].double()
                leak = _span(old).share(f.update().to(old.device))
                overlap = (old @ rows.to(old.device).mT).abs()
                entries, total = entries + overlap.numel(), total + float(overlap.sum())
                rows = torch.cat([old, rows.to(old.device)])
            rank = _span(rows).rank
            dim = rows.shape[1]
            name = f"{layer}.lora_A.{branch}.weight"
            sites.append(SiteCertificate(name, "lora_A", dim, rank, dim - rank, 0.0, 0.0, leak, None))
        shares = [s.leak for s in sites if s.leak is not None]
        if shares:
            notes.append(
                "O-LoRA promises nothing exactly: the share of an update in the row space of earlier branches is "
                f"{max(shares):.2g} at most, {sum(shares) / len(shares):.2g} on average; the entries of |A_i A_t^T| "
                f"sum to {total:.3g} ({total / entries:.2g} each)"
            )
        if index and (outside := self._outside()):
            notes.append(f"{len(outside)} tensors outside the branches trained too (the first: {outside[0]})")
        self._finish(task, notes)
        self._old = []
        return Certificate(
            guard=self.name,
            task=task,
            task_index=index,
            protected_tasks=index,
            leak=None,
            kept=None,
            energy=0.0,
            free=sum(s.free for s in sites),
            dims=sum(s.dim for s in sites),
            output_change=None,
            probes=0,
            held=0,
            sites=tuple(sites),
            notes=tuple(notes),
        )

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {"weight": self.weight, "norm": self.norm}

    # --- inside -------------------------------------------------------------------------------------------------

    def _design(self, branches: Branches, batches: Iterable[Any]) -> None:
        """PEFT's own start."""
        self._stack(branches)

    def _stack(self, branches: Branches) -> None:
        current = dict(branches.factors(self.current))
        alike: dict[tuple[int, ...], list[tuple[str, Tensor]]] = defaultdict(list)
        for layer, rows in self._earlier(branches).items():
            if layer in current:
                alike[(*rows.shape, *current[layer].a.shape)].append((layer, rows))
        self._old = [([n for n, _ in group], torch.stack([rows for _, rows in group])) for group in alike.values()]

    def _earlier(self, branches: Branches) -> dict[str, Tensor]:
        """Rows ``A`` of all earlier branches by layer, ``(sum of ranks, d)``, float32 or wider, detached."""
        rows: dict[str, list[Tensor]] = defaultdict(list)
        for name in self._frozen():
            for layer, f in branches.factors(name):
                rows[layer].append(f.a.detach().to(torch.promote_types(f.a.dtype, torch.float32)))
        return {layer: torch.cat(parts) for layer, parts in rows.items()}


def _span(rows: Tensor) -> Subspace:
    """The row space of a matrix."""
    space = Subspace(rows.shape[1], dtype=torch.float64, device=rows.device)
    if bool(rows.any()):
        space.grow(rows, energy=1.0)
    return space
