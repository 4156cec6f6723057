"""Tiles of a product, chosen from its shapes alone.

Each program of the grid takes 64 rows of the weights and a `split`-th of the columns, `columns` at a time, through
`stages` buffers of shared memory; the splits' sums are added behind it. What decides at batch 1 to 64 is that enough
loads are under way: some 512 programs for a Hopper's 132 SMs, two or more on each SM.
"""

from __future__ import annotations

import dataclasses

from qjax.errors import UserError
from qjax.kernels.layouts.planar import ROWS, Planar
from qjax.kernels.layouts.scales import entries, whole

SHARED = 232448
"""Bytes of shared memory that a program may have on sm_90."""
_PROGRAMS = 512
_STEPS = 4  # a program's least, if it has them: else filling the buffers is most of its time
_COLUMNS = 256
_TWO = SHARED // 2 - 4096  # with room for what two programs on an SM need besides


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the module's docstring.

    Attributes:
      batch: rows of x with padding: a multiple of 8.
      columns: weights of a row in a step.
      stages: steps whose loads are under way.
      split: programs that share a row.
    """

    batch: int
    columns: int
    stages: int
    split: int


def plan_for(batch: int, packed: Planar) -> Plan:
    """The tiles for a batch of `batch` rows.

    Raises:
      UserError: not even two stages fit into shared memory.
    """
    N, K = packed.padded
    batch = -(-batch // 8) * 8
    columns = packed.block
    while columns < _COLUMNS and K % (2 * columns) == 0:
        columns *= 2
    steps = K // columns
    wanted = min(_PROGRAMS * ROWS // N, steps // _STEPS)
    split = max(s for s in range(1, max(wanted, 1) + 1) if steps % s == 0)
    fits = [s for s in (6, 4, 3, 2) if shared(packed, Plan(batch, columns, s, split)) <= _TWO]
    return check(packed, Plan(batch, columns, fits[0] if fits else 2, split))


def check(packed: Planar, plan: Plan) -> Plan:
    """The same plan.

    Raises:
      UserError: it does not fit the weights, or shared memory.
    """
    K = packed.padded[1]
    fits = plan.columns % packed.block == 0 and K % (plan.columns * plan.split) == 0
    if plan.batch % 8 or plan.stages < 2 or not fits or not whole(packed.entries, K, plan.columns):
        raise UserError(
            f"{plan} does not fit {packed.format.name} of {packed.padded}: batch a multiple of 8, columns of "
            f"{packed.block} and of whole scales, columns times split a divisor of {K}, at least two stages"
        )
    need = shared(packed, plan)
    if need > SHARED:
        raise UserError(
            f"{plan.stages} stages of {plan.columns} columns of {packed.format.name} at batch {plan.batch} need {need} "
            f"bytes of shared memory, and a program has {SHARED}: fewer stages, columns or rows of x"
        )
    return plan


def shared(packed: Planar, plan: Plan) -> int:
    """Bytes of shared memory that a program takes, each buffer on a whole kilobyte."""
    K = packed.padded[1]
    step = [ROWS * plan.columns * x.shape[-1] * 2 // K for x in packed.planes]
    step += [2 * plan.batch * plan.columns]
    step += [ROWS * entries(x.shape[-2], K, plan.columns) * x.dtype.itemsize for x in packed.scales.values()]
    if packed.coding.ranged:
        step += [4 * plan.batch * max(plan.columns // packed.group, 1)]
    stages = min(plan.stages, K // plan.columns // plan.split)
    return sum(-(-stages * part // 1024) * 1024 for part in step) + 4 * ROWS * plan.batch + 1024
