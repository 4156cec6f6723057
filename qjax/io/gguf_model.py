"""Models in GGUF files: packed blocks become QTensors as they are, and go back with the same bytes.

flax kernel (in, out)  =  (file rows (out, in))^T;      q and k rows of arch `llama` are in pairs (see `rope_rows`)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats.protocol import BlockFormat
from qjax.io.gguf_read import GGUFFile, read_gguf
from qjax.io.gguf_types import DENSE, TENSOR_TYPES
from qjax.io.gguf_write import TensorInfo, tensor_order, write_gguf
from qjax.io.huggingface import get_leaf, own, set_leaf
from qjax.io.rope_rows import to_halves, to_pairs
from qjax.io.tokenizer_gguf import tokenizer_from_gguf
from qjax.models.card import Card
from qjax.models.config import DecoderConfig
from qjax.models.families import WeightName, config_from_gguf, config_to_gguf, rope_tensors, weight_names
from qjax.models.families.scaling import FREQS as ROPE_FREQS
from qjax.models.families.scaling import LONG, SHORT
from qjax.models.model import Model
from qjax.tensor import QTensor
from qjax.tokenizer import Tokenizer

FLOAT_TYPES = ("F32", "F16", "BF16")
# llama.cpp's `general.file_type`: the file's usual type, by the name of its mix.
FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
        "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19,
        "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27,
        "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38,
    }
)  # fmt: skip
# What `metadata_of` writes anew, and what is true of one file only.
WRITTEN = frozenset(
    {"general.architecture", "general.type", "general.quantization_version", "general.file_type", "general.alignment"}
    | {f"tokenizer.ggml.{key}" for key in (
        "model", "pre", "tokens", "token_type", "merges", "scores", "add_space_prefix", "bos_token_id", "eos_token_id",
        "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token",
    )}
    | {"tokenizer.chat_template"}
)  # fmt: skip
_NOT_KEPT = ("split.",)
_SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}  # a type -> its most usual mix


def open_gguf_model(path: str | Path) -> tuple[DecoderConfig, GGUFFile]:
    """The architecture of a file and its tensors, none of them read yet.

    Raises:
      UserError: corrupt, an unsupported architecture, a tensor that is missing, left over or of another shape.
    """
    file = read_gguf(path)
    tied = "output.weight" not in file.tensors
    rope = {name: np.array(file.array(name)) for name in (ROPE_FREQS, LONG, SHORT) if name in file.tensors}
    biased, normed = (f"blk.0.attn_q{part}" in file.tensors for part in (".bias", "_norm.weight"))
    k_eq_v = any(
        name.endswith("attn_k.weight") and name.replace("attn_k", "attn_v") not in file.tensors for name in file.tensors
    )
    layers = file.metadata.get(f"{file.metadata.get('general.architecture')}.block_count")
    if isinstance(layers, int) and layers > len(file.tensors):  # before anything counts to it
        raise UserError(f"{path}: block_count = {layers}, more layers than the {len(file.tensors)} tensors there are")
    try:
        config = config_from_gguf(file.metadata, tied=tied, biased=biased, normed=normed, k_eq_v=k_eq_v, rope=rope)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    names = weight_names(config)
    for w in names:
        found, expected = file.entry(w.gguf).shape, w.file_shape
        if found != expected and (1, *found) != expected:  # what is one row may be a vector
            raise UserError(f"{path}: tensor {w.gguf!r} has shape {list(found)}; its metadata ask for {list(expected)}")
    extra = file.tensors.keys() - {w.gguf for w in names} - rope.keys() - further(config, file)
    if extra:
        raise UserError(f"{path}: tensor {min(extra)!r} belongs to nothing that qjax knows in this architecture")
    return config, file


def further(config: DecoderConfig, file: GGUFFile) -> frozenset[str]:
    """The tensors of blocks behind the last, which guess further tokens and have no part in the next one's scores."""
    blocks = range(config.layers, int(file.metadata[f"{file.metadata['general.architecture']}.block_count"]))
    return frozenset(name for i in blocks for name in file.tensors if name.startswith(f"blk.{i}."))


def load_gguf(path: str | Path, dtype: Any = jnp.float32, pre: str | None = None) -> Model:
    """Load a GGUF file: block types as QTensors, F32, F16 and BF16 tensors as arrays.

    Args:
      path: the file.
      dtype: of the float arrays; None keeps each tensor's own.
      pre: the pre-tokenizer to use in place of the one the file names.

    Raises:
      UserError: as `open_gguf_model`; a tensor type that qjax has no format for; a tokenizer it cannot rebuild.
    """
    config, file = open_gguf_model(path)
    params: dict[str, Any] = {}
    for w in weight_names(config):
        set_leaf(params, w.path, read_weight(file, w, dtype))
    try:
        tokenizer = tokenizer_from_gguf(file.metadata, pre)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    return Model(config, params, tokenizer, card_of(file))


def card_of(file: GGUFFile) -> Card:
    """What a file says beside architecture, weights and tokenizer, in its own types."""
    arch = f"{file.metadata['general.architecture']}."
    kept = {k: file.typed(k) for k in file.metadata if not k.startswith((arch, *_NOT_KEPT)) and k not in WRITTEN}
    ends = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    stops = tuple(dict.fromkeys(i for i in ends if type(i) is int))
    return Card(gguf=kept, stops=stops if len(stops) > 1 else ())


