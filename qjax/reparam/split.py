"""Splits: W = W_hat + a part kept in higher precision. The rest is easier to round without it.

    columns     y = W' x_rest + V x_J          whole input channels J, f16                LLM.int8(), arXiv:2208.07339
    sparse      y = W' x + S x                 single weights, CSR: f16, u16 columns      SpQR, arXiv:2306.03078
    low_rank    y = W' x + A (B x)             A B the best of its rank in the metric of diag(h)

What is split off is settled after rounding: S holds the outliers minus what their places were rounded to, so that they
are exact up to f16.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import UserError
from qjax.formats.storage import fp16
from qjax.reparam.protocol import Applied, Reparam, Site, statistic
from qjax.stats import Stats
from qjax.typing import Array, Float, Int

_MOST = 0.5
"""A split of more than this share stores more than it saves."""


@partial(jax.tree_util.register_dataclass, data_fields=("at", "values"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Columns(Applied):
    """Columns `at`, i32[k], with `values`, f16[out, k]."""

    at: Any
    values: Any

    def input(self, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        return x.at[..., self.at].set(0)

    def output(self, y: Float[Array, "*b out"], x: Float[Array, "*b n"]) -> Float[Array, "*b out"]:
        return (y + _product(jnp.take(x, self.at, axis=-1), self.values)).astype(y.dtype)

    def inverse(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        return w.at[:, self.at].set(self.values.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class SplitColumns(Reparam):
    """See `columns`."""

    share: float | None = None
    threshold: float | None = None
    by: Literal["absmax", "h"] = "absmax"

    def __post_init__(self) -> None:
        if (self.share is None) == (self.threshold is None):
            raise UserError("columns: say either share=0.01 or threshold=6.0")
        _check_share("columns", self.share)
        if self.by not in ("absmax", "h"):
            raise UserError(f"columns: by is absmax or h, got {self.by!r}")

    @property
    def name(self) -> str:
        return "columns"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({self.by})

    def __call__(self, site: Site) -> tuple[Site, Columns]:
        size, n = statistic(site.stats, self.by, "columns"), site.w.shape[1]
        if self.share is not None or self.threshold is None:
            count = round((self.share or 0.0) * n)
        elif isinstance(size, jax.core.Tracer):
            raise UserError("columns: under jit the number of columns must be known; say share= instead of threshold=")
        else:
            count = int(jnp.sum(size >= self.threshold))
        if count > _MOST * n:
            raise UserError(
                f"columns: {count} of {n} channels reach {self.by} {self.threshold}; more than half cannot be outliers"
            )
        at = jnp.sort(jnp.argsort(-size)[:count]).astype(jnp.int32)
        rest = jnp.ones(n, jnp.float32).at[at].set(0.0)
        done = Columns(at, fp16(site.w[:, at]))
        return site.moved(site.w * rest[None, :], site.stats.scale(rest)), done


def columns(
    share: float | None = None, threshold: float | None = None, by: Literal["absmax", "h"] = "absmax"
) -> SplitColumns:
    """The input channels with the largest values stay f16.

    Args:
      share: of the channels, at most half; or
      threshold: all whose statistic reaches it (LLM.int8(): 6.0 on max|x|).
      by: the statistic, max|x| or E[x^2].
    """
    return SplitColumns(share, threshold, by)


@partial(jax.tree_util.register_dataclass, data_fields=("starts", "at", "values"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Sparse(Applied):
    """CSR: row i holds `values` (f16[k]) in columns `at` (u16 or i32[k]), from starts[i] to starts[i + 1]."""

    starts: Any
    at: Any
    values: Any

    @property
    def rows(self) -> Int[Array, "k"]:
        """The row of each value: i32[k]."""
        place = jnp.arange(self.values.shape[0], dtype=jnp.int32)
        return (jnp.searchsorted(self.starts, place, side="right") - 1).astype(jnp.int32)

    def output(self, y: Float[Array, "*b out"], x: Float[Array, "*b n"]) -> Float[Array, "*b out"]:
        terms = jnp.take(x, self.at.astype(jnp.int32), axis=-1).astype(jnp.float32)
        terms = terms * self.values.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        added = jnp.zeros(y.shape, jnp.float32).at[..., self.rows].add(terms)
        return (y + added.astype(y.dtype)).astype(y.dtype)

    def inverse(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        return w.at[self.rows, self.at.astype(jnp.int32)].add(self.values.astype(jnp.float32))

    def settled(self, w: Float[Array, "out n"], w_hat: Float[Array, "out n"]) -> Sparse:
        at = (self.rows, self.at.astype(jnp.int32))
        return dataclasses.replace(self, values=fp16(w[at] - w_hat[at]))


def sparse_of(w: Float[Array, "out n"], mask: np.ndarray, w_hat: Float[Array, "out n"]) -> Sparse:
    """The CSR part that makes w of w_hat where the mask holds; the mask is concrete."""
    row, column = np.nonzero(np.asarray(mask))
    starts = np.searchsorted(row, np.arange(mask.shape[0] + 1)).astype(np.int32)
    kind = np.uint16 if mask.shape[1] <= 2**16 else np.int32
    values = jnp.asarray(w)[row, column] - jnp.asarray(w_hat)[row, column]
    return Sparse(jnp.asarray(starts), jnp.asarray(column.astype(kind)), fp16(values))


@dataclasses.dataclass(frozen=True)
class SplitSparse(Reparam):
    """See `sparse`."""

    share: float = 0.005
    by: Literal["magnitude", "sensitivity"] = "sensitivity"

    def __post_init__(self) -> None:
        _check_share("sparse", self.share)
        if self.by not in ("magnitude", "sensitivity"):
            raise UserError(f"sparse: by is magnitude or sensitivity, got {self.by!r}")

    @property
    def name(self) -> str:
        return "sparse"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"h"} if self.by == "sensitivity" else ())

    def __call__(self, site: Site) -> tuple[Site, Sparse]:
        w = site.w
        size = w * w
        if self.by == "sensitivity":
            size = size * statistic(site.stats, "h", "sparse")[None, :]
        count = round(self.share * w.size)
        flat = jnp.sort(lax.top_k(size.reshape(-1), count)[1])
        row, column = flat // w.shape[1], flat % w.shape[1]
        starts = jnp.searchsorted(row, jnp.arange(w.shape[0] + 1, dtype=row.dtype)).astype(jnp.int32)
        kind = jnp.uint16 if w.shape[1] <= 2**16 else jnp.int32
        done = Sparse(starts, column.astype(kind), fp16(w[row, column]))
        return site.moved(w.at[row, column].set(0.0), site.stats), done


def sparse(share: float = 0.005, by: Literal["magnitude", "sensitivity"] = "sensitivity") -> SplitSparse:
    """The weights of largest w^2 h, or w^2, stay f16.

    Args:
      share: of all weights, at most half; each costs 32 bits.
      by: "sensitivity" (w^2 E[x^2]) or "magnitude".
    """
    return SplitSparse(share, by)


@partial(jax.tree_util.register_dataclass, data_fields=("A", "B"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LowRank(Applied):
    """A f16[out, r] and B f16[r, n]: W = W' + A B."""

    A: Any
    B: Any

    def output(self, y: Float[Array, "*b out"], x: Float[Array, "*b n"]) -> Float[Array, "*b out"]:
        return (y + _product(_product(x, self.B), self.A)).astype(y.dtype)

    def inverse(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        return w + self._whole()

    def _whole(self) -> Float[Array, "out n"]:
        A, B = self.A.astype(jnp.float32), self.B.astype(jnp.float32)
        return lax.dot(A, B, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class SplitLowRank(Reparam):
    """See `low_rank`."""

    rank: int = 16
    by: Literal["h", "none"] = "h"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"low_rank: rank must be at least 1, got {self.rank}")
        if self.by not in ("h", "none"):
            raise UserError(f"low_rank: by is h or none, got {self.by!r}")

    @property
    def name(self) -> str:
        return "low_rank"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"h"} if self.by == "h" else ())

    def __call__(self, site: Site) -> tuple[Site, LowRank]:
        if self.rank > _MOST * min(site.w.shape):
            raise UserError(f"low_rank: rank {self.rank} is more than half of {tuple(site.w.shape)}")
        d = _root(site.stats) if self.by == "h" else jnp.ones(site.w.shape[1], jnp.float32)
        u, s, vt = jnp.linalg.svd(site.w * d[None, :], full_matrices=False)
        root = jnp.sqrt(s[: self.rank])
        A, B = u[:, : self.rank] * root[None, :], vt[: self.rank] * root[:, None] / d[None, :]
        done = LowRank(fp16(A), fp16(B))
        return site.moved(site.w - done._whole(), site.stats), done


def low_rank(rank: int = 16, by: Literal["h", "none"] = "h") -> SplitLowRank:
    """The leading singular part stays f16.

    Args:
      rank: of the part, at most half of the smaller side.
      by: the metric: "h", that of diag(E[x^2]), or "none", the plain one.
    """
    return SplitLowRank(rank, by)


def _root(stats: Stats) -> Float[Array, "n"]:
    """sqrt(h), away from zero."""
    h = statistic(stats, "h", "low_rank")
    return jnp.sqrt(jnp.maximum(h, 1e-6 * jnp.maximum(jnp.max(h), 1e-30)))


def _product(x: Float[Array, "*b n"], w: Float[Array, "out n"]) -> Float[Array, "*b out"]:
    """x w^T, accumulated in float32."""
    return lax.dot_general(
        x.astype(jnp.float32), w.astype(jnp.float32), (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip


def _check_share(who: str, share: float | None) -> None:
    if share is not None and not 0 <= share <= _MOST:
        raise UserError(f"{who}: share lies between 0 and {_MOST}, got {share}; more cannot be outliers")
