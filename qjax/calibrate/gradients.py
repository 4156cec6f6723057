"""What flows into every matrix of a model and what the loss says of what flows out, one sequence after the other.

    y_t = W x_t        g_t = dL/dy_t        L = - sum_t log p(label_t),  labels drawn from the model's own p

Labels of the model's own make the second moment of W's gradient the curvature of the KL divergence to the model
(Fisher's information), which those of the text do not. One sequence is in memory at a time, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.lifting import Use, report, tap, tap_shapes, watch
from qjax.typing import Array, Float

Loss = Callable[[Any, Any], Array]
"""(key, what the function gives for one sequence) -> a number."""

Of = Callable[[Any, Array, Array], Any]
"""(what is given for a weight, x f32[t, n], g f32[t, m]) -> what the sequence adds to its sums."""


def own_labels(key: Array, logits: Float[Array, "*t vocab"]) -> Float[Array, ""]:
    """- log p of labels that are drawn from p = softmax(logits), summed over tokens."""
    labels = jax.random.categorical(key, lax.stop_gradient(logits), axis=-1)
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), labels[..., None], axis=-1))


def matrices(apply_fn: Callable[..., Any], params: Any, *args: Any) -> dict[str, tuple[Use, ...]]:
    """{path: its dots} of the weights that are one matrix, contracted along one axis."""
    found: dict[str, tuple[Use, ...]] = {}
    for use in report(apply_fn, params, *args):
        if use.kind == "dot" and len(use.shape) == 2 and len(use.axes) == 1 and not use.stacked:
            found[use.path] = (*found.get(use.path, ()), use)
    return {path: uses for path, uses in found.items() if len({use.axes for use in uses}) == 1}


def chosen(
    apply_fn: Callable[..., Any], params: Any, batches: Sequence[Any], paths: Collection[str] | None
) -> dict[str, Use]:
    """A use of each weight that is looked at.

    Raises:
      UserError: no batches, no weight, or one that is not a matrix.
    """
    if not batches:
        raise UserError("there are no batches to look at")
    found = matrices(apply_fn, params, *(a[:1] for a in _inputs(batches[0])))
    for path in paths or ():
        if path not in found:
            raise UserError(
                f"{path!r} is not one matrix that is contracted along one axis; those are {', '.join(found) or 'none'}"
            )
    if not found or (paths is not None and not paths):
        raise UserError("no weight is one matrix that is contracted along one axis, so there is none to look at")
    return {path: uses[0] for path, uses in found.items() if paths is None or path in paths}


def summed(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Sequence[Any],
    key: Array,
    loss: Loss,
    of: Of,
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Array], int]:
    """Sums over all sequences of what each adds.

    Args:
      apply_fn: a pure function of (params, *inputs), whose inputs have the sequences as their first axis.
      params: its weights.
      batches: inputs; a tuple is spread over the function's arguments.
      key: of the labels, which with a sequence's place are all that they depend on.
      loss: of one sequence.
      of: what it adds to a weight's sums.
      given: {path: what `of` is given}: the weights that are looked at.

    Returns: {path: sums}, {path: tokens, f32[]}, and how many sequences there were.

    Raises:
      UserError: no gradient at the output of a weight, or NaN.
    """

    total: Any = None
    sequences = 0
    for batch in batches:
        args = _inputs(batch)
        part = _step(apply_fn, loss, of, params, given, key, jnp.int32(sequences), *args)
        total = part if total is None else _add(total, part)
        sequences += args[0].shape[0]
    for path, (sums, _) in total.items():
        sizes = [float(jnp.max(jnp.abs(a))) for a in jax.tree.leaves(sums)]
        if not all(0 < size < float("inf") for size in sizes):
            what = "no gradient of the loss" if 0.0 in sizes else "a gradient or an input that is NaN or infinite"
            raise UserError(f"{path}: there is {what} at its output; the model, the text or the loss is broken")
    return {path: s for path, (s, _) in total.items()}, {path: n for path, (_, n) in total.items()}, sequences


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_float32
def _step(
    apply_fn: Callable[..., Any], loss: Loss, of: Of, params: Any, given: Any, key: Array, first: Array, *args: Array
) -> dict[str, Any]:
    """{path: (the sums of a batch, its tokens)}; `first` is the place of its first sequence."""

    def one(place: Array, args: tuple[Array, ...]) -> dict[str, Any]:
        args = tuple(a[None] for a in args)
        pairs = _pairs(apply_fn, loss, given, params, args, jax.random.fold_in(key, place))
        return {path: (of(given[path], x, g), jnp.float32(len(x))) for path, (x, g) in pairs.items()}

    places = first + jnp.arange(args[0].shape[0])
    shapes = jax.eval_shape(one, places[0], tuple(a[0] for a in args))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(lambda sums, at: (_add(sums, one(*at)), None), start, (places, args))[0]


def _inputs(batch: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(a) for a in (batch if isinstance(batch, tuple) else (batch,)))


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _pairs(
    apply_fn: Callable[..., Any], loss: Loss, paths: Collection[str], params: Any, args: tuple[Any, ...], key: Array
) -> dict[str, tuple[Float[Array, "t n"], Float[Array, "t m"]]]:
    """x and g of one sequence, by path; those of a weight's several uses one behind the other."""
    uses = {path: found for path, found in matrices(apply_fn, params, *args).items() if path in paths}
    shapes, wanted = tap_shapes(apply_fn, params, *args), {use.source for of in uses.values() for use in of}
    taps = {use.key: jnp.zeros(shapes[use.key].shape, shapes[use.key].dtype) for of in uses.values() for use in of}
    g = jax.grad(lambda taps: loss(key, tap(apply_fn)(params, taps, *args)))(taps)
    x = watch(apply_fn, lambda use, x: x if use.source in wanted else None)(params, *args)[1]

    def rows(a: Array) -> Array:
        return a.reshape(-1, a.shape[-1]).astype(jnp.float32)

    found = {}
    for path, of in uses.items():
        for use in of:
            if x[use.source].shape[:-1] != g[use.key].shape[:-1]:
                raise UserError(f"{path}: its output has the shape {g[use.key].shape}; its rows must be the last axis")
        into, out = (
            jnp.concatenate(parts) for parts in zip(*((rows(x[u.source]), rows(g[u.key])) for u in of), strict=True)
        )
        found[path] = into, out
    return found
