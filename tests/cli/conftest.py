from __future__ import annotations

import pytest
from typer.testing import CliRunner

from growthring.cli import app


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """A function that runs ``growthring`` with the given words, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("GROWTHRING_LOG", "GROWTHRING_ASSETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GROWTHRING_CACHE", str(tmp_path / "cache"))

    def call(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return call


@pytest.fixture
def refused(cli):
    """As ``cli``, for what must fail: returns the one message."""

    def call(*words):
        result = cli(*words)
        assert result.exit_code == 2, (result.stdout, result.stderr)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert result.stderr.count("error: ") == 1
        return result.stderr

    return call
