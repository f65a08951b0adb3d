r"""What the zero-shot guard keeps of a dual encoder: classes that nothing is trained on, before and after a stream.

The dual encoder is the small one that ``build_clip.py`` makes. It can tell ten garments apart before the stream, from
their prompts alone. Four of them are the reference, the other six are learned, two a task, class-incremental. Only the
image tower is adapted. The learning rate of every method is chosen on *validation* rows of a seed of its own (100);
there also the reference is one of validation rows, so no test row is scored before the choice is made.

A run is stored when it ends; started again, the benchmark goes on where it was.

    python benchmarks/zero_shot.py --model models/clip-small --fashion fashion-mnist
    # writes benchmarks/results/zero_shot.json

``build_clip.py`` takes its images from the end of the training file; the images here are from its start.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small batches gain nothing from a second core
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments

import growthring as gr
from _common import RESULTS, load, machine, store
from growthring.adapters import PromptTokensConfig
from growthring.evaluation import AccuracyMatrix, average, last, transfer
from growthring.guards import Certificate
from pegp_streams import GARMENTS, read_idx

NAME = "zero_shot.json"
SEARCH_SEED = 100
TEMPLATE = "a photo of a {}."
REFERENCE = (0, 1, 2, 3)
TASKS = ((4, 6), (5, 7), (8, 9))
"""Classes by their published numbers; those of a task resemble each other."""
SIZES = {"train": 192, "validation": 80, "test": 100, "reference": 96, "reference_test": 160, "steps": 12, "batch": 16}
"""Rows a task, rows of the reference (whose features the guard collects), steps a task, rows a step."""
POOLS = {"train": 400, "validation": 100, "test": 300}
"""Fixed rows of each class from which a seed draws."""


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: What the results call it.
        title: The method in words.
        prompts: Learned prompts train; else LoRA.
        guard: ``None``, ``"tasks"`` (learned tasks are guarded) or ``"reference"`` (from the start the reference too).
        rates: Learning rates that the search tries; none: the rate chosen for ``SAME``.
    """

    name: str
    title: str
    prompts: bool
    guard: str | None
    rates: tuple[float, ...]


_LORA, _PROMPTS = (1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2, 3e-2)
METHODS = (
    Method("lora", "LoRA, unguarded", False, None, _LORA),
    Method("lora-same-rate", "LoRA, unguarded, same rate as with the reference", False, None, ()),
    Method("lora-pegp", "LoRA, PEGP", False, "tasks", _LORA),
    Method("lora-zero-shot", "LoRA, PEGP with the reference", False, "reference", _LORA),
    Method("prompts", "Prompts, unguarded", True, None, _PROMPTS),
    Method("prompts-zero-shot", "Prompts, PEGP with the reference", True, "reference", _PROMPTS),
)
SAME = "lora-zero-shot"
PROMPTS = 8
ENERGY: Mapping[str, float] = {"lora_A": 0.99, "lora_B": 0.9, "prompt_key": 0.99, "prompt_value": 0.9}


class FromTheFirstTask(gr.PEGP):
    """PEGP that looks away while the reference is shown: the same run, without the zero-shot guard."""

    def end_task(self, task: str | None, batches: Any) -> Certificate:
        """As PEGP, but for the reference."""
        if task != "reference":
            return super().end_task(task, batches)
        return Certificate(self.name, task, 0, 0, None, None, 0.0, 0, 0, None, 0, 0, ())


# --- one run --------------------------------------------------------------------------------------------------------


@functools.cache
def pools(folder: Path) -> dict[str, dict[int, list[tuple[Any, str]]]]:
    """Images of every class: training and validation rows from the start of the training file, test rows."""
    found: dict[str, dict[int, list[tuple[Any, str]]]] = {}
    for prefix, splits in (("train", ("train", "validation")), ("t10k", ("test",))):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        start = 0
        for split in splits:
            end = start + POOLS[split]
            found[split] = {
                c: [(images[i], GARMENTS[c]) for i in np.flatnonzero(labels == c)[start:end]] for c in range(10)
            }
            start = end
    return found


def task(folder: Path, name: str, classes: tuple[int, ...], test: str = "test") -> gr.Task:
    """One task of all rows of the pools; ``test`` says from which pool its test rows are."""
    rows = {split: [row for c in classes for row in pool[c]] for split, pool in pools(folder).items()}
    validation = rows["validation"] if test == "test" else None
    return gr.Task(name, rows["train"], rows[test], validation, labels=[GARMENTS[c] for c in classes])


def stream(folder: Path, seed: int, search: bool) -> gr.TaskStream:
    """Three tasks and the reference, with the rows that ``seed`` draws."""
    size = {split: SIZES[split] for split in ("train", "validation", "test")}
    tasks = [
        task(folder, " and ".join(GARMENTS[c] for c in classes), classes).limit(**size, seed=seed) for classes in TASKS
    ]
    known = task(folder, "known garments", REFERENCE, "validation" if search else "test")
    known = known.limit(train=SIZES["reference"], test=SIZES["reference_test"], seed=seed)
    return gr.TaskStream(tasks, scenario="class", seed=seed, name="garments", reference=known)


def adapter(method: Method) -> PeftConfig:
    """What trains, all of it in the image tower."""
    if method.prompts:
        return PromptTokensConfig(num_tokens=PROMPTS, tower="image")
    return LoraConfig(r=8, lora_alpha=16, target_modules=r"vision_model\..*\.(q_proj|k_proj|v_proj|o_proj|fc1)")


