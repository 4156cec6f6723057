"""Which kernel multiplies with packed weights: the first line of TABLE that fits, on the platform a program is for.

    Kernel("cpu", "xla", "sums", xla.sums, fits, about)       a new kernel is such a line, above those it is better than

`fits` sees all that is known when a program is traced, and answers with the reason why not, or "".
"""

from __future__ import annotations

import dataclasses

import jax

from qjax.errors import UserError
from qjax.formats.grid import Grid
from qjax.kernels import accelerators, lanes, xla
from qjax.kernels.kernel import (
    FLOAT32,
    IMPLEMENTATIONS,
    PLATFORMS,
    Call,
    Implementation,
    Kernel,
    Platform,
    device_in_force,
)
from qjax.kernels.layouts import fits
from qjax.kernels.layouts import lanes as side_by_side
from qjax.kernels.prepacked import Layout

LANES = Layout("lanes", side_by_side.prepack, side_by_side.unpack, lambda packed: packed.shape)


def _lanes(call: Call) -> str:
    return fits.unfit(side_by_side.prepack, call.format, call.shape)


def _sums(call: Call) -> str:
    if not xla.in_whole_numbers(call.format):
        return "no whole numbers in blocks of 32 that leave x 20 bits of an int32"
    if call.dtype != FLOAT32:
        return f"x is {call.dtype}, not float32"
    return "" if call.rows == 1 else f"{call.rows} rows of x, not 1"


def _strips(call: Call) -> str:
    return "" if xla.by_rows(call.format, call.shape) else "its rows of weights do not stand alone"


def _points(call: Call) -> str:
    if isinstance(call.format, Grid):
        return "levels times scales, which a compiler decodes as it multiplies"
    return _strips(call)


def _always(call: Call) -> str:
    return ""


def _lies_otherwise(kernel: Kernel, call: Call) -> str:
    """To lay weights out at each call costs more than to decode them."""
    if kernel.layout is None or call.prepacked is True or call.prepacked == kernel.layout:
        return ""
    if call.prepacked:
        return "weights lie as another kernel reads them"
    return "weights lie as their format packs them: qjax.prepack lays them out, once"


ELSEWHERE = Kernel("cuda", "xla", "whole", xla.whole, _always, "decoded in the program, then one product", stack="vmap")
"""What any platform runs that the table does not name."""
WIDE = Kernel("cuda", "xla", "strips", xla.wide_strips, _points, "vectors of a table, a few rows of weights at a time")

TABLE: tuple[Kernel, ...] = (
    *accelerators.LINES,
    Kernel(
        "cpu",
        "xla",
        "lanes",
        lanes.matmul,
        _lanes,
        "laid out by qjax.prepack; outputs side by side, some weights at a time, decoded in the cache",
        layout=LANES,
    ),
    Kernel("cpu", "xla", "sums", xla.sums, _sums, "one row of x in whole numbers: int32 sums over the codes"),
    Kernel("cpu", "xla", "strips", xla.strips, _strips, "a few rows of weights at a time, decoded in the cache"),
    Kernel("cpu", "xla", "first", xla.first, _always, "decoded in the program, then one product with weights first"),
    *(dataclasses.replace(kernel, platform=platform) for kernel in (WIDE, ELSEWHERE) for platform in ("cuda", "tpu")),
)


def choice(
    call: Call, platform: Platform, implementation: Implementation = "auto"
) -> tuple[Kernel | None, list[tuple[Kernel, str]]]:
    """The kernel for a call on a platform.

    Args:
      call: the product.
      platform: where.
      implementation: "auto": any; else only such.

    Returns: the first that fits, None if none does; and those before it, each with the reason why not.
    """
    passed: list[tuple[Kernel, str]] = []
    for kernel in TABLE:
        if kernel.platform != platform or implementation not in ("auto", kernel.implementation):
            continue
        reason = _lies_otherwise(kernel, call) or kernel.fits(call)
        if not reason:
            return kernel, passed
        passed.append((kernel, reason))
    return None, passed


def chosen(call: Call, implementation: Implementation) -> Kernel:
    """The kernel where the program is to run (`running_on`).

    Raises:
      UserError: an unknown implementation, or one that has no kernel for this call there.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation={implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    here = running_on()
    platform = next((p for p in PLATFORMS if p == here), None)
    if platform is None and implementation != "pallas":
        return ELSEWHERE
    kernel, passed = choice(call, platform, implementation) if platform else (None, [])
    if kernel is None:
        reasons = [f"{other.name}: {reason}" for other, reason in passed] or ["there is none yet"]
        raise UserError(
            f"no {implementation} kernel on {here} takes {call.format.name} weights {list(call.shape)} and {call.rows} "
            f"rows of {call.dtype} ({'; '.join(reasons)}); implementation='auto' takes what there is (`qjax kernels`)"
        )
    return kernel


def running_on() -> str:
    """The platform that a program traced now is for: that of the mesh in force, else JAX's default."""
    platform = getattr(device_in_force(), "platform", None) or jax.default_backend()
    return "cuda" if platform == "gpu" else platform
