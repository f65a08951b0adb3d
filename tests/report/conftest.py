from __future__ import annotations

import pytest

from growthring.evaluation import AccuracyMatrix, metrics


def certificate(task, index, leak, change=None):
    site = {"name": "layer.0.query", "kind": "lora_A", "dim": 10, "rank": 2 + index, "free": 8 - index}
    site |= {"energy_target": 0.95, "energy": 0.96, "leak": leak}
    totals = {"leak": leak, "energy": 0.96, "free": 8 - index, "dims": 10, "output_change": change}
    counts = {"probes": 64, "held": 0, "protected_tasks": index, "task_index": index}
    return {"guard": "pegp", "task": task, "sites": [site], "notes": [], **totals, **counts}


def results(names, rows, values, *, method="pegp", title="PEGP", leaks=None):
    matrix = AccuracyMatrix(names, rows, values)
    return {
        "format_version": 1,
        "growthring_version": "0.1.0",
        "name": "trial",
        "method": method,
        "title": title,
        "scenario": "task",
        "seed": 3,
        "tasks": [{"name": n, "labels": ["x", "y"], "train": 11, "validation": 12, "test": 13} for n in names],
        "rows": list(matrix.rows),
        "matrix": matrix.to_list(),
        "macro_f1": matrix.to_list(),
        "validation_matrix": None,
        "metrics": metrics(matrix).to_dict(),
        "certificates": [
            certificate(n, i, leak, leak) for i, (n, leak) in enumerate(zip(names, leaks or [], strict=False))
        ],
        "timings": {
            "total_seconds": 125.0,
            "tasks": [
                {"name": n, "train_seconds": 9.5, "consolidate_seconds": 1.0, "evaluate_seconds": 2.0, "steps": 77}
                for n in names
            ],
        },
        "versions": {"python": "3.11.7"},
        "seeds": {"seed": 3},
        "config": {"model": "tiny <model>"},
    }


VALUES = [[0.2, 0.3, 0.4], [0.8, 0.35, 0.45], [0.7, 0.85, 0.5], [0.65, 0.8, 0.9]]


@pytest.fixture
def make():
    return results


@pytest.fixture
def pegp():
    return results(["trec", "bbc", "spam"], None, VALUES, leaks=[None, 2e-7, 3e-7])


@pytest.fixture
def joint():
    rows = [[0.2, 0.3, 0.4], [0.7, 0.8, 0.9]]
    return results(["trec", "bbc", "spam"], ["untouched", "joint"], rows, method="joint", title="Joint")
