"""What a config says of devices: one, or several.

    batch_at, place = spread(devices, windows)
    finetune(..., batch_at, ..., place=place)

With one device nothing is placed and batches stay host arrays. Otherwise the state lives where the path table of
`sharding` says, and each process reads its own rows of the one global batch; `processes` is how several meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from qjax.training.run.data import Windows
from qjax.training.run.sharding import DECODER, Table, global_batch, mesh, place, shardings


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a run computes.

    Attributes:
      data: copies of the state, each for a part of the batch; -1: as many as the devices allow.
      fsdp: devices that share one copy.
    """

    data: int = 1
    fsdp: int = 1


ONE_DEVICE = Devices()


def spread(
    devices: Devices, windows: Windows, table: Table = DECODER
) -> tuple[Callable[[int], dict[str, Any]], Callable[[Any], Any]]:
    """A run's batches and the placing of its state.

    Returns: step -> {"tokens": i32[batch, context + 1]}, and state -> the state where it lives.

    Raises:
      UserError: sizes that do not make the devices there are, a batch or a weight that they do not divide.
    """
    if (devices.data, devices.fsdp, jax.process_count()) == (1, 1, 1):
        return lambda step: {"tokens": windows.batch_at(step)}, lambda state: state
    here = mesh(devices.data, devices.fsdp)

    def batch_at(step: int) -> dict[str, Any]:
        rows = windows.batch_at(step, jax.process_index(), jax.process_count())
        return {"tokens": global_batch(rows, here)}

    def placed(state: Any) -> Any:
        return place(state, shardings(jax.eval_shape(lambda: state), here, table))

    return batch_at, placed
