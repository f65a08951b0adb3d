"""The reference of a stream: what the untouched model can do, which is guarded and measured but never trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from growthring.errors import ConfigError
from growthring.evaluation import AccuracyMatrix, accuracy, average, confusion, last, transfer
from growthring.guards import PEGP, Certificate, Guard
from growthring.guards.batches import evaluating
from growthring.streams import TaskStream

from .building import Built, candidates_of_reference
from .data import balanced_batches, evaluation_batches, inputs_of
from .logs import Bars, RunLog

__all__ = ["Reference", "zero_shot_figures"]


def zero_shot_figures(matrix: AccuracyMatrix) -> dict[str, float | None] | None:
    """Transfer, Avg and Last of MTIL: what is left of the zero-shot ability, and what is learned."""
    if not len(matrix):
        return None
    return {"transfer": transfer(matrix), "average": average(matrix), "last": last(matrix)}


class Reference:
    """Guards and scores the reference of a stream.

    Args:
        stream: A stream with or without a reference; without one, nothing is done.
        built: The model and the encoded reference.
        guards: The guards.
        batch_size: Examples at once when scoring.

    Raises:
        ConfigError: If a guard chooses its energy on the second task: with a reference it guards the first one too.
    """

    def __init__(self, stream: TaskStream, built: Built, guards: list[Guard], batch_size: int) -> None:
        self._splits, self._model, self._collate = built.reference, built.model, built.collate
        self._candidates, self._guards, self._batch_size = candidates_of_reference(stream), guards, batch_size
        self.accuracies: list[float] = []
        """Accuracy on the reference's test rows, among its own classes; one for each row of the matrix."""
        if self._splits is not None and any(isinstance(g, PEGP) and g.energy == "auto" for g in guards):
            raise ConfigError(
                "energy='auto' is chosen between the first task and the second, and a stream with a reference is "
                "guarded from the first task on; give a number"
            )

    def protect(self, seed: int, log: RunLog, bars: Bars) -> list[Certificate]:
        """Before the first task: let every attached guard learn what must be kept of the reference.

        Args:
            seed: Chooses the training rows that guards are shown.
            log: The run's log.
            bars: Progress bars.

        Returns:
            One certificate for each guard.
        """
        if self._splits is None:
            return []
        certificates = []
        for guard in self._guards:
            bars.task("reference: consolidating", None)
            samples = getattr(guard, "samples", 256)
            batches = balanced_batches(self._splits["train"], samples, 32, self._collate, seed)
            certificate = guard.end_task("reference", batches)
            said = {k: v for k, v in certificate.to_dict().items() if k not in ("sites", "deviations")}
            log.write("certificate", **said)
            certificates.append(certificate)
        return certificates

    def score(self, log: RunLog) -> None:
        """Append the accuracy of the model as it is now, and write it to the log."""
        if self._splits is None:
            return
        data, device = self._splits["test"], self._model.allowed.device
        among = torch.tensor(self._candidates, device=device)
        predicted = torch.zeros(len(data), dtype=torch.long)
        with evaluating(self._model):
            for rows, batch in evaluation_batches(data, self._batch_size, self._collate):
                scores: Tensor = self._model.logits(self._model.embed(**inputs_of(batch, device)))
                predicted[rows] = among[scores[:, among].argmax(-1)].cpu()
        first = self._candidates[0]
        true, found = [y - first for y in data.labels], [y - first for y in predicted.tolist()]
        self.accuracies.append(accuracy(confusion(true, found, len(self._candidates))))
        log.write("reference", accuracy=self.accuracies[-1])
