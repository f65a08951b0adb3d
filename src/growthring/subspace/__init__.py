"""Ground floor: pure tensor algebra. It knows no model, no trainer and no process group."""

from ._precision import full_precision, solver_device, widest_dtype
from .basis import Growth, Subspace
from .batching import SubspaceBank
from .health import Health, check_health, numerical_rank
from .moments import SecondMoment
from .range_finders import RANGE_FINDERS, RangeFinder, find_range

__all__ = [
    "RANGE_FINDERS",
    "Growth",
    "Health",
    "RangeFinder",
    "SecondMoment",
    "Subspace",
    "SubspaceBank",
    "check_health",
    "find_range",
    "full_precision",
    "numerical_rank",
    "solver_device",
    "widest_dtype",
]
