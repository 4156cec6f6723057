"""What a format is: levels times scales on blocks of weights, as a few pure functions.

    w_hat = decode(scales, codes)        codes = nearest(scales, w)        scales = fit(w, weight)

A format sees weights as f32[*b, n] with the contracted axis last, `n` a multiple of `block`. `scales` is a small dict
of arrays, already rounded to what the file can store; `codes` are unpacked integers, one for each weight or for a few.
`pack` turns the two into the packed leaves of a `QTensor` (each with the weights' leading axes `*b` first) and `unpack`
is its exact inverse.

    w_hat = sum_k theta_k B_k + m        (theta_1 ... theta_K, m) = columns(scales)        B = basis(codes)
    value, code = round(columns, target, metric)                           scales' = store(scales, columns')

The second pair is the same grid seen tile by tile: all that a rounding asks for. Error feedback and descent `round` one
tile of weights after another, in the tile's own metric where there is one, and the codes they get are those that are
stored; a refit solves for the columns, in which w_hat is linear, and stores them. For levels times a scale K is 1:
theta_1 = s, B_1 = T. A learned table has its entries as columns, a lattice or a trellis its points as the basis; what a
whole matrix shares is bound to the grid before (`Shared`).

All are jittable, vmappable and work on abstract shapes. `Grid` (grid.py) derives most of them.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from qjax.typing import Array, Float, Integer

# Arrays by name; Any, because shapes, shardings and specs pass through the same trees.
Scales = dict[str, Any]
Leaves = dict[str, Any]
Tile = tuple[int, int]
Columns = tuple[Any, ...]
"""theta_1 ... theta_K and, last, the offset m or None: f32[*b, rows, G] each, shared by n / G weights of a row."""


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
    def tile(self) -> Tile:
        """Rows and columns of the weights that are rounded together: (1, 1) for single levels."""

    @property
    def rows(self) -> int:
        """How many rows go together, in tiles or under scales: 1: each stands alone; 0: all of a matrix."""

    @property
    def bits_per_weight(self) -> float:
        """Storage, scales included (without the per-row or per-tensor part where `block` is 0)."""

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        """Scales for w [*b, n], minimizing sum weight (w - w_hat)^2 as well as the format's search can."""

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b m"]:
        """The codes nearest to the weights."""

    def decode(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Float[Array, "*b n"]:
        """The values of codes: f32[*b, n]."""

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b m"]]:
        """Scales and codes together: what `qjax.quantize` stores. Equals `nearest(fit(w), w)` unless the format's
        reference encoder picks its codes with scales of higher precision, as ggml's simple types do."""

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> Columns:
        """What the levels of each group depend on; `shape` is w's, (*b, n)."""

    def round(
        self, columns: Columns, target: Float[Array, "*c r k"], metric: Float[Array, "k k"] | None = None
    ) -> tuple[Float[Array, "*c r k"], Integer[Array, "*c r j"]]:
        """Tiles of r x k targets to what the grid has near them, and its codes.

        Args:
          columns: of each tile's rows, f32[*c, r].
          target: f32[*c, r, k].
          metric: H among the columns, which are the same ones in all tiles: e H e^T of each of their rows is to be
            small; None: the squared error.
        """

    def basis(self, codes: Integer[Array, "*b m"]) -> tuple[Array, ...]:
        """B_1 ... B_K, f32[*b, n] each."""

    def store(self, scales: Scales, columns: Columns) -> Scales:
        """The storable scales nearest to columns; super-scales stay as they are in `scales`."""

    def pack(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Leaves:
        """The stored leaves."""

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b m"]]:
        """The exact inverse of `pack`."""

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        """(*b, n), from the leaves' shapes alone."""


@runtime_checkable
class TileRounding(Protocol):
    """What a sweep over tiles asks: any `TileGrid`, or what rounds to mixtures of its levels."""

    @property
    def tile(self) -> Tile:
        """As of `Format`."""

    def round(self, columns: Columns, target: Array, metric: Array | None = None) -> tuple[Array, Array]:
        """As of `Format`."""


@runtime_checkable
class TileGrid(TileRounding, Protocol):
    """A grid: any `Format`, or what a `Shared` one is bound to."""

    def basis(self, codes: Array) -> tuple[Array, ...]:
        """As of `Format`."""


@runtime_checkable
class Shared(Format, Protocol):
    """A format whose levels are learned for a whole matrix, so that columns, which are of rows, cannot hold them; its
    `decode` is linear in them."""

    @property
    def shared(self) -> str:
        """Their name among the scales."""

    def with_shared(self, scales: Scales, levels: Array) -> Scales:
        """The scales with other levels, as they can be stored."""

    def bound(self, scales: Scales) -> TileGrid:
        """The grid with the levels at hand; `round` and `basis` are asked of it, not of the format."""


@runtime_checkable
class Stepped(Format, Protocol):
    """A format that says which scales a group might have instead of its own."""

    def neighbours(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Columns, ...]:
        """Columns of other storable scales, each group's near its own; what groups share stays. `store` takes any
        mixture of them, group by group, as it is. None where a group has no scale of its own."""


@runtime_checkable
class BlockFormat(Format, Protocol):
    """A ggml type: its one leaf `blocks` holds the file's bytes, u8[*b, n / block, block_bytes]."""

    @property
    def ggml_type(self) -> int:
        """The type's number in a GGUF file."""

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
