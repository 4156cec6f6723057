"""QTensor: packed codes and scales that behave as a leaf of any JAX program; quantize, dequantize, dot, bits.

q = quantize(w, "Q4_K");   w_hat = dequantize(q);   y = dot(x, q)  ==  x . w_hat over q's contracted axis
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax import kernels
from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats import sound
from qjax.formats.protocol import BlockFormat, Format, Leaves
from qjax.formats.storage import stored_bytes
from qjax.formats.tiles import unit_of
from qjax.reparam.inputs import RoundedInput
from qjax.reparam.protocol import restore_all, through
from qjax.tables import html_table, size
from qjax.typing import Array, Float, Shaped

FLOAT32 = np.dtype(np.float32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("leaves", "applied"),
    meta_fields=("format", "axis", "dtype", "split"),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array.

    Attributes:
      leaves: the packed arrays, each with the tensor's other axes first and its blocks behind them.
      format: the frozen, hashable Format that reads them.
      axis: the contracted axis along which blocks run, counted from the end (-1, -2 ...), so that it stays right
        when vmap or scan add and remove leading axes.
      applied: reparametrizations that the codes lie behind, in the order in which they were made; of matrices only,
        with the matrices' leading axes first in each of their leaves.
      dtype: the type of the weights that were packed: `lift` gives it to the program in place of the array.
      split: lengths of the adjacent axes that the quantized one merges, as (heads, head_dim) of an attention's output;
        `axis` is the last of them. () where it is one axis.

    The logical shape is derived from the leaves: a QTensor may be stacked, sliced by scan, sharded, saved by orbax and
    mapped by optax like any array.
    """

    leaves: Any  # Leaves; Any, because trees of shardings, shapes or None pass through here too
    format: Format
    axis: int = -1
    applied: Any = ()  # tuple[Applied, ...]
    dtype: Any = FLOAT32
    split: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, n = self.format.shape(self.leaves)
        at = len(lead) + 1 + self.axis
        return (*lead[:at], *(self.split or (n,)), *lead[at:])

    @property
    def merged(self) -> QTensor:
        """The same codes with the quantized axis as one."""
        return dataclasses.replace(self, split=())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rounds_inputs(self) -> bool:
        """Whether its inputs are rounded too, which no array of weights can stand for."""
        return any(isinstance(one, RoundedInput) for one in self.applied)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: codes, scales, padding, and what reparametrizations keep (seeds, scales, outliers)."""
        return sum(map(stored_bytes, jax.tree.leaves((self.leaves, self.applied))))

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, counted from the leaves."""
        return 8 * self.nbytes / self.size

    def _no_array(self, *_: Any, **__: Any) -> Any:
        """What a program does with an array: packed weights cannot, unless `lift` runs it."""
        raise UserError(
            f"{self} is packed, and this code wants an array: run the model through qjax.lift(apply)(params, x), "
            "contract with qjax.dot(x, q), or unpack with qjax.dequantize(q)"
        )

    __jax_array__ = __getitem__ = __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = _no_array

    def __repr__(self) -> str:
        try:
            under = "".join(f" under {type(one).__name__}" for one in self.applied)
            return f"QTensor({self.format.name}, shape={self.shape}, {self.bits_per_weight:.4g} bits per weight{under})"
        except Exception:  # a tree of something else than arrays (shardings, None) in place of the leaves
            return f"QTensor({self.format.name}, leaves={self.leaves})"

    def _repr_html_(self) -> str:
        """What is stored: codes, scales, and what reparametrizations keep."""
        parts = [("", self.leaves), *((f"{type(one).__name__}/", one) for one in self.applied or ())]
        rows = [
            (under + jax.tree_util.keystr(path, simple=True, separator="/"), *_stored(leaf))
            for under, part in parts
            for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]
        ]
        return html_table(repr(self), ("stored", "type", "shape", "size"), rows, (2, 3))


def _stored(leaf: Any) -> tuple[str, str, str]:
    """Type, shape and size of a leaf, where it is an array."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return type(leaf).__name__, "", ""
    shape = " x ".join(map(str, leaf.shape))
    return str(leaf.dtype), shape, size(stored_bytes(leaf))


def is_qtensor(x: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=is_qtensor)`."""
    return isinstance(x, QTensor)


