"""The demo's own runs on its own model and data, with few rows: the whole way from assets to the page."""

from __future__ import annotations

import json
import os

import pytest

from growthring.recipes import demo_runs, run
from growthring.recipes.demo import demo_settings
from growthring.streams import ASSETS, DEMO_ASSETS, asset_cache

HERE = all((asset_cache() / f"{name}-{ASSETS[name].version}" / "manifest.json").is_file() for name in DEMO_ASSETS)

pytestmark = pytest.mark.skipif(
    not HERE and not os.environ.get("GROWTHRING_ASSETS"),
    reason="the demo's model and data (157 MB) are not in the cache: `make assets` downloads them",
)


@pytest.mark.parametrize(("name", "limit"), [("pegp", 1e-5), ("pegp-linear", None)])
def test_a_small_demo_run_keeps_its_promise(tmp_path, name, limit):
    small = {**demo_settings(), "train_rows": 96, "validation_rows": 20, "test_rows": 40}
    config = dict(demo_runs(3, small))[name]
    config = config.model_copy(update={"train": config.train.model_copy(update={"weight_decay": 0.1})})
    result = run(config, tmp_path / name)
    stored = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
    assert len(stored["matrix"]) == len(stored["tasks"]) + 1 == 6
    assert stored["matrix"][0][0] > 1.5 / 6  # zero-shot by label text is far from chance before any training
    assert (tmp_path / name / "report.html").stat().st_size > 100_000
    later = result.certificates[1:]
    assert all(c.kept for c in later)
    assert all(c.leak is not None and c.leak > 0.0 for c in later)  # it was measured, and something moved
    if limit is not None:
        assert max(c.leak for c in later) <= limit
