"""The Typer application: global options, and errors as one message."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from growthring.errors import GrowthringError

from . import _console

__all__ = ["app", "main"]

logger = logging.getLogger(__name__)

_GLOBAL = ("-v", "-vv", "--verbose", "-q", "--quiet", "--debug")


class _Group(TyperGroup):
    """Takes the global options anywhere on the line, and turns errors into messages and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        first = [a for a in args[:end] if a in _GLOBAL]
        return super().parse_args(ctx, first + [a for a in args[:end] if a not in _GLOBAL] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _console.errors().print("stopped")
            raise typer.Exit(130) from None
        except GrowthringError as error:
            if _console.verbosity.debug:
                _console.errors().print_exception()
            _console.complain(str(error))
            raise typer.Exit(2) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if hasattr(error, "exit_code") or _console.verbosity.debug:  # a usage error, which Typer prints
                raise
            text = str(error).strip() or "no message"
            _console.complain(f"unexpected error: {type(error).__name__}: {text}\nRun with --debug for the traceback.")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="growthring",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune a pretrained model on one task after another without losing what it knew.",
    epilog="Start with: growthring demo. "
    "-v, --quiet and --debug may stand anywhere on the line. "
    "Exit codes: 0 done, 2 wrong input, 1 unexpected error, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        import growthring

        typer.echo(f"growthring {growthring.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, help="Show the log; -vv shows every detail. Also: GROWTHRING_LOG=info."
        ),
    ] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Errors and results only: no progress bars, no remarks.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet contradict each other")
    _console.set_up(verbose, quiet, debug)


def _register() -> None:
    from .demo import demo
    from .export import export
    from .robust import robust
    from .run import run
    from .show import methods, report, schema
    from .sites import sites

    for command in (demo, run, robust, sites, methods, report, schema, export):
        app.command()(command)


_register()


def main() -> None:
    """The command ``growthring``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal with a small character set shows ? instead of failing
    app()
