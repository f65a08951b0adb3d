"""Tables for the terminal and the self-contained HTML page."""

from __future__ import annotations

from ._results import promise_kept
from ._sections import optimizer_line
from .page import render_report, write_report
from .robust import render_robust_report, robust_table, write_robust_report
from .tables import matrix_table, summary_table

__all__ = [
    "matrix_table",
    "optimizer_line",
    "promise_kept",
    "render_report",
    "render_robust_report",
    "robust_table",
    "summary_table",
    "write_report",
    "write_robust_report",
]
