"""What a format is: levels times scales on blocks of weights, as a few pure functions.

    w_hat = decode(scales, codes)        codes = nearest(scales, w)        scales = fit(w, weight)

A format sees weights as f32[*b, n] with the contracted axis last, `n` a multiple of `block`. `scales` is a small dict
of arrays, already rounded to what the file can store; `codes` are unpacked integers in the weights' own order and
shape. `pack` turns the two into the packed leaves of a `QTensor` (each with the weights' leading axes `*b` first) and
`unpack` is its exact inverse.

    w_hat = s T + m        (s, m) = grid(scales)        T = level((w - m) / s)        scales' = store(scales, s', m')

The second line is the same grid seen weight by weight: what a rounding needs that takes one column at a time (error
feedback, descent) or that fits scales in another metric. All are jittable, vmappable and work on abstract shapes.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from qjax.typing import Array, Float, Integer

# Arrays by name; Any, because shapes, shardings and specs pass through the same trees.
Scales = dict[str, Any]
Leaves = dict[str, Any]


@runtime_checkable
class Format(Protocol):
    """A frozen, hashable record; see the module docstring for the conventions."""

    @property
    def name(self) -> str:
        """The name `qjax.format` knows it by."""

    @property
    def block(self) -> int:
        """Weights along the contracted axis that share scales: n must be a multiple. 0: the whole row."""

    @property
    def tile(self) -> int:
        """Weights rounded together: 1 for scalar levels."""

    @property
    def bits_per_weight(self) -> float:
        """Storage, scales included (without the per-row or per-tensor part where `block` is 0)."""

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        """Scales for w [*b, n], minimizing sum weight (w - w_hat)^2 as well as the format's search can."""

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        """The code of the level nearest to each weight: integers [*b, n]."""

    def decode(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
        """The value of each code: f32[*b, n]."""

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b n"]]:
        """Scales and codes together: what `qjax.quantize` stores. Equals `nearest(fit(w), w)` unless the format's
        reference encoder picks its codes with scales of higher precision, as ggml's simple types do."""

    @property
    def row_wise(self) -> bool:
        """Whether a row's scales are found and stored without looking at other rows."""

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        """The levels of every weight as s T + m: s, and m or None, each f32[*b, G], shared by n / G weights in a row.

        `shape` is w's, (*b, n). T are the format's unit levels, those that `level` rounds to.
        """

    def level(self, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        """The unit level nearest to u: elementwise (for a tile of more than one weight: over the last axis)."""

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        """The storable scales nearest to a grid (s, m); super-scales stay as they are in `scales`."""

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        """The stored leaves."""

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        """The exact inverse of `pack`."""

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        """(*b, n), from the leaves' shapes alone."""


@runtime_checkable
class BlockFormat(Format, Protocol):
    """A ggml type: its one leaf `blocks` holds the file's bytes, u8[*b, n / block, block_bytes]."""

    @property
    def ggml_type(self) -> int:
        """The type's number in a GGUF file."""

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
