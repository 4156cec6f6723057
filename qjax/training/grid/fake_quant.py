"""Fake quantization: the value of the quantized weight, the gradient of the float one.

    w_fake = dequantize(quantize(w))        dL/dw = estimator(dL/dw_fake, place of w on its grid)

The forward is literally what is exported: the same `encode` and `decode` that `qjax.quantize` and `qjax.dequantize`
run, behind an optimization barrier, so that no surrounding program fuses with them and rounds differently. Every format
of the registry has one, and so has every format that is added to it.

Source: Jacob et al., arXiv:1712.05877, section 3; the export rule is qjax's own (docs/training.md).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats import sound
from qjax.formats.protocol import Format, Scales
from qjax.tensor import check_length, importance_rows
from qjax.training.grid.estimators import Estimator, position_of, ste
from qjax.typing import Array, Float


def fake_quant(
    w: Float[Array, "*w"],
    format: str | Format,
    axis: int = -1,
    weight: Float[Array, "*w"] | Float[Array, "n"] | None = None,
    estimator: Estimator | None = None,
) -> Float[Array, "*w"]:
    """Quantize and decode in the forward, straight through in the backward.

    Args:
      w: floats of any shape; its length along `axis` must be a multiple of the format's block.
      format: a name or a Format.
      axis: the contracted axis.
      weight: importance of each weight, as in `qjax.quantize`.
      estimator: what passes back; default `ste()`.

    Returns: f32, bit for bit `qjax.dequantize(qjax.quantize(w, format, axis, weight))`, under jit and outside, for
      masters of any type.

    Raises:
      UserError: unknown format, a length the block does not divide, or no floats.

    >>> w = jnp.array([0.1, -0.24, 0.5, 1.0] * 8)
    >>> fake_quant(w, "Q4_0")[:4].tolist()
    [0.125, -0.25, 0.5, 1.0]
    >>> jax.grad(lambda w: fake_quant(w, "Q4_0").sum())(w)[:4].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    fmt = get_format(format)
    if w.ndim == 0 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise UserError(f"fake_quant needs a floating-point array with at least one axis, got {w.dtype}{list(w.shape)}")
    if not -w.ndim <= axis < w.ndim:
        raise UserError(f"axis {axis} is out of range for shape {w.shape}")
    if w.size == 0:
        raise UserError(f"an array of shape {w.shape} has no weights to quantize")
    check_length(fmt, w.shape[axis], f"axis {axis} of shape {tuple(w.shape)}")
    w = w.astype(jnp.float32)
    x = jnp.moveaxis(w, axis, -1)
    scales, codes = encoded(fmt, lax.stop_gradient(x), importance_rows(weight, x, axis))
    w_hat = jnp.moveaxis(decoded(fmt, scales, codes), -1, axis)
    return straight_through(fmt, ste() if estimator is None else estimator, axis, w, w_hat, scales)


@partial(jax.jit, static_argnums=0)
def encoded(fmt: Format, x: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> tuple[Scales, Array]:
    """Scales and codes of `qjax.quantize`, alike in every program: contracted axis last."""
    scales, codes = sound.encode(fmt, *lax.optimization_barrier((x, weight)))
    return lax.optimization_barrier((scales, codes))


@partial(jax.jit, static_argnums=0)
def rounded(fmt: Format, scales: Scales, x: Float[Array, "*b n"]) -> Array:
    """The codes of the levels nearest to x under given scales, alike in every program."""
    return lax.optimization_barrier(fmt.nearest(*lax.optimization_barrier((scales, x))))


@partial(jax.jit, static_argnums=0)
def decoded(fmt: Format, scales: Scales, codes: Array) -> Float[Array, "*b n"]:
    """The values of codes, alike in every program."""
    return lax.optimization_barrier(fmt.decode(*lax.optimization_barrier((scales, codes))))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def straight_through(
    fmt: Format, estimator: Estimator, axis: int, w: Float[Array, "*w"], w_hat: Float[Array, "*w"], scales: Scales
) -> Float[Array, "*w"]:
    """w_hat, with the gradient that the estimator passes to w; `axis` is the contracted one."""
    return w_hat


def _forward(
    fmt: Format, estimator: Estimator, axis: int, w: Array, w_hat: Array, scales: Scales
) -> tuple[Array, tuple]:
    return w_hat, (w, w_hat, scales)


def _backward(fmt: Format, estimator: Estimator, axis: int, residuals: tuple, g: Array) -> tuple[Array, None, None]:
    w, w_hat, scales = residuals
    place = position_of(fmt, scales, w, w_hat, axis)
    return estimator(g.reshape(place.w.shape), place).reshape(g.shape), None, None


straight_through.defvjp(_forward, _backward)
