"""``growthring run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from growthring.errors import ConfigError

from . import _console

__all__ = ["run"]


def run(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="A configuration; growthring schema describes it.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder, in place of the configuration's output.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, in place of the configuration's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results.json on standard output, and nothing else.")
    ] = False,
) -> None:
    """Learn a stream of tasks as a configuration file says, and write a run folder.

    Examples:
        growthring run stream.yaml

        growthring run stream.yaml --seed 1 --out runs/seed-1

        growthring run stream.yaml --json > results.json
    """
    from growthring.recipes.config import load_config
    from growthring.recipes.runner import check_folder

    if seed is not None and seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")
    settings = load_config(config, seed=seed)
    folder = out or Path(settings.output or Path("runs") / config.stem)
    check_folder(folder, overwrite=overwrite)
    _console.loading()
    with _console.quiet_libraries():
        from growthring.recipes.runner import build_stream
        from growthring.recipes.runner import run as run_config
        from growthring.report import matrix_table, summary_table

        stream = build_stream(settings)
        if _console.verbosity.chatter:
            names = ", ".join(task.name for task in stream)
            _console.errors().print(
                f"{settings.title}: {len(stream)} tasks ({names}), run folder {folder}", soft_wrap=True
            )
        result = run_config(settings, folder, overwrite=overwrite, progress=_console.verbosity.chatter, stream=stream)
    values = result.to_dict()
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = _console.output()
    console.print(matrix_table(values))
    console.print(summary_table([values]))
    console.print(f"The page: {(folder / 'report.html').resolve()}", soft_wrap=True)
