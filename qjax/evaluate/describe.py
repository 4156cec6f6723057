"""What a params tree holds, leaf by leaf: printed in a terminal, drawn in a notebook."""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax.errors import UserError
from qjax.evaluate.sizes import Sizes, TensorRow, named_leaves, sizes, tensor_rows
from qjax.models.model import Model
from qjax.tables import html_table, number, size, text_table


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """A table of a tree's leaves, and what they sum up to."""

    leaves: tuple[TensorRow, ...]
    sizes: Sizes

    @property
    def title(self) -> str:
        s = self.sizes
        return (
            f"{len(self.leaves)} leaves, {number(s.parameters)} weights, {size(s.bytes)}, "
            f"{s.whole_bits:.4g} bits per weight"
        )

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[int, ...]]:
        heads: tuple[str, ...] = ("path", "shape", "format", "bits")
        rows = [(r.path, " x ".join(map(str, r.shape)), r.format, f"{r.bits:.4g}") for r in self.leaves]
        if all(r.relative_rmse is None for r in self.leaves):
            return heads, [*rows], (1, 3)
        errors = (f"{r.relative_rmse:.5f}" for r in self.leaves)
        return (*heads, "rel. error"), [(*row, e) for row, e in zip(rows, errors, strict=True)], (1, 3, 4)

    def __repr__(self) -> str:
        heads, rows, numbers = self._table()
        return f"{text_table(heads, rows, numbers)}\n{self.title}"

    def _repr_html_(self) -> str:
        return html_table(self.title, *self._table())


def describe(tree: Any, reference: Any = None) -> Description:
    """Path, shape, format, bits and error of every leaf.

        error = |w_hat - w| / |w|        over all weights of a leaf

    Args:
      tree: arrays and QTensors, or a Model.
      reference: the float tree or Model it was made from; without it there are no errors.

    Raises:
      UserError: a leaf that is no array, or that the reference lacks or has in another shape.

    >>> import jax.numpy as jnp
    >>> from qjax.tensor import quantize
    >>> w = jnp.linspace(-1.0, 1.0, 64).reshape(32, 2)
    >>> describe({"w": quantize(w, "Q4_0", axis=0), "gain": jnp.ones(32)}, {"w": w, "gain": jnp.ones(32)})
    path   shape  format   bits  rel. error
    gain      32  float32    32     0.00000
    w     32 x 2  Q4_0      4.5     0.06652
    2 leaves, 96 weights, 164 B, 13.67 bits per weight
    """
    trees = [t.params if isinstance(t, Model) else t for t in (tree, reference)]
    for path, leaf in named_leaves(trees[0]).items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise UserError(f"{path or 'the tree'}: describe takes arrays and QTensors, got {type(leaf).__name__}")
    return Description(tuple(tensor_rows(*trees)), sizes(trees[0]))
