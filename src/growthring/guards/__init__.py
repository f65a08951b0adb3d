"""Guards: what a step must not change, and what is remembered between tasks."""

from .base import Certificate, DeviationCertificate, Guard, GuardCallback, SiteCertificate
from .branches import merge_branches
from .directional import Directional
from .energy import CANDIDATES, Energy, LinearSchedule, NullRatio
from .fresh_lora import FreshLoRA
from .ftp import FTP
from .gradient_memory import GradientMemory
from .inflora import InfLoRA
from .l2sp import L2SP
from .measure import DeviationTable, LayerDeviation, deviation
from .olora import OLoRA
from .pegp import PEGP
from .plan import TensorPlan
from .radius import Radius
from .spd import SPD
from .tpgm import TPGM

__all__ = [
    "CANDIDATES",
    "FTP",
    "L2SP",
    "PEGP",
    "SPD",
    "TPGM",
    "Certificate",
    "DeviationCertificate",
    "DeviationTable",
    "Directional",
    "Energy",
    "FreshLoRA",
    "GradientMemory",
    "Guard",
    "GuardCallback",
    "InfLoRA",
    "LayerDeviation",
    "LinearSchedule",
    "NullRatio",
    "OLoRA",
    "Radius",
    "SiteCertificate",
    "TensorPlan",
    "deviation",
    "merge_branches",
]
