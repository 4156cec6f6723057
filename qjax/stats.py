"""What was seen at the input of a weight, and how each statistic changes when the input does.

    H = E[x x^T]    h = E[x^2]    absmean = E|x|    absmax = max|x|    cross = E[(x_float - x) x^T]    samples = some x

A reparametrization W -> W B^-1 makes the input B x. H, cross and samples follow any linear B exactly; h, absmean and
absmax follow permutations and channel scales only: a rotation mixes channels, and what they say is lost.

    G = E[g g^T], g the gradient of the loss at the weight's output: not of the input, and not every collector has it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.tables import html_table
from qjax.typing import Array, Float, Int

Axis = int | tuple[int, ...]
KINDS = ("H", "h", "absmean", "absmax", "cross", "samples")


def missing(kind: str) -> str:
    """Says that a statistic is missing, and how to collect it."""
    how = f"observe(apply_fn, params, batches, kinds=({kind!r}, ...))"
    if kind == "cross":
        how = "observe(apply_fn, qparams, batches, kinds=('cross', ...), float_params=params)"
    return (
        f"the recipe needs the statistic {kind!r}, and none was collected for it; qjax.{how} collects it, and for a "
        "decoder quantize_model does, with a calibration text"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of one input, or a stack of them (leading axes); what was not collected is None.

    Attributes:
      H: E[x x^T], f32[n, n]; where tokens count by row groups of a weight, f32[k, n, n], for recipes that are `guided`.
      h: E[x^2], f32[n].
      absmean, absmax: f32[n].
      cross: E[(x_float - x) x^T], f32[n, n]: what the quantized predecessors changed about the input x.
      samples: f32[k, n], rows of x.
      count: tokens seen, f32[].
      G: E[g g^T], f32[k, m, m], of a weight whose k m rows stand in k blocks; what lies between blocks is not known.
      axis: the stored axis of the weight, counted from the end, that the input was contracted with, or the axes that
        are merged into one; None where nobody said.
      also: other axes along which the same weight was contracted; nothing here is of those inputs.
    """

    H: Float[Array, "*b n n"] | None = None
    h: Float[Array, "*b n"] | None = None
    absmean: Float[Array, "*b n"] | None = None
    absmax: Float[Array, "*b n"] | None = None
    cross: Float[Array, "*b n n"] | None = None
    samples: Float[Array, "*b k n"] | None = None
    count: Float[Array, "*b"] | None = None
    G: Float[Array, "*g blocks m m"] | None = None
    axis: Any = dataclasses.field(default=None, metadata={"static": True})  # Axis | None
    also: Any = dataclasses.field(default=(), metadata={"static": True})  # tuple[Axis, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was collected."""
        return tuple(k for k in KINDS if getattr(self, k) is not None)

    @property
    def importance(self) -> Float[Array, "*b n"] | None:
        """h, or the diagonal of H."""
        if self.h is not None:
            return self.h
        return None if self.H is None else jnp.diagonal(self.H, axis1=-2, axis2=-1)

    def _rows(self) -> list[tuple[str, str]]:
        """Kinds and shapes; trees of something else than arrays (shardings, axes) pass through here too."""
        kinds = ((kind, getattr(self, kind)) for kind in self.kinds)
        return [(kind, " x ".join(map(str, a.shape)) if hasattr(a, "shape") else str(a)) for kind, a in kinds]

    @property
    def _seen(self) -> str:
        """Tokens, where that is a number: one, or from the fewest to the most of a stack."""
        if self.count is None or not hasattr(self.count, "__array__") or isinstance(self.count, jax.core.Tracer):
            return ""
        least, most = (int(n) for n in (jnp.min(self.count), jnp.max(self.count)))
        return f"{least} tokens" if least == most else f"{least} to {most} tokens"

    def __repr__(self) -> str:
        parts = [f"{kind} {shape}" for kind, shape in self._rows()] + ([self._seen] if self._seen else [])
        return f"Stats({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return html_table(f"Stats of {self._seen or 'an input'}", ("statistic", "shape"), self._rows(), (1,))

    def permute(self, order: Int[Array, "n"]) -> Stats:
        """Of x[order]."""

        def vector(a: Array | None) -> Array | None:
            return None if a is None else jnp.take(a, order, axis=-1)

        def matrix(a: Array | None) -> Array | None:
            return None if a is None else jnp.take(jnp.take(a, order, axis=-1), order, axis=-2)

        return dataclasses.replace(
            self, H=matrix(self.H), h=vector(self.h), absmean=vector(self.absmean), absmax=vector(self.absmax),
            cross=matrix(self.cross), samples=vector(self.samples),
        )  # fmt: skip

    def scale(self, d: Float[Array, "n"]) -> Stats:
        """Of d x, channel by channel."""
        size = jnp.abs(d)

        def times(a: Array | None, by: Array) -> Array | None:
            return None if a is None else a * by.reshape((1,) * (a.ndim - by.ndim) + by.shape)

        both = d[:, None] * d[None, :]
        return dataclasses.replace(
            self, H=times(self.H, both), h=times(self.h, d * d), absmean=times(self.absmean, size),
            absmax=times(self.absmax, size), cross=times(self.cross, both), samples=times(self.samples, d),
        )  # fmt: skip

    def linear(self, B: Float[Array, "m n"] | Callable[[Array], Array]) -> Stats:
        """Of B x; B is a matrix, or the linear map of the last axis that it makes. h is taken from H.

        Raises:
          UserError: a statistic that B destroys was collected alone: absmean, absmax, or h without H.
        """
        for kind in ("absmean", "absmax"):
            if getattr(self, kind) is not None:
                raise UserError(
                    f"{kind} does not survive a rotation of the input: collect it again behind the rotation, or drop it"
                )
        if self.h is not None and self.H is None:
            raise UserError("h does not survive a rotation of the input: collect H, whose diagonal it is")

        def of(x: Array) -> Array:
            return B(x) if callable(B) else jnp.matmul(x, B.T, precision="highest")

        def both(a: Array | None) -> Array | None:
            return None if a is None else jnp.swapaxes(of(jnp.swapaxes(of(a), -1, -2)), -1, -2)

        H = both(self.H)
        h = None if self.h is None or H is None else jnp.diagonal(H, axis1=-2, axis2=-1)
        samples = None if self.samples is None else of(self.samples)
        return dataclasses.replace(self, H=H, h=h, absmean=None, absmax=None, cross=both(self.cross), samples=samples)

    def only(self, kinds: tuple[str, ...]) -> Stats:
        """Without the other kinds; count stays."""
        return dataclasses.replace(self, **{k: None for k in KINDS if k not in kinds})

    def along(self, axis: Axis, name: str) -> Stats:
        """The same, for a weight whose blocks are to run along an axis.

        Args:
          axis: counted from the end.
          name: the weight, for the message.

        Raises:
          UserError: they are of the inputs along another axis.
        """
        if self.axis is not None and self.axis != axis:
            raise UserError(
                f"{name}: its statistics are of what is contracted with axis {self.axis}, and it is to be rounded "
                f"along axis {axis}; round it along {self.axis}, or keep it in the plan"
            )
        return self


def axes_seen(stats: Mapping[str, Any]) -> dict[str, Axis]:
    """{path: the axis along which the weight was contracted where its statistics were collected}.

    Args:
      stats: {path: Stats}; other values, and those of no known axis, are passed over.

    Raises:
      UserError: a weight that was contracted along several axes: which one its blocks are to follow must be said.
    """
    known = {path: s for path, s in stats.items() if isinstance(s, Stats) and s.axis is not None}
    for path, s in known.items():
        if s.also:
            more = ", ".join(map(str, s.also))
            raise UserError(
                f"{path}: is contracted along axis {s.axis} and along {more}, and blocks follow one; its statistics "
                f"are of axis {s.axis}: say axes={{{path!r}: {s.axis}}}, or keep it in the plan"
            )
    return {path: s.axis for path, s in known.items() if s.axis is not None}
