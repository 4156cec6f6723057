"""What is still continuous of a model once its codes are fixed, as a tree that trains.

    v = v_0 exp(p)        each number v that a format stores beside the codes, and each that a change of variables keeps
    u = u_0 + rms(u_0) p  each vector of the model, gains of norms and biases, and weights that are still floats
    w_hat = decode(stored(v), codes)        dL/dp = sum over dw_hat/dv  dL/dw_hat v, straight through the storing

Scales, offsets and the entries of tables are numbers v; so are a K-quant's six-bit scales under its fp16 ones, which
move where p takes them to the next integer. w_hat is linear in each of them, whatever the levels are: a lattice's and
a trellis' points are looked up, not searched for. Parameters p are 0 at the start and without dimension: one rate fits
all formats, a number keeps its sign, and 0 stays 0. What is stored is stored by the format itself, so that a tuned
weight is a `QTensor` like any other, of the same codes and as many bytes.

Source: QuIP# (arXiv:2402.04396, section 5) and AQLM (arXiv:2401.06118, section 3.3) tune what is continuous behind
fixed codes; the scales alone are E2E-QP of EfficientQAT (arXiv:2407.11062, section 3.3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.grid import Scaled
from qjax.formats.protocol import Format, Scales
from qjax.formats.storage import fp16
from qjax.formats.stores import Multiple, Steps
from qjax.reparam.protocol import restore_all
from qjax.reparam.rotate import Rotated
from qjax.tensor import QTensor, is_qtensor
from qjax.training.grid.weights import leaves_by_path, mapped, replaced
from qjax.typing import Array, Float

Numbers = dict[str, Array]
Parameters = dict[str, Any]
"""{"scales": {path: {number: f32}}, "vectors": {path: f32}, "weights": {path: f32}}, what there is of the three."""


def start(params: Any) -> Parameters:
    """Parameters of a tree as it is: zeros.

    Args:
      params: a tree with QTensors, of a model.

    Raises:
      UserError: nothing is packed, or a packed weight rounds its inputs.
    """
    leaves = leaves_by_path(params)
    if not any(map(is_qtensor, leaves.values())):
        raise UserError("no weight of this model is packed: there is nothing to tune; quantize it first")
    for path, leaf in leaves.items():
        if is_qtensor(leaf) and leaf.rounds_inputs:
            raise UserError(f"{path}: rounds its inputs too, which no gradient passes; tune a recipe without act()")
    scales = {p: jax.eval_shape(numbers_of, leaf) for p, leaf in leaves.items() if is_qtensor(leaf)}
    vectors = {p: leaf for p, leaf in leaves.items() if _is_vector(leaf)}
    shapes = {"scales": {p: n for p, n in scales.items() if n}, "vectors": vectors}
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), {k: v for k, v in shapes.items() if v})


def values(params: Any, trained: Parameters) -> Any:
    """The tree that the model runs on: f32 at what is stored, with gradients by `trained`."""
    packed, scales = _packed(params), trained.get("scales", {})
    return replaced(params, mapped(lambda _, q, p, __: value(q, p), packed, _kinds(packed), scales, {})
                    | _floats(params, trained))  # fmt: skip


@jax.jit
def stored(params: Any, trained: Parameters) -> Any:
    """The tree that is exported: QTensors of the same codes and sizes, and floats, in their types."""
    packed, scales = _packed(params), trained.get("scales", {})
    return replaced(params, mapped(lambda _, q, p, __: storable(q, moved(q, p)), packed, _kinds(packed), scales, {})
                    | _floats(params, trained))  # fmt: skip


def numbers_of(q: QTensor) -> Numbers:
    """The numbers that a packed weight keeps beside its codes, f32: of its scales, and of its changes of variables.

    Integers are numbers where they are multiples of others. A rotation has none: a seed makes it.
    """
    scales, _ = q.format.unpack(q.leaves)
    found = {k: scales[k].astype(jnp.float32) for k in _moving(q.format, scales)}
    return found | {k: leaf.astype(jnp.float32) for k, leaf in _kept(q.applied).items()}


def moved(q: QTensor, p: Numbers) -> Numbers:
    """v = v_0 exp(p)."""
    return {k: v * jnp.exp(p[k]) if k in p else v for k, v in numbers_of(q).items()}


def storable(q: QTensor, numbers: Numbers) -> QTensor:
    """The packed weight of the storable numbers nearest to `numbers`."""
    fmt = q.format
    scales, codes = fmt.unpack(q.leaves)
    own = {k: numbers[k] for k in scales if k in numbers}
    now = scales | {k: v for k, v in own.items() if jnp.issubdtype(scales[k].dtype, jnp.floating)}
    if own and fmt.rows:  # numbers of a whole matrix are floats, and stand as they are
        now = fmt.store(now, fmt.columns(scales | own, q.format.shape(q.leaves)))
    applied = _with(q.applied, numbers)
    # Behind the barrier a cast to fp16 and back is not dropped.
    leaves, applied = lax.optimization_barrier((fmt.pack(now, codes), applied))
    return dataclasses.replace(q, leaves=leaves, applied=applied)


def value(q: QTensor, p: Numbers) -> Float[Array, "*w"]:
    """What a weight is worth as it would be stored, f32, with gradients by its parameters."""
    wanted = moved(q, p)
    new = jax.tree.map(lax.stop_gradient, storable(q, wanted))
    at = {k: _straight_through(v, wanted[k]) for k, v in numbers_of(new).items()}
    scales, codes = new.format.unpack(new.leaves)
    w = new.format.decode(scales | {k: v for k, v in at.items() if k in scales}, codes)
    w = restore_all(_with(new.applied, at, exact=False), w)
    return jnp.moveaxis(w, -1, q.axis).reshape(q.shape)


@jax.custom_jvp
def _straight_through(stored: Array, wanted: Array) -> Array:
    """`stored`, with the gradient of `wanted`."""
    return stored


@_straight_through.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


def _moving(fmt: Format, scales: Scales) -> list[str]:
    """Names of the entries of a format's scales that are numbers."""
    stores = (fmt.scaling.scale, fmt.scaling.offset, fmt.scaling.zero) if scales and isinstance(fmt, Scaled) else ()
    multiples = {store.key for store in stores if isinstance(store, Multiple | Steps)}
    return [k for k, v in scales.items() if jnp.issubdtype(v.dtype, jnp.floating) or k in multiples]


