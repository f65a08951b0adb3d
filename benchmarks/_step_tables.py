"""Tables of what a step of the GORP optimizer takes, in time and in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _words import NONE, Json, Stored, grid, not_yet, origin

STEP = ("gorp_step.json", "python benchmarks/gorp_step.py")
_SIZES = ("1024x1024", "4096x1024")
_BASE = "GORP's step at rank 8, refresh 10"
LIMITS = (
    *((f"{_BASE}, takes no longer than fused AdamW's on {m}", m, "adamw", 1.0) for m in _SIZES),
    (f"{_BASE}, takes no longer than fused AdamW's on the encoder's linear weights", "encoder", "adamw", 1.0),
    *((f"{_BASE}, takes at most 1/50 of galore-torch's on {m}", m, "galore-torch", 0.02) for m in _SIZES),
    *((f"with refresh 200, at most 1/5 of galore-torch's on {m}", f"{m}, T=200", "galore-torch", 0.2) for m in _SIZES),
    *((f"at rank 128, at most 1.3 times its products on {m}", f"{m}, r=128", "products", 1.3) for m in _SIZES),
)
"""Claim, case, what GORP is compared with, and the most that its time may be of the other's."""
AGAINST = ("adamw", "galore-torch", "products", "floor")


def step(stored: Stored) -> str:
    """Seconds a step, and as multiples of the others'."""
    data = stored.get(STEP[0])
    if data is None:
        return not_yet(STEP)
    rows = []
    for name, case in data["cases"].items():
        seconds = case["seconds"]
        ratios = [_ratio(case["ratio"].get(other)) for other in AGAINST]
        memory = _ratio(seconds["gorp with memory"] / seconds["gorp"])
        row = [name.split(",")[0], str(case["matrices"]), str(case["rank"]), str(case["refresh"])]
        rows.append([*row, f"{1e3 * seconds['gorp']:.2f}", *ratios, memory])
    head = ("matrices", "number", "rank", "refresh", "GORP, ms", "of fused AdamW", "of galore-torch", "of products")
    more = "Milliseconds a step over all matrices of a case, and GORP's time as a multiple of the others'. "
    table = grid((*head, "of the floor", "with a memory, of GORP"), rows)
    return f"{table}\n\n{origin(STEP, data['machine'], more)}"


def parts(stored: Stored) -> str:
    """Where the time of a step goes."""
    data = stored.get(STEP[0])
    if data is None:
        return not_yet(STEP)
    rows = []
    for name, case in data["cases"].items():
        seconds = case["seconds"]
        whole = seconds["gorp"]
        beyond = max(0.0, seconds["products"] - seconds["floor"])
        rest = max(0.0, whole - max(seconds["products"], seconds["floor"]))
        shares = [f"{100 * part / whole:.0f}" for part in (min(seconds["floor"], whole), beyond, rest)]
        rows.append([name, f"{case['gigabytes_a_second_of_the_floor']:.1f}", *shares])
    head = ("case", "floor, GB/s", "reading G, reading and writing W, %", "products beyond that, %", "all else, %")
    return f"{grid(head, rows)}\n\n{origin(STEP, data['machine'])}"


def memory(stored: Stored) -> str:
    """State and peak memory."""
    data = stored.get(STEP[0])
    if data is None:
        return not_yet(STEP)
    runs: dict[str, Any] = data["memory"]["runs"]
    base = runs["nothing"]["peak_bytes"]
    rows = [
        [name, f"{run['state_bytes'] / 1e6:.1f}", f"{(run['peak_bytes'] - base) / 1e6:.0f}"]
        for name, run in runs.items()
        if name != "nothing"
    ]
    shape = data["memory"]
    more = (
        f"{shape['layers']} layers of {shape['width']}x{shape['width']} ({shape['weights_bytes'] / 1e6:.0f} MB of "
        f"weights), {shape['steps']} steps, rank 8, refresh 10. Peak: of the process, beyond one that holds the "
        "weights and does not train; gradients are in it. "
    )
    return f"{grid(('optimizer', 'state, MB', 'peak, MB'), rows)}\n\n{origin(STEP, data['machine'], more)}"


def step_claims(stored: Stored) -> list[tuple[str, tuple[str, str], str | None]]:
    """Rows for the page of claims."""
    data = stored.get(STEP[0])
    claims = []
    for claim, case, other, limit in LIMITS:
        ratio = _find(data, case, other)
        verdict = None if ratio is None else f"{'held' if ratio <= limit else '**not held**'}: {_ratio(ratio)}"
        claims.append((claim, STEP, verdict))
    return claims


def _find(data: Json | None, case: str, other: str) -> float | None:
    return None if data is None else data["cases"].get(case, {}).get("ratio", {}).get(other)


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


STEP_TABLES: dict[str, Callable[[Stored], str]] = {"gorp-step": step, "gorp-parts": parts, "gorp-memory": memory}
