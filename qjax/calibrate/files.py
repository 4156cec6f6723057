"""Statistics in files: our own .npz, and llama.cpp's importance matrices.

.npz    `<path>|<kind>` arrays in float32, written whole or not at all; weights with one input share one entry; the
        axes that they were contracted along as JSON
imatrix h and count by GGUF tensor name (`qjax.io.imatrix`)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import atomic_file
from qjax.io.imatrix import Imatrix, check_imatrix
from qjax.io.npz import read_arrays
from qjax.models.families import WeightName
from qjax.stats import KINDS, Stats

_SHARED, _AXES = "shared", "axes"


def save_stats(path: str | Path, stats: Mapping[str, Stats]) -> None:
    """Write {path: Stats} to an .npz file. Raises UserError as `atomic_file` does."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, s in stats.items():
        shared[name] = first.setdefault(id(s), name)
        if shared[name] == name:
            for kind in (*KINDS, "count", "G"):
                if getattr(s, kind) is not None:
                    arrays[f"{name}|{kind}"] = np.asarray(getattr(s, kind))
    axes = {name: [s.axis, list(s.also)] for name, s in stats.items() if shared[name] == name and s.axis is not None}
    for name, said in ((_SHARED, shared), (_AXES, axes)):
        arrays[name] = np.frombuffer(json.dumps(said).encode(), np.uint8)
    with atomic_file(path) as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]


def load_stats(path: str | Path) -> dict[str, Stats]:
    """The inverse of `save_stats`. Raises UserError where the file is missing, broken or something else."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file of statistics")
    arrays = read_arrays(path)
    try:
        shared = json.loads(arrays.pop(_SHARED).tobytes())
        axes = json.loads(arrays.pop(_AXES).tobytes()) if _AXES in arrays else {}  # files before had none
        fields: dict[str, dict[str, jnp.ndarray]] = {name: {} for name in set(shared.values())}
        for key, array in arrays.items():
            name, kind = key.rsplit("|", 1)
            if kind not in (*KINDS, "count", "G") or array.dtype.kind not in "fiu":
                raise ValueError(f"{key} of {array.dtype}")
            fields[name][kind] = jnp.asarray(array)
        made = {name: Stats(**f, **_axes(*axes.get(name, (None, ())))) for name, f in fields.items()}
        return {name: made[of] for name, of in shared.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} holds no statistics that qjax wrote: {e}") from None


def _axes(axis: Any, also: Any) -> dict[str, Any]:
    """`axis` and `also` of Stats, from JSON's numbers and lists."""

    def one(a: Any) -> Any:
        return tuple(int(i) for i in a) if isinstance(a, list) else int(a)

    return {} if axis is None else {"axis": one(axis), "also": tuple(map(one, also))}


def imatrix_of(
    stats: Mapping[str, Stats], names: Iterable[WeightName], datasets: tuple[str, ...] = (), chunk_size: int = 512
) -> Imatrix:
    """llama.cpp's importance matrix of a decoder's statistics.

    Args:
      stats: {path in the params tree: Stats} with h or H.
      names: the decoder's weights, `weight_names(config)`.
      datasets, chunk_size: what the file says about its making.

    Raises:
      UserError: no weight has h or H.
    """
    values: dict[str, np.ndarray] = {}
    counts: dict[str, Any] = {}
    for w in names:
        s = stats.get("/".join(w.path))
        if s is not None and s.importance is not None:
            values[w.gguf] = np.asarray(s.importance, np.float32)
            seen = np.asarray(chunk_size if s.count is None else s.count)
            counts[w.gguf] = seen.astype(np.int64) if values[w.gguf].ndim > 1 else int(seen)
    if not values:
        raise UserError("an importance matrix needs the statistic h or H, and none was collected")
    return Imatrix(values, counts, datasets, chunk_size)


def stats_of_imatrix(imatrix: Imatrix, names: Iterable[WeightName]) -> dict[str, Stats]:
    """{path: Stats(h, count)} of an importance matrix.

    Raises:
      UserError: it is another model's: a tensor the decoder lacks, or rows of another length.
    """
    weights = {w.gguf: w for w in names}
    shapes = {g: w.file_shape for g, w in weights.items()}
    check_imatrix(imatrix, shapes)

    def one(w: WeightName, h: np.ndarray, count: Any) -> Stats:
        h = h.reshape(*w.file_shape[:-2], -1)  # a .dat file does not say how many experts
        return Stats(h=jnp.asarray(h), count=jnp.asarray(np.broadcast_to(count, h.shape[:-1]), jnp.float32))

    return {"/".join(weights[g].path): one(weights[g], h, imatrix.counts[g]) for g, h in imatrix.values.items()}
