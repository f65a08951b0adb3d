"""The house rules that a machine can check: imports go down, files stay short, nothing unsafe is loaded."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "growthring"
FILES = sorted(SOURCE.rglob("*.py"))

# What each room may import of growthring. Rooms of one floor do not know each other.
BASE = {"errors", "_io"}
MAY_IMPORT = {
    "subspace": BASE,
    "backbones": BASE,
    "streams": BASE,
    "evaluation": BASE,
    "adapters": BASE | {"subspace", "backbones"},
    "optim": BASE | {"subspace"},
    "guards": BASE | {"subspace", "backbones"},
    "report": BASE | {"evaluation"},
    "trainer": BASE | {"subspace", "backbones", "streams", "evaluation", "adapters", "optim", "guards", "report"},
    "recipes": BASE | {"backbones", "adapters", "streams", "evaluation", "optim", "guards", "trainer", "report"},
    "cli": BASE | {"adapters", "streams", "guards", "trainer", "report", "recipes", "evaluation"},
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of growthring that a file imports, absolutely or relatively, lazily too."""
    package = ["growthring", *path.relative_to(SOURCE).parts[:-1]]
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            base = (stem + (node.module or "")).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "growthring" else [base]
        rooms |= {n.split(".")[1] for n in names if n.startswith("growthring.")}
    return rooms


def test_imports_only_go_down() -> None:
    wrong = []
    for path in FILES:
        room = path.relative_to(SOURCE).parts[0]
        if room in MAY_IMPORT:
            forbidden = imported_rooms(path) - MAY_IMPORT[room] - {room, "__version__"}
            wrong += [f"{path.relative_to(SOURCE)} imports {name}" for name in sorted(forbidden)]
    assert not wrong


def test_the_import_check_sees_relative_and_lazy_imports(tmp_path: Path) -> None:
    assert "guards" in imported_rooms(SOURCE / "trainer" / "continual.py")
    assert "report" in imported_rooms(SOURCE / "trainer" / "result.py")  # imported inside a method


def test_every_room_is_listed() -> None:
    rooms = {p.name for p in SOURCE.iterdir() if (p / "__init__.py").is_file()}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short_and_load_nothing_executable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert not re.search(r"\bimport (pickle|dill|joblib|marshal)\b", text)
    assert "torch.load(" not in text
    assert "trust_remote_code=True" not in text.replace(" ", "")
    assert not re.search(r"^\s*print\(", text, re.MULTILINE) or path.parent.name == "cli"
