"""``growthring robust``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import _console

__all__ = ["robust"]


def robust(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="A sweep; --schema describes it.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder, in place of the configuration's output.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results.json on standard output, and nothing else.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a sweep, and stop.")] = False,
) -> None:
    """Compare methods inside and outside the domain that they are trained on, and draw the frontier.

    Every setting is tried on validation rows of that domain; the choices are written down; only then are the other
    domains opened, once. Started again in the same folder, it goes on where it was.

    Examples:
        growthring robust sweep.yaml

        growthring robust sweep.yaml --out runs/sweep --json > results.json

        growthring robust --schema > sweep.schema.json
    """
    if schema:
        from growthring.recipes.robust_config import robust_schema

        typer.echo(json.dumps(robust_schema(), indent=2, ensure_ascii=False))
        return
    if config is None:
        raise typer.BadParameter("name a configuration file, or say --schema", param_hint="CONFIG.yaml")
    from growthring.recipes.robust_config import load_robust_config

    settings = load_robust_config(config)
    folder = out or Path(settings.output or Path("runs") / config.stem)
    _console.loading()
    with _console.quiet_libraries():
        from growthring.recipes.robust import run_robust
        from growthring.report import robust_table, write_robust_report

        def tell(what: str, number: int, total: int) -> None:
            if _console.verbosity.chatter:
                _console.errors().print(f"{number + 1}/{total} {what}", soft_wrap=True, markup=False)

        results = run_robust(settings, folder, progress=tell)
        write_robust_report(results, folder / "report.html")
    if as_json:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = _console.output()
    console.print(robust_table(results))
    console.print(f"The page: {(folder / 'report.html').resolve()}", soft_wrap=True, markup=False)
