"""Guards: what a step must not change, and what is remembered between tasks."""

from .base import Certificate, Guard, GuardCallback, SiteCertificate
from .energy import CANDIDATES, Energy, LinearSchedule
from .pegp import PEGP

__all__ = [
    "CANDIDATES",
    "PEGP",
    "Certificate",
    "Energy",
    "Guard",
    "GuardCallback",
    "LinearSchedule",
    "SiteCertificate",
]
