"""Round: how codes are chosen for a format, one algorithm a file; roundings chain."""

from qjax.rounding.descend import descend
from qjax.rounding.ldlq import ldlq
from qjax.rounding.nearest import nearest
from qjax.rounding.protocol import Rounded, Rounding, check_chain, round_weight
from qjax.rounding.refit import refit

__all__ = ["Rounded", "Rounding", "check_chain", "descend", "ldlq", "nearest", "refit", "round_weight"]
