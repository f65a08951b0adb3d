"""Tables of ``robust_quality.py`` and ``largo_step.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from _words import NONE, Json, Stored, counted, energy_words, grid, not_yet, origin, seeds_of, spread
from growthring.evaluation import Frontier, effective_robustness, frontier

QUALITY = ("robust_quality.jsonl", "python benchmarks/robust_quality.py")
STEP = ("largo_step.json", "python benchmarks/largo_step.py")
BASELINE = "lora"
"""Its learning rates and WiSE curves are the frontier."""
LIMITS = {"delta": 0.10, "product": 0.03}
"""What a step with a radius may cost beyond LoRA's."""
VARIANTS = {"delta": "delta, radius", "product": "product, radius"}
TITLES: Mapping[str, str] = {
    "lora": "LoRA",
    "linear": "all linear weights (LP-FT)",
    "linear-scratch": "all linear weights, head from scratch",
    "l2-sp": "L2-SP",
    "ftp": "FTP",
    "tpgm": "TPGM",
    "spd": "SPD",
    "digrap": "DiGraP",
    "pissa": "PiSSA",
    "milora": "MiLoRA",
    "largo-f": "LARGO-F, principal",
    "largo-f-minor": "LARGO-F, minor",
    "largo-p": "LARGO-P, principal",
    "largo-p-activation": "LARGO-P, activation",
    "lora-outside": "LoRA kept out of general text",
    "largo-d": "LARGO-D, principal",
}
READINGS = ("largo-f", "largo-f-minor", "largo-p", "largo-p-activation", "largo-d")

BENCHES = ("sentiment", "topics", "emoji")
Point = tuple[float, float]


class Bench:
    """The finished runs of one bench.

    Args:
        stored: What is stored.
        name: The bench.
    """

    def __init__(self, stored: Stored, name: str) -> None:
        lines = [line for line in stored.lines(QUALITY[0]) if line.get("stream") == name]
        runs = {line["key"]: line for line in lines}.values()
        self.failed = [r for r in runs if "error" in r]
        self.search = [r for r in runs if r["phase"] == "search" and "error" not in r]
        self.finals = [r for r in runs if r["phase"] == "final" and "error" not in r]

    def rate(self, method: str) -> float | None:
        """The learning rate that validation rows chose."""
        own = [r for r in self.search if r["method"] == method]
        if not own:
            return None
        best = max(own, key=lambda r: (r["validation_aa"], r["energy"] or 0.0, -r["learning_rate"]))
        return float(best["learning_rate"])

    def chosen(self, method: str) -> list[Json]:
        """Final runs with the chosen settings."""
        rate = self.rate(method)
        return [r for r in self.finals if r["method"] == method and r["learning_rate"] == rate]

    def settings(self, method: str) -> Iterator[tuple[float, list[Json]]]:
        """Final runs of every learning rate that a method has."""
        rates = sorted({r["learning_rate"] for r in self.finals if r["method"] == method})
        for rate in rates:
            yield rate, [r for r in self.finals if (r["method"], r["learning_rate"]) == (method, rate)]

    def baseline(self, seed: int | None = None) -> Frontier | None:
        """The frontier: of one seed, or of means over seeds, which has less luck in it."""
        corners: list[Point] = []
        for _, runs in self.settings(BASELINE):
            for alpha in sorted({p["alpha"] for r in runs for p in r["points"]}):
                points = [at(r, alpha) for r in runs if seed in (None, r["seed"])]
                if points:
                    corners.append(mean(points))
        return frontier(corners) if corners else None

    def height(self, runs: Sequence[Json], alpha: float = 1.0) -> float | None:
        """Height of the mean over seeds above the frontier of means."""
        line = self.baseline()
        return effective_robustness(mean([at(r, alpha) for r in runs]), line) if runs and line is not None else None

    def above(self, runs: Sequence[Json], alpha: float = 1.0) -> int:
        """Seeds that lie above the frontier of the same seed."""
        lines = [(r, self.baseline(r["seed"])) for r in runs]
        return sum(line is not None and effective_robustness(at(r, alpha), line) > 0 for r, line in lines)