def guards(method: Method) -> list[gr.PEGP]:
    """What guards it."""
    if method.guard is None:
        return []
    energy = {kind: share for kind, share in ENERGY.items() if kind.startswith("prompt") == method.prompts}
    kind = gr.PEGP if method.guard == "reference" else FromTheFirstTask
    return [kind(energy, samples=SIZES["reference"], probes=0)]


def trainer(
    method: Method, rate: float, seed: int, model: Path, tasks: gr.TaskStream, search: bool = False
) -> gr.ContinualTrainer:
    """The trainer of one run."""
    return gr.ContinualTrainer(
        model,
        tasks,
        adapter=adapter(method),
        guards=guards(method),
        args=TrainingArguments(
            output_dir=tempfile.gettempdir(),
            learning_rate=rate,
            per_device_train_batch_size=SIZES["batch"],
            max_steps=SIZES["steps"],
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        ),
        prompt_template=TEMPLATE,
        seed=seed,
        method=method.name,
        title=method.title,
        evaluate_test=not search,
        evaluate_validation=search,
    )


def run(method: Method, rate: float, seed: int, model: Path, folder: Path, search: bool) -> dict[str, Any]:
    """Train, score, and say what was measured."""
    start = time.perf_counter()
    result = trainer(method, rate, seed, model, stream(folder, seed, search), search).fit()
    about = {"method": method.name, "seed": seed, "learning_rate": rate}
    spent = {"seconds": round(time.perf_counter() - start, 1)}
    if search:
        assert result.validation is not None
        return about | {"validation_last": statistics.fmean(result.validation.to_list()[-1])} | spent
    assert result.mtil is not None
    papers = [c for c in result.certificates if c.leak is not None]
    return about | {
        "title": method.title,
        "mtil": result.mtil,
        "matrix": result.matrix.to_list(),
        "reference": result.reference,
        "leak": max((c.leak for c in papers), default=None),
        "kept": all(c.kept for c in papers) if papers else None,
        **spent,
    }


def untouched(seed: int, model: Path, folder: Path) -> dict[str, Any]:
    """What the same figures are when nothing is learned: LoRA that was not trained changes nothing."""
    start = time.perf_counter()
    tasks = stream(folder, seed, search=False)
    assert tasks.reference is not None

    def accuracies(fitted: gr.ContinualTrainer, seen: int) -> list[float]:
        pairs = [(fitted.stream.encode(i, "test"), fitted.predict(i, seen=seen)) for i in range(len(fitted.stream))]
        return [statistics.fmean(t == p for t, p in zip(*pair, strict=True)) for pair in pairs]

    learned = trainer(METHODS[0], 1e-3, seed, model, tasks)
    rows = [accuracies(learned, seen) for seen in range(len(tasks) + 1)]
    matrix = AccuracyMatrix([t.name for t in tasks], values=rows)
    known = accuracies(trainer(METHODS[0], 1e-3, seed, model, gr.TaskStream([tasks.reference], seed=seed)), 0)
    return {
        "method": "untouched",
        "seed": seed,
        "learning_rate": None,
        "title": "Untouched model",
        "mtil": {"transfer": transfer(matrix), "average": average(matrix), "last": last(matrix)},
        "matrix": rows,
        "reference": known * len(rows),
        "leak": None,
        "kept": None,
        "seconds": round(time.perf_counter() - start, 1),
    }


# --- all of them ----------------------------------------------------------------------------------------------------


def choose(tried: list[dict[str, Any]], method: Method) -> float:
    """The rate with the best validation accuracy at the end of the stream; of equals the lower one."""
    mine = [r for r in tried if r["method"] == (method.name if method.rates else SAME)]
    return float(max(mine, key=lambda r: (r["validation_last"], -r["learning_rate"]))["learning_rate"])


def main() -> None:
    """Search, choose, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dual encoder (build_clip.py)")
    parser.add_argument("--fashion", type=Path, required=True, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: search only")
    parser.add_argument("--out", default=NAME, help=f"file in {RESULTS.name}; default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    setting = {"sizes": SIZES, "energy": dict(ENERGY), "search_seed": SEARCH_SEED}
    setting |= {"reference": [GARMENTS[c] for c in REFERENCE], "tasks": [[GARMENTS[c] for c in t] for t in TASKS]}
    data = {} if options.fresh else load(options.out)
    if data and any(data.get(key) != value for key, value in setting.items()):
        raise SystemExit(f"{options.out} was made with other settings: give --fresh, or another --out")
    data = data or {"machine": machine(), **setting, "search": [], "runs": []}

    def measure(where: str, name: str, rate: float | None, seed: int, made: Callable[[], dict[str, Any]]) -> None:
        if (name, seed, rate) in {(r["method"], r["seed"], r["learning_rate"]) for r in data[where]}:
            return
        data[where].append(made())
        store(options.out, data)
        print({k: v for k, v in data[where][-1].items() if k != "matrix"}, flush=True)

    files = (options.model, options.fashion)
    for method in METHODS:
        for rate in method.rates:
            made = functools.partial(run, method, rate, SEARCH_SEED, *files, search=True)
            measure("search", method.name, rate, SEARCH_SEED, made)
    rates = {m.name: choose(data["search"], m) for m in METHODS}
    data["runs"] = [r for r in data["runs"] if r["learning_rate"] == rates.get(r["method"], r["learning_rate"])]
    for seed in options.seeds:
        measure("runs", "untouched", None, seed, functools.partial(untouched, seed, *files))
        for method in METHODS:
            rate = rates[method.name]
            measure("runs", method.name, rate, seed, functools.partial(run, method, rate, seed, *files, search=False))


if __name__ == "__main__":
    main()
