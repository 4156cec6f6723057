"""What a run reads, on one device or on several.

    data = data_on(windows, heldout, devices)
    train(data.distribute(state), step, data.batch_at, run)

With one device nothing is copied and batches stay host arrays. Otherwise the state lives where the path table of
`sharding` says, and each process reads its own rows of the one global batch; `processes` is how several meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qjax.training.run.data import Batches
from qjax.training.run.sharding import DECODER, Table, distribute, global_batch, mesh, shardings


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


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """What a run reads.

    Attributes:
      batch_at: step -> {"tokens": i32[b, t + 1]}, and what else the loss reads: "mask", a teacher's top k "cached".
      heldout: windows i32[n, t + 1] that judge the model.
      distribute: copies the state to where it lives.
    """

    batch_at: Callable[[int], dict[str, Any]]
    heldout: np.ndarray
    distribute: Callable[[Any], Any] = lambda state: state


def data_on(windows: Batches, heldout: np.ndarray, devices: Devices = ONE_DEVICE, table: Table = DECODER) -> Data:
    """Batches of windows, and where the state lives, by the table.

    Raises:
      UserError: sizes that do not make the devices there are, a batch or a weight that they do not divide.
    """
    orders: dict[int, np.ndarray] = {}  # an epoch's is drawn once
    if (devices.data, devices.fsdp, jax.process_count()) == (1, 1, 1):
        return Data(lambda step: {"tokens": windows.batch_at(step, orders=orders)}, heldout)
    here = mesh(devices.data, devices.fsdp)

    def batch_at(step: int) -> dict[str, Any]:
        rows = windows.batch_at(step, jax.process_index(), jax.process_count(), orders)
        return {"tokens": global_batch(rows, here)}

    def distributed(state: Any) -> Any:
        return distribute(state, shardings(jax.eval_shape(lambda: state), here, table))

    return Data(batch_at, heldout, distributed)
