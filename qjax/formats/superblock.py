"""Super-blocks laid out for a fast search: 128 of them side by side, one weight of each in every vector.

    [*b, n]  ->  chunks of 128 super-blocks  ->  x[element, sub-block, super-block]

With super-blocks in the minor axis, every step of a search is elementwise and a sum over a sub-block's weights is a
chain of vector additions; a chunk (128 KiB) stays in cache; memory does not grow with the tensor. Chunks all have one
shape, short tensors are padded and vmap merges its axis into the super-blocks, so that the same compiled body sees the
same numbers whatever the shape of the call. One call keeps one core busy: several cores want several calls at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from qjax.formats import storage
from qjax.formats.grid import Scaling
from qjax.formats.protocol import Scales
from qjax.formats.storage import round_fp16
from qjax.typing import Array, Float, Integer

_CHUNK_CPU = 128
_CHUNK_DEVICE = 16384  # accelerators want many lanes
_LEAST = 2.0**-24  # the smallest fp16
_SMALL = 1e-30

Search = Callable[[Array, Array | None], tuple[Array, ...]]


def by_chunks(
    search: Search, w: Array, weight: Array | None, block: int, sub: int, cpu_chunk: int = _CHUNK_CPU
) -> tuple[Array, ...]:
    """Run a search over all super-blocks of w.

    Args:
      search: (x f32[sub, block / sub, N], v like x or None) -> arrays [..., N], each independent along N. v is the
        importance relative to the largest of its super-block.
      w: f32[*b, n].
      weight: importance f32[*b, n], or None for 1.
      block: weights of a super-block.
      sub: weights of a sub-block.
      cpu_chunk: super-blocks side by side on a CPU.

    Returns: the search's arrays with N moved out: [*b, n / block, ...].
    """

    def run(args: tuple[Array, ...]) -> tuple[Array, ...]:
        *lead, n = args[0].shape
        total = args[0].size // block
        chunk = cpu_chunk if jax.default_backend() == "cpu" else _CHUNK_DEVICE
        count = -(-total // chunk)

        def cut(a: Array) -> Array:
            a = jnp.pad(a.reshape(total, block), ((0, count * chunk - total), (0, 0)))
            return a.reshape(count, chunk, block // sub, sub)

        def one(part: tuple[Array, ...]) -> tuple[Array, ...]:
            x, *v = (lax.optimization_barrier(a.transpose(2, 1, 0)) for a in part)
            return tuple(jnp.moveaxis(a, -1, 0) for a in search(x, relative(v[0]) if v else None))

        out = lax.map(one, tuple(cut(a) for a in args))
        return tuple(a.reshape(-1, *a.shape[2:])[:total].reshape(*lead, n // block, *a.shape[2:]) for a in out)

    mapped = custom_vmap(run)

    @mapped.def_vmap
    def _(size: int, batched: list[tuple[bool, ...]], args: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple]:
        full = tuple(
            a if is_batched else jnp.broadcast_to(a[None], (size, *a.shape))
            for a, is_batched in zip(args, batched[0], strict=True)
        )
        out = mapped(full)
        return out, tuple(True for _ in out)

    args = (w,) if weight is None else (w, weight)
    return mapped(tuple(lax.stop_gradient(a) for a in args))


def relative(v: Array) -> Array:
    """Importance [sub, J, N] with 1 as the largest of a super-block: only ratios matter, and sums stay in range."""
    most = jnp.max(v, axis=(0, 1), keepdims=True)
    return v * reciprocal(most)


def reciprocal(s: Array) -> Array:
    """1 / s, and 0 where |s| is not above 1e-30."""
    return storage.reciprocal(s, _SMALL)


def once(*arrays: Array) -> tuple[Array, ...]:
    """Compute these here: a barrier that keeps XLA from repeating them for each weight that uses them."""
    return lax.optimization_barrier(arrays)


def store(d: Array) -> Array:
    """A scale as fp16 keeps it: infinite beyond its largest, and not zero unless it is zero."""
    size = jnp.maximum(round_fp16(jnp.abs(d)), _LEAST)
    return jnp.where(d == 0, 0.0, jnp.where(d < 0, -size, size))


def unless_beyond(first: Array, found: Array) -> Array:
    """What a search found, but where it began beyond fp16: weights too large to store are not to look sound."""
    return jnp.where(jnp.isinf(first), first, found)


def squares(e: Array, v: Array | None) -> Array:
    """sum over elements of v e^2: [sub, J, N] -> [J, N]."""
    return total(e * e if v is None else v * e * e)


def total(x: Array) -> Array:
    """sum over elements: [sub, J, N] -> [J, N], sub a power of two.

    Written as a tree of additions: XLA fuses that with what computes x, which it does not do for a reduction.
    """
    terms = list(x)
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return once(terms[0])[0]


def keep(better: Array, new: tuple[Array, ...], old: tuple[Array, ...]) -> tuple[Array, ...]:
    """Elementwise choice between two equal tuples of arrays [J, N] or [N], `better` of shape [J, N] or [N]."""
    return tuple(
        jnp.where(better if n.ndim == better.ndim else better[None], n, o) for n, o in zip(new, old, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class ByReciprocal(Scaling):
    """Scales that weights are multiplied by the reciprocals of, as the searches do that chose them."""

    def units(self, scales: Scales, x: Float[Array, "*b G g"]) -> Float[Array, "*b G g"]:
        """x (1 / s) - m (1 / s), 0 where s is."""
        inverse = reciprocal(self.scale.get(scales))
        if self.offset is None:
            return x * once(inverse[..., None])[0]
        inverse, offset = once(inverse[..., None], (-self.offset.get(scales) * inverse)[..., None])
        return x * inverse + offset

    def nearest(self, levels: Any, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        """See `Scaling`; computed once, for the many fields that hold bits of it."""
        return once(super().nearest(levels, scales, w))[0]
