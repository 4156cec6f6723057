"""ggml's types of one scale and few levels: signs (Q1_0), trits (TQ1_0, TQ2_0), four levels (Q2_0). w = d q.

    type   B    bytes   fields, little-endian; d fp16
    Q1_0   128  18      d | bits[16]               bit ? d : -d
    Q2_0   64   18      d | qs[16]                 (q - 1) d, byte i: weights 4 i ... 4 i + 3 from its lowest bits
    TQ1_0  256  54      qs[48] | qh[4] | d         (q - 1) d, trits: ggml_trits.py
    TQ2_0  256  66      qs[64] | d                 (q - 1) d, byte m of each half: weights m, m + 32, m + 64, m + 96

Source: block_q1_0, block_q2_0, block_tq1_0 and block_tq2_0 of ggml, which takes d = max |x| (Q1_0: the mean of |x|) and
no importance: its types are for models that were trained to few levels (BitNet, TriLM). Here d is the best there is
(best_scale.py); of weights that have such levels already it is the same number.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.best_scale import best_scale
from qjax.formats.fields import Blocks, Field, Half, Planes, Stream, split
from qjax.formats.ggml_trits import Trits
from qjax.formats.grid import GGML, Scaling
from qjax.formats.levels import Integers, Levels, Table
from qjax.formats.protocol import Scales
from qjax.formats.storage import quotient, round_fp16
from qjax.formats.stores import Stored


@dataclasses.dataclass(frozen=True)
class BestScale(Scaling):
    """d, fp16, of least squared error: {"d": f32[*b, n / block]}.

    Attributes:
      steps: whole-numbered levels below 0 and above it; (0, 0): the levels are -1 and 1.
    """

    block: int
    steps: tuple[int, int]
    scale = Stored("d")

    def fit(self, levels: Levels, w: Array, weight: Array | None) -> Scales:
        """The best scale; that of ggml where no other is better as stored."""
        x, v = lax.stop_gradient((split(w, self.block), None if weight is None else split(weight, self.block)))
        size = jnp.abs(x)
        theirs = jnp.max(size, axis=-1) if any(self.steps) else quotient(jnp.sum(size, axis=-1), self.block)

        def error(d: Array) -> Array:
            T = levels.value(self.nearest(levels, {"d": d}, x.reshape(w.shape)).reshape(x.shape))
            e = jnp.square(x - d[..., None] * T)
            return jnp.sum(e if v is None else v * e, axis=-1)

        start, d = round_fp16(theirs), round_fp16(best_scale(x, v, *self.steps))
        better = (error(d) < error(start)) & jnp.isfinite(start)
        return {"d": jnp.where(better, d, start)}


def _format(name: str, levels: Levels, steps: tuple[int, int], layout: Blocks, about: str) -> GGML:
    return GGML(name, levels, BestScale(layout.block, steps), layout, f"GGUF: {about}")


def _trits(name: str, number: int, per_byte: str, field: Field) -> GGML:
    layout = Blocks(number, 256, (field, Half("d")), (("q", 1),))
    return _format(name, Integers(-1, 1), (1, 1), layout, f"ternary, {per_byte} weights in a byte")


FORMATS = (
    _trits("TQ1_0", 34, "five", Trits("q")),
    _trits("TQ2_0", 35, "four", Planes("q", 256, 2, 128)),
    _format(
        "Q1_0", Table((-1.0, 1.0)), (0, 0), Blocks(41, 128, (Half("d"), Stream("q", 128, 1))),
        "signs, one fp16 scale",
    ),
    _format(
        "Q2_0", Integers(-1, 2), (1, 2), Blocks(42, 64, (Half("d"), Stream("q", 64, 2)), (("q", 1),)),
        "-1, 0, 1 and 2 times one fp16 scale",
    ),
)  # fmt: skip
