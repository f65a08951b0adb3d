"""The parts of a pretrained model, found from its structure and one small forward pass, never from names."""

from .find import map_modules, map_towers
from .module_map import ROLES, Attention, Block, Mlp, ModuleMap, Stack

__all__ = ["ROLES", "Attention", "Block", "Mlp", "ModuleMap", "Stack", "map_modules", "map_towers"]
