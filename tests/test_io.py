"""Atomic writes: what was there stays when a writer fails, whatever it fails with."""

from __future__ import annotations

import pytest
from safetensors import SafetensorError

from growthring._io import write_text, write_with


def fails_with(error):
    def write(path):
        path.write_text("half")
        raise error

    return write


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError("No space left on device")])
def test_a_failed_write_is_an_os_error_and_leaves_the_old_file(tmp_path, error):
    path = write_text(tmp_path / "file", "old")
    with pytest.raises(OSError, match="No space left on device"):
        write_with(path, fails_with(error))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_with(tmp_path / "file", fails_with(ZeroDivisionError()))
    assert not list(tmp_path.iterdir())
