from __future__ import annotations

import os

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from growthring._io import cache_folder
from growthring.adapters import LargoConfig
from growthring.adapters.largo import svd_cache
from growthring.adapters.largo.starts import start_factors
from growthring.adapters.largo.svd_cache import SMALLEST, singular_triplets

WEIGHT = torch.randn(SMALLEST + 3, SMALLEST, generator=torch.Generator().manual_seed(0))


def triplets(weight=WEIGHT, r=3, minor=False, iterations=None):
    return singular_triplets(weight, r, minor=minor, iterations=iterations, name="layer")


def files():
    return sorted(cache_folder("svd").glob("*")) if cache_folder("svd").is_dir() else []


@pytest.fixture
def counted(monkeypatch):
    calls = []
    original = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def same(one, other):
    return one.largest == other.largest and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("left", "sigma", "right")
    )


def test_a_weight_is_decomposed_once(counted):
    first = triplets()
    assert len(files()) == len(counted) == 1
    assert same(triplets(WEIGHT.clone()), first)
    assert same(triplets(nn.Parameter(WEIGHT.clone())), first)
    assert len(counted) == 1


def test_everything_that_changes_the_answer_changes_the_file():
    triplets()
    for number, changed in enumerate(
        (
            {"r": 4},
            {"minor": True},
            {"iterations": 2},
            {"iterations": 3},
            {"weight": WEIGHT.double()},
            {"weight": WEIGHT.bfloat16()},
            {"weight": WEIGHT.T},
            {"weight": WEIGHT + 1e-6 * torch.eye(*WEIGHT.shape)},
        ),
        start=2,
    ):
        triplets(**changed)
        assert len(files()) == number, changed


def test_the_answer_is_the_same_with_and_without_the_cache(monkeypatch):
    triplets()
    cached = triplets()
    monkeypatch.setenv("GROWTHRING_CACHE", "off")
    assert same(triplets(), cached)
    u, s, v = torch.linalg.svd(WEIGHT, full_matrices=False)
    assert torch.equal(cached.sigma, s[:3])
    torch.testing.assert_close(cached.left @ torch.diag(s[:3]) @ cached.right, u[:, :3] @ torch.diag(s[:3]) @ v[:3])


def test_off_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GROWTHRING_CACHE", "OFF")
    triplets()
    assert not any(tmp_path.iterdir())
    assert cache_folder("svd") == tmp_path / "home" / "growthring" / "svd"


def test_small_matrices_are_not_kept(counted):
    triplets(WEIGHT[:, : SMALLEST - 1])
    assert not files()
    assert len(counted) == 1


@pytest.mark.parametrize(
    "damage", ["torn", "empty", "text", "other", "nan", "zeros", "longer", "largest", "foreign", "folderless"]
)
def test_a_file_that_is_not_whole_is_made_anew(damage, counted):
    from safetensors.torch import load_file, save_file

    first = triplets()
    (path,) = files()
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not safetensors")
    elif damage == "other":
        save_file({**load_file(path), "sigma": torch.zeros(7)}, path)
    elif damage == "nan":
        save_file({**load_file(path), "left": torch.full_like(first.left, float("nan"))}, path)
    elif damage == "zeros":
        save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)
    elif damage == "longer":  # still U^T W = diag(sigma) V^T
        save_file({**load_file(path), "left": 3 * first.left, "right": 3 * first.right}, path)
    elif damage == "largest":
        save_file({**load_file(path), "largest": torch.tensor(1e30, dtype=torch.float64)}, path)
    elif damage == "foreign":  # whole, but of another weight
        triplets(WEIGHT + 1)
        (other,) = set(files()) - {path}
        other.replace(path)
        counted.pop()
    else:
        path.unlink()
        path.parent.rmdir()
    assert same(triplets(), first)
    assert len(counted) == 2
    assert files() == [path]
    assert same(triplets(), first)
    assert len(counted) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch, tmp_path, counted):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GROWTHRING_CACHE", str(tmp_path / "file"))
    first = triplets()
    assert same(triplets(), first)
    assert len(counted) == 2


def test_a_full_disk_costs_time_only(monkeypatch, counted):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(svd_cache, "save_file", full)
    first = triplets()
    assert same(triplets(), first)
    assert len(counted) == 2
    assert not files()


def test_a_user_without_a_home_has_no_cache(monkeypatch, counted):
    monkeypatch.setenv("GROWTHRING_CACHE", "~no-such-user/cache")
    triplets()
    assert len(counted) == 1


def test_the_folder_is_bounded(monkeypatch):
    triplets()
    (oldest,) = files()
    size = oldest.stat().st_size
    monkeypatch.setattr(svd_cache, "MOST_BYTES", 3 * size)
    for number in range(1, 3):
        triplets(WEIGHT + number)
    for place, path in enumerate(files()):
        os.utime(path, (place, place))
    os.utime(oldest, (0, 0))
    triplets()  # used now
    triplets(WEIGHT + 9)
    assert len(files()) == 3
    assert oldest in files()


def test_what_is_cached_is_no_view_and_stays_as_it_is():
    weight = WEIGHT.clone()
    first = triplets(weight)
    first.left.zero_()
    assert triplets(weight).left.norm() > 0


@pytest.mark.parametrize("form", ["delta", "product"])
def test_the_same_file_serves_every_form_and_scale(form, counted):
    start_factors(WEIGHT, LargoConfig(r=3), "w")
    start_factors(WEIGHT, LargoConfig(r=3, form=form, alpha=1), "w")
    assert len(counted) == 1
