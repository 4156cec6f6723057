"""What a kernel runs on: a warpgroup of a GPU, or jax's interpreter, which has no registers to decode in.

Both run the same program; they differ in how a decode meets its words and in how two tiles are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from qjax.kernels.mosaic_gpu.words import Arrays, Registers, Words

Decode = Callable[[Words, Sequence[Any], int], Any]
"""(ops, a word of each plane, run) -> the word of two bfloat16."""
Terms = Sequence[tuple[Callable[[], Any], Any, int]]
"""Products of neighbouring columns, to be added: what makes the weights, the reference to x, the first column there."""


@runtime_checkable
class Machine(Protocol):
    """See the module's docstring."""

    @property
    def interpret(self) -> Any:
        """What `plgpu.kernel` takes under that name."""

    def zeros(self, shape: tuple[int, int]) -> Any:
        """A sum to add to."""

    def decode(self, decode: Decode, planes: Sequence[Any], run: int) -> Any:
        """u16[N, P] of each plane -> bf16[N, P]."""

    def products(self, groups: Sequence[Terms], shape: tuple[int, int]) -> Sequence[Any]:
        """f32[N, batch] for each group, all under way before the first is awaited."""


class Warpgroup:
    """128 threads and their registers."""

    interpret = None

    def zeros(self, shape: tuple[int, int]) -> Any:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    def decode(self, decode: Decode, planes: Sequence[Any], run: int) -> Any:
        shape = plgpu.ShapeDtypeStruct(planes[0].shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,) * len(planes), return_type=shape)
        def inline(_: Any, *arrays: Any) -> Any:
            i32 = ir.IntegerType.get_signless(32)
            two = ir.VectorType.get((2,), ir.BF16Type.get())
            out = np.empty_like(arrays[0].registers)
            for at in np.ndindex(out.shape):
                words = [mgpu.utils.bitcast(array.registers[at], i32) for array in arrays]
                out[at] = mgpu.utils.bitcast(decode(Registers(), words, run), two)
            return mgpu.FragmentedArray(_registers=out, _layout=arrays[0].layout, _is_signed=None)

        return inline(*planes)

    def products(self, groups: Sequence[Terms], shape: tuple[int, int]) -> Sequence[Any]:
        def run(*sums: Any) -> Sequence[Any]:
            for sum_, terms in zip(sums, groups, strict=True):
                for weights, x, first in terms:
                    w = weights()
                    plgpu.wgmma(sum_, w, x.at[:, pl.ds(first, w.shape[1])].T)
            return [sum_[...] for sum_ in sums]

        return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for _ in groups))


class Simulated:
    """jax's interpreter of Mosaic GPU, which has pipelines, barriers and copies."""

    @property
    def interpret(self) -> Any:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return InterpretGPUParams()

    def zeros(self, shape: tuple[int, int]) -> Any:
        return jnp.zeros(shape, jnp.float32)

    def decode(self, decode: Decode, planes: Sequence[Any], run: int) -> Any:
        words = [lax.bitcast_convert_type(w.reshape(w.shape[0], -1, 2), jnp.uint32) for w in planes]
        return lax.bitcast_convert_type(decode(Arrays(), words, run), jnp.bfloat16).reshape(planes[0].shape)

    def products(self, groups: Sequence[Terms], shape: tuple[int, int]) -> Sequence[Any]:
        def one(terms: Terms) -> jax.Array:
            w = jnp.concatenate([weights() for weights, _, _ in terms], axis=1)
            _, x, first = terms[0]
            return jnp.dot(w, x[:, first : first + w.shape[1]].T, preferred_element_type=jnp.float32)

        return [one(terms) for terms in groups]
