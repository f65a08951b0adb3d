"""The page: one HTML file that holds everything it needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from growthring._io import write_text

from . import _format as fmt
from ._results import Results, as_list
from ._view import page_view
from .figures import to_json

__all__ = ["environment", "plotly", "render_report", "write_report"]


def write_report(results: Sequence[Results] | Results, path: str | Path) -> Path:
    """Write the page to a file, atomically.

    The file works from disk and reaches for nothing on the network (a content security policy in it forbids that).
    Everything that came from data is escaped.

    Args:
        results: The contents of one ``results.json``, or of several to compare methods.
        path: Where to write, usually ``report.html``.

    Returns:
        The path written.

    Raises:
        ConfigError: When there are no results.
        DataError: When one of them lacks a key or holds an impossible matrix.
    """
    return write_text(path, render_report(results))


def render_report(results: Sequence[Results] | Results) -> str:
    """The page as text; see :func:`write_report`."""
    view, figures = page_view(as_list(results))
    return (
        environment()
        .get_template("template.html.j2")
        .render(**view, figure_data=Markup(to_json(figures)), plotly=Markup(plotly()))
    )


@cache
def plotly() -> str:
    """The source of plotly, fit to stand inside a ``<script>`` element."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


@cache
def environment() -> Environment:
    """Where templates are found, and how they show numbers."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=fmt.percent, points=fmt.points, small=fmt.small, duration=fmt.duration)
    return environment
