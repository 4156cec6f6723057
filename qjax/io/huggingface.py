"""Models in Hugging Face's layout: a folder with config.json, safetensors (one file or shards) and a tokenizer.

Of a model of text and images the language model is read (see `multimodal`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import atomic_dir
from qjax.io.expert_stacks import MXFP4, Info, read_experts, write_experts
from qjax.io.exports import opened
from qjax.io.folder_facts import write_facts
from qjax.io.linear_heads import read_linear, write_linear
from qjax.io.multimodal import language_settings, language_tensors
from qjax.io.onnx_file import is_onnx, open_onnx
from qjax.io.safetensors import FLOATS, SHARD_BYTES, Checkpoint, open_folder, write_folder
from qjax.io.tokenizer_hf import read_json, read_tokenizer
from qjax.models.card import Card
from qjax.models.config import DecoderConfig
from qjax.models.families import WeightName, config_from_hf, family_of, weight_names
from qjax.models.model import Model
from qjax.tensor import QTensor, dequantize, from_bytes

# Tensors that carry no weight: buffers that some versions of transformers save. Layers behind the last one, which
# num_nextn_predict_layers announces (DeepSeek-V3), or that are called mtp (Qwen3.5), guess further tokens and have no
# part in the next one's scores.
_BUFFERS = ("rotary_emb.inv_freq",)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def open_model(folder: str | Path) -> tuple[DecoderConfig, Checkpoint]:
    """The architecture of a folder and its tensors, none of them read yet.

    Raises:
      UserError: config.json or a tensor is missing, a shape is not what the config asks for, or a tensor is left over.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face folder")
    whole = read_json(folder / "config.json")
    there = open_onnx(folder) if is_onnx(folder) else open_folder(folder)
    settings, checkpoint = language_settings(whole), opened(whole, there)
    if settings is not whole:
        checkpoint = language_tensors(checkpoint)
        # Whether the head is tied stands in either part, by version; that it is not there says so.
        settings = {**settings, "tie_word_embeddings": "lm_head.weight" not in checkpoint.tensors}
    layers = settings.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(checkpoint.tensors):  # before anything counts to it
        count = len(checkpoint.tensors)
        raise UserError(f"{folder}: config.json: num_hidden_layers = {layers}, more than the {count} tensors there are")
    try:
        config = config_from_hf(settings)
    except UserError as e:
        raise UserError(f"{folder}: {e}") from e
    if columns := family_of(config).expert_columns:
        checkpoint = read_experts(checkpoint, columns)
    if config.linear is not None:
        checkpoint = read_linear(checkpoint, config.linear)
    names = weight_names(config)
    for w in names:
        for name in w.hf_names:
            if name not in checkpoint.tensors:
                raise UserError(f"{folder}: tensor {name!r} is missing")
            found, expected = checkpoint.tensors[name].shape, w.hf_shape
            if found != expected:
                raise UserError(
                    f"{folder}: tensor {name!r} has shape {list(found)}; config.json asks for {list(expected)}"
                )
    ignored = {"lm_head.weight"} if config.tied else set()
    extra = checkpoint.tensors.keys() - {name for w in names for name in w.hf_names} - ignored
    extra = {name for name in extra if not name.endswith(_BUFFERS)}
    if settings.get("num_nextn_predict_layers"):
        extra = {name for name in extra if _layer(name) < config.layers}
    if "mtp" in family_of(config).options:
        extra = {name for name in extra if not name.startswith("mtp.")}
    if fp8 := sorted(name for name in extra if name.endswith("weight_scale_inv")):
        raise UserError(
            f"{folder}: {fp8[0]!r} belongs to weights in blocks of FP8, of which config.json says nothing; it "
            "needs its quantization_config"
        )
    if extra:
        raise UserError(f"{folder}: tensor {min(extra)!r} belongs to nothing in a {config.family} model")
    return config, checkpoint


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to, -1 outside."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def read_leaf(w: WeightName, checkpoint: Checkpoint, dtype: Any) -> jax.Array | QTensor:
    """One weight of a folder as a leaf of the flax tree; what is packed stays so."""
    stored = checkpoint.tensors[w.hf_names[0]]
    if stored.packed is not None:
        return _packed_leaf(w, checkpoint)
    if stored.dtype == MXFP4 and stored.made is not None:
        q = from_bytes(MXFP4, stored.made(0, stored.shape[0]).reshape(-1), stored.shape)
        return QTensor(q.leaves, q.format, -2)
    parts = [checkpoint.array(name) for name in w.hf_names]
    whole = parts[0] if parts[0].shape == w.file_shape else np.stack(parts)
    return own(w.turned(whole), dtype)


def _packed_leaf(w: WeightName, checkpoint: Checkpoint) -> QTensor:
    parts = [checkpoint.tensors[name] for name in w.hf_names]
    if len({part.dtype for part in parts}) > 1:
        kinds = " and ".join(sorted({part.dtype for part in parts}))
        raise UserError(f"{checkpoint.path}: the experts of {w.hf!r} have different types, {kinds}")
    made = [part.packed() for part in parts if part.packed is not None]
    q = made[0] if w.hf_shape == w.file_shape else jax.tree.map(lambda *leaves: np.stack(leaves), *made)
    leaves, applied = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), (q.leaves, q.applied))
    return QTensor(leaves, q.format, -2 if w.transposed else -1, applied)


