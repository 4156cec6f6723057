"""Low-rank adapters beside frozen weights.

    y = x . W_hat + scale (x . A) . B          A [n, r],  B [r, out],  scale = alpha / r

LoRA (Hu et al., arXiv:2106.09685, section 4.1): A starts random, B at zero, the base stays as it is. On a packed base
this is QLoRA (Dettmers et al., arXiv:2305.14314, section 3): `init_adapters(params)` of an NF4_dq model.

A model's adapters are one dict {path: Adapter}, the tree that an optimizer trains. merging.py makes a model without
adapters of them; qalora.py and loftq.py have other adapters and other starts.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.lifting import adapt
from qjax.plan.rules import fits
from qjax.tensor import QTensor, dequantize, is_qtensor
from qjax.training.grid.weights import leaves_by_path
from qjax.typing import Array, Float

LAYERS = ("layers_*/kernel",)
"""Every matrix of a decoder but embedding and head."""


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scale",))
@dataclasses.dataclass(frozen=True)
class Adapter:
    """scale A B, a correction of one weight or of a stack of them.

    Attributes:
      a: A, f32[*b, n, r].
      b: B, f32[*b, r, out].
      scale: alpha / r.
    """

    a: Any  # arrays; Any, because trees of shapes, shardings and None pass through here too
    b: Any
    scale: float = 1.0


Adapters = Mapping[str, Adapter]


def init_adapters(
    params: Any, rank: int = 64, alpha: float = 16.0, patterns: Sequence[str] = LAYERS, *, key: Array
) -> dict[str, Adapter]:
    """Adapters that change nothing yet: A uniform in +-1 / sqrt(n), as LoRA's code has it, and B = 0.

    Args:
      params: a tree of arrays, QTensors or shapes. An array is a flax kernel (in, out) or a stack of them; a QTensor
        knows its contracted axis.
      rank: r.
      alpha: scale is alpha / r.
      patterns: which matrices, by their paths, as in a plan: globs, or regular expressions after `re:`.
      key: of A; a path's A depends on the key and the path alone.

    Returns: {path: Adapter}, the tree to train.

    Raises:
      UserError: a pattern that matches no matrix, a rank above n or out.

    >>> adapters = init_adapters({"layers_0": {"q": {"kernel": jnp.ones((8, 6))}}}, 2, key=jax.random.key(0))
    >>> {path: (m.a.shape, m.b.shape, m.scale) for path, m in adapters.items()}
    {'layers_0/q/kernel': ((8, 2), (2, 6), 8.0)}
    """
    adapters = {}
    for path, leaf in matching(params, patterns).items():
        lead, n, out = sides(path, leaf)
        check_rank(path, rank, n, out)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own, (*lead, n, rank), jnp.float32, -(n**-0.5), n**-0.5)
        adapters[path] = Adapter(a, jnp.zeros((*lead, rank, out), jnp.float32), alpha / rank)
    return adapters


def apply_adapted(apply: Callable[..., Any], params: Any, adapters: Adapters, *inputs: Any, **options: Any) -> Any:
    """Run a model with adapters beside its frozen weights: x . W + scale (x . A) . B.

    There is no dropout on the adapter's input: `lift.adapt` has no place for it.

    Args:
      apply: a pure function of (params, *inputs).
      params: dense or packed; no gradient reaches them.
      adapters: {path: Adapter}.
      *inputs, **options: what apply takes.

    Raises:
      UserError: what `lift.adapt` raises: an unknown path, a weight that is looked up, an adapter of another shape.
    """
    return adapt(apply)(lax.stop_gradient(params), adapters, *inputs, **options)


def map_adapted(fn: Callable[[str, Any, Adapter], Any], params: Any, adapters: Adapters) -> Any:
    """Params with fn(path, weight, adapter) in place of each weight that has an adapter.

    Raises:
      UserError: an adapter of no weight.
    """
    unused = set(adapters)

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        unused.discard(name)
        return fn(name, leaf, adapters[name]) if name in adapters else leaf

    mapped = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_qtensor)
    if unused:
        raise UserError(f"there is an adapter for {min(unused)!r}, but no weight of that name")
    return mapped


def lora_weight(w: Float[Array, "*w"] | QTensor, adapter: Adapter) -> Float[Array, "*w"]:
    """W + scale A B, alike under jit and eagerly: what a fake-quantizer is to see.

    Args:
      w: a kernel [*b, n, out], or a QTensor of any orientation.
      adapter: of w.

    Returns: f32 of w's shape.
    """
    base, delta = _values(w), product(adapter)
    if isinstance(w, QTensor) and w.axis == -1:
        delta = jnp.swapaxes(delta, -1, -2)
    if delta.shape != base.shape:
        raise UserError(
            f"an adapter with a {adapter.a.shape} and b {adapter.b.shape} does not fit a weight of {base.shape}"
        )
    return _sum(base, delta)


@jax.jit
def product(adapter: Adapter) -> Float[Array, "*b n out"]:
    """scale A B, f32. The scale goes in front: behind the product, compilers fuse it with a sum that follows."""
    return lax.optimization_barrier(jnp.matmul(adapter.scale * adapter.a, adapter.b, precision="highest"))


def _values(w: Any) -> Array:
    return dequantize(w) if is_qtensor(w) else w.astype(jnp.float32)


@jax.jit
def _sum(base: Array, delta: Array) -> Array:
    return lax.optimization_barrier(base + delta)


# which weights, and their sides


def matching(params: Any, patterns: Sequence[str]) -> dict[str, Any]:
    """The matrices that some pattern matches, under their paths.

    Raises:
      UserError: a pattern that matches none.
    """
    matrices = {path: leaf for path, leaf in leaves_by_path(params).items() if len(getattr(leaf, "shape", ())) > 1}
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        hits = {path for path in matrices if fits(pattern, path)}
        if not hits:
            near = f"they are named like {next(iter(matrices))!r}" if matrices else "there is none"
            raise UserError(f"adapters: pattern {pattern!r} matches no matrix; {near}")
        found |= hits
    return {path: leaf for path, leaf in matrices.items() if path in found}


def sides(path: str, leaf: Any) -> tuple[tuple[int, ...], int, int]:
    """Axes of a stack, n and out of a weight."""
    *lead, first, second = leaf.shape
    if not is_qtensor(leaf) or leaf.axis == -2:
        return tuple(lead), first, second
    if leaf.axis != -1:
        raise UserError(f"{path}: an adapter is for matrices; {leaf} is quantized along axis {leaf.axis}")
    return tuple(lead), second, first


def check_rank(where: str, rank: int, n: int, out: int) -> None:
    """Raise UserError unless 1 <= rank <= min(n, out)."""
    if not 1 <= rank <= min(n, out):
        raise UserError(f"{where}: rank {rank} does not fit {n} x {out}; take 1 to {min(n, out)}")
