"""Numbers as readers see them. ``None`` and NaN are an em dash everywhere."""

from __future__ import annotations

import math

DASH = "\N{EM DASH}"
MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def missing(value: float | None) -> bool:
    """Whether there is no number to show."""
    return value is None or not math.isfinite(value)


def percent(fraction: float | None) -> str:
    """A fraction as percent with one decimal, without the sign: ``0.7833`` is ``78.3``."""
    return DASH if fraction is None or missing(fraction) else f"{_round(100 * fraction):.1f}"


def points(fraction: float | None) -> str:
    """A difference of fractions in percentage points, signed: ``-0.1`` is ``-10.0`` (with a true minus sign)."""
    if fraction is None or missing(fraction):
        return DASH
    value = _round(100 * fraction)
    return f"{value:+.1f}".replace("-", MINUS) if value else "0.0"


def small(value: float | None) -> str:
    """A number of any size in two significant digits: ``3.2e-07`` is ``3.2 x 10^-7`` in typographic form."""
    if value is None or missing(value):
        return DASH
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}\u00d710{str(int(exponent)).translate(_SUPERSCRIPT)}"


def duration(seconds: float | None) -> str:
    """Seconds as ``8.3 s``, ``2 min 05 s`` or ``1 h 02 min``."""
    if seconds is None or missing(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def shorten(text: str, limit: int) -> str:
    """``text`` cut to ``limit`` characters with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "\u2026"


def _round(value: float) -> float:
    return round(value, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
