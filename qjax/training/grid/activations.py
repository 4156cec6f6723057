"""Fake quantization of what flows: the inputs of linear layers, and what the key/value cache stores.

    y = W x_hat      x_hat = s q(x / s)      s = max |x| of the token / q_max
    attention reads  k_hat = fake_quant(k),  v_hat = fake_quant(v)      a format's blocks along each head's channels

Inputs are rounded exactly as a model quantized with `act(...)` rounds them when it runs (reparam/inputs.py), and the
cache exactly as one that stores a format's blocks token by token: prefill and step-by-step decoding see the same
values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats.protocol import Format
from qjax.lifting import replace_inputs, report
from qjax.plan.rules import fits
from qjax.recipes import reparam
from qjax.reparam.inputs import Kind, RoundedInput
from qjax.reparam.rotate import Rotate, Rotated
from qjax.training.grid.fake_quant import fake_quant
from qjax.typing import Array, Float

Apply = Callable[..., Any]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_quant(kind: Kind, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """x rounded token by token, straight through: nothing lies outside of the range of a token's own largest |x|.

    Args:
      kind: int8, int4, e4m3 or e5m2.
      x: any float type; the last axis is one token's.
    """
    return RoundedInput(None, kind).input(x)


token_quant.defvjp(lambda kind, x: (token_quant(kind, x), None), lambda kind, _, g: (g,))


def quantized_inputs(apply: Apply, kind: Kind = "int8", patterns: Sequence[str] = ("*",)) -> Apply:
    """A model whose linear layers read rounded inputs, in training and out of it.

    Args:
      apply: a pure function of (params, *inputs).
      kind: int8, int4, e4m3 or e5m2.
      patterns: as in a plan, over the paths of the weights whose inputs are rounded.

    Raises:
      UserError: (when called) a pattern that fits no weight of a dot.
    """

    def transform(use: Any, x: Array) -> Array:
        return token_quant(kind, x) if any(fits(p, use.path) for p in patterns) else x

    inner = replace_inputs(apply, transform)

    def quantized(params: Any, *args: Any) -> Any:
        paths = [use.path for use in report(apply, params, *args) if use.kind == "dot"]
        for p in patterns:
            if not any(fits(p, path) for path in paths):
                raise UserError(f"inputs: pattern {p!r} fits no weight; they are called like {paths[0]!r}")
        return inner(params, *args)

    return quantized


def quantized_cache(keys: str | Format, values: str | Format | None = None) -> Callable[[str, Array], Array]:
    """For `Decoder(stored=...)`: keys and values as a cache in these formats gives them back, straight through.

    Behind a rotation R, x_hat = R^T fake_quant(R x): what attention reads from a cache that holds rotated keys (after
    the position embedding) and asks it with rotated queries, q (R^T k) = (R q) k: the online rotation of QuaRot
    (arXiv:2404.00456, section 4, stage 2c), which spreads the few large channels of keys.

    Args:
      keys, values: formats whose blocks divide the head's channels, or lines such as "hadamard() >> Q4_0"; values
        default to the keys'.

    Raises:
      UserError: no such format, or something other than a rotation in front of it.

    >>> stored = quantized_cache("hadamard() >> Q4_0", "Q8_0")
    >>> stored("k", jnp.ones((1, 2, 32))).shape
    (1, 2, 32)
    """
    ways = {"k": _stored_as(keys), "v": _stored_as(keys if values is None else values)}

    def stored(name: str, x: Array) -> Array:
        turn, format = ways[name]
        if turn is None:
            return fake_quant(x, format).astype(x.dtype)
        turned = fake_quant(turn.input(x.astype(jnp.float32)), format)
        return turn.inverse(turned.reshape(-1, x.shape[-1])).reshape(x.shape).astype(x.dtype)

    return stored


def _stored_as(line: str | Format) -> tuple[Rotated | None, Format]:
    """The rotation and the format of "rotation >> format"."""
    if not isinstance(line, str) or ">>" not in line:
        return None, get_format(line)
    rotation, _, name = line.rpartition(">>")
    turn = reparam(rotation.strip())
    if not isinstance(turn, Rotate):
        raise UserError(f"cache {line!r}: only a rotation may stand in front of a format, as in 'hadamard() >> Q4_0'")
    # Both sides are the head's own channels here.
    return Rotated(jnp.uint32(turn.seed), turn.kind, "in", turn.block), get_format(name.strip())