def quantize(
    w: Float[Array, "*w"] | np.ndarray,
    format: str | Format,
    axis: int | tuple[int, ...] = -1,
    weight: Float[Array, "*w"] | Float[Array, "n"] | np.ndarray | None = None,
) -> QTensor:
    """Round `w` onto a format's grid.

    Args:
      w: floats of any shape; its length along `axis` must be a multiple of the format's block.
      format: a name (`qjax.format_names()`) or a Format.
      axis: the contracted axis, along which blocks run: -1 for rows (out, in), 0 for flax kernels (in, out). Adjacent
        axes, (0, 1) for (heads, head_dim, out), are merged into one.
      weight: importance of each weight in the squared error, of w's shape, or one number per position of `axis`.

    Returns: a QTensor of w's logical shape that remembers w's type.

    Raises:
      UserError: unknown format, no weights, a length the block does not divide, a weight of another shape, or (outside
        jit) NaN or Inf in w or weight, a negative weight, w too large for the format's scales. Under jit, blocks with
        such weights decode to NaN or Inf.

    >>> q = quantize(jnp.linspace(-1, 1, 64).reshape(2, 32), "Q8_0")
    >>> q.shape, q.bits_per_weight
    ((2, 32), 8.5)
    """
    if isinstance(axis, tuple):
        w = jnp.asarray(w)
        whole, last, split = merged(w.shape, axis)
        weight = weight.reshape(whole) if weight is not None and weight.shape == w.shape else weight
        return dataclasses.replace(quantize(w.reshape(whole), format, last, weight), split=split)
    fmt = get_format(format)
    w = _one_array(w, fmt, axis)
    if w.ndim == 0 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise UserError(f"quantize needs a floating-point array with at least one axis, got {w.dtype}{list(w.shape)}")
    if not -w.ndim <= axis < w.ndim:
        raise UserError(f"axis {axis} is out of range for shape {w.shape}")
    axis = axis % w.ndim - w.ndim
    if w.size == 0:
        raise UserError(f"an array of shape {w.shape} has no weights to quantize")
    check_length(fmt, w.shape[axis], f"axis {axis} of shape {tuple(w.shape)}")
    rows = w.shape[-2 if axis == -1 else -1] if w.ndim > 1 else 1
    if fmt.rows > 1 and rows % fmt.rows:
        raise UserError(f"{fmt.name} holds {fmt.rows} rows together, and got {rows} (shape {tuple(w.shape)})")
    dtype = w.dtype
    w = jnp.moveaxis(w.astype(jnp.float32), axis, -1)
    _check_finite(w, "w")
    leaves, overflowed = _encode(w, importance_rows(weight, w, axis), fmt)
    if not isinstance(overflowed, jax.core.Tracer) and overflowed:
        raise UserError(
            f"w reaches {float(jnp.max(jnp.abs(w))):.3g}, too large for the scales of {fmt.name}; scale it down, or "
            "take a format with float32 scales, such as int4_g128_f32 or NF4"
        )
    return QTensor(leaves, fmt, axis, dtype=dtype)


