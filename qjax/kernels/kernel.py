"""A kernel: one way of multiplying with packed weights; and what it is asked to multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from qjax.formats.protocol import Format
from qjax.kernels.prepacked import Layout

Platform = Literal["cpu", "cuda", "tpu"]
Implementation = Literal["auto", "xla", "pallas"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "cuda", "tpu")
FLOAT32 = np.dtype(np.float32)
IMPLEMENTATIONS: tuple[Implementation, ...] = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Call:
    """A product, before it is made.

    Attributes:
      format: of the weights.
      shape: of one matrix of them, (*o, n).
      rows: of x.
      dtype: of x.
      prepacked: whether its weights may lie as any kernel wants them, and are brought into its layout for this; or the
        layout that they lie in.
    """

    format: Format
    shape: tuple[int, ...]
    rows: int
    dtype: Any = FLOAT32
    prepacked: bool | Layout = True


def device_in_force() -> Any:
    """The abstract device of the mesh in force; None where there is none."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way of multiplying.

    Attributes:
      platform: where it runs.
      implementation: what it is written in.
      name: its name.
      matmul: (x [m, n], leaves, format, precision) -> y [m, *o], of x's type; the leaves in its layout.
      fits: why it cannot take a call; "" where it can.
      about: what it does.
      stack: how a stack of matrices goes through: one after another, or all at once.
      layout: how it has weights lie; None: as their format packs them. `qjax.prepack` brings them into it once, at
        load; others it takes where it is asked for by name, and they are laid out within the program, at each call.
    """

    platform: Platform
    implementation: Literal["xla", "pallas"]
    name: str
    matmul: Callable[..., Any]
    fits: Callable[[Call], str]
    about: str
    stack: Literal["map", "vmap"] = "map"
    layout: Layout | None = None