def load_folder(folder: str | Path, dtype: Any = jnp.float32) -> Model:
    """Load a folder.

    Args:
      folder: holds config.json, safetensors and, unless the model has none, a tokenizer.
      dtype: of the params; None keeps each tensor's own. Experts in MXFP4 stay packed.

    Raises:
      UserError: as `open_model`.
    """
    folder = Path(folder)
    config, checkpoint = open_model(folder)
    params: dict[str, Any] = {}
    for w in weight_names(config):
        set_leaf(params, w.path, read_leaf(w, checkpoint, dtype))
    settings = language_settings(read_json(folder / "config.json"))
    return Model(config, params, read_tokenizer(folder, settings), card_of(folder, settings, config, checkpoint))


def card_of(folder: Path, settings: Mapping[str, Any], config: DecoderConfig, checkpoint: Checkpoint) -> Card:
    """What a folder says beside architecture, weights and tokenizer."""
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() and file.stat().st_size else {}
    stops: dict[int, None] = {}
    for said in (settings.get("eos_token_id"), generation.get("eos_token_id")):
        ids = said if isinstance(said, list) else [said]
        stops |= dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < config.vocab)
    tensors = (checkpoint.tensors[name] for w in weight_names(config) for name in w.hf_names)
    stored = {t.dtype for t in tensors if t.packed is None}
    dtype = next((name for name, code in _DTYPES.items() if stored == {code}), None)
    return Card(generation=generation, stops=tuple(stops) if len(stops) > 1 else (), dtype=dtype)


def save_folder(model: Model, folder: str | Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder atomically: config.json, generation_config.json, model.safetensors and the tokenizer.

    Packed weights are written as the floats they stand for: the layout has no place for them.

    Args:
      dtype: "float32", "bfloat16" or "float16", of every tensor; by default that of the folder it was loaded from where
        it still holds every weight exactly, else float32.
      shard_bytes: a larger model is written in several files and an index.

    Raises:
      UserError: an unknown dtype, a missing weight, a config that config.json cannot say, a full disk.
    """
    dtype = _same_dtype(model) if dtype is None else dtype
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; expected one of {', '.join(_DTYPES)}")
    stored = _DTYPES[dtype]
    names = weight_names(model.config)
    files = [(name, stored, w.hf_shape) for w in names for name in w.hf_names]
    weights: Iterator[np.ndarray] = (
        part for w in names for part in _to_file(model, w).astype(FLOATS[stored]).reshape(-1, *w.hf_shape)
    )
    files, weights = in_folder(model.config, files, weights)
    with atomic_dir(folder) as out:
        write_facts(out, model, dtype)
        write_folder(out, files, weights, shard_bytes)


def in_folder(
    config: DecoderConfig, infos: Iterable[Info], arrays: Iterable[np.ndarray]
) -> tuple[list[Info], Iterator[np.ndarray]]:
    """Tensors in the order of `weight_names`, as the family's folders have them: the inverse of what `open_model` makes
    of a folder's."""
    if columns := family_of(config).expert_columns:
        infos, arrays = write_experts(infos, arrays, columns)
    if config.linear is not None:
        infos, arrays = write_linear(infos, arrays, config.linear)
    return list(infos), iter(arrays)


def _same_dtype(model: Model) -> str:
    """The dtype of the folder a model came from where no weight would change by it, else float32."""
    dtype = model.card.dtype or "float32"
    narrow = FLOATS[_DTYPES[dtype]]

    def fits(leaf: Any) -> bool:
        if isinstance(leaf, QTensor):
            return False
        array = np.asarray(leaf)
        return array.dtype == narrow or bool(np.array_equal(array.astype(narrow).astype(array.dtype), array))

    same = dtype != "float32" and all(fits(get_leaf(model.params, w)) for w in weight_names(model.config))
    return dtype if same else "float32"


def set_leaf(params: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Put a leaf at a path of a nested dict."""
    *folders, name = path
    for key in folders:
        params = params.setdefault(key, {})
    params[name] = leaf


def own(view: np.ndarray, dtype: Any) -> jax.Array:
    """A view of a mapped file as an array of its own, so that nothing done to the file later reaches the model."""
    wide = view.dtype == np.float64 and dtype is None
    return jnp.asarray(np.array(view, np.float32 if wide else dtype, order="C"))


def get_leaf(params: Any, w: WeightName) -> Any:
    """The leaf of a weight, checked against its shape."""
    leaf = params
    for key in w.path:
        if not isinstance(leaf, dict) or key not in leaf:
            raise UserError(f"the model's params lack {'/'.join(w.path)!r}")
        leaf = leaf[key]
    if tuple(leaf.shape) != w.shape:
        raise UserError(f"{'/'.join(w.path)!r} has shape {list(leaf.shape)}; the config asks for {list(w.shape)}")
    return leaf


def _to_file(model: Model, w: WeightName) -> np.ndarray:
    leaf = get_leaf(model.params, w)
    if isinstance(leaf, QTensor) and leaf.rounds_inputs:
        raise UserError(f"{'/'.join(w.path)!r} rounds its inputs, which a folder of floats cannot say")
    return w.turned(np.asarray(dequantize(leaf) if isinstance(leaf, QTensor) else leaf))
