"""What `qjax export` takes of a checkpoint of 1.1 B weights: peak resident memory and seconds, container by container.

    qjax run configs/memory_export.toml

A folder of random bf16 weights in TinyLlama's shapes is written in shards, and exported into each container, rounded to
nearest on the way; the first of what came out then goes over into others as it is. Each export is a process of its own,
and the run stops where one takes more memory than it may.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qjax import rundir
from qjax.errors import UserError
from qjax.evaluate.cost import cost_of
from qjax.io.folder_facts import write_facts
from qjax.io.safetensors import write_folder
from qjax.models.config import DecoderConfig
from qjax.models.families import WeightName, weight_names
from qjax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Config:
    """The shapes of a model, and where it goes."""

    vocab: int = 32_000  # TinyLlama's
    dim: int = 2048
    hidden: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    shard_bytes: int = 1_000_000_000
    into: tuple[str, ...] = ("compressed-tensors:uint4_g128", "gptq:uint4_g128", "awq:uint4_g128")
    over: tuple[str, ...] = ("gptq_v2", "mlx")  # packed weights of the first, as they are
    most: int = 2_500_000_000  # bytes of resident memory that an export may take


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns a row an export."""
    rows: list[dict[str, Any]] = []
    decoder = decoder_of(config)
    weights = sum(math.prod(w.shape) for w in weight_names(decoder))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder, first = Path(scratch) / "model", Path(scratch) / "packed"
        write_random(folder, decoder, config.shard_bytes)
        for job in (*config.into, *config.over):
            to, _, name = job.partition(":")
            source = folder if name else first
            made = Path(scratch) / "made"
            command = [sys.executable, "-m", "qjax", "export", str(source), "-o", str(made), "--to", to]
            cost = cost_of([*command, "--type", name] if name else command)
            sizes = {"read_mb": size_of(source), "written_mb": size_of(made)}
            row = {"to": to, "type": name or "as it is", **cost, "weights": weights, **sizes}
            rows.append(row)
            rundir.log(out, row)
            print(f"{to}: {cost['peak_rss_mb']:.0f} MB, {cost['seconds']:.0f} s", file=sys.stderr)
            if cost["peak_rss_mb"] > config.most / 1e6:
                raise UserError(f"{to} took {cost['peak_rss_mb']:.0f} MB of memory, more than {config.most / 1e6:.0f}")
            if first.exists():
                shutil.rmtree(made)
            else:
                made.rename(first)
    return {"rows": rows}


def decoder_of(config: Config) -> DecoderConfig:
    """A Llama of these shapes."""
    names = ("vocab", "dim", "hidden", "layers", "heads", "kv_heads")
    return DecoderConfig(**{k: getattr(config, k) for k in names}, head_dim=config.dim // config.heads)


def write_random(folder: Path, decoder: DecoderConfig, shard_bytes: int) -> None:
    """A folder of normal weights in bf16, tensor by tensor, without a tokenizer."""
    folder.mkdir()
    write_facts(folder, Model(decoder, {}), "bfloat16")
    names = weight_names(decoder)
    write_folder(folder, [(w.hf, "BF16", w.hf_shape) for w in names], arrays(names), shard_bytes)


def arrays(names: Sequence[WeightName]) -> Iterator[np.ndarray]:
    """Of each weight; norms are ones."""
    for seed, w in enumerate(names):
        made = np.ones(w.hf_shape, np.float32)
        if len(w.hf_shape) > 1:
            made = np.random.default_rng(seed).standard_normal(w.hf_shape, np.float32)
            made *= np.float32(w.hf_shape[1] ** -0.5)
        yield made.astype(ml_dtypes.bfloat16)


def size_of(folder: Path) -> float:
    """MB of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6
