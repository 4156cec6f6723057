"""The few 32-bit instructions that a decode is written in, on registers of a GPU or on arrays.

    shift(w, n)                  w >> n, w << -n
    lop3(a, b, c, truth)         any function of three words, bit by bit: its truth table
    prmt(a, b, select)           byte i = byte (nibble i of select) of b:a
    fma(a, b, c)                 a b + c of two bfloat16 each
    word(value)                  a constant

A decode is one program for both: what the interpreter runs is what is compiled, instruction for instruction.
Source: PTX ISA, `lop3.b32`, `prmt.b32` (generic mode, no sign replication), `fma.rn.bf16x2` (sm_90).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

AND_OR = 0xEA
"""(a and b) or c."""
CHOOSE = 0xCA
"""b where a, else c."""


@runtime_checkable
class Words(Protocol):
    """See the module's docstring."""

    def word(self, value: int) -> Any: ...

    def shift(self, w: Any, n: int) -> Any: ...

    def lop3(self, a: Any, b: Any, c: Any, truth: int) -> Any: ...

    def prmt(self, a: Any, b: Any, select: Any) -> Any: ...

    def fma(self, a: Any, b: Any, c: Any) -> Any: ...


def pair(value: float) -> int:
    """The word of two equal bfloat16; the value must be one.

    >>> hex(pair(-136.0))
    '0xc308c308'
    """
    half = int(np.float32(value).view(np.uint32)) >> 16
    assert np.uint32(half << 16).view(np.float32) == value, f"{value} is no bfloat16"
    return half << 16 | half


class Registers:
    """PTX: words are 32-bit registers of a thread."""

    def word(self, value: int) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        return arith.constant(i32, ir.IntegerAttr.get(i32, value - (value >> 31 << 32)))  # type: ignore[arg-type]

    def shift(self, w: Any, n: int) -> Any:
        return w if n == 0 else _asm(f"{'shr' if n > 0 else 'shl'}.b32 $0, $1, {abs(n)};", w)

    def lop3(self, a: Any, b: Any, c: Any, truth: int) -> Any:
        return _asm(f"lop3.b32 $0, $1, $2, $3, {truth};", a, b, c)

    def prmt(self, a: Any, b: Any, select: Any) -> Any:
        return _asm("prmt.b32 $0, $1, $2, $3;", a, b, select)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return _asm("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c)


class Arrays:
    """jnp: words are u32 arrays of one shape."""

    def word(self, value: int) -> Any:
        return jnp.uint32(value)

    def shift(self, w: Any, n: int) -> Any:
        return w >> n if n >= 0 else w << -n

    def lop3(self, a: Any, b: Any, c: Any, truth: int) -> Any:
        out = jnp.uint32(0)
        for i in range(8):
            if truth >> i & 1:
                terms = (x if i >> k & 1 else ~x for x, k in ((a, 2), (b, 1), (c, 0)))
                out = out | next(terms) & next(terms) & next(terms)
        return out

    def prmt(self, a: Any, b: Any, select: Any) -> Any:
        out = jnp.uint32(0)
        for i in range(4):
            at = (select >> (4 * i)) & 7
            byte = jnp.where(at < 4, a >> (8 * (at & 3)), b >> (8 * (at & 3))) & 255
            out = out | byte << (8 * i)
        return out

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
        a, b, c = (_halves(jnp.broadcast_to(x, shape)) for x in (a, b, c))
        out = a * b + c
        return lax.bitcast_convert_type(out.astype(jnp.bfloat16), jnp.uint32)


def _asm(code: str, *words: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(words), code, "=r" + ",r" * len(words))


def _halves(w: Any) -> Any:
    """The two bfloat16 of each word, f32[*w, 2]."""
    return lax.bitcast_convert_type(w, jnp.bfloat16).astype(jnp.float32)
