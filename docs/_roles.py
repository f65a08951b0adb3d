"""For mkdocstrings: docstrings have Sphinx roles, pages are Markdown; a role becomes its name in code type."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|meth|func|data|attr|mod|exc):`(?P<short>~)?(?P<name>[\w.]+)`")


def plain(text: str) -> str:
    """``text`` with every role as Markdown code; ``~`` keeps the last part of a name."""
    return ROLE.sub(lambda m: f"`{m['name'].rsplit('.', 1)[-1] if m['short'] else m['name']}`", text)


class PlainRoles(Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
