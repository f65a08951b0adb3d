"""Named methods as data, the schema of a run, and what builds a run from it."""

from __future__ import annotations

from .config import RunConfig, config_schema, load_config, parse_config
from .demo import demo_runs
from .methods import METHODS, Method, get_method
from .runner import build, build_stream, run

__all__ = [
    "METHODS",
    "Method",
    "RunConfig",
    "build",
    "build_stream",
    "config_schema",
    "demo_runs",
    "get_method",
    "load_config",
    "parse_config",
    "run",
]
