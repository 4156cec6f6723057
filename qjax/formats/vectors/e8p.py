"""E8P_2, E8P_3, E8P_4: QuIP#'s lattice codes (lattice.py) under one f16 scale a row.

How wide they lie about normal weights, 1.03, 0.98 and 1.03, and how much finer the second code, 2.04 and 3.45 times, is
as published (arXiv:2402.04396 and its code), the latter to three digits.
"""

from __future__ import annotations

from qjax.formats.vectors.grid import VectorGrid
from qjax.formats.vectors.lattice import E8P, Ball, Residual

FORMATS = (
    VectorGrid("E8P_2", E8P(), "QuIP#: 65,536 points of E8 + 1/4 for 8 weights, f16 scale a row"),
    VectorGrid(
        "E8P_3", Residual(E8P(), Ball(), 251 / 512, 0.98), "QuIP#: E8P_2 and 256 points of E8 for what it leaves"
    ),
    VectorGrid("E8P_4", Residual(E8P(), E8P(), 297 / 1024, 1.03), "QuIP#: E8P_2 and again E8P_2 for what it leaves"),
)
