"""The scales of a format as matrices (rows, groups), and back; s and o of a group from what is stored of them.

A format's own scales (`format.unpack`) have a type's super-blocks as an axis, and their floats as float32. A kernel's
layout has one matrix for each, whose entries serve equally many columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.fields import Blocks, Half
from qjax.formats.grid import Grid
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.stores import Multiple, Store, Stored
from qjax.kernels.layouts.coding import Coding
from qjax.typing import Array, Shaped


def group_of(format: Grid, scales: Scales, shape: tuple[int, ...]) -> int:
    """Columns under one scale, of weights of a shape; those of the row where it has one.

    Raises:
      UserError: they are no power of two from 16 on.
    """
    s = jax.eval_shape(lambda scales: format.columns(scales, shape)[0], scales)
    group = shape[-1] // s.shape[-1]
    if s.shape[-1] > 1 and (group % 16 or group & (group - 1)):
        raise UserError(f"{format.name} has no kernel: groups must be a power of two from 16 on, or rows, got {group}")
    return group


def matrices(scales: Scales, shape: tuple[int, ...]) -> dict[str, Shaped[Array, "*b rows entries"]]:
    """Each array of the scales of weights of a shape (*b, rows, n)."""
    return {name: x.reshape(*shape[:-1], -1) for name, x in scales.items()}


def restored(format: Grid, found: dict[str, Shaped[Array, "*b rows entries"]], n: int) -> Scales:
    """The format's scales, of rows of n weights; the inverse of `matrices`, whatever type the numbers came to."""
    scales: Scales = {}
    for name, x in found.items():
        low = {m.key: m.low for m in _stores(format) if isinstance(m, Multiple)}.get(name)
        x = x.astype(jnp.float32 if low is None else jnp.uint8 if low == 0 else jnp.int8)
        if low is not None and isinstance(format.layout, Blocks):
            x = x.reshape(*x.shape[:-1], n // format.layout.block, -1)
        scales[name] = x
    return scales


def file_type(format: Grid, leaves: Leaves, name: str, x: Array) -> Any:
    """The type in which the file has an array of the scales."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.dtype
    if isinstance(format.layout, Blocks):
        halves = {field.of for field in format.layout.fields if isinstance(field, Half)}
        return jnp.dtype(jnp.float16) if name in halves else x.dtype
    return leaves[name].dtype  # a zero point's stream is u8, as one of its numbers is


def scale_and_offset(code: Coding, read: Callable[[str], Any]) -> tuple[Any, Any]:
    """s and o of a group, where w = s T' + o; o is None where there is none.

    Args:
      read: the f32 numbers of a group, by the name of an array of the scales.
    """

    def value(store: Store) -> Any:
        if isinstance(store, Multiple):
            v = read(store.unit) * read(store.key)
            return v if store.sign > 0 else -v
        assert isinstance(store, Stored)
        return read(store.key)

    s = value(code.scaling.scale)
    if code.scaling.offset is not None:
        m = value(code.scaling.offset)
        return s, m + s * code.center if code.center else m
    if code.scaling.zero is not None:
        return s, s * (code.center - value(code.scaling.zero))
    return s, s * code.center if code.center else None


def entries(count: int, K: int, columns: int) -> int:
    """Of `count` entries for K columns, those of `columns` of them; 1 where an entry serves more."""
    return max(count * columns // K, 1)


def whole(counts: Iterable[int], K: int, columns: int) -> bool:
    """Whether `columns` of K columns have whole entries of all arrays, or lie under one."""
    return all(n == 1 or columns % (K // n) == 0 or K // n % columns == 0 for n in counts)


def padded_entries(count: int, n: int, K: int) -> int:
    """Entries for K columns where n columns have `count`; a row's one stays one."""
    return -(-K * count // n) if count > 1 else 1


def pad(x: Array, rows: int, n: int) -> Array:
    """[*b, r, k] -> [*b, rows, n], with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, n - x.shape[-1])])


def up(n: int, multiple: int) -> int:
    """n or more, a multiple."""
    return -(-n // multiple) * multiple


def _stores(format: Grid) -> tuple[Store, ...]:
    scaling = format.scaling
    return tuple(store for store in (scaling.scale, scaling.offset, scaling.zero) if store is not None)
