"""One training state over many devices: a mesh, a table of where each leaf lives, batches by rows.

    mesh = devices as (data, fsdp)        batch: rows over both axes        kernel (in, out): out over fsdp

Fully sharded data parallelism (ZeRO stage 3, Rajbhandari et al., arXiv:1910.02054) as JAX has it: every device keeps a
part of each weight and of its optimizer state, computes on its own rows of the batch, and the compiler gathers weights
and scatters gradients (GSPMD, Xu et al., arXiv:2105.04663). Along `data`, the state is copied.

    here   = mesh(data=2, fsdp=4)
    where  = shardings(jax.eval_shape(fresh_state), here)
    state  = jax.jit(fresh_state, out_shardings=where)()
    step   = jax.jit(train_step, donate_argnums=0, out_shardings=(where, None))
    state, metrics = step(state, global_batch(rows, here))

A weight is cut along its output axis, so that the groups of a quantized weight, which run along the contracted axis,
stay whole, and so do the scales (out, groups) that are cut with it. A table that cuts the contracted axis is held to
whole groups (`blocks`): a part of a group would have a scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.errors import UserError
from qjax.plan.rules import fits
from qjax.typing import Array, Integer

# (pattern, spec), in order; the first pattern that fits a leaf's whole path decides. As in a plan, a pattern is a shell
# glob or, after `re:`, a regular expression. Patterns that begin with * fit the moments of an optimizer as well, whose
# paths end in the parameter's. Vectors that no pattern fits are replicated; scalars always are.
Table = Sequence[tuple[str, P]]

DECODER: Table = (
    ("*scales/*", P("fsdp")),  # grids of quantized weights that train, (out, groups)
    ("*constants/*/kernel", P(None, "fsdp")),  # a teacher, or weights that do not train
    ("*constants/*/embedding", P("fsdp", None)),
    ("*constants/*", P("fsdp")),  # and grids that stay
    ("*/leaves/*", P("fsdp")),  # a QTensor's packed arrays, (out, blocks, ...)
    ("*/applied/*", P()),  # its changes of variables
    ("*/kernel/[ab]", P()),  # low-rank adapters
    ("*embedding", P("fsdp", None)),  # (vocab, dim)
    ("*kernel", P(None, "fsdp")),  # (in, out)
)

_SMALL = 2**16


def mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices as a mesh with axes ("data", "fsdp").

    Args:
      data: copies of the state, each for a part of the batch; -1: as many as the devices allow.
      fsdp: devices that share one copy; -1: as many as the devices allow.
      devices: those to use; None: all of all processes.

    Raises:
      UserError: data * fsdp is not the number of devices.
    """
    # Processes one after the other, so that a process's rows are a contiguous part of the batch, and neighbours along
    # fsdp, which talk most, are near each other.
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    known = data if fsdp == -1 else fsdp
    if known > 0 and -1 in (data, fsdp) and len(devices) % known == 0:
        data, fsdp = (len(devices) // known if n == -1 else n for n in (data, fsdp))
    if data < 1 or fsdp < 1 or data * fsdp != len(devices):
        raise UserError(
            f"a mesh of data={data} times fsdp={fsdp} does not make the {len(devices)} devices there are; "
            "give two divisors whose product that is, or one and -1 for the rest"
        )
    return Mesh(np.array(devices).reshape(data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def shardings(
    shapes: Any,
    mesh: Mesh,
    table: Table = DECODER,
    blocks: Mapping[str, int] | None = None,
    small: int = _SMALL,
) -> Any:
    """Where each leaf of a tree lives.

    Args:
      shapes: a tree of arrays or of `jax.eval_shape`'s shapes: parameters, optimizer state, or a state of both.
      mesh: see `mesh`; any mesh that has the axes which the table names.
      table: ordered (pattern, spec).
      blocks: {path: weights along the contracted axis that share scales, 0 for the whole row} of quantized weights, as
        a format's `block`. A path stands for every leaf whose path ends in it, moments included.
      small: a leaf of at most that many elements is replicated along an axis that does not divide.

    Returns: the same tree of NamedShardings, for `jit`'s in_shardings and out_shardings and for `distribute`.

    Raises:
      UserError: a matrix that no pattern fits, an axis that does not divide over its devices (in whole blocks), a spec
        with more axes than the leaf or with an axis that the mesh lacks, or a block whose path no leaf has.

    >>> here = mesh(1, 1, jax.devices()[:1])
    >>> shapes = {"head": {"kernel": jax.ShapeDtypeStruct((8, 16), np.float32)}}
    >>> tuple(shardings(shapes, here)["head"]["kernel"].spec)
    (None, 'fsdp')
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf)) for path, leaf in leaves]
    block_of = _blocks_of([path for path, _ in named], blocks or {})
    specs = [
        _fitted(path, shape, _lookup(path, shape, table), mesh, block_of.get(path, 1), small) for path, shape in named
    ]
    return jax.tree.unflatten(tree, [NamedSharding(mesh, spec) for spec in specs])


def distribute(tree: Any, shardings: Any) -> Any:
    """Copy a tree of arrays to where `shardings` says.

    With several processes, each gives the same whole arrays and keeps its part. The result shares no memory with
    `tree`, so that it may be donated. Where the state can be computed, `jax.jit(fresh_state, out_shardings=...)` needs
    no whole array anywhere.
    """
    return jax.device_put(tree, shardings, may_alias=False)


def global_batch(rows: Integer[np.ndarray, "rows *rest"] | Array, mesh: Mesh) -> Array:
    """The batch of all processes, cut by rows over both axes of the mesh.

    Args:
      rows: this process's part, [batch / processes, ...]: with a mesh of `mesh`, rows p batch / processes and on.

    Returns: the global array [batch, ...].

    Raises:
      UserError: a batch that the devices do not divide.
    """
    processes = len({d.process_index for d in mesh.devices.flat})
    batch = rows.shape[0] * processes
    if batch % mesh.size:
        raise UserError(f"a batch of {batch} rows does not divide among {mesh.size} devices; take a multiple")
    where = NamedSharding(mesh, P(tuple(mesh.axis_names)))
    return jax.make_array_from_process_local_data(where, np.asarray(rows), (batch, *rows.shape[1:]))


def _lookup(path: str, shape: tuple[int, ...], table: Table) -> P:
    if not shape:
        return P()
    for pattern, spec in table:
        if fits(pattern, path):
            return spec
    if len(shape) > 1:
        raise UserError(f"no rule of the sharding table fits {path} {list(shape)}; add one, such as ({path!r}, P())")
    return P()


def _fitted(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh, block: int, small: int) -> P:
    """The spec, without the axes of a small leaf that do not divide."""
    if len(spec) > len(shape):
        raise UserError(f"{path} {list(shape)} has fewer axes than its spec {spec}; give it a rule of its own")
    contracted = _contracted_axis(path, len(shape))
    fitted = []
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        for name in names:
            if name not in mesh.shape:
                raise UserError(f"{path}: its spec {spec} names {name!r}; the mesh has {', '.join(mesh.axis_names)}")
        ways = math.prod(mesh.shape[name] for name in names)
        unit = (block or shape[axis]) if axis == contracted else 1
        fits = ways == 1 or shape[axis] % (ways * unit) == 0
        if not fits and math.prod(shape) > small:
            whole = f" in whole blocks of {unit}" if unit > 1 else ""
            raise UserError(
                f"{path} {list(shape)}: axis {axis} of {shape[axis]} does not divide{whole} over the {ways} devices of "
                f"mesh axis {'+'.join(names)}; take a mesh that fits, or a rule that cuts another axis or none"
            )
        fitted.append(spec[axis] if fits else None)
    return P(*fitted)


def _contracted_axis(path: str, ndim: int) -> int:
    """By name: the first of a kernel's (in, out), the last of everything else."""
    return ndim - 2 if path.rsplit("/", 1)[-1] == "kernel" and ndim > 1 else ndim - 1


def _blocks_of(paths: Sequence[str], blocks: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, block in blocks.items():
        hits = [path for path in paths if path == key or path.endswith("/" + key)]
        if not hits:
            raise UserError(
                f"a block of {block} is given for {key!r}, which is no leaf; they are named like {paths[:1]}"
            )
        found |= dict.fromkeys(hits, block)
    return found
