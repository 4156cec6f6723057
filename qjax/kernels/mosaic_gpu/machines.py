"""What a kernel runs on: a warpgroup of a GPU, or jax's interpreter, which has no registers to decode in.

Both run the same program; they differ in how a decode meets its words and in how two tiles are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol, runtime_checkable

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from qjax.kernels import inputs
from qjax.kernels.mosaic_gpu.words import Arrays, Registers, Words

Decode = Callable[[Words, Sequence[Any], int], Any]
"""(ops, a word of each plane, run) -> the word of two numbers of 16 bits."""
Parts = Sequence[tuple[Sequence[Any], int]]
"""Neighbouring runs: the words u16[N, P] of each plane, and which run of them."""
Term = tuple[Callable[[], Any], Any, int]
"""A product: what makes the weights, the reference to x, the first column there."""


@runtime_checkable
class Machine(Protocol):
    """See the module's docstring."""

    @property
    def interpret(self) -> Any:
        """What `plgpu.kernel` takes under that name."""

    def zeros(self, shape: tuple[int, int]) -> Any:
        """A sum to add to."""

    def decode(self, decode: Decode, parts: Parts, type: Any = jnp.bfloat16, table: Any = None) -> Any:
        """[N, P] of a type of 16 bits for each part, side by side; the table is a reference to u32[n / 128, 128]."""

    def above(self, words: Any) -> Any:
        """u16[N, P], the row above in place of each; of sixteen rows the first has the last."""

    def spread(self, words: Any, part: int, selects: tuple[int, int]) -> Any:
        """u16[N, 16] of eight of u16[N, 16], the `part`-th: pairs of words and 0, by one `prmt` and by another."""

    def split(self, x: Any) -> Sequence[Any]:
        """f32[N, P] as three bfloat16 that add up to it, the largest first."""

    def products(self, sums: Sequence[Sequence[Term]], shape: tuple[int, int]) -> Sequence[Any]:
        """f32[N, batch] of each sum of terms, all under way before the first is awaited."""


_COLUMNS, _HALF = 1, 4
"""Axes of a WGMMA layout's registers: eight columns each, and rows i and i + 8 of a warp."""


class Warpgroup:
    """128 threads and their registers."""

    interpret = None

    def zeros(self, shape: tuple[int, int]) -> Any:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    def decode(self, decode: Decode, parts: Parts, type: Any = jnp.bfloat16, table: Any = None) -> Any:
        counts, runs, (N, P) = [len(planes) for planes, _ in parts], [run for _, run in parts], parts[0][0][0].shape
        tables = () if table is None else (table,)
        layout = plgpu.Layout.WGMMA

        @plgpu.inline_mgpu(
            arg_types=(layout,) * sum(counts) + (plgpu.RefType(),) * len(tables),
            return_type=plgpu.ShapeDtypeStruct((N, len(parts) * P), type, layout=layout),
        )
        def inline(_: Any, *operands: Any) -> Any:
            i32, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(type))
            ops, arrays, made = Registers(*map(_address, operands[sum(counts) :])), iter(operands), []
            for run, count in zip(runs, counts, strict=True):
                registers = [next(arrays).registers for _ in range(count)]
                out = np.empty_like(registers[0])
                for at in np.ndindex(out.shape):
                    words = [mgpu.utils.bitcast(each[at], i32) for each in registers]
                    out[at] = mgpu.utils.bitcast(decode(ops, words, run), two)
                made.append(out)
            whole = np.concatenate(made, axis=_COLUMNS)
            return mgpu.FragmentedArray(_registers=whole, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

        return inline(*(plane for planes, _ in parts for plane in planes), *tables)

    def above(self, words: Any) -> Any:
        shape = plgpu.ShapeDtypeStruct(words.shape, words.dtype, layout=plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=shape)
        def inline(_: Any, array: Any) -> Any:
            """A warp has sixteen rows: four of its threads the words of rows i and i + 8, the next four of i + 1."""
            i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
            out, ops = np.empty_like(array.registers), Registers()
            for at in np.ndindex(out.shape):
                if at[_HALF] == 0:
                    low, high = ((*at[:_HALF], half, *at[_HALF + 1 :]) for half in (0, 1))
                    made = ops.from_above(*(mgpu.utils.bitcast(array.registers[i], i32) for i in (low, high)))
                    out[low], out[high] = (mgpu.utils.bitcast(w, pair) for w in made)
            return mgpu.FragmentedArray(_registers=out, _layout=array.layout, _is_signed=False)

        return inline(words)

    def spread(self, words: Any, part: int, selects: tuple[int, int]) -> Any:
        shape = plgpu.ShapeDtypeStruct(words.shape, words.dtype, layout=plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=shape)
        def inline(_: Any, array: Any) -> Any:
            i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
            out, ops = np.empty_like(array.registers), Registers()
            for at in np.ndindex(out.shape):
                given = array.registers[(*at[:_COLUMNS], part, *at[_COLUMNS + 1 :])]
                word = ops.prmt(mgpu.utils.bitcast(given, i32), ops.word(0), ops.word(selects[at[_COLUMNS]]))
                out[at] = mgpu.utils.bitcast(word, pair)
            return mgpu.FragmentedArray(_registers=out, _layout=array.layout, _is_signed=False)

        return inline(words)

    def split(self, x: Any) -> Sequence[Any]:
        found = []
        for _ in range(3):
            found.append(x.astype(jnp.bfloat16))
            x = x - found[-1].astype(jnp.float32)
        return found

    def products(self, sums: Sequence[Sequence[Term]], shape: tuple[int, int]) -> Sequence[Any]:
        def run(*accumulators: Any) -> Sequence[Any]:
            for accumulator, terms in zip(accumulators, sums, strict=True):
                for weights, x, first in terms:
                    w = weights()
                    plgpu.wgmma(accumulator, w, x.at[:, pl.ds(first, w.shape[1])].T)
            return [accumulator[...] for accumulator in accumulators]

        return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for _ in sums))