def place(run: Json, alpha: float = 1.0) -> Json:
    """What was measured of a run at a place of its curve."""
    found: Json = next(p for p in run["points"] if p["alpha"] == alpha)
    return found


def at(run: Json, alpha: float = 1.0) -> Point:
    """ID test accuracy and mean OOD accuracy."""
    found = place(run, alpha)
    return found["id_test"], statistics.fmean(found["ood"].values())


def mean(points: Sequence[Point]) -> Point:
    """The mean of some points."""
    return statistics.fmean(p[0] for p in points), statistics.fmean(p[1] for p in points)


def quality(name: str) -> Callable[[Stored], str]:
    """The table of one bench."""

    def table(stored: Stored) -> str:
        bench = Bench(stored, name)
        if not bench.finals:
            return not_yet(QUALITY)
        about = next(line for line in stored.lines(QUALITY[0]) if line["phase"] == "about")
        domains = list(bench.finals[0]["points"][0]["ood"])
        body = [_start(bench, domains)]
        for method, title in TITLES.items():
            body.append([title, *_row(bench, bench.chosen(method), domains)])
        for method in TITLES:
            runs = bench.chosen(method)
            between = {p["alpha"] for r in runs for p in r["points"]} - {0.0, 1.0}
            for alpha in sorted(between):
                body.append([f"{TITLES[method]}, WiSE {alpha:g}", *_row(bench, runs, domains, alpha)])
        head = (
            "method",
            "learning rate",
            "strength",
            "ID",
            "OOD mean",
            "above frontier",
            "seeds above",
            *domains,
            "deviation",
        )
        size = about["sizes"][name]
        lost = f"{counted(len(bench.failed), 'run')} failed and left out. " if bench.failed else ""
        kind = "A development bench. " if name in about["development"] else "Not a development bench. "
        words = (
            f"{kind}Percent. {size['train']} training rows, {size['epochs']} epochs, batch {size['batch']}. "
            f"{counted(len(bench.search), 'run')} of the search on validation rows of seed {about['search_seed']}. "
            f"{seeds_of(bench.finals)}{lost}"
        )
        return f"{grid(head, body)}\n\n{origin(QUALITY, about['machine'], words)}"

    return table


def _start(bench: Bench, domains: Sequence[str]) -> list[str]:
    """The untouched model with its probe: the beginning of the curve of one LoRA."""
    runs = [r for r in bench.finals if any(p["alpha"] == 0 for p in r["points"])]
    return ["untouched, linear probe", *_row(bench, runs, domains, 0.0, settings=False)]


def _row(
    bench: Bench, runs: Sequence[Json], domains: Sequence[str], alpha: float = 1.0, settings: bool = True
) -> list[str]:
    rates = "/".join(f"{x:g}" for x in sorted({r["learning_rate"] for r in runs})) if settings else ""
    strengths = "/".join(sorted({energy_words(r["energy"]) for r in runs})) if settings else ""
    places = [place(r, alpha) for r in runs]
    points = [at(r, alpha) for r in runs]
    return [
        rates or NONE,
        strengths or NONE,
        spread([p[0] for p in points]),
        spread([p[1] for p in points]),
        spread([bench.height(runs, alpha)], sign=True),
        f"{bench.above(runs, alpha)} of {len(runs)}" if runs else NONE,
        *(spread([p["ood"][domain] for p in places]) for domain in domains),
        spread([p["deviation"] for p in places], scale=1.0),
    ]


def steps(stored: Stored) -> str:
    """What a step costs beside LoRA's."""
    found = stored.get(STEP[0])
    if found is None:
        return not_yet(STEP)
    body = [
        [
            r["shape"],
            r["variant"],
            str(r["batch_tokens"]),
            f"{r['lora_step_ms']:.1f}",
            f"{r['step_ms']:.1f}",
            _percent(r["overhead"]),
            f"{r['lora_bytes'] / 1e6:.2f}",
            f"{r['bytes'] / 1e6:.2f}",
        ]
        for r in found["steps"]
    ]
    head = ("model", "variant", "tokens a batch", "LoRA step, ms", "step, ms", "overhead, %", "LoRA, MB", "MB")
    more = "MB: what training holds beyond the base model (parameters, gradients, buffers, optimizer, guard). "
    return f"{grid(head, body, left=2)}\n\n{origin(STEP, found['machine'], more)}"


