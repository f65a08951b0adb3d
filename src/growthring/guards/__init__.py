"""Guards: what a step must not change, and what is remembered between tasks."""

from .base import Certificate, Guard, GuardCallback, SiteCertificate
from .branches import merge_branches
from .energy import CANDIDATES, Energy, LinearSchedule, NullRatio
from .fresh_lora import FreshLoRA
from .gradient_memory import GradientMemory
from .inflora import InfLoRA
from .olora import OLoRA
from .pegp import PEGP
from .plan import TensorPlan

__all__ = [
    "CANDIDATES",
    "PEGP",
    "Certificate",
    "Energy",
    "FreshLoRA",
    "GradientMemory",
    "Guard",
    "GuardCallback",
    "InfLoRA",
    "LinearSchedule",
    "NullRatio",
    "OLoRA",
    "SiteCertificate",
    "TensorPlan",
    "merge_branches",
]
