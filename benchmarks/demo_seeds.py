"""The demo on three seeds: what the README and the docs report, as measured.

Every seed draws other rows, another order and another adapter start. Settings are those of the demo, chosen on the
validation data of a fourth seed by ``demo_sweep.py``.

    python benchmarks/demo_seeds.py    # writes benchmarks/results/demo_seeds.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from _common import load, machine, store
from growthring.recipes import demo_runs, run

NAME = "demo_seeds.json"


def main() -> None:
    """Run what is missing and store after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = [] if options.fresh else load(NAME).get("runs", [])
    done = {(r["name"], r["seed"]) for r in runs}
    for seed in options.seeds:
        for name, config in demo_runs(seed):
            if (name, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                config = config.model_copy(update={"output": str(Path(folder) / name), "threads": options.threads})
                result = run(config).to_dict()
            result["config"]["output"] = None  # the temporary folder says nothing
            leaks = [c["leak"] for c in result["certificates"] if c["leak"] is not None]
            kept = ("method", "title", "seed", "rows", "matrix", "macro_f1", "metrics", "timings", "tasks", "config")
            certificates = [{k: v for k, v in c.items() if k != "sites"} for c in result["certificates"]]
            runs.append(
                {
                    "name": name,
                    **{k: result[k] for k in kept},
                    "worst_leak": max(leaks, default=None),
                    "certificates": certificates,
                }
            )
            print(name, seed, result["metrics"], flush=True)
            store(NAME, {"machine": machine(), "runs": runs})


if __name__ == "__main__":
    main()
