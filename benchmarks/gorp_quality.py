r"""Full-rank and low-rank learners on CLINC150 and four standard tasks: search, then three seeds.

Learning rate (and energy, where a method has one) are chosen on *validation* rows of a seed of their own (100); test
splits are not scored before the choice is made. On ``clinc10`` the search trains on the first five domains only, and
takes the accuracy with all classes competing. ``standard4-reversed`` has no search: it takes the settings chosen on
``standard4``. Every finished run appends one line to the results file; started again, the benchmark goes on.

    python benchmarks/gorp_quality.py --encoder minilm-l3 --data text    # writes benchmarks/results/gorp_quality.jsonl

``docs/benchmarks.md`` says where encoders and data come from. ``clinc10`` is learned by the demo's encoder.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core is faster than one process on all
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import copy
import functools
import multiprocessing
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, TrainerCallback, set_seed

import gorp_methods as methods
import gorp_streams as streams
import growthring as gr
from _common import RESULTS
from _runs import Book, Job, final_jobs, headlines, search_jobs, training_arguments, validation_accuracy, work
from gorp_methods import Cell
from growthring.streams import demo_encoder_path

NAME = "gorp_quality.jsonl"
PROCESS = Path("/proc/self")


# --- one run ----------------------------------------------------------------------------------------------------


@functools.cache
def _stream(name: str, seed: int, sources: streams.Sources, search: bool) -> gr.TaskStream:
    return streams.build(name, seed, sources, search)


def _folder(stream: str, sources: streams.Sources) -> Path:
    if stream == "clinc10":
        return demo_encoder_path()
    assert sources.encoder is not None
    return sources.encoder


@functools.cache
def _encoder(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, dtype=torch.float32)


class StateSize(TrainerCallback):  # type: ignore[misc]
    """Bytes of the optimizer's state at the end of a task, the largest over the tasks."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up every tensor."""
        self.bytes = max(self.bytes, size_of(kwargs["optimizer"].state))


def size_of(value: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) if isinstance(value, list | tuple | set) else 0


def memory(kind: str) -> int | None:
    """Kilobytes: ``VmRSS`` now, or ``VmHWM`` at most since the last reset; ``None`` where the system does not say."""
    status = PROCESS / "status"
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(kind)), None)


