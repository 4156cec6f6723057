"""Tokens a second that llama.cpp makes from files of several types, in turn, and how they compare with one of them.

    LLAMA_CPP_LIB_PATH=<folder of libllama.so> qjax run configs/llamacpp_speed.toml

A model of random weights, wide as a language model of a billion and a few layers deep, is written by llama.cpp's own
quantizer in every type: what is read and multiplied does not depend on values. A round visits all types, so that a
machine that slows down slows all; a ratio is the median over rounds of what stands side by side in one.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import qjax
from qjax.errors import UserError
from qjax.evaluate.llamacpp import bindings, quantize
from qjax.models.model import Model
from qjax.training.decoder.fresh import fresh_model


@dataclasses.dataclass(frozen=True)
class Config:
    """The model and what is timed."""

    types: tuple[str, ...] = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
    against: str = "Q4_0"  # the type of ratio 1
    dim: int = 2048
    hidden: int = 5632
    layers: int = 4
    heads: int = 32
    kv_heads: int = 4
    context: int = 512
    prompt: int = 256  # tokens read at once
    tokens: int = 32  # written one by one
    rounds: int = 5
    threads: int = 2
    seed: int = 0


def run(config: Config, out: Path) -> dict[str, Any]:
    """Write the files, time them in turn, remove them. Returns a row a type."""
    if config.against not in config.types:
        raise UserError(f"against: {config.against!r} is none of types: {' '.join(config.types)}")
    if config.prompt + config.tokens > config.context:
        raise UserError(f"context: {config.prompt} + {config.tokens} tokens do not fit {config.context}")
    bindings()  # or say that llama.cpp is missing before any work
    tokenizer = qjax.load("reference").tokenizer
    assert tokenizer is not None
    source = out / "float.gguf"
    model = fresh_model(config, len(tokenizer.tokens), config.seed)
    qjax.save(Model(model.config, model.params, tokenizer), source)
    files = {kind: out / f"{kind}.gguf" for kind in config.types}
    for kind, file in files.items():
        quantize(source, file, kind, threads=config.threads)
    source.unlink()
    tokens = np.random.default_rng(config.seed).integers(3, len(tokenizer.tokens), config.context).tolist()
    seen: dict[str, list[tuple[float, float]]] = {kind: [] for kind in files}
    for i in range(config.rounds):
        for kind, file in files.items():
            seen[kind].append(rates(file, tokens, config))
            print(f"round {i + 1}, {kind}: {seen[kind][-1][1]:.1f} tokens/s", file=sys.stderr, flush=True)
    rows = [row(kind, files[kind].stat().st_size, seen[kind], seen[config.against]) for kind in files]
    for file in files.values():
        file.unlink()
    Console(highlight=False).print(shown(rows, config))
    return {"rows": rows}


def rates(file: Path, tokens: list[int], config: Config) -> tuple[float, float]:
    """Tokens a second of a prompt and behind it, in a context of its own."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=config.context, n_batch=config.prompt, n_threads=config.threads,
                  n_threads_batch=config.threads, n_gpu_layers=0, verbose=False)  # fmt: skip
    try:
        model.eval(tokens[:2])  # pages of the file come in
        model.reset()
        clock = time.perf_counter()
        model.eval(tokens[: config.prompt])
        read = time.perf_counter()
        for token in tokens[config.prompt : config.prompt + config.tokens]:
            model.eval([token])
        return config.prompt / (read - clock), config.tokens / (time.perf_counter() - read)
    finally:
        model.close()


def row(kind: str, size: int, seen: list[tuple[float, float]], against: list[tuple[float, float]]) -> dict[str, Any]:
    """A type's medians, and its ratios to another's of the same rounds."""
    prompt, written = zip(*seen, strict=True)
    ratios = [[a / b for a, b in zip(one, other, strict=True)] for one, other in zip(seen, against, strict=True)]
    return {
        "type": kind,
        "file_mb": size / 1e6,
        "prompt_tokens_per_second": statistics.median(prompt),
        "tokens_per_second": statistics.median(written),
        "prompt_ratio": statistics.median(r[0] for r in ratios),
        "ratio": statistics.median(r[1] for r in ratios),
        "ratio_least": min(r[1] for r in ratios),
        "ratio_most": max(r[1] for r in ratios),
    }


def shown(rows: list[dict[str, Any]], config: Config) -> Table:
    """The table of a run."""
    table = Table(title=f"llama.cpp, {config.threads} threads; ratios to {config.against}")
    for name in ("type", "MB", "prompt, tokens/s", "ratio", "written, tokens/s", "ratio (least to most)"):
        table.add_column(name, justify="left" if name == "type" else "right")
    for r in rows:
        spread = f"{r['ratio']:.2f} ({r['ratio_least']:.2f} to {r['ratio_most']:.2f})"
        table.add_row(r["type"], f"{r['file_mb']:.0f}", f"{r['prompt_tokens_per_second']:.0f}",
                      f"{r['prompt_ratio']:.2f}", f"{r['tokens_per_second']:.1f}", spread)  # fmt: skip
    return table
