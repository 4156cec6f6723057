"""TQ1_0's packing: five trits a byte, for 256 weights 48 bytes of five and 4 bytes of four.

32 bytes hold weights 0..159 (byte m: m, m + 32, ... m + 128), 16 bytes hold 160..239 (steps of 16), 4 bytes hold
240..255 (steps of 4). A byte is ceil(N 256 / 243), N its trits as a base-3 number of five digits, first trit highest;
multiplying the byte by 3^k and keeping 8 bits moves trit k to the top, where times 3 >> 8 reads it. Source: block_tq1_0
of ggml.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

_GROUPS = ((32, 5), (16, 5), (4, 4))  # bytes, trits a byte


@dataclasses.dataclass(frozen=True)
class Trits:
    """A field of 256 trits, 0 to 2."""

    of: str
    size: int = 52

    def write(self, numbers: dict[str, Array]) -> Array:
        fields, at = [], 0
        for size, count in _GROUPS:
            group = numbers[self.of][..., at : at + size * count].astype(jnp.uint32)
            number = jnp.zeros_like(group[..., :size])
            for k in range(count):
                number = number * 3 + group[..., k * size : (k + 1) * size]
            fields.append(((number * 3 ** (5 - count) * 256 + 242) // 243).astype(jnp.uint8))
            at += size * count
        return jnp.concatenate(fields, axis=-1)

    def read(self, raw: Array) -> dict[str, Array]:
        trits, at = [], 0
        for size, count in _GROUPS:
            group = raw[..., at : at + size].astype(jnp.uint32)
            trits += [(((group * 3**k) & 255) * 3) >> 8 for k in range(count)]
            at += size
        return {self.of: jnp.concatenate(trits, axis=-1).astype(jnp.uint8)}