def read_weight(file: GGUFFile, w: WeightName, dtype: Any = jnp.float32) -> Any:
    """One weight of a file as a leaf of the flax tree: a QTensor or an array."""
    if file.entry(w.gguf).type in FLOAT_TYPES:
        rows = np.asarray(file.array(w.gguf))
        rows = rows if w.rope_heads is None else to_halves(rows, w.rope_heads)
        rows = rows - np.asarray(w.offset, rows.dtype) if w.offset else rows
        rows = np.log(-rows) if w.decay else rows
        return own(w.turned(rows.reshape(w.file_shape)), dtype)
    q = file.qtensor(w.gguf)
    if w.offset or q.ndim < 2:
        raise UserError(f"{file.path}: tensor {w.gguf!r} has type {file.entry(w.gguf).type}; expected F32, F16 or BF16")
    blocks = np.asarray(q.leaves["blocks"])
    blocks = blocks if w.rope_heads is None else to_halves(blocks, w.rope_heads)
    return QTensor({"blocks": own(blocks, np.uint8)}, q.format, -2 if w.transposed else -1)


def save_gguf(
    model: Model, path: str | Path, float_type: str = "F32", pre: str | None = None, name: str | None = None
) -> None:
    """Write a GGUF file that llama.cpp loads, tensor by tensor.

    Args:
      model: packed weights are written with their exact bytes, float matrices as `float_type`, vectors and routers as
        F32.
      path: the final name.
      float_type: "F32", "F16" or "BF16".
      pre: llama.cpp's name of the pre-tokenizer, where the tokenizer does not know it.
      name: `general.name`; by default that of the file it was loaded from, else this file's.

    Raises:
      UserError: no tokenizer (llama.cpp cannot load such a file), a packed weight that is no ggml type, a config that
        llama.cpp cannot run, a full disk.
    """
    path = Path(path)
    if float_type not in FLOAT_TYPES:
        raise UserError(f"float_type {float_type!r} is not supported; expected one of {', '.join(FLOAT_TYPES)}")
    if model.tokenizer is None:
        raise UserError(f"cannot write {path}: the model has no tokenizer, and llama.cpp loads no file without one")
    leaves = {w.gguf: (w, get_leaf(model.params, w)) for w in weight_names(model.config)}
    infos = [info_of(w, leaf, float_type) for w, leaf in leaves.values()]
    rope = rope_tensors(model.config)
    infos += [TensorInfo(name, table.shape, "F32") for name, table in rope.items()]
    infos.sort(key=lambda info: tensor_order(info.name))
    kept = model.card.gguf
    name = name or kept.get("general.name") or path.stem
    meta = metadata_of(model.config, model.tokenizer, pre, name, usual_type(infos), kept)

    def tensors() -> Iterator[np.ndarray]:
        for info in infos:
            yield rope[info.name] if info.name in rope else to_rows(*leaves[info.name], info.type)

    write_gguf(path, meta, infos, tensors())


def metadata_of(
    config: DecoderConfig,
    tokenizer: Tokenizer,
    pre: str | None,
    name: str,
    file_type: str,
    kept: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """All metadata of a file; `file_type` is a type or one of llama-quantize's mixes, `kept` what another file said."""
    tokenizer = tokenizer if pre is None else dataclasses.replace(tokenizer, pre=pre)
    mix = _SHORT.get(file_type, file_type)
    said = {
        **config_to_gguf(config),
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        **({"general.file_type": FILE_TYPES[mix]} if mix in FILE_TYPES else {}),
        **tokenizer.to_gguf(config.vocab),
    }
    return said | {key: value for key, value in kept.items() if key not in said}


def info_of(w: WeightName, leaf: Any, float_type: str) -> TensorInfo:
    """What a weight will be in a file, or a UserError where GGUF has no type for it."""
    if not isinstance(leaf, QTensor):
        return TensorInfo(w.gguf, w.file_shape, "F32" if w.stays_float else float_type)
    path = "/".join(w.path)
    if not isinstance(leaf.format, BlockFormat) or leaf.format.name not in TENSOR_TYPES:
        raise UserError(f"{path!r} is packed as {leaf.format.name}, which is no ggml type: GGUF cannot hold it")
    if leaf.applied:
        raise UserError(
            f"{path!r} lies behind {type(leaf.applied[0]).__name__}, and GGUF has no place for a change of variables: "
            "fuse it into the float model, then quantize"
        )
    axis = -2 if w.transposed else -1
    if leaf.axis != axis:
        raise UserError(f"{path!r} is packed along axis {leaf.axis}; GGUF needs blocks along the input axis, {axis}")
    return TensorInfo(w.gguf, w.file_shape, leaf.format.name)


def usual_type(infos: list[TensorInfo]) -> str:
    """The type that most weights of the matrices have."""
    total: dict[str, int] = {}
    for info in infos:
        if len(info.shape) > 1:
            total[info.type] = total.get(info.type, 0) + int(np.prod(info.shape))
    return max(total, key=lambda t: total[t])


def to_rows(w: WeightName, leaf: Any, type_name: str) -> np.ndarray:
    """A weight as the file holds it: rows (out, in) of floats, or of packed blocks."""
    if isinstance(leaf, QTensor):
        rows = np.asarray(leaf.leaves["blocks"])
        return rows if w.rope_heads is None else to_pairs(rows, w.rope_heads)
    rows = w.turned(np.asarray(leaf))
    rows = rows if w.rope_heads is None else to_pairs(rows, w.rope_heads)
    rows = rows.astype(np.float32) + np.float32(w.offset) if w.offset else rows
    rows = -np.exp(rows.astype(np.float32)) if w.decay else rows
    return rows.astype(DENSE[type_name])
