"""Projected optimizers: how a gradient becomes a step."""

from ._options import ParameterPlan
from .factory import GORPFactory
from .galore import GaLore
from .gorp import GORP, Observer
from .layerwise import LayerWise

__all__ = ["GORP", "GORPFactory", "GaLore", "LayerWise", "Observer", "ParameterPlan"]
