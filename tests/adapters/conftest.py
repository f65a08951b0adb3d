from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.setenv("GROWTHRING_CACHE", str(tmp_path / "cache"))
