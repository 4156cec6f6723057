"""How one number a group, a scale or an offset, is itself stored: each in a small format of its own.

    Stored("d", "f16")               v as a float
    Multiple("sc", "d", 0, 63)       v = d sc          integers under one float: K-quants, nested scales
    Steps("scale", 7)                v = low + step q  SpQR's bilevel statistics
    Dynamic("absmax")                v = offset + nested map[q]   bitsandbytes' double quantization (dynamic_map.py)

A store reads and writes its arrays in the dict of a format's scales. `put` keeps what several groups share. Its
`neighbours` are what a group may have instead while the others stay: the next integers; some shares of a float, whose
next number would change no code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from qjax.formats.protocol import Scales
from qjax.formats.storage import quotient, stored
from qjax.typing import Array, Float


@runtime_checkable
class Store(Protocol):
    """A frozen record; see the module docstring."""

    def get(self, scales: Scales) -> Float[Array, "*b G"]:
        """The numbers that are stored."""

    def put(self, scales: Scales, v: Float[Array, "*b G"]) -> Scales:
        """The arrays of the storable numbers nearest to v, under what `scales` has above them."""

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        """The arrays of other numbers near those that are stored; none where a group has no number of its own."""


NEAR = (1 - 1 / 8, 1 - 1 / 16, 1 - 1 / 32, 1 + 1 / 32, 1 + 1 / 16, 1 + 1 / 8)
"""Of a float: half of what the outermost of four to eight levels move by until their weights round anew, and more."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """As a float: f16, bf16, f32, or by a function of its own that rounds to what can be stored.

    Attributes:
      near: its neighbours, in shares of it; none of a number that only means something beside another.
    """

    key: str
    kind: str | Callable[[Array], Array] = "f16"
    near: tuple[float, ...] = NEAR

    def get(self, scales: Scales) -> Float[Array, "*b G"]:
        return scales[self.key]

    def put(self, scales: Scales, v: Float[Array, "*b G"]) -> Scales:
        return {self.key: stored(v, self.kind) if isinstance(self.kind, str) else self.kind(v)}

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        v = scales[self.key]
        return tuple(self.put(scales, v * jnp.float32(share)) for share in self.near)


@dataclasses.dataclass(frozen=True)
class Multiple:
    """Integers in [low, high] times one float for several: `key` of any shape, `unit` f32[*b, B]; negated if asked."""

    key: str
    unit: str
    low: int
    high: int
    sign: int = 1

    def get(self, scales: Scales) -> Float[Array, "*b G"]:
        unit = scales[self.unit]
        v = unit[..., None] * scales[self.key].reshape(*unit.shape, -1).astype(jnp.float32)
        return (v if self.sign > 0 else -v).reshape(*unit.shape[:-1], -1)

    def put(self, scales: Scales, v: Float[Array, "*b G"]) -> Scales:
        """The nearest integers; those under a unit of 0, which all mean the same, stay."""
        unit, now = scales[self.unit][..., None], scales[self.key]
        x = jnp.round(quotient(self.sign * v.reshape(*unit.shape[:-1], -1), jnp.where(unit == 0, 1.0, unit)))
        x = jnp.clip(x, self.low, self.high).astype(now.dtype)
        return {self.key: jnp.where(unit == 0, now.reshape(x.shape), x).reshape(now.shape)}

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        return next_integers(scales[self.key], self.key, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Integers in [0, high] as steps from the least of several numbers: `<key>_low`, `<key>_step` f32[*b, B]."""

    key: str
    high: int

    def get(self, scales: Scales) -> Float[Array, "*b G"]:
        """The product is exact, so a fused multiply-add gives the same."""
        low, step, codes = scales[f"{self.key}_low"], scales[f"{self.key}_step"], scales[self.key]
        sets = codes.astype(jnp.float32).reshape(*low.shape, -1)
        return (low[..., None] + step[..., None] * sets).reshape(codes.shape)

    def put(self, scales: Scales, v: Float[Array, "*b G"]) -> Scales:
        low, step = scales[f"{self.key}_low"][..., None], scales[f"{self.key}_step"][..., None]
        u = quotient(v.reshape(*low.shape[:-1], -1) - low, jnp.where(step > 0, step, 1.0))
        return {self.key: jnp.clip(jnp.round(u), 0, self.high).reshape(v.shape).astype(jnp.uint8)}

    def fit(self, v: Float[Array, "*b G"], count: int) -> Scales:
        """Steps from the least to the largest of each `count` numbers, as fp16, and the numbers on them."""
        sets = v.reshape(*v.shape[:-1], -1, count)
        low = stored(sets.min(axis=-1), "f16")
        step = jnp.maximum(stored(quotient(sets.max(axis=-1) - low, self.high), "f16"), 0.0)
        shared = {f"{self.key}_low": low, f"{self.key}_step": step}
        return shared | self.put(shared, v)

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        return next_integers(scales[self.key], self.key, 0, self.high)


def next_integers(codes: Array, key: str, low: int, high: int) -> tuple[Scales, ...]:
    """The integers before and behind, within their range."""
    return tuple({key: jnp.clip(codes.astype(jnp.int32) + d, low, high).astype(codes.dtype)} for d in (-1, 1))
