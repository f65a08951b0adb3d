"""Errors that say what came in, what is allowed, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "DataError", "GrowthringError", "GuardError", "NumericalError", "nearest"]


class GrowthringError(Exception):
    """Base of every error that growthring raises on purpose; the command line prints it without a traceback."""


class ConfigError(GrowthringError, ValueError):
    """A setting is wrong: unknown name, wrong type, impossible value."""


class DataError(GrowthringError, ValueError):
    """The data of a task cannot be used; the message names the task, the row and the fix."""


class GuardError(GrowthringError, RuntimeError):
    """A guard cannot give its guarantee: no sites, nothing trainable, a torn memory."""


def nearest(name: str, allowed: Iterable[str], limit: int = 3) -> str:
    """Say what would have been accepted in place of ``name``.

    Args:
        name: What came in.
        allowed: Every accepted name.
        limit: How many near names to offer.

    Returns:
        ``"did you mean 'x'?"`` when something is close, else the list of allowed names.
    """
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "allowed: " + ", ".join(options) if options else "nothing is allowed here"


class NumericalError(GrowthringError, ArithmeticError):
    """Numbers that no subspace can be made of: NaN, infinity, a matrix of zeros."""
