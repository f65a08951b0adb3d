r"""In-domain and out-of-domain accuracy of robust fine-tuning on three benches: search, then three seeds.

Learning rate and strength of every method are chosen on *validation* rows of the learned domain under a seed of their
own (100), in runs of one epoch. Only when all choices of a bench are made, and only after a final run is trained, the
other domains are loaded and scored. LoRA is trained at every learning rate; with the WiSE curve of each it makes the
frontier. Every finished run appends one line to the results file; started again, the benchmark goes on.

    python benchmarks/robust_quality.py --encoder minilm-l3 --vit vit-small --data text --wheels wheels \
        --emoji emoji        # writes benchmarks/results/robust_quality.jsonl

``docs/benchmarks.md`` says where encoders and data come from. A bench without its files is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core is faster than one process on all
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import copy
import dataclasses
import functools
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, set_seed

import robust_data as data
import robust_methods as methods
from _common import RESULTS
from _runs import Book, Job, Setting, final_jobs, next_setting, search_jobs, training_arguments, work
from growthring.trainer import RobustTrainer
from robust_methods import Cell

NAME = "robust_quality.jsonl"
BLOCKS, ADAPTED = 9, 3
"""Of the image encoder: blocks that are used (later ones tell these images apart no better), and last ones adapted."""


@functools.cache
def _task(bench: str, seed: int, sources: data.Sources) -> tuple[Any, data.Loaders]:
    return data.build(bench, seed, sources)


@functools.cache
def _encoder(folder: Path, image: bool) -> torch.nn.Module:
    encoder: torch.nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32)
    if image:
        encoder.encoder.layer = encoder.encoder.layer[:BLOCKS]
        encoder.config.num_hidden_layers = BLOCKS
    return encoder


def trainer(job: Job, sources: data.Sources) -> RobustTrainer:
    """The trainer of one run."""
    method, size = methods.METHODS[job.cell.method], data.SIZES[job.cell.stream]
    if job.phase == "search":
        size = dataclasses.replace(size, epochs=1)
    task, _ = _task(job.cell.stream, job.seed, sources)
    image = job.cell.stream == "emoji"
    folder = sources.vit if image else sources.encoder
    assert folder is not None
    options: dict[str, Any] = {"image_size": size.length}
    if not image:
        options = {"tokenizer": AutoTokenizer.from_pretrained(folder), "max_length": size.length}
    encoder = copy.deepcopy(_encoder(folder, image))
    encoder.requires_grad_(False)
    linear = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and "layer." in name
    }
    if image:
        ends = tuple(f"layer.{block}." for block in range(BLOCKS - ADAPTED, BLOCKS))
        linear = {name: module for name, module in linear.items() if any(end in name for end in ends)}
    if method.adapter == "linear":
        for module in linear.values():
            module.weight.requires_grad_(True)
    arguments = training_arguments(job, size)
    arguments.weight_decay = 0.0  # none of these methods shrinks weights toward zero
    guards = [method.guard(job.setting.energy)] if method.guard is not None else []
    set_seed(job.seed)
    made = RobustTrainer(
        encoder,
        task,
        start="scratch" if method.scratch else "probe",
        adapter=methods.adapter(method, list(linear)),
        guards=guards,
        args=arguments,
        seed=job.seed,
        method=job.cell.method,
        evaluate_test=False,
        **options,
    )
    if method.general:
        texts = data.general_texts(job.cell.stream, sources)
        tokens = options["tokenizer"](
            texts, truncation=True, max_length=size.length, padding=True, return_tensors="pt"
        )
        rows = range(0, len(texts), 32)
        names = ("input_ids", "attention_mask")
        batches = [{name: tokens[name][i : i + 32] for name in names} for i in rows]
        for guard in guards:
            guard.attach(made.model)
            guard.begin_task("general")
            guard.end_task("general", batches)
    return made


def run(job: Job, sources: data.Sources) -> dict[str, Any]:
    """Train, score, and say what was measured; other domains are loaded by final runs alone, after training."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    try:
        fitted = trainer(job, sources)
        result = fitted.fit()
        if job.phase == "search":
            score = fitted.score([fitted.task], "validation")[fitted.task.name]
            return {"validation_aa": score, "seconds": round(time.perf_counter() - start, 2)}
        others = {name: load() for name, load in _task(job.cell.stream, job.seed, sources)[1].items()}
        places = [1.0]
        if job.cell.method in methods.CURVES:
            places = [*methods.ALPHAS[job.cell.stream], 1.0]
        if job.cell.method == "lora" and job.setting.learning_rate == methods.LOW_RANK_RATES[0]:
            places = [0.0, *places]  # the untouched model with its probe
        points = [fitted.point(others, alpha=alpha).to_dict() for alpha in places]
    except Exception as error:  # one setting that diverges must not end all runs; the line says what happened
        return {"error": f"{type(error).__name__}: {error}", "seconds": round(time.perf_counter() - start, 2)}
    papers = result.certificates
    return {
        "points": points,
        "kept": all(c.kept for c in papers) if papers and all(c.kept is not None for c in papers) else None,
        "train_seconds": round(sum(t["train_seconds"] for t in result.timings["tasks"]), 2),
        "seconds": round(time.perf_counter() - start, 2),
    }


def following(cell: Cell, scores: Any) -> Setting | None:
    """The next setting of a method's search."""
    method = methods.METHODS[cell.method]
    return next_setting(method.rates, method.strengths, scores)


def frontier_jobs(cells: list[Cell], seeds: range, book: Book) -> list[Job]:
    """Methods of the frontier, at every learning rate and seed."""
    jobs = [
        Job("final", cell, seed, Setting(rate))
        for seed in seeds
        for cell in cells
        if cell.method in methods.FRONTIER
        for rate in methods.METHODS[cell.method].rates
    ]
    return [job for job in jobs if job.key not in book.done]


def main() -> None:
    """Search, then final runs, bench by bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(data.Sources):
        parser.add_argument(f"--{field.name}", type=Path)
    parser.add_argument("--benches", nargs="+", choices=list(data.SIZES))
    parser.add_argument("--methods", nargs="+", choices=list(methods.METHODS), default=list(methods.METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    asked = parser.parse_args()
    sources = data.Sources(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(data.Sources)})
    benches = asked.benches or sources.benches()
    deadline = time.monotonic() + 60 * asked.budget_minutes
    book = Book(asked.out, data.SIZES, rank=methods.RANK, development=data.DEVELOPMENT)
    measure = functools.partial(run, sources=sources)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.workers, mp_context=context) as pool:
        for bench in benches:
            images = bench == "emoji"  # of which there are none of another kind
            cells = [Cell(bench, name) for name in asked.methods if not (images and methods.METHODS[name].general)]
            while jobs := search_jobs(cells, book, following):
                if not work(jobs, book, measure, pool, deadline):
                    return
            others = [cell for cell in cells if cell.method not in methods.FRONTIER]
            jobs = [*frontier_jobs(cells, range(asked.seeds), book), *final_jobs(others, range(asked.seeds), book)]
            if not work(sorted(jobs, key=lambda job: job.seed), book, measure, pool, deadline):
                return


if __name__ == "__main__":
    main()