def _kept(applied: tuple[Any, ...]) -> dict[str, Array]:
    """The floats of changes of variables, but for rotations."""
    found = {}
    for i, one in enumerate(applied):
        if not isinstance(one, Rotated):
            for path, leaf in jax.tree_util.tree_leaves_with_path(one):
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    found[f"applied_{i}{jax.tree_util.keystr(path)}"] = leaf
    return found


def _with(applied: tuple[Any, ...], numbers: Numbers, exact: bool = True) -> tuple[Any, ...]:
    """Changes of variables with other floats; `exact`: in the type that is stored."""

    def pick(i: int, path: Any, leaf: Array) -> Array:
        new = numbers.get(f"applied_{i}{jax.tree_util.keystr(path)}")
        if new is None or not exact:
            return leaf if new is None else new
        return fp16(new) if leaf.dtype == jnp.float16 else new.astype(leaf.dtype)

    return tuple(
        jax.tree_util.tree_map_with_path(lambda path, leaf, i=i: pick(i, path, leaf), one)
        for i, one in enumerate(applied)
    )


def _packed(params: Any) -> dict[str, QTensor]:
    return {path: leaf for path, leaf in leaves_by_path(params).items() if is_qtensor(leaf)}


def _kinds(packed: dict[str, QTensor]) -> dict[str, Any]:
    """What weights that are computed together must share, beside their shapes."""
    return {
        path: (jax.tree.structure(q), tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(q)))
        for path, q in packed.items()
    }


def _is_vector(leaf: Any) -> bool:
    return not is_qtensor(leaf) and leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _floats(params: Any, trained: Parameters) -> dict[str, Array]:
    """u = u_0 + rms(u_0) p, in the type of u_0: of vectors, and of weights that are still floats."""
    leaves = leaves_by_path(params)

    def at(u: Array, p: Array) -> Array:
        wide = u.astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(wide)))
        return (wide + jnp.where(size > 0, size, 1.0) * p).astype(u.dtype)

    free = trained.get("vectors", {}) | trained.get("weights", {})
    return {path: at(leaves[path], p) for path, p in free.items()}
