"""The lines of the table that are written in Pallas: for Hopper GPUs and for TPUs.

Their modules are imported when they are first asked, which takes as long as half of qjax.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax

from qjax.formats.protocol import Format, Leaves
from qjax.kernels.kernel import Call, Kernel, device_in_force
from qjax.kernels.prepacked import Layout


def _gpu() -> Any:
    return import_module("qjax.kernels.mosaic_gpu")


def _supers() -> Any:
    return import_module("qjax.kernels.mosaic_gpu.supers")


def _vectors() -> Any:
    return import_module("qjax.kernels.mosaic_gpu.vectors")


def _tpu() -> Any:
    return import_module("qjax.kernels.mosaic_tpu")


def _layout(name: str) -> Layout:
    """A layout of qjax.kernels.layouts."""

    def of() -> Any:
        return import_module(f"qjax.kernels.layouts.{name}")

    def prepack(format: Format, leaves: Leaves) -> Any:
        return of().prepack(format, leaves)

    def unpack(packed: Any) -> Leaves:
        return of().unpack(packed)

    return Layout(name, prepack, unpack, lambda packed: packed.shape)


def _on_hopper(kernels: Callable[[], Any]) -> Callable[[Call], str]:
    def fits(call: Call) -> str:
        known = device_in_force() or jax.devices()[0]
        elsewhere = _gpu().no_hopper(known.device_kind) if getattr(known, "platform", "") in ("gpu", "cuda") else ""
        return elsewhere or kernels().unfit(call.format, call.shape, call.rows, call.dtype)

    return fits


def _on_tpu(call: Call) -> str:
    return _tpu().unfit(call.format, call.shape, call.rows, call.dtype)


LINES: tuple[Kernel, ...] = (
    Kernel(
        "cuda", "pallas", "mosaic_gpu_supers", lambda x, packed, format, precision: _supers().matmul(x, packed),
        _on_hopper(_supers), "laid out by qjax.prepack; codes times their integer scales, decoded on their way",
        layout=_layout("supers"),
    ),
    Kernel(
        "cuda", "pallas", "mosaic_gpu", lambda x, packed, format, precision: _gpu().matmul(x, packed), _on_hopper(_gpu),
        "laid out by qjax.prepack; codes decoded on their way to the matrix unit", layout=_layout("planar"),
    ),
    Kernel(
        "cuda", "pallas", "mosaic_gpu_vectors", lambda x, packed, format, precision: _vectors().matmul(x, packed),
        _on_hopper(_vectors), "laid out by qjax.prepack; points of lattices and trellises, decoded on their way",
        layout=_layout("points"),
    ),
    Kernel(
        "tpu", "pallas", "mosaic_tpu", lambda x, packed, format, precision: _tpu().matmul(x, packed), _on_tpu,
        "laid out by qjax.prepack; integers of the machine's own types, scales on the sums", layout=_layout("columns"),
    ),
)  # fmt: skip
