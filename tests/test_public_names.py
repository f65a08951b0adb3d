"""The names that others rely on, and that importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys

import growthring as gr


def test_every_public_name_is_there_and_listed() -> None:
    for name in gr.__all__:
        assert getattr(gr, name).__doc__, name
    assert set(gr.__all__) <= set(dir(gr))


def test_the_contract_of_the_guard() -> None:
    for method in (
        "attach",
        "consolidate",
        "before_step",
        "after_step",
        "callback",
        "save_pretrained",
        "load_pretrained",
    ):
        assert callable(getattr(gr.PEGP, method))


def test_rooms_are_reached_through_the_root() -> None:
    code = "import growthring as gr; gr.optim.GaLore, gr.guards.PEGP; assert gr.GORP is gr.optim.GORP"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"optim", "guards"} <= set(dir(gr))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(gr, "no_such_name")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, growthring; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
