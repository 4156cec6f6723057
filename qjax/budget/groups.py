"""Which weights change their format together, and which formats they may have: what reads the file decides.

llama.cpp   any type whose blocks divide the rows, for any tensor; q and k meet in one product, gate and up in another,
            and change together
vllm        4 or 8 bits in groups of 128; q, k and v are one matrix there, gate and up another; embedding and head
            stay as they are
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats import BlockFormat, Format
from qjax.formats import format as get_format
from qjax.plan import Weight
from qjax.tensor import quantize


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program reads.

    Attributes:
      formats: names, where the user names none.
      together: kinds of weights of a block, by the ends of their paths, that have one format.
      outside: whether the embedding and the head take a format too; otherwise they are kept.
    """

    formats: tuple[str, ...]
    together: tuple[tuple[str, ...], ...]
    outside: bool = True


_HALVES = ("mlp/gate/kernel", "mlp/up/kernel")
TARGETS = {
    "llama.cpp": Target(
        (
            *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
            *("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0"),
        ),
        (("attn/q/kernel", "attn/k/kernel"), _HALVES),
    ),
    "vllm": Target(
        ("int4_g128_mse", "int8_g128"), (("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"), _HALVES), outside=False
    ),
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights that have one format.

    Attributes:
      name: for tables: "layers_3/attn/q+k".
      part: of the model in which they lie: "layers_3".
      weights: one or several.
      formats: those that divide the rows of all of them, by rising bits.
    """

    name: str
    part: str
    weights: tuple[Weight, ...]
    formats: tuple[Format, ...]

    @property
    def size(self) -> int:
        """How many numbers."""
        return sum(math.prod(w.shape) for w in self.weights)


def groups_of(weights: Iterable[Weight], target: Target, formats: Sequence[str] = ()) -> tuple[Group, ...]:
    """The groups of a model's weights, in their order.

    Args:
      weights: all of them; vectors, routers and convolutions are left out, for plans keep them.
      target: what reads the file.
      formats: in place of the target's.

    Raises:
      UserError: a weight whose rows no format's blocks divide; no two formats.
    """
    known = sorted((get_format(name) for name in formats or target.formats), key=lambda f: f.bits_per_weight)
    if len(set(known)) < 2:
        raise UserError(f"a budget needs two formats at least to choose from, got {', '.join(f.name for f in known)}")
    kept = () if target.outside else ("embed", "head")
    members: dict[str, list[Weight]] = {}
    for w in weights:
        part = w.path.split("/")[0]
        if not (w.is_vector or w.spared or part in kept):
            members.setdefault(_name(w.path, target.together), []).append(w)
    return tuple(_group(name, tuple(ws), known) for name, ws in members.items())


def _name(path: str, together: Sequence[tuple[str, ...]]) -> str:
    """The name of the group that a weight is in."""
    part, _, rest = path.partition("/")
    for kinds in together:
        if rest in kinds:
            room, *_ = rest.split("/")
            return f"{part}/{room}/{'+'.join(kind.split('/')[-2] for kind in kinds)}"
    return path.removesuffix("/kernel").removesuffix("/embedding")


def _group(name: str, weights: tuple[Weight, ...], known: Sequence[Format]) -> Group:
    fits = tuple(f for f in known if all(not f.block or w.shape[-1] % f.block == 0 for w in weights))
    if not fits:
        raise UserError(
            f"{weights[0]}: no block of {', '.join(f.name for f in known)} divides its rows of {weights[0].shape[-1]}; "
            "add a format with a smaller block"
        )
    return Group(name, weights[0].path.split("/")[0], weights, fits)


def stored_size(format: Format | None, shape: tuple[int, ...]) -> int:
    """Bytes of a weight [*b, n] in a format, scales and padding included; of one that is kept (None), in float32."""
    if format is None:
        return 4 * math.prod(shape)
    if isinstance(format, BlockFormat):
        return math.prod(shape) // format.block * format.block_bytes
    made = jax.eval_shape(lambda w: quantize(w, format), jax.ShapeDtypeStruct(shape, jnp.float32))
    return made.nbytes
