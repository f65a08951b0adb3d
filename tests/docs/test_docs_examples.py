"""Every example of README, CONTRIBUTING and docs runs, and every public name is documented."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shlex
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import growthring
from growthring.cli import app
from growthring.recipes import load_config, load_robust_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
DOCUMENTED = re.compile(r"^::: (?P<name>[\w.]+)$", re.M)


@dataclass
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start("text")) + 1, m["language"], m["title"], m["text"])
        for m in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Shell lines of a page that start with a program, without comments."""
    for block in blocks_of(page):
        for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words and words[0] == program:
                yield words[1:]


@contextmanager
def no_warning_of_ours(page: Path) -> Iterator[None]:
    """Warnings of other libraries pass; one of growthring, or one that an example causes, does not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    places = (str(page), *(str(Path(p).resolve()) for p in growthring.__path__))
    ours = [w for w in caught if str(Path(w.filename).resolve()).startswith(places)]
    assert not ours, "\n".join(f"{w.filename}:{w.lineno}: {w.message}" for w in ours)


def shell(words: list[str]) -> None:
    """Run one ``growthring`` line."""
    words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"growthring {' '.join(words)}: {result.output}"
    if target is not None:
        Path(target).write_text(result.stdout, encoding="utf-8")


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prepared folder, and the current one."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    return tmp_path


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``torchrun`` tells a script that runs on one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language in ("python", "yaml") for b in blocks_of(p))], ids=name_of
)
def test_every_example_runs(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    """Blocks in order; Python blocks of a page share their names, YAML blocks become files under their titles."""
    if page.stem == "distributed":
        request.getfixturevalue("one_rank")
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        with no_warning_of_ours(page):
            if block.language == "yaml":
                assert block.title, f"{name_of(page)}, line {block.line}: a configuration needs a title"
                (folder / block.title).write_text(block.text, encoding="utf-8")
                load = load_robust_config if "ood:" in block.text else load_config
                load(folder / block.title)
            elif block.language == "python":
                padding = "\n" * (block.line - 1)  # so that a traceback shows the line of the page
                exec(compile(padding + block.text, str(page), "exec", dont_inherit=True), names)
            elif block.language == "bash" and page.stem in (
                "tutorial-cli",
                "tutorial-gorp",
                "tutorial-images",
                "tutorial-robust",
                "scenarios",
            ):
                for line in block.text.splitlines():
                    words = shlex.split(line, comments=True)[1:]
                    # the first block is an overview, before the files that it names
                    if words and words[0] != "demo" and any(name.endswith(".yaml") for name in os.listdir()):
                        shell(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Commands and options as the command line knows them; targets as the Makefile does; scripts as they lie there."""
    group = typer.main.get_command(app)
    for words in commands(page, "growthring"):
        words = words[: words.index(">")] if ">" in words else words
        if words and words[0].startswith("-"):
            continue
        assert words[0] in group.commands, words  # type: ignore[attr-defined]
        group.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in commands(page, "make"):
        assert words[0] in targets
    for script in re.findall(r"python (benchmarks/\w+\.py)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        target = match["target"].partition("#")[0]
        if target and "://" not in target:
            assert (page.parent / target).is_file(), f"{name_of(page)}: {match['target']}"


def documented() -> set[str]:
    pages = (ROOT / "docs" / "api").glob("*.md")
    return {m["name"] for page in pages for m in DOCUMENTED.finditer(page.read_text(encoding="utf-8"))}


def public() -> Iterator[tuple[str, str]]:
    """Every public module with every name in its ``__all__``; of the command line the commands are the interface."""
    for found in pkgutil.iter_modules(growthring.__path__):
        if found.name.startswith("_") or found.name == "cli":
            continue
        module = importlib.import_module(f"growthring.{found.name}")
        yield from ((module.__name__, name) for name in getattr(module, "__all__", ()))


def test_every_public_name_is_documented() -> None:
    wanted = {f"{module}.{name}" for module, name in public()}
    assert wanted - documented() == set()
    assert documented() - wanted == set(), "documented, but not public"
    for name in wanted:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


def test_every_name_of_the_root_is_documented() -> None:
    page = (ROOT / "docs" / "api" / "growthring.md").read_text(encoding="utf-8")
    links = dict(re.findall(r"\[`growthring\.(\w+)`\]\[([\w.]+)\]", page))
    assert set(links) == set(growthring.__all__)
    assert set(links.values()) <= documented()
    for name, target in links.items():
        module, _, attribute = target.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(growthring, name)


def test_every_page_is_in_the_navigation() -> None:
    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from leaves(part)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(leaves(nav)) == sorted(
        p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")
    )