class Simulated:
    """jax's interpreter of Mosaic GPU, which has pipelines, barriers and copies."""

    @property
    def interpret(self) -> Any:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams()

    def zeros(self, shape: tuple[int, int]) -> Any:
        return jnp.zeros(shape, jnp.float32)

    def decode(self, decode: Decode, parts: Parts, type: Any = jnp.bfloat16, table: Any = None) -> Any:
        ops, made = Arrays(*(() if table is None else (table[...].reshape(-1),))), []
        for planes, run in parts:
            words = [lax.bitcast_convert_type(w.reshape(w.shape[0], -1, 2), jnp.uint32) for w in planes]
            made.append(lax.bitcast_convert_type(decode(ops, words, run), type).reshape(planes[0].shape))
        return jnp.concatenate(made, axis=1)

    def above(self, words: Any) -> Any:
        return jnp.roll(words.reshape(-1, 16, words.shape[1]), 1, axis=1).reshape(words.shape)

    def spread(self, words: Any, part: int, selects: tuple[int, int]) -> Any:
        given = lax.bitcast_convert_type(words[:, 8 * part : 8 * part + 8].reshape(-1, 4, 2), jnp.uint32)
        made = (Arrays().prmt(given, jnp.uint32(0), jnp.uint32(select)) for select in selects)
        return jnp.concatenate([lax.bitcast_convert_type(w, jnp.uint16).reshape(-1, 8) for w in made], axis=1)

    def split(self, x: Any) -> Sequence[Any]:
        return jnp.split(inputs.parts(x), 3)  # XLA would drop a pair of casts

    def products(self, sums: Sequence[Sequence[Term]], shape: tuple[int, int]) -> Sequence[Any]:
        def one(weights: Callable[[], Any], x: Any, first: int) -> jax.Array:
            w = weights()
            return jnp.dot(w, x[:, first : first + w.shape[1]].T, preferred_element_type=jnp.float32)

        return [reduce(lambda total, term: total + term, (one(*term) for term in terms)) for terms in sums]


def _address(table: Any) -> Any:
    """The 32-bit address of a reference into shared memory."""
    pointer = mgpu.utils.memref_ptr(table)
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)
