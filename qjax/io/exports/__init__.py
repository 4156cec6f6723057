"""Checkpoints of other libraries, one file a container, both ways: `qjax export`, and every command that opens a model.

container.py says what a container is. A folder whose config.json speaks of one is opened with its weights packed as
they are; `CONTAINERS` are those that are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qjax.errors import UserError
from qjax.io.exports.awq import AWQ
from qjax.io.exports.bitsandbytes import BitsAndBytes
from qjax.io.exports.compressed_tensors import W8A8, WEIGHTS
from qjax.io.exports.container import Container, Reader
from qjax.io.exports.fp8_blocks import FP8Blocks
from qjax.io.exports.gptq import V1, V2
from qjax.io.exports.mlx import MLX
from qjax.io.exports.onnx import MatMulNBits
from qjax.io.safetensors import Checkpoint

_ALL: tuple[Container, ...] = (WEIGHTS, W8A8, V1, V2, AWQ(), BitsAndBytes(), MLX(), MatMulNBits())
_READ: tuple[Reader, ...] = (*_ALL, FP8Blocks())
CONTAINERS: Mapping[str, Container] = MappingProxyType({c.name: c for c in _ALL})


def container(name: str) -> Container:
    """A container by its name. Raises UserError where there is none."""
    if name not in CONTAINERS:
        raise UserError(f"{name!r} is no container; these are written: gguf, {', '.join(CONTAINERS)}")
    return CONTAINERS[name]


def reader_of(config: Mapping[str, Any]) -> Reader | None:
    """What reads a folder's packed weights, by its config.json; None: floats, or a kind that is not read."""
    return next((one for one in _READ if one.reads(config)), None)


def opened(config: Mapping[str, Any], checkpoint: Checkpoint) -> Checkpoint:
    """A folder's tensors with its packed weights in one piece each, as its config.json says; no weight is read.

    Raises:
      UserError: a kind of quantization that is not read; what `Reader.open` raises.
    """
    said = config.get("quantization_config", config.get("quantization"))
    if said is None:
        return checkpoint
    if (reader := reader_of(config)) is not None:
        return reader.open(config, checkpoint)
    method = said.get("quant_method") if isinstance(said, dict) else said
    raise UserError(
        f"{checkpoint.path}: config.json: weights quantized by {method!r} are not read; those of "
        f"{', '.join(one.name for one in _READ)} are"
    )
