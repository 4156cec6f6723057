"""LoftQ: a quantized weight and an adapter that make up for each other from the start.

    min |W - Q - A B|_F        A_0 B_0 = 0;   Q_t = q(W - A_{t-1} B_{t-1}),   A_t B_t = SVD_r(W - Q_t),   t = 1 .. T

Li et al., arXiv:2310.08659, algorithm 1, with singular values split evenly: A = U sqrt(S), B = sqrt(S) V^T. Plain QLoRA
starts from W_hat alone, which at 2 and 3 bits is a broken model. The alternation is not monotone, since q is no exact
minimizer: with 2-bit absmax scales on Gaussian weights its fifth round is often worse than its first. The best of the T
rounds is what comes back, so more of them never hurt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats.protocol import Format
from qjax.pipeline.memory import contracted_axis, named_weight
from qjax.plan.rules import Plan
from qjax.tensor import QTensor, check_length, dequantize, is_qtensor, quantize
from qjax.training.adapters.lora import LAYERS, Adapter, check_rank, matching
from qjax.training.grid.weights import leaves_by_path
from qjax.typing import Array, Float

Rounding = Callable[[Array], QTensor]


def loftq(
    w: Float[Array, "*b m n"] | np.ndarray,
    format: str | Format,
    axis: int = -2,
    rank: int = 64,
    rounds: int = 5,
    quantizer: Rounding | None = None,
) -> tuple[QTensor, Adapter]:
    """The best of some rounds of alternating between rounding and SVD.

    Args:
      w: floats: a matrix, or a stack of them that is worked on matrix by matrix.
      format: a name or a Format.
      axis: the contracted axis: -2 for flax kernels (in, out), -1 for rows (out, in).
      rank: r, at most the smaller side.
      rounds: T; 1 is the SVD of what plain quantization leaves.
      quantizer: q, a function of one matrix that JAX can trace; None: `quantize` to the nearest. With one, `format`
        only checks the shape.

    Returns: Q, and (A, B) f32 with scale 1, of the round with the least Frobenius error.

    Raises:
      UserError: a rank or axis that does not fit, NaN or Inf in w (outside jit), a quantizer that does not return a
        QTensor of the matrix's shape.
    """
    fmt, w = get_format(format), jnp.asarray(w)
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise UserError(f"loftq needs a matrix of floats, or a stack of them, got {w.dtype}{list(w.shape)}")
    axis = axis - w.ndim if axis >= 0 else axis
    if axis not in (-1, -2):
        raise UserError(f"loftq: axis must be one of the last two, -2 for kernels (in, out), got {axis} of {w.shape}")
    if rounds < 1:
        raise UserError(f"loftq needs at least one round, got {rounds}")
    check_length(fmt, w.shape[axis], f"axis {axis} of shape {w.shape}")
    check_rank("loftq", rank, w.shape[axis], w.shape[-3 - axis])
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        raise UserError(f"loftq: {int(jnp.sum(~jnp.isfinite(w)))} of {w.size} weights are NaN or infinite")
    fn: Any = partial(_alternate, format=fmt, axis=axis, rank=rank, rounds=rounds, quantizer=quantizer)
    for _ in range(w.ndim - 2):
        fn = jax.vmap(fn)
    q, (a, b) = fn(w.astype(jnp.float32))
    return q, Adapter(a, b, 1.0)


@partial(jax.jit, static_argnames=("format", "axis", "rank", "rounds", "quantizer"))
def _alternate(
    w: Array, *, format: Format, axis: int, rank: int, rounds: int, quantizer: Rounding | None
) -> tuple[QTensor, tuple[Array, Array]]:
    q_of = quantizer or partial(quantize, format=format, axis=axis)

    def one(low_rank: Array) -> tuple[QTensor, tuple[Array, Array], Array, Array]:
        """A round: Q, (A, B), A B arranged as w is, and the error."""
        q = q_of(w - low_rank)
        if not is_qtensor(q) or q.shape != w.shape:
            raise UserError(f"loftq: the quantizer gave {q} for a matrix of {w.shape}; it must return its QTensor")
        left = w - dequantize(q)
        a, b = best_of_rank(left if axis == -2 else left.T, rank)
        ab = jnp.matmul(a, b, precision="highest")
        ab = ab if axis == -2 else ab.T
        return q, (a, b), ab, jnp.linalg.norm(left - ab)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        best, low_rank = carry
        q, factors, ab, error = one(low_rank)
        best = jax.tree.map(lambda new, old: jnp.where(error < best[2], new, old), (q, factors, error), best)
        return (best, ab), None

    q, factors, ab, error = one(jnp.zeros_like(w))
    ((q, factors, _), _), _ = lax.scan(step, ((q, factors, error), ab), None, length=rounds - 1)
    return q, factors


def best_of_rank(w: Float[Array, "n out"], rank: int) -> tuple[Float[Array, "n r"], Float[Array, "r out"]]:
    """U sqrt(S) and sqrt(S) V^T of the leading singular values: their product is the nearest matrix of that rank."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root[None, :], root[:, None] * vt[:rank]


def loftq_params(
    params: Any,
    plan: Plan | Mapping[str, tuple[str | Format, int]],
    rank: int = 64,
    rounds: int = 5,
    patterns: Sequence[str] = LAYERS,
) -> tuple[Any, dict[str, Adapter]]:
    """Quantize a tree, each matrix with an adapter by `loftq`, rounded to the nearest.

    Args:
      params: a tree of floats; layers of equal shape share one compiled program.
      plan: a Plan of formats, over kernels (in, out) and embeddings; or {path: (format, axis)}.
      rank, rounds: as for `loftq`.
      patterns: which of the quantized matrices get adapters. The others are quantized alone: embeddings are looked up,
        where no adapter works.

    Returns: params with QTensors, and {path: Adapter} for `apply_adapted`.

    Raises:
      UserError: a plan with recipes, a path of no weight, a weight that is packed already; what `loftq` and
        `Plan.assign` raise.
    """
    named, tree = leaves_by_path(params), jax.tree.structure(params, is_leaf=is_qtensor)
    formats = _of_plan(plan, named) if isinstance(plan, Plan) else plan
    for path in formats:
        if path not in named:
            raise UserError(f"loftq: no weight is called {path!r}; they are called like {next(iter(named))!r}")
        if is_qtensor(named[path]):
            raise UserError(f"loftq: {path} is packed already; start from the float weights")
    adapted = matching({path: named[path] for path in formats}, patterns)
    adapters: dict[str, Adapter] = {}
    for path, (fmt, axis) in formats.items():
        try:
            if path in adapted:
                named[path], adapters[path] = loftq(named[path], fmt, axis, rank, rounds)
            else:
                named[path] = quantize(named[path], fmt, axis)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return jax.tree.unflatten(tree, list(named.values())), adapters


def _of_plan(plan: Plan, named: Mapping[str, Any]) -> dict[str, tuple[Format, int]]:
    """The format and contracted axis of each weight that the plan quantizes."""
    formats = {}
    for one in plan.assign(named_weight(path, leaf, {}) for path, leaf in named.items()):
        path = one.weight.path
        if one.recipe is not None:
            raise UserError(f"loftq: the plan gives {path} a recipe; its rules must be formats alone")
        if one.format is not None:
            formats[path] = (one.format, contracted_axis(path, named[path].ndim))
    return formats
