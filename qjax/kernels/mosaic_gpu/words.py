"""The few 32-bit instructions that a decode is written in, on registers of a GPU or on arrays.

    shift(w, n)                  w >> n, w << -n
    lop3(a, b, c, truth)         any function of three words, bit by bit: its truth table
    prmt(a, b, select)           byte i = byte (nibble i of select) of b:a
    fma(a, b, c)                 a b + c of two bfloat16 each
    fma16(a, b, c)               the same of two float16 each
    mad(a, b, c)                 a b + c modulo 2^32
    bytes(a, c)                  c plus the sum of the four bytes of a
    look(i, first)               word first + i of the table that the decode has, if it has one
    word(value)                  a constant

A decode is one program for both: what the interpreter runs is what is compiled, instruction for instruction.
Source: PTX ISA, `lop3.b32`, `prmt.b32` (generic mode, no sign replication), `fma.rn.bf16x2` (sm_90), `dp4a.u32.u32`.
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
XOR = 0x3C
"""a xor b."""


@runtime_checkable
class Words(Protocol):
    """See the module's docstring."""

    def word(self, value: int) -> Any: ...

    def shift(self, w: Any, n: int) -> Any: ...

    def lop3(self, a: Any, b: Any, c: Any, truth: int) -> Any: ...

    def prmt(self, a: Any, b: Any, select: Any) -> Any: ...

    def fma(self, a: Any, b: Any, c: Any) -> Any: ...

    def fma16(self, a: Any, b: Any, c: Any) -> Any: ...

    def mad(self, a: Any, b: Any, c: Any) -> Any: ...

    def bytes(self, a: Any, c: Any) -> Any: ...

    def look(self, i: Any, first: int = 0) -> Any: ...


def pair(value: float) -> int:
    """The word of two equal bfloat16; the value must be one.

    >>> hex(pair(-136.0))
    '0xc308c308'
    """
    half = int(np.float32(value).view(np.uint32)) >> 16
    assert np.uint32(half << 16).view(np.float32) == value, f"{value} is no bfloat16"
    return half << 16 | half


def pair16(value: float) -> int:
    """The word of two equal float16; the value must be one.

    >>> hex(pair16(-1024.0))
    '0xe400e400'
    """
    half = np.float16(value)
    assert float(half) == value, f"{value} is no float16"
    return int(half.view(np.uint16)) * 0x10001


class Registers:
    """PTX: words are 32-bit registers of a thread; the table, if there is one, lies in shared memory.

    Args:
      table: the 32-bit address of its first word.
    """

    def __init__(self, table: Any = None) -> None:
        self.table = table

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

    def fma16(self, a: Any, b: Any, c: Any) -> Any:
        return _asm("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)

    def mad(self, a: Any, b: Any, c: Any) -> Any:
        return _asm("mad.lo.u32 $0, $1, $2, $3;", a, b, c)

    def bytes(self, a: Any, c: Any) -> Any:
        return _asm("dp4a.u32.u32 $0, $1, $2, $3;", a, self.word(0x01010101), c)

    def look(self, i: Any, first: int = 0) -> Any:
        load = f"{{ .reg .b32 t; mad.lo.u32 t, $1, 4, $2; ld.shared.b32 $0, [t+{4 * first}]; }}"
        return _asm(load, i, self.table)

    def from_above(self, low: Any, high: Any) -> tuple[Any, Any]:
        """What the thread has that is four before in the warp; the first four have the last four's, exchanged."""
        i32 = ir.IntegerType.get_signless(32)
        lane: Any = llvm.inline_asm(i32, [], "mov.u32 $0, %laneid;", "=r")
        last = arith.cmpi(arith.CmpIPredicate.uge, lane, self.word(28))
        given = arith.select(last, high, low), arith.select(last, low, high)
        before = arith.addi(lane, self.word(28))  # modulo 32
        move = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
        made = [llvm.inline_asm(i32, [w, before], move, "=r,r,r", has_side_effects=True) for w in given]
        return made[0], made[1]


class Arrays:
    """jnp: words are u32 arrays of one shape.

    Args:
      table: u32[n], if there is one.
    """

    def __init__(self, table: Any = None) -> None:
        self.table = table

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
        return _fma(jnp.bfloat16, a, b, c)

    def fma16(self, a: Any, b: Any, c: Any) -> Any:
        return _fma(jnp.float16, a, b, c)

    def mad(self, a: Any, b: Any, c: Any) -> Any:
        return a * b + c

    def bytes(self, a: Any, c: Any) -> Any:
        return c + (a & 255) + (a >> 8 & 255) + (a >> 16 & 255) + (a >> 24)

    def look(self, i: Any, first: int = 0) -> Any:
        return self.table[i.astype(jnp.int32) + first]


def _asm(code: str, *words: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(words), code, "=r" + ",r" * len(words))


def _fma(kind: Any, *words: Any) -> Any:
    """a b + c of both numbers of 16 bits of each word."""
    shape = jnp.broadcast_shapes(*(w.shape for w in words))
    a, b, c = (lax.bitcast_convert_type(jnp.broadcast_to(w, shape), kind).astype(jnp.float32) for w in words)
    return lax.bitcast_convert_type((a * b + c).astype(kind), jnp.uint32)
