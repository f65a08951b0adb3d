"""Sets of other domains under seal: loaded once, after every choice was written down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from growthring._io import write_json
from growthring.errors import ConfigError, GuardError

__all__ = ["SealedSets"]


class SealedSets:
    """Evaluation sets that nothing can look at before the choices are made, nor choose by afterwards.

    Nothing is loaded until :meth:`open`. It wants the file of the choices to be there, and writes beside it, in
    ``opened.json``, which choices the sets were opened after. From then on they can only be opened after the same
    choices again, as when an interrupted run goes on; other choices would have been made by someone who could know
    the answers, and need a new folder.

    Args:
        loaders: What makes each set, by name; called without arguments, in order.
        choices: The file, ``choices.json``, that must have been written before.

    Raises:
        ConfigError: There is no set, or a loader cannot be called.

    Example:
        ```python
        sealed = SealedSets({"tweets": read_tweets}, folder / "choices.json")
        ...                                    # train, choose on validation rows, write choices.json
        scores = trainer.score(sealed.open())
        ```
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]], choices: str | Path) -> None:
        if not loaders:
            raise ConfigError("sealed sets: there is none; give at least one loader by name")
        for name, loader in loaders.items():
            if not callable(loader):
                raise ConfigError(
                    f"sealed set {name!r}: {type(loader).__name__} is no loader: give a function that reads the set, "
                    "so that nothing is read before the end"
                )
        self._loaders, self._choices, self._opened = dict(loaders), Path(choices), False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sets, which is all that is known of them before."""
        return tuple(self._loaders)

    def check(self) -> None:
        """Make sure that the sets could be opened now; loads nothing.

        Raises:
            GuardError: The choices are not written, were other ones when the sets were opened before, or this object
                was opened already.
        """
        if self._opened:
            raise GuardError(
                "the sealed sets were opened already; they are looked at once. Keep what open() gave, and score all "
                "there is to score with it"
            )
        if not self._choices.is_file():
            raise GuardError(
                f"the choices are not written yet: there is no {self._choices}. Choose on validation rows, write the "
                "file, then open"
            )
        marker = self._marker()
        if marker is not None and marker != self._digest():
            raise GuardError(
                f"the choices ({self._choices.name}) are not what they were when the sets were opened: choices made "
                f"now could know the answers. Go back to those, or start in another folder than {self._choices.parent}"
            )

    def open(self) -> dict[str, Any]:
        """Load the sets, once.

        Returns:
            What each loader gave, by name.

        Raises:
            GuardError: As :meth:`check`.
        """
        self.check()
        self._opened = True
        if self._marker() is None:
            write_json(self._place, {"choices_sha256": self._digest(), "sets": list(self._loaders)})
        return {name: loader() for name, loader in self._loaders.items()}

    @property
    def _place(self) -> Path:
        return self._choices.with_name("opened.json")

    def _digest(self) -> str:
        return hashlib.sha256(self._choices.read_bytes()).hexdigest()

    def _marker(self) -> str | None:
        """Hash of the choices after which the sets were opened before; ``None`` if they never were."""
        if not self._place.is_file():
            return None
        try:
            return str(json.loads(self._place.read_text(encoding="utf-8"))["choices_sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise GuardError(
                f"{self._place} cannot be read ({type(error).__name__}), so nothing says after which choices the sets "
                "were opened; start in another folder"
            ) from None
