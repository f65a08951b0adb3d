from __future__ import annotations

from pathlib import Path

import pytest
from upstream import reason_to_skip, wanted

HERE = Path(__file__).parent

# What `make test` runs: one test of each kind, on one model. The rest is behind the marker.
FAST = (
    "test_attributes_parametrized", "test_save_pretrained", "test_load_multiple_adapters", "test_disable_adapters",
    "test_only_params_are_updated", "test_delete_adapter", "test_multiple_active_adapters_forward",
    "test_merge_layers", "test_unmerge_after_sequential_merge_restores_base",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        if HERE not in item.path.parents or not hasattr(item, "originalname"):
            kept.append(item)
            continue
        if item.cls is None:
            kept.append(item)  # ours
            continue
        params = getattr(item, "callspec", None)
        if params is None or not wanted(params.params):
            dropped.append(item)
            continue
        reason = reason_to_skip(item.originalname, params.params)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        if reason is not None or item.originalname not in FAST or "fast" not in item.name:
            item.add_marker(pytest.mark.conformance)
        kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some upstream tests write where they stand
