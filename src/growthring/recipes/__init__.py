"""Named methods as data, the schema of a run, and what builds a run from it."""

from __future__ import annotations

from ._method import Method
from .config import RunConfig, config_schema, load_config, parse_config
from .demo import demo_runs
from .methods import METHODS, get_method
from .presets import GorpPreset, gorp_preset
from .robust import run_robust
from .robust_config import RobustConfig, load_robust_config, parse_robust_config, robust_schema
from .runner import build, build_stream, run
from .sites import explain_sites, group_sites, sites_line

__all__ = [
    "METHODS",
    "GorpPreset",
    "Method",
    "RobustConfig",
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
    "load_robust_config",
    "parse_config",
    "parse_robust_config",
    "robust_schema",
    "run",
    "run_robust",
    "sites_line",
]
