"""Tasks, streams of tasks, the sources they are read from, and the demo stream."""

from __future__ import annotations

from growthring.streams._splits import Examples
from growthring.streams.assets import ASSETS, Asset, asset_cache, fetch
from growthring.streams.demo import DEMO_ASSETS, demo_encoder_path, demo_stream
from growthring.streams.held_out import EvaluationSet
from growthring.streams.images import Images
from growthring.streams.stream import ClassEntry, Scenario, TaskStream
from growthring.streams.task import SPLITS, Task

__all__ = [
    "ASSETS",
    "DEMO_ASSETS",
    "SPLITS",
    "Asset",
    "ClassEntry",
    "EvaluationSet",
    "Examples",
    "Images",
    "Scenario",
    "Task",
    "TaskStream",
    "asset_cache",
    "demo_encoder_path",
    "demo_stream",
    "fetch",
]