def reset_peak() -> None:
    """Let ``VmHWM`` begin again from what is in use now."""
    if (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")


def trainer(job: Job, sources: streams.Sources, state: StateSize) -> gr.ContinualTrainer:
    """The trainer of one run."""
    cell, size, search = job.cell, streams.SIZES[job.cell.stream], job.phase == "search"
    method = methods.METHODS[cell.method]
    stream, folder = _stream(cell.stream, job.seed, sources, search), _folder(cell.stream, sources)
    more = {} if method.full_rank is None else {"full_rank": method.full_rank}
    set_seed(job.seed)
    made = gr.ContinualTrainer(
        copy.deepcopy(_encoder(folder)),
        stream,
        adapter=methods.adapter(method),
        optimizer=methods.optimizer(method),
        guards=methods.guards(method, job.setting, len(stream)),
        args=training_arguments(job, size),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=size.length,
        joint=method.joint,
        seed=job.seed,
        method=cell.method,
        evaluate_test=not search,
        callbacks=[state],
        **more,
    )
    _score_learned_tasks_only(made)
    return made


def _score_learned_tasks_only(made: gr.ContinualTrainer) -> None:
    """Scores of tasks that are still to come are not reported, and would take half as long as training does."""
    scorer = made._scorer
    score = scorer.scores

    def scores(task_index: int, split: str, seen: int) -> Any:
        return score(task_index, split, seen) if task_index < seen else dict.fromkeys(scorer.views)

    scorer.scores = scores  # type: ignore[method-assign]


def run(job: Job, sources: streams.Sources) -> dict[str, Any]:
    """Train, score, and say what was measured."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start, busy = time.perf_counter(), time.process_time()
    state = StateSize()
    reset_peak()
    try:
        fitted = trainer(job, sources, state)
        result = fitted.fit()
    except Exception as error:  # one setting that diverges must not end all runs; the line says what happened
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
    found = result.to_dict()
    views = streams.VIEWS[job.cell.stream]
    spent = {}
    for part in ("prepare", "train", "consolidate", "evaluate"):
        spent[f"{part}_seconds"] = round(sum(t.get(f"{part}_seconds", 0.0) for t in found["timings"]["tasks"]), 2)
    if job.phase == "search":
        score = validation_accuracy(fitted, *views[0])
        return {"validation_aa": score, **spent, "seconds": round(time.perf_counter() - start, 2)}
    papers = found["certificates"]
    read = {(view["classifier"], view["given"]): view for view in found["views"]}
    return {
        "views": {given: headlines(read[classifier, given]) for classifier, given in views},
        "matrices": {given: _rounded(read[classifier, given]["matrix"]) for classifier, given in views},
        "leak": max((c["leak"] for c in papers if c["leak"] is not None), default=None),
        "kept": all(known) if (known := [c["kept"] for c in papers if c["kept"] is not None]) else None,
        "free": papers[-1]["free"] / papers[-1]["dims"] if papers and papers[-1]["dims"] else None,
        "trained": sum(p.numel() for p in fitted.model.parameters() if p.requires_grad),
        "state_bytes": state.bytes,
        "guard_bytes": sum(size_of(guard.state_dict()) for guard in fitted.guards),
        "peak_kilobytes": memory("VmHWM"),
        **spent,
        "cpu_seconds": round(time.process_time() - busy, 2),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _rounded(matrix: Iterable[Iterable[float | None]]) -> list[list[float | None]]:
    return [[None if value is None else round(value, 4) for value in row] for row in matrix]


# --- all runs ---------------------------------------------------------------------------------------------------


def chosen_on(cell: Cell) -> Cell:
    """The cell whose search decides for this one."""
    return replace(cell, stream=streams.CHOSEN_ON.get(cell.stream, cell.stream))


def names(known: Iterable[str]) -> Any:
    """A parser of comma-separated names."""
    known = tuple(known)

    def parse(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: choose among {', '.join(known)}")
        return given

    return parse


def main() -> None:
    """Search, choose, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of paraphrase-MiniLM-L3-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder with clinc150, dbpedia, ...")
    parser.add_argument("--streams", type=names(streams.SIZES), default=list(streams.SIZES), help="comma-separated")
    parser.add_argument("--methods", type=names(methods.METHODS), default=list(methods.METHODS), help="likewise")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: search only")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--list", action="store_true", help="say what is left to do, and do nothing")
    options = parser.parse_args()
    sources = streams.Sources(encoder=options.encoder, data=options.data)
    usable = []
    for name in options.methods:
        if (lacking := methods.missing(name)) is None:
            usable.append(name)
        else:
            print(f"{name} left out: there is no {lacking}", flush=True)
    cells = list(methods.cells(options.streams, usable))
    searched = list(dict.fromkeys(map(chosen_on, cells)))
    if options.fresh:
        options.out.unlink(missing_ok=True)
    book = Book(
        options.out,
        streams.SIZES,
        options.retry,
        search_tasks=dict(streams.SEARCH_TASKS),
        chosen_on=dict(streams.CHOSEN_ON),
        chosen_by={name: " given ".join(views[0]) for name, views in streams.VIEWS.items()},
    )
    if options.list:
        left = len(final_jobs(cells, options.seeds, book, chosen_on))
        trying = len(search_jobs(searched, book, methods.next_setting))
        print(f"{len(cells)} cells; the search of {trying} is not over; {left} final runs ready")
        return
    deadline = time.monotonic() + 60 * options.budget_minutes
    measure = functools.partial(run, sources=sources)
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while jobs := search_jobs(searched, book, methods.next_setting):
            if not work(jobs, book, measure, pool, deadline):
                return
        work(final_jobs(cells, options.seeds, book, chosen_on), book, measure, pool, deadline)


if __name__ == "__main__":
    main()
