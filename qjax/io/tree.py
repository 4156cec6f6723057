"""A params tree of one's own in one safetensors file: arrays as they are, packed weights as their leaves.

Every array is a tensor under its path ("layers_0/attn/q/kernel", a packed one's leaves behind that). What safetensors
cannot say stands in the file's metadata under "qjax", as JSON:

    a dict      {"dict": [[key, node], ...]}          an array    {"tensor": name}
    a list      {"list": [node, ...]}                 None        {"none": 0}
    a tuple     {"tuple": [node, ...]}
    a QTensor   {"format": name, "axis": -2, "shape": [..], "leaves": node}
                                                      and "dtype" where the packed weights were not float32, "split"
                                                      where the quantized axis merges several
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.io.atomic import atomic_file
from qjax.io.safetensors import DTYPE_NAMES, DTYPES, open_file, write_tensors
from qjax.tensor import QTensor, dequantize

KEY = "qjax"


def save_tree(tree: Any, path: str | Path) -> None:
    """Write a params tree atomically.

    Args:
      tree: dicts with strings or ints for keys, lists and tuples of arrays and QTensors.
      path: the final name.

    Raises:
      UserError: another kind of node or leaf, a packed weight under a change of variables or of a format without a
        name, a full disk. Each names the leaf.
    """
    found: dict[str, np.ndarray] = {}
    tree = _describe(tree, "", found)
    infos = [(name, DTYPE_NAMES[array.dtype], array.shape) for name, array in found.items()]
    with atomic_file(path) as f:
        write_tensors(f, infos, found.values(), DTYPES, {KEY: json.dumps(tree)})


def load_tree(path: str | Path) -> Any:
    """The inverse of `save_tree`: the same tree, formats and bytes.

    Raises:
      UserError: unreadable, not written by `save_tree`, or damaged; names the file.
    """
    file = open_file(path)
    if KEY not in file.metadata:
        raise UserError(f"{path}: no params tree that qjax saved; a model in safetensors is loaded by its folder")
    try:
        return _rebuild(json.loads(file.metadata[KEY]), lambda name: jnp.asarray(np.array(file.array(name, DTYPES))))
    except UserError as e:
        raise UserError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: what it says about its tree is damaged: {' '.join(str(e).split())}") from None


def _describe(node: Any, path: str, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """A node as JSON; its arrays go into `found`."""
    if isinstance(node, Mapping):
        for key in node:
            if type(key) not in (str, int):
                raise UserError(f"{path or 'the tree'}: has the key {key!r}; a file holds strings and ints for keys")
        return {"dict": [[key, _describe(child, _join(path, key), found)] for key, child in node.items()]}
    if type(node) in (list, tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_describe(child, _join(path, i), found) for i, child in enumerate(node)]}
    if node is None:
        return {"none": 0}
    if isinstance(node, QTensor):
        return _describe_packed(node, path, found)
    dtype = getattr(node, "dtype", None)
    if not isinstance(node, np.ndarray | np.generic | jax.Array) or dtype not in DTYPE_NAMES:
        raise UserError(f"{path or 'the tree'}: a file holds arrays and QTensors, not {_kind(node)}")
    if path in found:
        raise UserError(f"{path}: two leaves have this path")
    found[path] = np.asarray(node)
    return {"tensor": path}


def _describe_packed(q: QTensor, path: str, found: dict[str, np.ndarray]) -> dict[str, Any]:
    if q.applied:
        raise UserError(
            f"{path}: is packed behind {type(q.applied[0]).__name__}, and a file has no place for a change of variables"
        )
    try:
        named = get_format(q.format.name) == q.format
    except UserError:
        named = False
    if not named:
        raise UserError(f"{path}: {q.format.name} is no format that its name alone describes; a file cannot say it")
    leaves = _describe(q.leaves, path, found)
    typed: dict[str, Any] = {} if q.dtype == jnp.float32 else {"dtype": q.dtype.name}
    typed |= {"split": list(q.split)} if q.split else {}
    return {"format": q.format.name, "axis": q.axis, "shape": list(q.shape), "leaves": leaves} | typed


def _rebuild(node: Any, array: Any) -> Any:
    (kind, value), *_ = node.items()
    if kind == "dict":
        return {key: _rebuild(child, array) for key, child in value}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_rebuild(child, array) for child in value)
    if kind == "none":
        return None
    if kind == "tensor":
        return array(value)
    if kind != "format":
        raise ValueError(f"a node of kind {kind!r}")
    q = QTensor(_rebuild(node["leaves"], array), get_format(value), node["axis"])
    split = tuple(int(size) for size in node.get("split", ()))
    q = dataclasses.replace(q, dtype=jnp.dtype(node.get("dtype", "float32")), split=split)
    said, holds = tuple(node["shape"]), _shape(q)
    if said != holds:
        raise ValueError(f"a {value} tensor should be {list(said)}, its arrays make {holds and list(holds)}")
    return q


def _shape(q: QTensor) -> tuple[int, ...] | None:
    """The shape that a packed weight unpacks to; None where its arrays do not fit its format."""
    try:
        return tuple(jax.eval_shape(dequantize, q).shape)
    except Exception:  # whatever a format's functions raise at arrays of other shapes
        return None


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _kind(node: Any) -> str:
    dtype = getattr(node, "dtype", None)
    return type(node).__name__ if dtype is None else f"{type(node).__name__} of {dtype}"
