"""``growthring methods``, ``report`` and ``schema``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from growthring.errors import ConfigError, DataError, nearest

from . import _console

if TYPE_CHECKING:
    from growthring.recipes import Method

__all__ = ["methods", "report", "schema"]


def methods(
    name: Annotated[str | None, typer.Argument(help="Say all about this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
) -> None:
    """List the methods: what each one is, its paper, its guarantee.

    Examples:
        growthring methods

        growthring methods pegp

        growthring methods --json
    """
    from growthring.recipes.methods import METHODS, get_method

    chosen = [get_method(name)] if name is not None else list(METHODS.values())
    if as_json:
        typer.echo(json.dumps([method.to_dict() for method in chosen], indent=2, ensure_ascii=False))
        return
    console = _console.output()
    if name is None:
        table = Table(show_edge=False, pad_edge=False)
        for column in ("method", "what it does", "paper", "guard"):
            table.add_column(column, no_wrap=column == "method")
        for method in chosen:
            paper = f"arXiv {method.paper.arxiv}" if method.paper else "-"
            first = method.summary.partition(". ")[0].rstrip(".")  # the table has room for one sentence
            table.add_row(Text(method.name, style="bold"), f"{first}.", paper, method.guard or "-")
        console.print(table)
        console.print("\ngrowthring methods NAME says all about one.")
        return
    method = chosen[0]
    paper = f"{method.paper.title}, arXiv {method.paper.arxiv}" if method.paper else "common practice, no paper"
    console.print(Text(f"{method.title} ({method.name})", style="bold"))
    console.print(method.summary)
    grid = Table.grid(padding=(0, 2))
    for key, value in (
        ("paper", paper),
        ("guarantee", method.guarantee),
        ("cost", method.cost),
        ("use when", method.use_when),
        ("not when", method.avoid_when),
        *((("optimizer", method.optimizer),) if method.optimizer is not None else ()),
        ("learning rate", f"{_rates(method)} unless given"),
        *((("energy", _energy(method.energy)),) if method.energy is not None else ()),
    ):
        grid.add_row(Text(key, style="dim"), value)
    console.print(grid)


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders, results.json files, or a demo's folder.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page. Default for one folder: its report.html.")
    ] = None,
) -> None:
    """Write one self-contained HTML page over one run or several.

    Examples:
        growthring report runs/pegp

        growthring report runs/pegp runs/joint --out compare.html
    """
    found = [file for run in runs for file in _results_files(Path(run))]
    if out is None and len(runs) > 1:
        raise ConfigError("several runs and no place for their page: say --out FILE, for example --out compare.html")
    first = Path(runs[0])
    target = out if out is not None else (first if first.is_dir() else first.parent) / "report.html"
    if target.is_dir():
        raise ConfigError(f"--out {target}: this is a folder; name a file, for example {target / 'report.html'}")
    results = [_read(file) for file in found]
    from growthring.report import summary_table, write_report

    try:
        write_report(results, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}; choose another file") from error
    _console.output().print(summary_table(results))
    _console.output().print(f"The page: {target.resolve()}", soft_wrap=True)


def schema() -> None:
    """Print the JSON Schema of a configuration file, for editors and other programs.

    Example:
        growthring schema > growthring.schema.json
    """
    from growthring.recipes.config import config_schema

    typer.echo(json.dumps(config_schema(), indent=2, ensure_ascii=False))


def _rates(method: Method) -> str:
    """The learning rate, and that of weights beside LoRA."""
    apart = f", {method.full_rank_lr:g} for the weights beside LoRA" if method.full_rank_lr is not None else ""
    return f"{method.learning_rate:g}{apart}"


def _energy(energy: Any) -> str:
    """An energy in words."""
    if isinstance(energy, Mapping) and "times" in energy:
        return f"all above {energy['times']:g} times the smallest"
    if isinstance(energy, Mapping) and "start" in energy:
        return f"{energy['start']:g}, rising to {energy['end']:g} over {energy['tasks']} tasks"
    if isinstance(energy, Mapping):
        return ", ".join(f"{kind} {_energy(one)}" for kind, one in energy.items())
    return f"{energy:g}"


def _results_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        tip = f"; {nearest(path.name, beside)}" if beside and len(beside) <= 50 else ""
        raise ConfigError(f"{path}: there is no such run folder or file{tip}")
    if (path / "results.json").is_file():
        return [path / "results.json"]
    inside = sorted(path.glob("*/results.json"), key=lambda file: _place(path, file))
    if not inside:
        raise ConfigError(f"{path}: this folder holds no results.json; it is no run folder, or its run did not end")
    return inside


def _place(folder: Path, file: Path) -> tuple[int, str]:
    """The order of the demo's summary first, then names."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        names = [run["name"] for run in summary["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    name = file.parent.name
    return (names.index(name) if name in names else len(names), name)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from None
    if isinstance(value, dict) and value.get("kind") == "robust":
        raise DataError(
            f"{file}: this is a robustness sweep, not a run; its page is report.html in the same folder, and "
            "growthring robust with the same configuration and folder writes it anew"
        )
    if not isinstance(value, dict) or "matrix" not in value:
        raise DataError(f"{file}: this is no results.json: it holds no accuracy matrix")
    return value
