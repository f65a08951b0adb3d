"""Speed and memory of the GORP optimizer, as ratios in one run.

What is compared, on the same shapes with the same random gradients: fused AdamW, GaLore as ``galore-torch`` 1.0 has
it, GORP, GORP with a memory, the products of a GORP step alone (two a step, and two more a refresh), and the floor
that memory sets: reading the gradient, reading and writing the weight (``W += G``). All contenders of a case take
turns, a whole number of refresh periods each turn, so that refreshes are in and a drifting machine hits all alike.

Memory is that of fresh processes which train a stack of layers, one for each contender.

    python benchmarks/gorp_step.py    # writes benchmarks/results/gorp_step.json

``pip install --no-deps galore-torch==1.0`` lets it take part; without it its figures are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _common import machine, store
from growthring.optim import GORP
from growthring.subspace import Subspace

NAME = "gorp_step.json"
ENCODER = [(384, 384)] * 24 + [(1536, 384)] * 6 + [(384, 1536)] * 6
"""Linear weights of all-MiniLM-L6."""
CASES: dict[str, tuple[list[tuple[int, int]], int, int]] = {
    "1024x1024": ([(1024, 1024)] * 4, 8, 10),
    "4096x1024": ([(4096, 1024)] * 2, 8, 10),
    "encoder": (ENCODER, 8, 10),
    "1024x1024, T=200": ([(1024, 1024)] * 2, 8, 200),
    "4096x1024, T=200": ([(4096, 1024)] * 2, 8, 200),
    "1024x1024, r=128": ([(1024, 1024)] * 4, 128, 200),
    "4096x1024, r=128": ([(4096, 1024)] * 2, 128, 200),
    "4096x1024, r=128, T=10": ([(4096, 1024)] * 2, 128, 10),
}
"""Shapes, rank and refresh of each case."""


def galore() -> type[torch.optim.Optimizer] | None:
    """``galore_torch``'s AdamW; what it imports for other optimizers is not needed and stood in for."""
    for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "tensorly"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object  # type: ignore[attr-defined]
    sys.modules["tensorly"].tenalg = None  # type: ignore[attr-defined]
    sys.modules["tensorly.decomposition"] = types.ModuleType("tensorly.decomposition")
    sys.modules["tensorly.decomposition"].tucker = None  # type: ignore[attr-defined]
    try:
        from galore_torch import GaLoreAdamW
    except ImportError:
        return None
    made: type[torch.optim.Optimizer] = GaLoreAdamW
    return made


def their_group(params: list[Any], rank: int, refresh: int) -> dict[str, Any]:
    """A projected group as ``galore_torch`` takes it."""
    return {"params": params, "rank": rank, "update_proj_gap": refresh, "scale": 1.0, "proj_type": "std"}


