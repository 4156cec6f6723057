"""Experts that a Hugging Face folder has in one tensor, for gate and up together, and as all other folders have them.

    experts.gate_up_proj [e, in, 2 out]           gpt-oss: even columns are gate's, odd ones up's
                                                  Llama 4: the first half is gate's, the second up's
                             [e, 2 out, in]       Qwen3.5, Gemma 4 ("rows"): so are its rows
    experts.down_proj [e, in, out]                biases [e, 2 out], [e, out]
    gpt-oss as published: blocks [e, 2 out, in / 32, 16] and scales [e, 2 out, in / 32] of MXFP4

    <->  experts.{gate,up,down}_proj.weight [e, out, in], .bias [e, out]

A byte of the published blocks has weights 2 i and 2 i + 1; one of ggml's, which follow their scale, i and i + 16. What
is read is ggml's MXFP4 of the same scales and codes, as llama.cpp's converter writes it. Sources: the model card,
arXiv:2508.10925, section 2.1; OCP Microscaling formats 1.0.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from qjax.errors import UserError
from qjax.io.safetensors import FLOATS, Checkpoint, Stored, mapped

MXFP4 = "MXFP4"
_BLOCK, _BYTES = 32, 17  # weights of a block, and its bytes
_AT = r"(.*\.(?:mlp|feed_forward|layers\.\d+)\.experts\.)"
_EXPERTS = re.compile(_AT + r"(gate_up|down)_proj(_bias|_blocks|_scales)?$")
_OURS = re.compile(_AT + r"(gate|up|down)_proj\.(weight|bias)$")
_AXES = {"bias": 2, "weight": 3, "blocks": 4, "scales": 3}

Info = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


def gguf_blocks(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Published MXFP4 as ggml's: u8[*b, n, 16] and u8[*b, n] -> u8[*b, n, 17], the same scales and codes."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], _BLOCK)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], packed], axis=-1)


def _parts(which: str, columns: str, outputs: int) -> tuple[tuple[str, slice], ...]:
    """The parts of a tensor and their outputs in it."""
    if which == "down":
        return (("down", slice(None)),)
    if columns == "even":
        return ("gate", slice(0, None, 2)), ("up", slice(1, None, 2))
    return ("gate", slice(0, outputs // 2)), ("up", slice(outputs // 2, None))


def read_experts(checkpoint: Checkpoint, columns: str) -> Checkpoint:
    """A folder's tensors with its experts under the names and in the form of `weight_names`; no weight is read.

    Args:
      checkpoint: of the folder.
      columns: which are gate's, `Family.expert_columns`.

    Raises:
      UserError: blocks without scales or scales without blocks, or of other shapes or types than fit.
    """
    found: dict[str, Stored] = {}
    for name, stored in checkpoint.tensors.items():
        match = _EXPERTS.match(name)
        if match is None:
            found[name] = stored
            continue
        at, which, form = match[1], match[2], (match[3] or "_weight")[1:]
        axis = 1 if form in ("blocks", "scales") or columns == "rows" else -1
        outputs = stored.shape[axis] if stored.shape[1:] else 0
        parts = _parts(which, columns, outputs)
        if len(stored.shape) != _AXES[form] or outputs % len(parts):
            raise UserError(f"{stored.path}: tensor {name!r} has shape {list(stored.shape)}, which no expert has")
        half = {"blocks": "scales", "scales": "blocks"}.get(form)
        other = name if half is None else name.removesuffix(form) + half
        if other not in checkpoint.tensors:
            raise UserError(f"{stored.path}: tensor {other!r} is missing; {name!r} is the other half of its MXFP4")
        for part, rows in parts if form != "scales" else ():
            if form == "blocks":
                made = _packed(name, stored, checkpoint.tensors[other], rows)
            else:
                made = _plain(stored, rows, columns == "rows")
            found[f"{at}{part}_proj.{'bias' if form == 'bias' else 'weight'}"] = made
    return dataclasses.replace(checkpoint, tensors=found)


def _plain(stored: Stored, rows: slice, turned: bool) -> Stored:
    """A part of a tensor of floats, which has outputs along its last axis, or `turned` along its second."""
    if stored.dtype not in FLOATS:
        return stored  # told by whoever reads it

    def made(first: int, count: int) -> np.ndarray:
        array = mapped(stored, FLOATS[stored.dtype], first, count)
        if turned:
            return array[:, rows]
        array = array[..., rows]
        return array if array.ndim == 2 else array.swapaxes(-1, -2)

    outputs = len(range(*rows.indices(stored.shape[1 if turned else -1])))
    shape = (
        (stored.shape[0], outputs)
        if len(stored.shape) == 2
        else ((stored.shape[0], outputs, stored.shape[2 if turned else 1]))
    )
    nbytes = math.prod(shape) * FLOATS[stored.dtype].itemsize
    return dataclasses.replace(stored, shape=shape, nbytes=nbytes, made=made)


def _packed(name: str, blocks: Stored, scales: Stored, rows: slice) -> Stored:
    """A part of blocks and scales, which have outputs along their second axis."""
    if {blocks.dtype, scales.dtype} != {"U8"} or blocks.shape != (*scales.shape, _BLOCK // 2):
        what = f"{blocks.dtype}{list(blocks.shape)} and {scales.dtype}{list(scales.shape)}"
        raise UserError(f"{blocks.path}: {name!r} and its scales are {what}, no blocks of MXFP4")

    def made(first: int, count: int) -> np.ndarray:
        parts = (mapped(s, np.uint8, first, count)[:, rows] for s in (blocks, scales))
        return gguf_blocks(*parts).reshape(count, shape[1], -1)

    outputs = len(range(*rows.indices(scales.shape[1])))
    shape = (scales.shape[0], outputs, scales.shape[2] * _BLOCK)
    nbytes = math.prod(shape) // _BLOCK * _BYTES
    return dataclasses.replace(blocks, dtype=MXFP4, shape=shape, nbytes=nbytes, made=made)


def write_experts(
    infos: Iterable[Info], arrays: Iterable[np.ndarray], columns: str
) -> tuple[list[Info], Iterator[np.ndarray]]:
    """What `read_experts` reads of floats: tensors as `weight_names` has them -> as such a folder has them.

    Args:
      infos: of all tensors, the experts' in the order of `weight_names`.
      arrays: the tensors, asked for one at a time.
      columns: which are gate's.
    """
    infos = list(infos)

    def named(name: str, dtype: str, shape: tuple[int, ...]) -> Info | None:
        if (match := _OURS.match(name)) is None:
            return name, dtype, shape
        if match[2] == "gate":
            return None  # comes with up's
        twice, end = (2, "gate_up_proj") if match[2] == "up" else (1, "down_proj")
        if match[3] == "bias":
            return f"{match[1]}{end}_bias", dtype, (shape[0], twice * shape[1])
        turned = (twice * shape[1], shape[2]) if columns == "rows" else (shape[2], twice * shape[1])
        return match[1] + end, dtype, (shape[0], *turned)

    def joined() -> Iterator[np.ndarray]:
        gates: dict[str, np.ndarray] = {}
        for (name, *_), array in zip(infos, arrays, strict=True):
            match = _OURS.match(name)
            if match is not None and match[2] == "gate":
                gates[match[3]] = array
                continue
            if match is not None and match[2] == "up":
                both, axis = [gates.pop(match[3]), array], 2 if columns == "even" else 1
                array = np.stack(both, axis).reshape(len(array), -1, *array.shape[2:])
            as_it_is = match is None or match[3] == "bias" or columns == "rows"
            yield array if as_it_is else array.swapaxes(-1, -2)

    return [info for info in (named(*info) for info in infos) if info is not None], joined()
