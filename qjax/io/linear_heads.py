"""Linear attention of a Hugging Face folder, and in the order and shape that `weight_names` has.

    folder: value heads of a key head are neighbours, 0 0 1 1      conv1d [channels, 1, width]
    ours:   key heads in turn, 0 1 0 1 (`tiled`)                   conv   [channels, width]

    Qwen3-Next: in_proj_qkvz, key head by key head q, k, its v, its z  ->  in_proj_qkv [q, k, v], in_proj_z

llama.cpp wants the second forms. Rows or columns of floats move, nothing is computed; matrices of packed weights, which
only GGUF files hold, have them already.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

from qjax.errors import UserError
from qjax.io.expert_stacks import Info
from qjax.io.safetensors import FLOATS, Checkpoint, Stored, mapped
from qjax.models.config import LinearAttention

_QKV, _Z, _QKVZ = (f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "qkvz"))
_OURS = re.compile(r".*\.linear_attn\.(in_proj_(?:qkv|z|a|b)\.weight|conv1d\.weight|A_log|dt_bias|out_proj\.weight)$")


def order_of(name: str, rule: LinearAttention) -> np.ndarray | None:
    """Which row of the folder's tensor is each of ours (of out_proj: which column); None where none moves."""
    if (match := _OURS.match(name)) is None or not rule.tiled or rule.value_heads == rule.key_heads:
        return None
    heads = np.arange(rule.value_heads).reshape(rule.key_heads, -1).T.reshape(-1)
    if match[1] in ("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight"):
        return heads
    values = (heads[:, None] * rule.value_dim + np.arange(rule.value_dim)).reshape(-1)
    if match[1] in ("in_proj_z.weight", "out_proj.weight"):
        return values
    return np.concatenate([np.arange(2 * rule.keys), 2 * rule.keys + values])


def read_linear(checkpoint: Checkpoint, rule: LinearAttention) -> Checkpoint:
    """A folder's tensors with those of linear attention as `weight_names` has them; no weight is read.

    Raises:
      UserError: in_proj_qkvz has another number of rows than the rule.
    """
    found: dict[str, Stored] = {}
    for name, stored in checkpoint.tensors.items():
        if rule.tiled or not name.endswith(_QKVZ):
            found[name] = _ours(name, stored, rule)
            continue
        qkv, z = qkvz_rows(rule)
        if stored.shape[:1] != (len(qkv) + len(z),):
            wanted = f"config.json asks for {len(qkv) + len(z)} rows"
            raise UserError(f"{stored.path}: tensor {name!r} has shape {list(stored.shape)}; {wanted}")
        at = name.removesuffix("qkvz.weight")
        found |= {f"{at}qkv.weight": _rows(stored, qkv), f"{at}z.weight": _rows(stored, z)}
    return dataclasses.replace(checkpoint, tensors=found)


def qkvz_rows(rule: LinearAttention) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of in_proj_qkvz are in_proj_qkv's, and which in_proj_z's."""
    values = rule.value_heads // rule.key_heads * rule.value_dim
    ends = np.cumsum([rule.key_dim, rule.key_dim, values])
    rows = np.arange(rule.channels + rule.value_heads * rule.value_dim).reshape(rule.key_heads, -1)
    *qkv, z = (part.reshape(-1) for part in np.split(rows, ends, axis=1))
    return np.concatenate(qkv), z


def _rows(stored: Stored, which: np.ndarray) -> Stored:
    """Some rows of a matrix of floats, in this order."""
    if stored.dtype not in FLOATS:
        return stored  # told by whoever reads it

    def made(first: int, count: int) -> np.ndarray:
        return mapped(stored, FLOATS[stored.dtype], 0, stored.shape[0])[which[first : first + count]]

    nbytes = stored.nbytes // stored.shape[0] * len(which)
    return dataclasses.replace(stored, shape=(len(which), *stored.shape[1:]), nbytes=nbytes, made=made)


def _ours(name: str, stored: Stored, rule: LinearAttention) -> Stored:
    order, is_conv = order_of(name, rule), name.endswith("linear_attn.conv1d.weight")
    if stored.dtype not in FLOATS or (order is None and not is_conv):
        return stored  # of another type: told by whoever reads it
    axis, shape = int(name.endswith("out_proj.weight")), stored.shape
    if order is not None and (len(shape) <= axis or shape[axis] != len(order)):
        return stored  # of another shape: likewise

    def made(first: int, count: int) -> np.ndarray:
        if order is None or axis:
            array = mapped(stored, FLOATS[stored.dtype], first, count)
            array = array if order is None else array[:, order]
        else:
            array = mapped(stored, FLOATS[stored.dtype], 0, shape[0])[order[first : first + count]]
        return array.reshape(count, *ours[1:])

    ours = (shape[0], *shape[2:]) if is_conv and shape[1:2] == (1,) else shape
    return dataclasses.replace(stored, shape=ours, made=made)


def write_linear(
    infos: Iterable[Info], arrays: Iterable[np.ndarray], rule: LinearAttention
) -> tuple[list[Info], Iterator[np.ndarray]]:
    """What `read_linear` reads: tensors as `weight_names` has them -> as a folder has them.

    Args:
      infos: of all tensors.
      arrays: the tensors, asked for one at a time.
      rule: of the decoder.
    """
    infos = list(infos)

    def theirs(name: str, array: np.ndarray) -> np.ndarray:
        if (order := order_of(name, rule)) is not None:
            array = np.take(array, np.argsort(order), axis=int(name.endswith("out_proj.weight")))
        return array[:, None] if name.endswith("linear_attn.conv1d.weight") else array

    def shaped(name: str, dtype: str, shape: tuple[int, ...]) -> Info:
        return name, dtype, (shape[0], 1, shape[1]) if name.endswith("linear_attn.conv1d.weight") else shape

    def joined() -> Iterator[np.ndarray]:
        qkv: np.ndarray | None = None
        for (name, *_), array in zip(infos, arrays, strict=True):
            if not rule.tiled and name.endswith(_QKV):
                qkv = array
            elif not rule.tiled and name.endswith(_Z) and qkv is not None:
                yield np.concatenate([qkv, array])[np.argsort(np.concatenate(qkvz_rows(rule)))]
            else:
                yield theirs(name, array)

    def named(name: str, dtype: str, shape: tuple[int, ...]) -> Info | None:
        if not rule.tiled and name.endswith(_QKV):
            return None  # comes with z's
        if not rule.tiled and name.endswith(_Z):
            return name.replace("in_proj_z", "in_proj_qkvz"), dtype, (sum(map(len, qkvz_rows(rule))), *shape[1:])
        return shaped(name, dtype, shape)

    return [info for info in (named(*info) for info in infos) if info is not None], joined()
