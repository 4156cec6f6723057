"""Round: how codes are chosen for a format, one algorithm a file; roundings chain."""

from qjax.rounding.annealed import annealed
from qjax.rounding.clip import clip
from qjax.rounding.codebooks import codebooks
from qjax.rounding.descend import descend
from qjax.rounding.hqq import hqq
from qjax.rounding.ldlq import ldlq
from qjax.rounding.learned import learned, learned_clipping
from qjax.rounding.nearest import nearest
from qjax.rounding.neighbours import neighbours
from qjax.rounding.protocol import Rounded, Rounding, check_chain, check_grid, round_weight
from qjax.rounding.refit import refit
from qjax.rounding.relaxed import relaxed
from qjax.rounding.spqr import spqr
from qjax.rounding.two_sided import round_two_sided

__all__ = [
    "Rounded",
    "Rounding",
    "annealed",
    "check_chain",
    "check_grid",
    "clip",
    "codebooks",
    "descend",
    "hqq",
    "ldlq",
    "learned",
    "learned_clipping",
    "nearest",
    "neighbours",
    "refit",
    "relaxed",
    "round_two_sided",
    "round_weight",
    "spqr",
]
