"""growthring: fine-tune a pretrained model on one task after another without losing what it knew."""

from importlib.metadata import PackageNotFoundError, version

from growthring.guards import PEGP, Certificate, Guard, LinearSchedule
from growthring.streams import Task, TaskStream
from growthring.subspace import SecondMoment, Subspace
from growthring.trainer import ContinualTrainer, RunResult

try:
    __version__ = version("growthring")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "PEGP",
    "Certificate",
    "ContinualTrainer",
    "Guard",
    "LinearSchedule",
    "RunResult",
    "SecondMoment",
    "Subspace",
    "Task",
    "TaskStream",
]
