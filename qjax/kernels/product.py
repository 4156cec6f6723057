"""The product with packed weights as one operation of JAX: differentiated, mapped and cut over a mesh as a whole.

    y[*s, m, *o] = sum_n x[*s, m, n] w_hat[*s, *o, n]          s: axes of a stack of matrices, as of experts

    gradient    by x, and by leaves that are floats: that of `xla.whole`, with the weights decoded again, not kept
    vmap        of x alone: more rows; of the weights: one more axis of the stack
    a mesh      each device multiplies with the packed weights that it holds; sharded blocks are summed over

Each is a layer around `run`, which asks the table for the kernels of one device.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import Format, Leaves
from qjax.kernels import partition, xla
from qjax.kernels.dispatch import ELSEWHERE, chosen
from qjax.kernels.kernel import Call, Implementation, Kernel
from qjax.kernels.prepacked import Prepacked, bare, laid_out
from qjax.typing import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Product:
    """What is known of a product besides its arrays.

    Attributes:
      format: of the weights.
      implementation: what may multiply.
      precision: of float32 products.
      stack: how many axes x and the leaves have in front, the same for both.
    """

    format: Format
    implementation: Implementation = "auto"
    precision: str | None = None
    stack: int = 0

    def outer(self, leaves: Leaves) -> tuple[int, ...]:
        """*o."""
        return self.format.shape(leaves)[self.stack : -1]


def matmul(
    x: Shaped[Array, "*b n"], leaves: Leaves, format: Format, implementation: Implementation = "auto"
) -> Shaped[Array, "*b *o"]:
    """y[*b, *o] = sum_n x[*b, n] w_hat[*o, n], by the kernel that `dispatch.TABLE` says.

    Args:
      x: floats [*b, n].
      leaves: packed weights [*o, n].
      format: of the leaves.
      implementation: "auto", or only what is written in "xla" or "pallas".

    Returns: [*b, *o] in x's type, summed in float32; float32 products are as precise as
      `jax.default_matmul_precision` says.

    Raises:
      UserError: no such implementation, or it has no kernel for this call where the program is to run.
    """
    how = Product(format, implementation, cast(Any, jax.config).jax_default_matmul_precision)
    y = _compiled(how, x.reshape(-1, x.shape[-1]), leaves)
    return y.reshape(*x.shape[:-1], *how.outer(leaves))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: Product, x: Array, leaves: Leaves) -> Array:
    return _mapped(how)(x, leaves)


def _forward(how: Product, x: Array, leaves: Leaves) -> tuple[Array, Any]:
    return _mapped(how)(x, leaves), (x, leaves)


def _backward(how: Product, kept: Any, g: Array) -> Any:
    def whole(x: Array, leaves: Leaves) -> Array:
        return xla.whole(x, leaves, how.format, how.precision)

    return jax.vjp(whole, *kept)[1](g)


_product.defvjp(_forward, _backward)
_compiled = jax.jit(_product, static_argnums=0)  # traced once a shape, eagerly too


@functools.lru_cache(maxsize=4096)
def _mapped(how: Product) -> Any:
    """The product with its vmap rule, x [*s, m, n]."""
    mapped = jax.custom_batching.custom_vmap(partition.over_a_mesh(how.format, how.stack, functools.partial(run, how)))

    @mapped.def_vmap
    def rule(size: int, batched: list[Any], x: Array, leaves: Leaves) -> tuple[Array, bool]:
        x_too, each = batched
        if not any(jax.tree.leaves(each)):  # rows of x, as many more
            x = jnp.moveaxis(x, 0, how.stack)
            y = mapped(x.reshape(*x.shape[: how.stack], -1, x.shape[-1]), leaves)
            y = y.reshape(*x.shape[:-1], *y.shape[how.stack + 1 :])
            return jnp.moveaxis(y, how.stack, 0), True
        x = x if x_too else jnp.broadcast_to(x, (size, *x.shape))
        leaves = jax.tree.map(
            lambda leaf, own: leaf if own else jnp.broadcast_to(leaf, (size, *leaf.shape)), leaves, each
        )
        return _mapped(dataclasses.replace(how, stack=how.stack + 1))(x, leaves), True

    return mapped


def run(how: Product, x: Array, leaves: Leaves) -> Array:
    """The product on one device: by the kernel of the platform that it is traced for; lowered for another, by
    `xla.whole`."""
    *_, rows, n = x.shape
    format = bare(how.format)
    anyhow = how.implementation == "pallas"
    lies = how.format.layout if isinstance(how.format, Prepacked) and not anyhow else anyhow
    kernel = chosen(Call(format, (*how.outer(leaves), n), rows, x.dtype, lies), how.implementation)

    def of(kernel: Kernel) -> Any:
        def one(x: Array, leaves: Leaves) -> Array:
            return kernel.matmul(x, laid_out(kernel.layout, how.format, leaves), format, how.precision)

        for _ in range(how.stack):
            one = _over(one) if kernel.stack == "map" else jax.vmap(one)
        return one

    own = {} if kernel.matmul is ELSEWHERE.matmul else {kernel.platform: of(kernel)}
    if how.implementation == "pallas":
        return lax.platform_dependent(x, leaves, **own)
    return lax.platform_dependent(x, leaves, **own, default=of(ELSEWHERE))


def _over(one: Any) -> Any:
    return lambda x, leaves: lax.map(lambda pair: one(*pair), (x, leaves))
