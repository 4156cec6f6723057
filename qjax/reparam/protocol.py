"""What a reparametrization is: an exact change of variables of a linear layer, made before the weight is rounded.

    y = W x  ==  out(W' in(x), x)        W' = init(W)        W = inverse(W')

A `Reparam` is a frozen record of choices ("randomized Hadamard of both sides, seed 3"). Called on a `Site` it returns
the site in the new variables and what it did, an `Applied`: a small pytree (a seed, scales, indices, a sparse part)
that runs the layer and is stored beside the codes. They chain: the next one sees the site that the one before left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.chain import Link
from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.stats import KINDS, Stats
from qjax.typing import Array, Float

Loss = Callable[[Array, Stats], Array]


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight on its way to the grid.

    Attributes:
      w: f32[out, n].
      stats: of its input.
      format: the grid it is going to.
      loss: f32[] of rounding some (w, stats) with the stages that follow, tr(E H E^T); for searches. None: not known.
    """

    w: Float[Array, "out n"]
    stats: Stats
    format: Format
    loss: Loss | None = None

    def moved(self, w: Float[Array, "out n"], stats: Stats) -> Site:
        """The same site in other variables."""
        return dataclasses.replace(self, w=w, stats=stats)


class Applied:
    """What a reparametrization did: a pytree; each method is the identity where it does not concern it.

    Its fields are arrays of one matrix, or have a stack's axes in front; typed Any, because trees of shapes, shardings
    or None pass through here too.
    """

    @property
    def rounds_input(self) -> bool:
        """Whether `input` rounds; otherwise it is linear."""
        return False

    def inverse(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        """A weight in the new variables, in the old ones."""
        return w

    def input(self, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        """The input that W' wants."""
        return x

    def output(self, y: Float[Array, "*b out"], x: Float[Array, "*b n"]) -> Float[Array, "*b out"]:
        """The layer's output, from that of W' and the layer's own input."""
        del x
        return y

    def held(self, out: int, n: int) -> Applied:
        """Itself, with the arrays that its methods would make anew at each call."""
        del out, n
        return self

    def settled(self, w: Float[Array, "out n"], w_hat: Float[Array, "out n"]) -> Applied:
        """Itself, once the weight it left (w, before the change) has been rounded to w_hat (after the change)."""
        del w, w_hat
        return self


class Reparam(Link):
    """A frozen, hashable record of a change of variables."""

    @property
    def name(self) -> str:
        """The function that makes it, as recipes write it."""
        raise NotImplementedError

    @property
    def requires(self) -> frozenset[str]:
        """The statistics it cannot do without: names of `Stats` fields."""
        return frozenset()

    def __call__(self, site: Site) -> tuple[Site, Applied]:
        """The site in the new variables, and what was done."""
        raise NotImplementedError


def reparametrize(
    reparams: Sequence[Reparam], site: Site, kept: frozenset[str] = frozenset()
) -> tuple[Site, tuple[Applied, ...], tuple[Array, ...]]:
    """Apply a chain.

    Args:
      reparams: in order.
      site: the weight as it is.
      kept: statistics that are wanted behind the chain. Others are dropped once no member wants them any more, so that
        one that a rotation would destroy is an error only where it is needed behind the rotation.

    Returns: the last site, what each member did, and the weight that each member found.
    """
    applied, found = [], []
    for i, reparam in enumerate(reparams):
        wanted = reparam.requires.union(kept, *(r.requires for r in reparams[i + 1 :]))
        if "h" in wanted and site.stats.h is None:
            wanted |= {"H"}
        now = site.stats.only(tuple(k for k in KINDS if k in wanted))
        found.append(site.w)
        site, one = reparam(dataclasses.replace(site, stats=now))
        applied.append(one)
    return site, tuple(applied), tuple(found)


def behind(applied: Sequence[Applied], stats: Stats) -> Stats:
    """H and cross of other tokens behind a chain that is chosen; an input that is rounded counts as it is.

    H -> B H B^T, B x = input(x)
    """
    stats = stats.only(("H", "cross"))
    for one in applied:
        stats = stats if one.rounds_input else stats.linear(one.input)
    return stats


def behind_outputs(
    applied: Sequence[Applied], G: Float[Array, "k m m"], out: int, n: int
) -> Float[Array, "k m m"] | Float[Array, "1 out out"]:
    """G of the output of W' behind a chain: A^T G A, with y = A y' the change of the output; as it is where there is
    none.

    Args:
      G: E[g g^T] of the layer's output, in blocks.
      out, n: of the weight.
    """
    for one in applied:
        if type(one).output is Applied.output:
            continue
        eye = jnp.eye(out, dtype=G.dtype)
        rows = one.output(eye, jnp.zeros((out, n), G.dtype))  # row i is A e_i, so this is A^T
        if not bool(jnp.all(rows == eye)):
            whole = jax.scipy.linalg.block_diag(*G)
            G = jnp.matmul(jnp.matmul(rows, whole, precision="highest"), rows.T, precision="highest")[None]
    return G


def restore(applied: Sequence[Applied], w: Float[Array, "out n"]) -> Float[Array, "out n"]:
    """A weight behind a chain, in the variables before it."""
    for one in reversed(applied):
        w = one.inverse(w)
    return w


def restore_all(applied: tuple[Applied, ...], w: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """`restore` of a matrix, or of a stack of them; an array of any shape behind no change of variables."""
    if not applied:
        return w
    back = restore
    for _ in range(w.ndim - 2):
        back = jax.vmap(back)
    return back(applied, w)


def settle(applied: Sequence[Applied], found: Sequence[Array], w_hat: Float[Array, "out n"]) -> tuple[Applied, ...]:
    """The chain once its weight is rounded: what was split off makes up for the rounding where it can.

    Args:
      applied, found: as `reparametrize` gives them.
      w_hat: the rounded weight behind the chain.
    """
    done: list[Applied] = []
    for one, w in zip(reversed(applied), reversed(found), strict=True):
        done.append(one.settled(w, w_hat))
        w_hat = done[-1].inverse(w_hat)
    return tuple(reversed(done))


def through(applied: Sequence[Any], x: Float[Array, "*b n"], product: Callable[[Array], Array]) -> Array:
    """Run a layer: x in, `product` with W' inside, y out."""
    if not applied:
        return product(x)
    first, *rest = applied
    return first.output(through(rest, first.input(x), product), x)


def statistic(stats: Stats, kind: str, who: str) -> Array:
    """A statistic, or a UserError that says who wants it."""
    found = stats.importance if kind == "h" else getattr(stats, kind)
    if found is None:
        raise UserError(f"{who} needs the statistic {kind!r}: observe the model with kinds=({kind!r}, ...)")
    return found
