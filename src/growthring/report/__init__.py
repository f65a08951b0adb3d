"""Tables for the terminal and the self-contained HTML page."""

from __future__ import annotations

from ._results import promise_kept
from .page import render_report, write_report
from .tables import matrix_table, summary_table

__all__ = ["matrix_table", "promise_kept", "render_report", "summary_table", "write_report"]
