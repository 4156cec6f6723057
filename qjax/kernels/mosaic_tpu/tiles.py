"""Tiles of a product on a TPU, chosen from its shapes alone.

A step multiplies x [batch, inputs] by W [inputs, outputs] in VMEM; steps go through the inputs innermost, so that sums
stay in VMEM, and each buffer is there twice, one being filled.
"""

from __future__ import annotations

import dataclasses

from qjax.errors import UserError
from qjax.kernels.layouts.columns import LANES, Columns
from qjax.kernels.layouts.scales import entries, up, whole

VMEM = 16 * 2**20
"""Bytes that a program may have on every TPU here (a v5e's limit; later ones have more)."""
_BATCH = (16, 32, 64, 128)
_OUTPUTS = 512
_INPUTS = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step's rows of x, outputs and inputs."""

    batch: int
    outputs: int
    inputs: int


def plan_for(batch: int, packed: Columns, x_bytes: int = 2) -> Plan:
    """The tiles for a batch.

    Args:
      batch: rows of x.
      x_bytes: of a number of x: 2 for bfloat16, 1 for int8.

    Raises:
      UserError: no tiles fit into VMEM.
    """
    K, N = packed.padded
    rows = next((b for b in _BATCH if batch <= b), _BATCH[-1])
    inputs = max(k for k in _divisors(K, _INPUTS) if whole(packed.entries, K, k))
    return check(packed, Plan(max(rows, _tile(x_bytes)), max(_divisors(N, _OUTPUTS)), inputs), x_bytes)


def check(packed: Columns, plan: Plan, x_bytes: int = 2) -> Plan:
    """The same plan.

    Raises:
      UserError: it does not fit the weights, or VMEM.
    """
    K, N = packed.padded
    fits = _fits(N, plan.outputs) and _fits(K, plan.inputs) and whole(packed.entries, K, plan.inputs)
    if plan.batch % _tile(x_bytes) or not fits:
        raise UserError(
            f"{plan} does not fit {packed.format.name} of {packed.padded}, groups of {packed.group}: batch a multiple "
            f"of {_tile(x_bytes)}, outputs and inputs multiples of {LANES} that divide the weights', whole scales"
        )
    need = memory(packed, plan, x_bytes)
    if need > VMEM:
        raise UserError(
            f"{plan} of {packed.format.name} needs {need} bytes of VMEM, and a program has {VMEM}: smaller tiles"
        )
    return plan


def memory(packed: Columns, plan: Plan, x_bytes: int = 2) -> int:
    """Bytes of VMEM that a program takes: two buffers for each block, the sums, and what is converted on the way."""
    K, (batch, outputs, inputs) = packed.padded[0], dataclasses.astuple(plan)
    weights = inputs * outputs * packed.bits // 8
    x = batch * inputs * x_bytes
    scales = sum(8 * 4 * outputs * entries(s.shape[-3], K, inputs) for s in packed.scales.values())
    sums = 4 * batch * up(max(inputs // packed.group, 1), LANES) if packed.coding.ranged else 0
    return 2 * (weights + x + scales + sums + 4 * batch * outputs) + 2 * 4 * batch * outputs + 2 * inputs * outputs


def _tile(x_bytes: int) -> int:
    """Rows of x that a register holds."""
    return 32 // x_bytes


def _fits(n: int, part: int) -> bool:
    return part % LANES == 0 and n % part == 0


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(LANES, most + 1, LANES) if _fits(n, d)]