def decompositions(stored: Stored) -> str:
    """Seconds for the singular vectors of a layer."""
    found = stored.get(STEP[0])
    if found is None:
        return not_yet(STEP)
    kinds = ("exact", "randomised", "cached")
    body = [["×".join(map(str, r["shape"])), *(f"{r[f'{k}_seconds']:.3f}" for k in kinds)] for r in found["svd"]]
    head = ("weight", "exact, s", "randomised, s", "from the cache, s")
    return f"{grid(head, body)}\n\n{origin(STEP, found['machine'], 'Seconds to adapt one layer. ')}"


def _percent(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def verdicts(stored: Stored) -> str:
    """How each method stands to the frontier, bench by bench, and what its choice is by."""
    benches = {name: Bench(stored, name) for name in BENCHES}
    if not any(bench.finals for bench in benches.values()):
        return not_yet(QUALITY)
    about = next(line for line in stored.lines(QUALITY[0]) if line["phase"] == "about")
    body = []
    for method, title in TITLES.items():
        found = {name: bench.chosen(method) for name, bench in benches.items()}
        cells = []
        for name, runs in found.items():
            cells.append(_verdict(benches[name], runs))
        scores = [statistics.fmean(map(score, found[name])) for name in about["development"] if found[name]]
        whole = len(scores) == len(about["development"])
        body.append([title, *cells, f"{100 * statistics.fmean(scores):.1f}" if whole else NONE])
    head = ("method", *(f"above the frontier, {name}" for name in BENCHES), "development score")
    more = "Development score: the mean of ID validation and OOD mean over the development benches, percent. "
    return f"{grid(head, body)}\n\n{origin(QUALITY, about['machine'], more)}"


def score(run: Json) -> float:
    """What the default reading is chosen by, of one run on a development bench."""
    return (place(run)["id_validation"] + at(run)[1]) / 2


ROBUST_TABLES: Mapping[str, Callable[[Stored], str]] = {
    "robust-sentiment": quality("sentiment"),
    "robust-topics": quality("topics"),
    "robust-emoji": quality("emoji"),
    "robust-verdicts": verdicts,
    "largo-step": steps,
    "largo-svd": decompositions,
}


def robust_claims(stored: Stored) -> list[tuple[str, tuple[str, str], str | None]]:
    """Rows for the page of claims."""
    rows: list[tuple[str, tuple[str, str], str | None]] = []
    for method in READINGS:
        words = []
        for name in BENCHES:
            bench = Bench(stored, name)
            runs = bench.chosen(method)
            if runs:
                words.append(f"{name}: {_verdict(bench, runs)}")
        claim = f"{TITLES[method]} lies above the frontier of LoRA's learning rates and WiSE curves"
        rows.append((claim, QUALITY, "; ".join(words) or None))
    found: Any = stored.get(STEP[0])
    for form, limit in LIMITS.items():
        measured = None
        if found is not None:
            own = {r["shape"]: r["overhead"] for r in found["steps"] if r["variant"] == VARIANTS[form]}
            verdict = "reached" if max(own.values()) <= limit else "**not reached**"
            measured = f"{verdict}: " + ", ".join(f"{_percent(v)} % ({shape})" for shape, v in own.items())
        rows.append((f"a LARGO step in {form} form costs at most {100 * limit:.0f} % over LoRA's", STEP, measured))
    return rows


def _verdict(bench: Bench, runs: Sequence[Json]) -> str:
    """Above the frontier or not: the mean, and how many seeds are above their own."""
    height = bench.height(runs)
    if height is None:
        return NONE
    above = bench.above(runs)
    word = "yes" if height > 0 and above == len(runs) else "**no**" if height <= 0 else "**not every seed**"
    return f"{word} ({spread([height], sign=True)}; {above} of {len(runs)} seeds)"
