"""Named methods as data, the schema of a run, and what builds a run from it."""

from __future__ import annotations

from ._method import Method
from .config import RunConfig, config_schema, load_config, parse_config
from .demo import demo_runs
from .methods import METHODS, get_method
from .presets import GorpPreset, gorp_preset
from .runner import build, build_stream, run
from .sites import explain_sites, group_sites, sites_line

__all__ = [
    "METHODS",
    "GorpPreset",
    "Method",
    "RunConfig",
    "build",
    "build_stream",
    "config_schema",
    "demo_runs",
    "explain_sites",
    "get_method",
    "gorp_preset",
    "group_sites",
    "load_config",
    "parse_config",
    "run",
    "sites_line",
]
