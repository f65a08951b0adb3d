"""What the command line says, and where: results on standard output, everything else on standard error."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

import growthring
from growthring.errors import ConfigError, nearest

__all__ = ["Verbosity", "complain", "errors", "loading", "output", "quiet_libraries", "set_up", "verbosity"]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_PACKAGE = Path(str(growthring.__path__[0])).resolve()
_PLAIN_WIDTH = 110  # of a file or a pipe: wide enough for every table


class Verbosity:
    """How much to say; set once for each command.

    Attributes:
        level: Level of growthring's own log.
        libraries: Whether to let other libraries speak.
        chatter: Whether to show progress bars and remarks.
        debug: Whether unexpected errors keep their traceback.
    """

    def __init__(self) -> None:
        self.level, self.libraries, self.chatter, self.debug = logging.WARNING, False, True, False


verbosity = Verbosity()


def output() -> Console:
    """The console on standard output."""
    return _console(sys.stdout)


def errors() -> Console:
    """The console on standard error."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=_PLAIN_WIDTH)


def complain(message: str) -> None:
    """One error message."""
    errors().print(Text("error: ", style="bold red").append(message, style="not bold default"), soft_wrap=True)


def loading() -> None:
    """Say, to someone who watches, why nothing happens for some seconds."""
    if verbosity.chatter and errors().is_terminal:
        errors().print("Loading PyTorch and transformers ...", style="dim")


def set_up(verbose: int, quiet: bool, debug: bool) -> None:
    """Decide what is said.

    Args:
        verbose: 1 for the log and other libraries' warnings, 2 for every detail.
        quiet: Errors only.
        debug: Keep tracebacks.

    Raises:
        ConfigError: ``GROWTHRING_LOG`` holds no level.
    """
    verbosity.debug, verbosity.libraries, verbosity.chatter = debug, verbose > 0, not quiet
    name = os.environ.get("GROWTHRING_LOG", "").strip().lower()
    if name and name not in LEVELS:
        raise ConfigError(f"GROWTHRING_LOG={name!r}: {nearest(name, LEVELS)}")
    verbosity.level = LEVELS[name] if name else logging.WARNING
    if verbose or quiet:
        verbosity.level = logging.ERROR if quiet else logging.DEBUG if verbose > 1 else logging.INFO
    logger = logging.getLogger("growthring")
    logger.setLevel(verbosity.level)
    for handler in [h for h in logger.handlers if isinstance(h, _Handler)]:
        logger.removeHandler(handler)
    logger.addHandler(_Handler())


class _Handler(logging.Handler):
    """Writes to what standard error is at the moment, which a progress bar may have taken over."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Meanwhile, warnings of growthring are one line each, and those of other libraries need ``-v``."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbosity.libraries:
        _hush(bars=verbosity.chatter)
    with warnings.catch_warnings():
        if not verbosity.libraries:
            warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"growthring(\.|$)")
        warnings.showwarning = _show_warning
        yield


def _hush(bars: bool) -> None:
    """Leave of other libraries' output only the bars of downloads."""
    import datasets
    import huggingface_hub
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not bars:
        disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
    ours = Path(filename).resolve().is_relative_to(_PACKAGE)
    if verbosity.level <= logging.WARNING:
        print(f"warning: {message}" if ours else f"warning ({filename}): {message}", file=sys.stderr)
