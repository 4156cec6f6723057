"""Tiles of a product, chosen from its shapes alone.

Each program of the grid takes 64 rows of the weights and a `split`-th of the columns, `columns` at a time, through
`stages` buffers of shared memory; the splits' sums are added behind it. What decides at batch 1 to 64 is that enough
loads are under way: some 512 programs for a Hopper's 132 SMs, two or more on each SM.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.kernels.layouts.planar import ROWS
from qjax.kernels.layouts.scales import whole

SHARED = 232448
"""Bytes of shared memory that a program may have on sm_90."""
_PROGRAMS = 512
_STEPS = 4  # a program's least, if it has them: else filling the buffers is most of its time
_COLUMNS = 512
_STAGES = 4  # a power of two: which buffer is next is then no division
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


@runtime_checkable
class Laid(Protocol):
    """What tiles ask of a layout: its padded shape, the columns of a block, how many scales of each kind a row has, and
    the bytes that a step reads."""

    @property
    def format(self) -> Format: ...

    @property
    def padded(self) -> tuple[int, int]: ...

    @property
    def block(self) -> int: ...

    @property
    def entries(self) -> tuple[int, ...]: ...

    def buffers(self, columns: int, batch: int) -> list[int]: ...


def plan_for(batch: int, packed: Laid, wide: int = 1) -> Plan:
    """The tiles for a batch of `batch` rows.

    Args:
      batch: rows of x, parts of them counted each.
      packed: the weights.
      wide: numbers of 16 bits of x that meet a weight.

    Raises:
      UserError: not even two stages fit into shared memory.
    """
    N, K = packed.padded
    batch = -(-batch // 8) * 8

    def fit(columns: int, stages: int, split: int = 1) -> bool:
        return shared(packed, Plan(batch, columns, stages, split), wide) <= _TWO

    columns = packed.block
    while columns < _COLUMNS and K % (2 * columns) == 0 and fit(2 * columns, _STAGES):
        columns *= 2
    steps = K // columns
    wanted = min(_PROGRAMS * ROWS // N, steps // _STEPS)
    split = max(s for s in range(1, max(wanted, 1) + 1) if steps % s == 0)
    stages = next((s for s in (_STAGES, 3) if fit(columns, s, split)), 2)
    return check(packed, Plan(batch, columns, stages, split), wide)


def check(packed: Laid, plan: Plan, wide: int = 1) -> Plan:
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
    need = shared(packed, plan, wide)
    if need > SHARED:
        raise UserError(
            f"{plan.stages} stages of {plan.columns} columns of {packed.format.name} at batch {plan.batch} need {need} "
            f"bytes of shared memory, and a program has {SHARED}: fewer stages, columns or rows of x"
        )
    return plan


def shared(packed: Laid, plan: Plan, wide: int = 1) -> int:
    """Bytes of shared memory that a program takes, each buffer on a whole kilobyte."""
    step = [*packed.buffers(plan.columns, plan.batch), 2 * wide * plan.batch * plan.columns]
    stages = min(plan.stages, packed.padded[1] // plan.columns // plan.split)
    return sum(-(-stages * part // 1024) * 1024 for part in step) + 4 * ROWS * plan.batch + 1024