def merged(shape: tuple[int, ...], axes: int | tuple[int, ...]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """A shape with some of its axes as one.

    Args:
      axes: adjacent ones in order; or one, which stays.

    Returns: the shape, the axis counted from the end, and the lengths that it merges ((), if it is one).

    Raises:
      UserError: the axes are not adjacent, in order, or not there.

    >>> merged((2, 4, 3), (0, 1))
    ((8, 3), -2, (2, 4))
    """
    if not isinstance(axes, tuple):
        return shape, axes, ()
    there = [a % len(shape) for a in axes if -len(shape) <= a < len(shape)]
    if len(there) != len(axes) or not axes or there != list(range(there[0], there[0] + len(there))):
        raise UserError(f"axes {axes} of shape {tuple(shape)} cannot be merged into one: say adjacent ones in order")
    split = tuple(shape[a] for a in there)
    whole = (*shape[: there[0]], math.prod(split), *shape[there[-1] + 1 :])
    return whole, there[-1] - len(shape), split if len(split) > 1 else ()


def _one_array(w: Any, fmt: Format, axis: Any) -> Array:
    """w as an array. Raises UserError where it is none, or where its other axis is the one that the blocks fit."""
    if is_qtensor(w):
        raise UserError(f"{w} is quantized already; start from the float weights, or dequantize it")
    if not (hasattr(w, "__array__") or hasattr(w, "__jax_array__") or isinstance(w, list | tuple | float | int)):
        raise UserError(
            f"quantize takes one array, got {type(w).__name__}: quantize_params takes a whole tree of them, such as a "
            "params dict or an nnx model, and quantize_model a qjax Model"
        )
    w = jnp.asarray(w)
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise UserError(f"axis must be a number, -1 for rows (out, in) or 0 for a flax kernel (in, out), got {axis!r}")
    if w.ndim == 2 and -2 <= axis < 2 and w.shape[axis] % (unit := unit_of(fmt)):
        other = -1 if axis % 2 == 0 else 0
        if w.shape[other] and w.shape[other] % unit == 0:
            raise UserError(
                f"{fmt.name} needs a multiple of {unit} weights along the quantized axis, got {w.shape[axis]} "
                f"(axis {axis} of shape {tuple(w.shape)}); its other axis fits: axis={other}, as for "
                + ("a flax kernel (in, out)" if other == 0 else "rows (out, in)")
            )
    return w


def importance_rows(
    weight: Float[Array, "*w"] | Float[Array, "n"] | np.ndarray | None, x: Float[Array, "*b n"], axis: int
) -> Float[Array, "*b n"] | None:
    """The importance of each weight, contracted axis last.

    Args:
      weight: of the shape that x had before its `axis` went last, or one number for each position of it, or None.
      x: the weights, contracted axis last.
      axis: where that was.

    Raises:
      UserError: another shape, or (outside jit) NaN, Inf or a negative number.
    """
    if weight is None:
        return None
    weight = jnp.asarray(weight).astype(jnp.float32)
    if weight.ndim == x.ndim and x.ndim > 1:
        weight = jnp.moveaxis(weight, axis, -1)
    if weight.shape not in (x.shape, x.shape[-1:]):
        raise UserError(f"weight has shape {weight.shape}; expected w's shape or ({x.shape[-1]},)")
    _check_finite(weight, "weight", low=0.0)
    return jnp.broadcast_to(weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape), x.shape)


@partial(jax.jit, static_argnums=2)
def _encode(w: Array, weight: Array | None, fmt: Format) -> tuple[Leaves, Array]:
    scales, codes = sound.encode(fmt, w, weight)
    return fmt.pack(scales, codes), sound.overflowed(scales)


@jax.jit
def dequantize(q: QTensor) -> Float[Array, "*w"]:
    """The values a QTensor stands for: f32 of its logical shape, whatever the type of the weights that were packed."""
    w = restore_all(q.applied, q.format.decode(*q.format.unpack(q.leaves)))
    return jnp.moveaxis(w, -1, q.axis).reshape(q.shape)


def dot(
    x: Shaped[Array, "*b n"], q: QTensor, implementation: Literal["auto", "xla", "pallas"] = "auto"
) -> Float[Array, "*b_o"]:
    """Contract the last axis of x with the quantized axis of q.

    Args:
      x: [*b, n]; integers and booleans count as float32.
      q: a QTensor whose quantized axis has length n; its other axes `*o` stay in order.
      implementation: "auto": the kernel that `qjax kernels` names; "xla" or "pallas": one written in that.

    Returns: [*b, *o] in x's type, whatever type the packed weights had, accumulated in float32. The weights are
      multiplied in x's type: bfloat16 operands for bfloat16 x. For float32 x the products are as precise as
      `jax.default_matmul_precision` says: by default TF32 on a GPU and bfloat16 on a TPU, in full under "highest",
      always in full on the CPU.
    Raises:
      UserError: the operands do not fit each other, or no such kernel takes them.
    """
    if not is_qtensor(q):
        hint = "the input comes first: dot(x, q)" if is_qtensor(x) else "quantize(w, format) makes one of an array"
        raise UserError(f"dot takes an array and a QTensor, got {type(x).__name__} and {type(q).__name__}; {hint}")
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_:
        x = x.astype(jnp.float32)  # not the weights to integers
    q = q.merged
    n = q.shape[q.axis]
    if x.ndim == 0 or x.shape[-1] != n:
        fits = x.ndim > 0 and x.shape[-1] in q.shape
        hint = f"; its blocks run along axis {q.axis}: quantize with the axis that x meets" if fits else ""
        raise UserError(f"dot contracts x's last axis with {n} weights, got x of shape {x.shape} and {q}{hint}")
    if q.applied:
        return _behind(x, q, implementation)
    return kernels.matmul(x, q.leaves, q.format, implementation)


