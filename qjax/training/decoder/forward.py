"""A decoder's forward for training: its products in bfloat16 or not, what flows between its weights rounded or not.

Forward(config)(params, tokens)          logits, or what the head reads
Forward(config).hidden(params, tokens)   what leaves each of its blocks, in the same arithmetic
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block, Decoder
from qjax.training.decoder.quantization import Activations
from qjax.training.grid.activations import quantized_cache, quantized_inputs
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Forward:
    """A function of (params, tokens). Equal records are one function: what is compiled of one serves the other.

    Attributes:
      config: of the decoder.
      activations: how what flows is rounded.
      mixed: bfloat16 operands and float32 sums; else float32.
      readout: give logits; else what the head reads.
    """

    config: DecoderConfig
    activations: Activations = dataclasses.field(default_factory=Activations)
    mixed: bool = False
    readout: bool = True

    def __call__(self, params: Any, tokens: Any) -> Array:
        """Logits [b, t, vocab], or [b, t, dim]."""
        model = self._decoder(self.readout)
        return self._rounded(lambda params, tokens: model.apply({"params": params}, tokens))(params, tokens)

    def hidden(self, params: Any, tokens: Any) -> list[Array]:
        """What leaves each block, [b, t, dim] each."""
        model = self._decoder(readout=False)

        def states(params: Any, tokens: Any) -> list[Array]:
            blocks = {"capture_intermediates": lambda module, _: isinstance(module, Block), "mutable": "intermediates"}
            seen: Any = model.apply({"params": params}, tokens, **blocks)[1]["intermediates"]  # type: ignore[arg-type]
            return [seen[f"layers_{i}"]["__call__"][0][0] for i in range(self.config.layers)]  # of (x, its cache)

        return self._rounded(states)(params, tokens)

    def _decoder(self, readout: bool) -> Decoder:
        options: dict[str, Any] = {"dtype": jnp.bfloat16, "dot_general": mixed_dot_general} if self.mixed else {}
        if self.activations.cache:
            options["stored"] = quantized_cache(self.activations.cache)
        return Decoder(self.config, readout=readout, **options)

    def _rounded(self, apply: Any) -> Any:
        """The same function with the inputs of its blocks rounded."""
        kind: Any = self.activations.inputs
        return quantized_inputs(apply, kind, ("layers_*",)) if kind else apply


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x, w, dimension_numbers):
    return lax.dot_general(x, w, dimension_numbers, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, w, dimension_numbers):
    return _dot(x, w, dimension_numbers), (x, w)


def _backward(dimension_numbers, residuals, g):
    x, w = residuals
    ((_, (cw,)), _) = dimension_numbers
    g = g.astype(x.dtype)
    # dx = g w^T and dw = x^T g, over all batch axes of x; w is (in, out) or, contracted on axis 1, (out, in).
    dx = lax.dot_general(g, w, (((g.ndim - 1,), (1 - cw,)), ((), ())), preferred_element_type=jnp.float32)
    batch = tuple(range(x.ndim - 1))
    dw = lax.dot_general(x, g, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), (dw if cw == 0 else dw.T).astype(w.dtype)


_dot.defvjp(_forward, _backward)


def mixed_dot_general(x, w, dimension_numbers, precision=None, preferred_element_type=None, **_):
    """`lax.dot_general` of activations [..., k] with a matrix, for use as a model's `dot_general`.

    All three products (forward, dx, dw) keep their operands in the input's type and accumulate in float32, which is
    what matrix units (TPU, tensor cores, AMX) do natively.
    """
    del precision, preferred_element_type
    ((cx, cw), (bx, bw)) = dimension_numbers
    if tuple(cx) != (x.ndim - 1,) or w.ndim != 2 or bx or bw:
        raise ValueError(
            f"mixed_dot_general is for [..., k] times a matrix, got {x.shape} {w.shape} {dimension_numbers}"
        )
    return _dot(x, w, ((tuple(cx), tuple(cw)), ((), ())))
