"""What the kernel has to know of a vector code: which weights a register's pairs are, and how they come out of it.

Two neighbouring units of sixteen weights, of one row, share the registers of their K words. From these the decode makes
pairs of float16, a run of the matrix product each:

    y_n = s_n (unit sum_terms factor sum_runs scale (pair_0 x[place_0] + pair_1 x[place_1])  +  center sum x)

A place is one of the 32 weights, the second unit's from 16 on. It may come twice, where a weight is a sum of two
halves: the matrix unit adds them, exactly.

Bits that a mask leaves in the ten lowest of a float16 are a number already, in units of 2^-24, and a matrix unit takes
it so: no instruction makes a normal number of it, and what it lacks of a weight is `center`.
"""

from __future__ import annotations

import dataclasses

from qjax.kernels.layouts.points import UNIT
from qjax.kernels.mosaic_gpu.machines import Decode

SUBNORMAL = 2.0**24
"""The inverse of float16's smallest."""
Places = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Code:
    """See the module's docstring.

    Attributes:
      places: by run.
      terms: (decode, factor) of each part of a point.
      scales: of x by run, powers of two; () for ones.
      unit: of the pairs' numbers.
      center: what each weight lacks.
      table: words that decodes look up.
      above: whether decodes want the last words of the row above, too, behind those of their own.
    """

    places: Places
    terms: tuple[tuple[Decode, float], ...]
    scales: tuple[float, ...] = ()
    unit: float = 1.0
    center: float = 0.0
    table: tuple[int, ...] = ()
    above: bool = False

    @property
    def wide(self) -> int:
        """How often x comes for each weight."""
        return len(self.places) // UNIT