def _behind(x: Array, q: QTensor, implementation: Any) -> Array:
    """`dot` of a matrix under reparametrizations: x goes through them, and what comes out comes back."""
    if q.ndim != 2:
        raise UserError(f"dot takes one matrix under reparametrizations, got {q}; vmap over a stack of them")
    *outer, last = q.applied
    bare = QTensor(q.leaves, q.format, q.axis)
    if isinstance(last, RoundedInput):
        scales, codes = q.format.unpack(q.leaves)
        w = q.format.decode(scales, codes)
        y = through(outer, x, lambda z: last.product(z, q.format, scales, w).astype(x.dtype))
    else:
        y = through(q.applied, x, lambda z: dot(z, bare, implementation))
    return y.astype(x.dtype)


def held(q: QTensor) -> QTensor:
    """The same weight with its dense rotations as arrays in place of seeds: they count as bits, and `dot` under jit
    does not make them anew at each call. Other reparametrizations stay as they are.

    Args:
      q: a matrix, or a stack of them.
    """
    *lead, out, n = q.format.shape(q.leaves)

    def hold(applied: tuple) -> tuple:
        return tuple(one.held(out, n) for one in applied)

    for _ in lead if q.applied else ():
        hold = jax.vmap(hold)
    return dataclasses.replace(q, applied=hold(q.applied))


def to_bytes(q: QTensor) -> bytes:
    """The exact bytes of a ggml tensor with rows (out, in), as a GGUF file stores them.

    A flax kernel (in, out), packed along axis 0, has the bytes of its transpose, which are those of the file: blocks
    run along `in` in both.

    Raises:
      UserError: the format is no ggml type.
    """
    if not isinstance(q.format, BlockFormat):
        raise UserError(f"{q.format.name} is not a ggml type; only those have a byte layout of their own")
    if q.applied:
        raise UserError(
            f"{q}: a ggml file has no place for a reparametrization; fuse it into the model's weights first"
        )
    return np.asarray(q.leaves["blocks"]).tobytes()


def from_bytes(format: str | Format, raw: bytes | np.ndarray, shape: tuple[int, ...]) -> QTensor:
    """The QTensor of a ggml tensor's bytes; the inverse of `to_bytes`.

    Args:
      format: a ggml type's name.
      raw: the tensor's bytes, exactly as many as the shape needs.
      shape: (*rows, n) as numpy counts, contracted axis last.
    """
    fmt = get_format(format)
    if not isinstance(fmt, BlockFormat):
        raise UserError(f"{fmt.name} is not a ggml type; only those have a byte layout of their own")
    *rows, n = shape
    check_length(fmt, n, f"shape {tuple(shape)}")
    blocks = (*rows, n // fmt.block, fmt.block_bytes)
    flat = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes | bytearray | memoryview) else raw.view(np.uint8)
    if flat.size != math.prod(blocks):
        raise UserError(f"{fmt.name} of shape {tuple(shape)} takes {math.prod(blocks)} bytes, got {flat.size}")
    return QTensor({"blocks": jnp.asarray(flat.reshape(blocks))}, fmt, -1)


def check_length(fmt: Format, n: int, where: str) -> None:
    """Raise UserError unless a row of n weights splits into the format's blocks and tiles."""
    unit = unit_of(fmt)
    if n == 0 or n % unit:
        raise UserError(f"{fmt.name} needs a multiple of {unit} weights along the quantized axis, got {n} ({where})")


def _check_finite(x: Array, name: str, low: float = -jnp.inf) -> None:
    """Raise on NaN, Inf or values below `low`. Under a trace there are no values to look at."""
    bad = jnp.sum(~(jnp.isfinite(x) & (x >= low)))
    if not isinstance(bad, jax.core.Tracer) and bad:
        raise UserError(
            f"{name} has {bad} of {x.size} values that are NaN, infinite or negative"
            if low == 0.0
            else f"{name} has {bad} of {x.size} values that are NaN or infinite"
        )
