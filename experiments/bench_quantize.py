"""qjax against llama.cpp's own quantizer: time, memory and error on the same weights and the same cores.

    qjax run configs/bench_quantize.toml --scratch /folder/with/room

A synthetic checkpoint (TinyLlama's shapes by default, bf16, heavy-tailed columns) is written as a Hugging Face folder
and as a GGUF file of the same weights. Then, in turn, `qjax quantize FOLDER --type T` and llama.cpp's
`llama_model_quantize` (through llama-cpp-python, found by LLAMA_CPP_LIB_PATH) each make a file of it, every run a
process of its own. Reported: wall and CPU seconds of the whole process, its peak resident memory, the file's size,
whether every tensor has the same type, and the relative errors of some tensors in both files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from qjax.errors import UserError
from qjax.evaluate.cost import cost_of
from qjax.io.gguf_model import metadata_of
from qjax.io.gguf_read import read_gguf
from qjax.io.gguf_types import DENSE
from qjax.io.gguf_write import TensorInfo, write_gguf
from qjax.io.rope_rows import to_pairs
from qjax.io.safetensors import SINGLE, write_file
from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.io.tokenizer_hf import write_tokenizer
from qjax.models.config import DecoderConfig
from qjax.models.families import WeightName, config_to_hf, weight_names
from qjax.plan import FILE_TYPES
from qjax.tensor import dequantize

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that GPT-2's BPE spells as themselves

THEIRS = """
import ctypes, sys, time, llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.nthread, p.ftype = int(sys.argv[3]), int(sys.argv[4])
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)) == 0
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The checkpoint and the contest."""

    scratch: Path | None = None  # where the checkpoint and the results lie; none: the run directory
    type: str = "Q4_K_M"
    rounds: int = 3  # runs of each quantizer, in turn
    threads: int = 2  # of llama.cpp; qjax uses the cores it may
    vocab: int = 32000
    dim: int = 2048
    hidden: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    seed: int = 0
    keep: bool = False  # keep the checkpoint and the files


def run(config: Config, out: Path) -> dict[str, Any]:
    """Make the checkpoint where it is not there yet, run both quantizers in turn, compare. Returns the results."""
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        raise UserError("LLAMA_CPP_LIB_PATH is unset; point it at the folder of libllama.so to have a rival")
    scratch = config.scratch or out
    scratch.mkdir(parents=True, exist_ok=True)
    decoder = DecoderConfig(
        vocab=config.vocab,
        dim=config.dim,
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.dim // config.heads,
    )
    folder, base = scratch / "checkpoint", scratch / "checkpoint.gguf"
    write_checkpoint(folder, base, decoder, config.seed)
    ours, theirs = scratch / "ours.gguf", scratch / "theirs.gguf"
    number = FILE_TYPES[config.type][0]
    commands = {
        "qjax": [
            *(sys.executable, "-m", "qjax", "quantize", str(folder), "-o", str(ours), "--type", config.type),
            *("--json", str(scratch / "ours.json")),
        ],
        "llama.cpp": [sys.executable, "-c", THEIRS, str(base), str(theirs), str(config.threads), str(number)],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(config.rounds):
        for name, command in commands.items():
            (ours if name == "qjax" else theirs).unlink(missing_ok=True)
            load = round(os.getloadavg()[0], 1)
            runs[name].append({**cost_of(command), "load_before": load})
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    results = {
        "command": "qjax run configs/bench_quantize.toml",
        "weights": sum(int(np.prod(w.shape)) for w in weight_names(decoder)),
        "type": config.type,
        "runs": runs,
        "median": {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in runs.items()},
        "best": {name: {k: min(r[k] for r in rows) for k in rows[0]} for name, rows in runs.items()},
        "output_bytes": {"qjax": ours.stat().st_size, "llama.cpp": theirs.stat().st_size},
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
        **compare(base, ours, theirs),
    }
    (out / "bench_quantize.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    if not config.keep:
        for file in (ours, theirs, base, *sorted(folder.iterdir())):
            file.unlink()
        folder.rmdir()
    return results


def weight(w: WeightName, seed: int, index: int) -> np.ndarray:
    """One weight (out, in) in bf16: Gaussian rows under columns whose sizes are log-normal; norms near one."""
    rng = np.random.default_rng([seed, index])
    shape = w.file_shape
    if len(shape) == 1:
        return (1 + 0.1 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
    columns = 0.02 * np.exp(0.4 * rng.standard_normal(shape[-1], np.float32))
    return (rng.standard_normal(shape, np.float32) * columns).astype(ml_dtypes.bfloat16)


def write_checkpoint(folder: Path, base: Path, decoder: DecoderConfig, seed: int) -> None:
    """The same weights as a Hugging Face folder and as a GGUF file, one tensor in memory at a time."""
    if base.exists() and (folder / SINGLE).exists():
        return
    names = weight_names(decoder)
    folder.mkdir(exist_ok=True)
    print(f"writing a checkpoint of {sum(int(np.prod(w.shape)) for w in names):,} weights", flush=True)
    tokens = ["<s>", "</s>", *map(chr, BYTES)]
    tokens += [f"t{i}" for i in range(len(tokens), decoder.vocab)]
    types = [3, 3] + [1] * (decoder.vocab - 2)
    tokenizer = bpe_tokenizer(tokens, types, ["t 1"] if "t1" in tokens else [], "gpt-2", bos=0, eos=1, add_bos=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(decoder) | {"torch_dtype": "bfloat16"}))
    write_tokenizer(folder, tokenizer)
    arrays = (weight(w, seed, i) for i, w in enumerate(names))
    write_file(folder / SINGLE, [(w.hf, "BF16", w.file_shape) for w in names], arrays)

    def rows() -> Iterator[np.ndarray]:
        for i, w in enumerate(names):
            array = weight(w, seed, i)
            array = array if w.rope_heads is None else to_pairs(array, w.rope_heads)
            yield array if array.ndim > 1 else array.astype(np.float32)

    infos = [TensorInfo(w.gguf, w.file_shape, "BF16" if len(w.shape) > 1 else "F32") for w in names]
    write_gguf(base, metadata_of(decoder, tokenizer, None, "checkpoint", "BF16"), infos, rows())


def compare(base: Path, ours: Path, theirs: Path) -> dict[str, Any]:
    """Whether the two files agree in every type, and the relative errors of the first layer's tensors in both."""
    files = {"qjax": read_gguf(ours), "llama.cpp": read_gguf(theirs)}
    types = {name: {t.name: t.type for t in f.tensors.values()} for name, f in files.items()}
    source = read_gguf(base)
    errors: dict[str, dict[str, Any]] = {}
    for name, kind in types["llama.cpp"].items():
        if name.startswith("blk.0.") and kind not in DENSE:
            w = source.array(name).astype(np.float32)
            errors[name] = {"type": kind} | {
                who: float(np.linalg.norm(np.asarray(dequantize(f.qtensor(name))) - w) / np.linalg.norm(w))
                for who, f in files.items()
            }
    return {"same_types": types["qjax"] == types["llama.cpp"], "errors": errors}


def versions() -> dict[str, str]:
    """Of what was measured."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("qjax", "jax", "jaxlib", "numpy", "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "a checkout"
    return found


def show(results: dict[str, Any]) -> None:
    """The table of a run."""
    table = Table(title=f"{results['weights']:,} weights to {results['type']}; medians")
    for column in ("", "seconds", "CPU seconds", "peak RSS, MB", "file, bytes"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in results["median"].items():
        size = f"{results['output_bytes'][name]:,}"
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_rss_mb']:.0f}", size)
    Console().print(table, f"same types everywhere: {results['same_types']}")
