"""What a model larger than the memory given to it takes: peak resident memory and bytes read of every command.

    qjax run configs/memory.toml

A file of random weights is written in a real model's shapes, calibrated and quantized, judged by KL against itself in
floats, and continued; each by one command in a process of its own, whose peak is what the kernel counts (ru_maxrss,
pages of mapped files included) and whose reads are the bytes of tensors it asked the file for. The largest part of the
model in float32 (a block, or the embedding) and the residual stream of all windows stand beside it. Shapes: Gemma 3's
vocabulary and width; MobileLLM-1B's (arXiv:2402.14905).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qjax import rundir
from qjax.errors import UserError
from qjax.io.gguf_model import metadata_of
from qjax.io.gguf_write import TensorInfo, tensor_order, write_gguf
from qjax.models import stdlib_text
from qjax.models.config import DecoderConfig
from qjax.models.families import weight_names


@dataclasses.dataclass(frozen=True)
class Config:
    """The shapes of a model, and what is done to it."""

    vocab: int = 262_144  # Gemma 3's
    dim: int = 640
    hidden: int = 2048
    layers: int = 18
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 256
    tied: bool = True
    recipe: str = "best_gguf"  # which surveys the float model first
    format: str = "Q4_0"
    context: int = 128  # tokens a window
    windows: int = 4  # of calibration, and judged
    tokens: int = 4  # made
    most: int | None = None  # bytes of resident memory that a command may take
    room: int | None = None  # the same, beside the largest part and the residual stream


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns a row a command."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model, small, text = (Path(folder) / name for name in ("float.gguf", "small.gguf", "text.txt"))
        text.write_text(stdlib_text.heldout_text()[: 40 * config.windows * config.context], "utf-8")
        decoder = decoder_of(config)
        write_random(model, decoder)
        windows = ("--ctx", config.context, "--limit", config.windows)
        calibrate = ("--calib", text, "--calib-ctx", config.context, "--calib-windows", config.windows)
        commands: dict[str, tuple[Any, ...]] = {
            "quantize": (
                "quantize",
                model,
                "-o",
                small,
                "--type",
                config.format,
                "--recipe",
                config.recipe,
                *calibrate,
            ),
            "eval": ("eval", model, "--text", text, *windows),
            "KL": ("eval", small, "--text", text, "--baseline", model, *windows),
            "generate": ("generate", model, "--prompt", "def ", "--max-tokens", config.tokens),
        }
        held = {"model_mb": model.stat().st_size / 1e6, **sizes_of(decoder, config)}
        beside = math.inf if config.room is None else config.room / 1e6 + held["largest_part_mb"] + held["stream_mb"]
        most = min(beside, math.inf if config.most is None else config.most / 1e6)
        for name, command in commands.items():
            row = {"step": name, **measured([str(part) for part in command]), **held}
            row["reads"] = row["read_mb"] / held["model_mb"]
            rows.append(row)
            rundir.log(out, row)
            print(f"{name}: {row['peak_mb']:.0f} MB, {row['seconds']:.0f} s", file=sys.stderr)
            if row["peak_mb"] > most:
                raise UserError(f"{name} took {row['peak_mb']:.0f} MB of memory, more than {most:.0f}")
    return {"rows": rows}


def decoder_of(config: Config) -> DecoderConfig:
    """A Llama of these shapes."""
    names = ("vocab", "dim", "hidden", "layers", "heads", "kv_heads", "head_dim", "tied")
    return DecoderConfig(**{name: getattr(config, name) for name in names})


def sizes_of(decoder: DecoderConfig, config: Config) -> dict[str, float]:
    """MB in float32: of the largest part of the params tree, of a block, and of the residual stream."""
    parts: dict[str, int] = {}
    for w in weight_names(decoder):
        parts[w.path[0]] = parts.get(w.path[0], 0) + 4 * math.prod(w.shape)
    stream = 4 * config.windows * config.context * config.dim
    held = {"largest_part": max(parts.values()), "block": parts["layers_0"], "stream": stream}
    return {f"{name}_mb": nbytes / 1e6 for name, nbytes in held.items()}


def write_random(path: Path, decoder: DecoderConfig) -> None:
    """A GGUF file of normal weights in F32, tensor by tensor; its tokenizer is the built-in model's, filled up."""
    from qjax.pipeline.source import open_source

    tokenizer = open_source("reference").tokenizer
    assert tokenizer is not None
    names = {w.gguf: w for w in weight_names(decoder)}
    infos = sorted((TensorInfo(n, w.file_shape, "F32") for n, w in names.items()), key=lambda i: tensor_order(i.name))

    def tensors() -> Iterator[np.ndarray]:
        for seed, info in enumerate(infos):
            if len(info.shape) == 1:
                yield np.ones(info.shape, np.float32)
                continue
            w = np.random.default_rng(seed).standard_normal(info.shape, np.float32)
            w *= np.float32(1.0 if info.name == "token_embd.weight" and not decoder.tied else info.shape[1] ** -0.5)
            yield w

    write_gguf(path, metadata_of(decoder, tokenizer, None, "random", "F32"), infos, tensors())


def measured(command: list[str]) -> dict[str, Any]:
    """A command of qjax in a process of its own: seconds, peak resident memory, tensors asked for."""
    with tempfile.NamedTemporaryFile("r") as told:
        clock = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, told.name, *command], capture_output=True, text=True)
        seconds = time.perf_counter() - clock
        if done.returncode:
            raise UserError(f"qjax {' '.join(command)}: {done.stderr.strip()[-500:]}")
        return {"seconds": seconds, **json.loads(told.read())}


def child(told: str, command: list[str]) -> int:
    """`qjax COMMAND` with its reads counted; what it took goes to the file `told`."""
    from qjax.cli import main
    from qjax.pipeline.source_tensor import SourceTensor

    raw, rows, read = SourceTensor.raw, SourceTensor.rows, [0]

    def counted_raw(self: SourceTensor, ahead: bool = True) -> np.ndarray:
        read[0] += self.nbytes
        return raw(self, ahead)

    def counted_rows(self: SourceTensor, which: np.ndarray) -> np.ndarray:
        before = read[0]
        found = rows(self, which)
        read[0] = before + len(np.unique(which)) * (self.nbytes // self.weight.shape[0])
        return found

    SourceTensor.raw, SourceTensor.rows = counted_raw, counted_rows  # type: ignore[method-assign]
    code = main(command)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    Path(told).write_text(json.dumps({"peak_mb": peak / 1e6, "read_mb": read[0] / 1e6}))
    return code


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(child(sys.argv[1], sys.argv[2:]))
