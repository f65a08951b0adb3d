"""``growthring sites``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from growthring.errors import ConfigError

from . import _console

__all__ = ["sites"]

_STYLES = {"protected": "green", "held": "yellow", "frozen": "yellow", "free": "red"}
_ORDER = ("protected", "projected", "held", "adamw", "frozen", "free")


def sites(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="A configuration; growthring schema describes it.")
    ],
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, in place of the configuration's.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Every tensor by itself, as JSON on standard output, and nothing else.")
    ] = False,
) -> None:
    """Say, before anything is trained, what protects every trainable tensor, or why nothing does and what that costs.

    Methods with an optimizer of their own also say how that treats each of them.

    Examples:
        growthring sites stream.yaml

        growthring sites stream.yaml --json
    """
    from growthring.recipes.config import load_config

    if seed is not None and seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")
    settings = load_config(config, seed=seed)
    _console.loading()
    with _console.quiet_libraries():
        from growthring.recipes.runner import build
        from growthring.recipes.sites import explain_sites, group_sites, sites_line
        from growthring.report import optimizer_line

        trainer = build(settings)
        rows, plans = explain_sites(trainer), trainer.explain_optimizer()
    line = sites_line(rows)
    if as_json:
        values = {"method": settings.method, "title": settings.title, "summary": line, "tensors": rows}
        values |= {"optimizer": plans}
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    console = _console.output()
    console.print(Text(f"{settings.title} ({settings.method})", style="bold"))
    console.print(line, markup=False)
    groups, treated = group_sites(rows), group_sites(plans)
    front = _common([group["pattern"] for group in (*groups, *treated)])
    for same in _alike(groups, ("guard", "treatment", "kinds", "condition", "why", "cost")):
        console.print()
        console.print(_heading(same[0], sum(group["count"] for group in same)))
        console.print(_table(same, front))
    if treated:
        console.print(f"\n{optimizer_line(plans)}", markup=False)
    for same in _alike(treated, ("treatment", "side", "why")):
        console.print()
        side = f", basis on the {same[0]['side']}" if same[0]["side"] else ""
        console.print(Text(f"{same[0]['treatment']}{side}", style="bold").append(f"\n  why: {same[0]['why']}", "dim"))
        console.print(_table(same, front))
    if front:
        console.print(f"\nAll names begin with {front}", style="dim", markup=False)


def _heading(group: Mapping[str, Any], count: int) -> Text:
    """Treatment, kinds, and what stands behind them."""
    text = Text()
    text.append(str(group["treatment"]), style=f"bold {_STYLES[group['treatment']]}")
    kinds = f" {', '.join(group['kinds'])}" if group["kinds"] else ""
    guard = f", {group['guard']}" if group["guard"] else ""
    text.append(f"{kinds} ({count} tensors{guard})" if count > 1 else f"{kinds} (1 tensor{guard})")
    for word, value in (("condition", group["condition"]), ("why", group["why"]), ("cost", group["cost"])):
        if value:
            text.append(f"\n  {word}: ", style="dim").append(str(value))
    return text


def _table(groups: Sequence[Mapping[str, Any]], front: str) -> Table:
    """How many, of which shape, under which name."""
    table = Table(show_edge=False, pad_edge=False, box=None, show_header=False, padding=(0, 2, 0, 0))
    for group in groups:
        shape = " x ".join(map(str, group["shape"])) or "1"
        table.add_row(f"  {group['count']}", Text(shape), Text(group["pattern"][len(front) :]))
    return table


def _alike(groups: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[list[Mapping[str, Any]]]:
    """Groups that have these in common, together; protected or projected ones first, free ones last."""
    together: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for group in groups:
        together.setdefault(tuple(str(group[key]) for key in keys), []).append(group)
    return sorted(together.values(), key=lambda same: _ORDER.index(same[0]["treatment"]))


def _common(patterns: Sequence[str]) -> str:
    """The beginning, in whole parts, that all names have; empty for a single name."""
    if len(patterns) < 2:
        return ""
    parts = [pattern.split(".")[:-1] for pattern in patterns]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join([*shared, ""]) if shared else ""
