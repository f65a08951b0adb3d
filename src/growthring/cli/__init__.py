"""The command line: ``growthring demo``, ``run``, ``methods``, ``report``, ``schema``."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