def parameters(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    """Weights with gradients of a decaying spectrum, as those of trained networks have."""
    made = []
    for m, n in shapes:
        p = nn.Parameter(torch.randn(m, n) * 0.02)
        k = min(m, n, 64)
        p.grad = (torch.randn(m, k) * torch.arange(1, k + 1).pow(-0.6)) @ torch.randn(k, n) / k + 1e-3 * torch.randn(
            m, n
        )
        made.append(p)
    return made


def floor(shapes: list[tuple[int, int]]) -> Callable[[], None]:
    """Reading every gradient, reading and writing every weight."""
    pairs = [(p.detach(), p.grad) for p in parameters(shapes)]

    def step() -> None:
        for w, g in pairs:
            w.add_(g, alpha=1e-3)

    return step


def products(shapes: list[tuple[int, int]], rank: int, refresh: int) -> Callable[[], None]:
    """The products with large matrices of a GORP step, and of its share of refreshes, and nothing else."""
    work = []
    for p in parameters(shapes):
        m, n = p.shape
        work.append((p.detach(), p.grad, torch.randn(m, rank), torch.randn(n, rank)))
    count = 0

    def step() -> None:
        nonlocal count
        for number, (w, g, out, into) in enumerate(work):
            into_basis = (lambda g=g, p=into: g @ p) if g.shape[0] >= g.shape[1] else (lambda g=g, p=out: p.mT @ g)
            into_basis()
            w.addmm_(out, into.mT, alpha=1e-6)
            if (count + number) % refresh == 0:  # once more in the last basis, and back
                into_basis()
                _ = out.mT @ g if g.shape[0] >= g.shape[1] else g @ into
        count += 1

    return step


def contenders(shapes: list[tuple[int, int]], rank: int, refresh: int) -> dict[str, Callable[[], Any]]:
    """What takes turns."""
    options: dict[str, Any] = {"lr": 1e-4, "rank": rank, "refresh": refresh}
    memory = parameters(shapes)
    guarded = GORP(memory, **options)
    guarded.protect({p: (_space(p.shape[1]), None) for p in memory})
    made: dict[str, Callable[[], Any]] = {
        "adamw": torch.optim.AdamW(parameters(shapes), lr=1e-4, fused=True).step,
        "gorp": GORP(parameters(shapes), **options).step,
        "gorp with memory": guarded.step,
        "products": products(shapes, rank, refresh),
        "floor": floor(shapes),
    }
    theirs = galore()
    if theirs is not None:
        group = {
            "params": parameters(shapes),
            "rank": rank,
            "update_proj_gap": refresh,
            "scale": 1.0,
            "proj_type": "std",
        }
        made["galore-torch"] = theirs([group], lr=1e-4, no_deprecation_warning=True).step
    return made


def _space(dim: int) -> Subspace:
    return Subspace(dim, torch.linalg.qr(torch.randn(dim, dim // 4))[0])


def measure(shapes: list[tuple[int, int]], rank: int, refresh: int, seconds: float) -> dict[str, Any]:
    """Seconds a step of every contender, the median of its turns, and ratios of GORP to the others."""
    made = contenders(shapes, rank, refresh)
    turn = max(refresh, 20)
    for step in made.values():
        step()
    turns: dict[str, list[float]] = {name: [] for name in made}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns["gorp"]) < 3:
        for name, step in made.items():
            if name == "galore-torch" and len(turns[name]) >= 3:
                continue  # a turn of it takes as long as all others together
            start = time.perf_counter()
            for _ in range(turn):
                step()
            turns[name].append((time.perf_counter() - start) / turn)
    taken = {name: statistics.median(values) for name, values in turns.items()}
    ratios = {name: taken["gorp"] / value for name, value in taken.items() if name != "gorp"}
    return {
        "shapes": sorted({f"{m}x{n}" for m, n in shapes}),
        "matrices": len(shapes),
        "rank": rank,
        "refresh": refresh,
        "steps_a_turn": turn,
        "turns": {name: len(values) for name, values in turns.items()},
        "seconds": taken,
        "ratio": ratios,
        "gigabytes_a_second_of_the_floor": sum(m * n for m, n in shapes) * 12 / taken["floor"] / 1e9,
    }


# --- memory ---------------------------------------------------------------------------------------------------------

LAYERS, WIDTH = 6, 2048
MEMORY = ("nothing", "adamw", "galore-torch", "gorp", "gorp, layer by layer", "lora, adamw")


def memory_of(name: str, steps: int) -> dict[str, int]:
    """Train a stack of square layers with one contender in this process; its state and this process's peak."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if name == "lora, adamw":
        from peft import LoraConfig, get_peft_model

        stack = get_peft_model(stack, LoraConfig(r=8, target_modules=[str(i) for i in range(LAYERS)]))
    trained = [p for p in stack.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": 1e-4, "rank": 8, "refresh": 10}
    if name == "galore-torch":
        theirs = galore()
        assert theirs is not None
        optimizer: torch.optim.Optimizer = theirs([their_group(trained, 8, 10)], lr=1e-4, no_deprecation_warning=True)
    elif name.startswith("gorp"):
        optimizer = GORP(trained, **options)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if name == "gorp, layer by layer":
        from growthring.optim import LayerWise

        LayerWise(optimizer)  # type: ignore[arg-type]
    for _ in range(steps if name != "nothing" else 0):
        stack(torch.randn(4, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = sum(_bytes(value) for entry in optimizer.state.values() for value in entry.values())
    return {"state_bytes": state, "peak_bytes": peak_of_this_process()}


def peak_of_this_process() -> int:
    """Most memory held so far, in bytes; ``ru_maxrss`` would begin with that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bytes(value: Any) -> int:
    value = getattr(value, "ortho_matrix", value)  # what galore_torch's projector object holds
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()  # a view pins the whole of what it is a view of
    return sum(_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def memory(steps: int) -> dict[str, Any]:
    """Every contender in a process of its own."""
    found = {}
    for name in MEMORY:
        if name == "galore-torch" and galore() is None:
            continue
        command = [sys.executable, __file__, "--memory-of", name, "--steps", str(steps)]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"layers": LAYERS, "width": WIDTH, "steps": steps, "weights_bytes": 4 * LAYERS * WIDTH**2, "runs": found}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each case")
    parser.add_argument("--memory-of", choices=MEMORY, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=12, help="steps of the memory runs")
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(memory_of(given.memory_of, given.steps)))
        return
    torch.manual_seed(0)
    cases = {}
    for name, (shapes, rank, refresh) in CASES.items():
        cases[name] = measure(shapes, rank, refresh, given.seconds)
        shown = ", ".join(f"{what} {value:.3g}" for what, value in cases[name]["ratio"].items())
        print(f"{name}: GORP takes, as a multiple of: {shown}", flush=True)
    store(NAME, {"cases": cases, "memory": memory(given.steps), "machine": machine()})


if __name__ == "__main__":
    main()
