"""The streams of the GORP quality benchmark.

================== ================= ========================================================================
stream             scenario          tasks
================== ================= ========================================================================
clinc10            class-incremental CLINC150: ten domains of 15 intents, 150 classes at the end
standard4          task              dbpedia, amazon reviews, AG news, SST-2, each with its own classes
standard4-reversed task              the same from the last to the first
================== ================= ========================================================================

``clinc10`` is read in two ways, with all classes seen so far competing and with the task given; settings are chosen
by the first. Settings of ``standard4-reversed`` are those that were chosen on ``standard4``.
"""

from __future__ import annotations

from collections.abc import Mapping

import pegp_streams
from _runs import Size
from growthring.streams import TaskStream
from pegp_streams import Sources

SIZES: Mapping[str, Size] = {
    "clinc10": Size(600, 150, 150, 1, 32, 24),
    "standard4": Size(240, 100, 100, 1, 16, 48),
    "standard4-reversed": Size(240, 100, 100, 1, 16, 48),
}
VIEWS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "clinc10": (("head", "classes seen"), ("head", "task")),
    "standard4": (("head", "task"),),
    "standard4-reversed": (("head", "task"),),
}
"""Classifier, and what it is told; the first is the one that settings are chosen by."""
CHOSEN_ON: Mapping[str, str] = {"standard4-reversed": "standard4"}
"""Streams that take the settings of another."""
SEARCH_TASKS: Mapping[str, int] = {"clinc10": 5}
"""Tasks that the search trains on, the first ones, where these are not all."""
DOMAINS = (
    *pegp_streams.DOMAINS,
    "credit_cards",
    "meta",
    "home",
    "auto_and_commute",
    "kitchen_and_dining",
)
"""In the order of the published file."""


def build(name: str, seed: int, sources: Sources, search: bool) -> TaskStream:
    """One stream, with the rows that ``seed`` draws; for a search, of some streams only the first tasks."""
    size = SIZES[name]
    if name == "clinc10":
        tasks, scenario = pegp_streams.clinc(sources, DOMAINS), "class"
    else:
        tasks, scenario = pegp_streams.standard(sources), "task"
        tasks = tasks[::-1] if name == "standard4-reversed" else tasks
    tasks = tasks[: SEARCH_TASKS.get(name)] if search else tasks
    drawn = [t.limit(train=size.train, validation=size.validation, test=size.test, seed=seed) for t in tasks]
    return TaskStream(drawn, scenario=scenario, seed=seed, name=name)  # type: ignore[arg-type]
