"""What is done to one piece of a decoder with all windows: run it, whole or up to a place in it; go back through it.

Each is one program a shape, whatever the layer; weights come in, a piece at a time, and leave again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.compiled import full_float32
from qjax.io.space import let_go, scratch
from qjax.lifting import Piece, Use, report, tap, tap_shapes
from qjax.models.devices import each_step
from qjax.models.parts import Parts, Table, embed, run
from qjax.models.stages import Apply, Stages
from qjax.pipeline.activations import Activations, Writer
from qjax.pipeline.encode import check_finite
from qjax.pipeline.output_curvature import summed_curvature
from qjax.typing import Array


class Checked:
    """The same model, its weights looked through for NaN and Inf when they are first asked for: what is broken is named
    before it has spread into activations and gradients."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._seen: set[str] = set()

    def part(self, name: str) -> Any:
        """See `Parts`."""
        part = self._parts.part(name)
        if name not in self._seen:
            check_finite(part, f"{name}/")
            self._seen.add(name)
        return part

    def embedding(self) -> Table:
        """Rows of the embedding by token."""
        table = self._parts.table("embed")

        def rows(tokens: np.ndarray) -> Any:
            found = table(tokens)
            check_finite({"embedding": found}, "embed/")
            return found

        return rows


def groups_of(apply: Callable[..., Any], params: Any, *x: Any) -> tuple[tuple[Use, ...], ...]:
    """The contractions of a piece in the order of execution, those with the same input together."""
    found: dict[int, list[Use]] = {}
    for use in report(apply, params, *x):
        if use.kind == "dot":
            found.setdefault(use.source, []).append(use)
    return tuple(tuple(uses) for uses in found.values())


def head_weights(stages: Stages, parts: Checked) -> dict[str, Any]:
    """What `stages.head` needs."""
    name = "embed" if stages.tied else "head"
    return {"final_norm": parts.part("final_norm"), name: parts.part(name)}


@dataclasses.dataclass(frozen=True, eq=False)
class Here:
    """A place inside of a piece.

    Attributes:
      apply: what is still to run: (params, *x) -> what the piece gives.
      x: what of all windows goes into it, [windows, ...] each, behind the rounded weights.
      x_float: the same in the float model; None where nobody asks.
    """

    apply: Callable[..., Any]
    x: tuple[np.ndarray, ...]
    x_float: tuple[np.ndarray, ...] | None = None


def run_piece(
    apply: Callable[..., Any], params: Any, x: tuple[np.ndarray, ...], shape: tuple[int, ...], steps: list[slice],
    folder: Path | None, name: str,
) -> Activations:  # fmt: skip
    """apply(params, *x) of all windows, stored."""
    out = Writer(folder, name, shape)
    for at, y in each_step(run, (apply,), (params,), x, steps):
        out.array[at] = np.asarray(y)
        let_go(out.array, *x)
    return out.done()


def advanced(
    steps: list[slice], folder: Path | None, piece: Piece, following: Piece, params: Any, floats: Any, here: Here
) -> Here:
    """The place behind a cut: both streams run up to it, each with its own weights."""

    def up_to(params: Any, x: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        shapes = [((len(x[0]), *a.shape[1:]), a.dtype) for a in following.live]
        outs = tuple(np.empty(s, d) if folder is None else scratch(d, s, folder) for s, d in shapes)
        for at, ys in each_step(run, (piece.step,), (params,), x, steps):
            for out, y in zip(outs, ys, strict=True):
                out[at] = np.asarray(y)
            let_go(*outs, *x)
        return outs

    return Here(following.rest, up_to(params, here.x), None if here.x_float is None else up_to(floats, here.x_float))


def embedded(
    stages: Stages, table: Table, tokens: np.ndarray, steps: list[slice], folder: Path | None, name: str
) -> Activations:
    """What the first block reads of all windows, stored; of the embedding, only their rows are in memory."""
    out = Writer(folder, name, (*tokens.shape, stages.dim))
    for at in steps:
        out.array[at] = np.asarray(embed(stages, table, tokens[at]))
    return out.done()


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
@full_float32
def block_step(
    apply: Apply,
    keys: tuple[tuple[str, ...], ...],
    rows: tuple[tuple[str, int], ...],
    guided: tuple[tuple[str, int], ...],
    params: Any,
    x: Array,
    g: Array,
) -> tuple[Array, Array, dict[str, Array], dict[str, Array]]:
    """What the loss says of a block.

    Args:
      keys: of the weights of each input.
      rows: (key, rows of a block) of the weights whose G is wanted.
      guided: (key, groups) of those whose rows are told apart.

    Returns: dL/dx; |dL/dy|^2 of the weights of each input, of all their experts, token by token: f32[groups, b, t]; the
      sums of G, see output_curvature.py; and the mean of (dL/dy_i)^2 over each group of rows: f32[k, b, t].
    """
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, x).items()}
    _, back = jax.vjp(lambda taps, x: tap(apply)(params, taps, x), taps, x)
    by_output, by_input = back(g)

    def size(y: Array) -> Array:
        return jnp.sum(jnp.sum(jnp.square(y), axis=-1).reshape(-1, *x.shape[:2]), axis=0)

    def curvature(y: Array, m: int) -> Array:
        tokens = y.reshape(*y.shape[:-3], x.shape[0] * x.shape[1], y.shape[-1])
        return summed_curvature(tokens, m)

    def by_rows(y: Array, k: int) -> Array:
        return jnp.moveaxis(jnp.mean(jnp.square(y).reshape(*x.shape[:2], k, -1), axis=-1), -1, 0)

    sizes = [sum(size(by_output[k]) for k in group) for group in keys]
    found_G = {key: curvature(by_output[key], m) for key, m in rows}
    return by_input, jnp.stack(sizes), found_G, {key: by_rows(by_output[key], k) for key, k in guided}


@partial(jax.jit, static_argnums=0)
@full_float32
def embed_step(apply: Apply, rows: Array, g: Array) -> Array:
    """sum of c c^T, c the gradient at the looked-up row; `rows` are those of the tokens, in order."""
    params, tokens = {"embed": {"embedding": rows}}, jnp.arange(len(rows), dtype=jnp.int32).reshape(g.shape[:-1])
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, tokens).items()}
    _, back = jax.vjp(lambda taps: tap(apply)(params, taps, tokens), taps)
    (c,) = (c.reshape(-1, c.shape[-1]) for c in back(g)[0].values())
    return lax.dot_general(c, c, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
