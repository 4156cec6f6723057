"""`qjax inspect FILE`: what a model file holds, read from its headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from qjax.cli import output
from qjax.cli.model import MODEL_HELP
from qjax.cli.targets import check_json
from qjax.terminal import shown

SHOWN = 90  # characters of a metadata value


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Metadata, tensors, types and bits per weight of a GGUF file or a Hugging Face directory.

        qjax inspect small.gguf
        qjax inspect path/to/directory --json model.json
        qjax inspect small.gguf --brief                # metadata and totals only

    Only headers are read, so large files are as quick as small ones.
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE", help=MODEL_HELP)]
    brief: Annotated[bool, tyro.conf.arg(help="leave out the list of tensors")] = False
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.io.checkpoint import locate

        path = locate(self.file)
        check_json(self.json, (path,))
        read = _folder if path.is_dir() else _gguf if path.suffix == ".gguf" else _llama2c
        kind, metadata, tensors = read(path)
        found = summary(self.file, kind, metadata, tensors)
        if not output.write_json(self.json, found):
            _print(found, self.brief)


def summary(file: str, kind: str, metadata: Mapping[str, Any], tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything `inspect` knows, with stable keys; `tensors` hold name, shape, type, bytes."""
    types: dict[str, dict[str, int]] = {}
    for t in tensors:
        weights = math.prod(t["shape"])
        t["bits_per_weight"] = 8 * t["bytes"] / weights if weights else 0.0
        row = types.setdefault(t["type"], {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += weights
        row["bytes"] += t["bytes"]
    weights = sum(row["weights"] for row in types.values())
    size = sum(row["bytes"] for row in types.values())
    return {
        "file": file,
        "kind": kind,
        "metadata": dict(metadata),
        "tensors": tensors,
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        "weights": weights,
        "bytes": size,
        "bits_per_weight": 8 * size / weights if weights else 0.0,
    }


def _row(name: str, shape: tuple[int, ...], type_: str, nbytes: int) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "type": type_, "bytes": nbytes}


def _gguf(path: Path) -> tuple[str, Mapping[str, Any], list[dict[str, Any]]]:
    from qjax.io.gguf_read import read_gguf

    file = read_gguf(path)
    rows = [_row(t.name, t.shape, t.type, t.nbytes) for t in file.tensors.values()]
    return f"GGUF version {file.version}", file.metadata, rows


def _folder(path: Path) -> tuple[str, Mapping[str, Any], list[dict[str, Any]]]:
    from qjax.errors import UserError
    from qjax.io.exports import reader_of
    from qjax.io.onnx_file import is_onnx, open_onnx
    from qjax.io.safetensors import open_folder
    from qjax.io.tokenizer_hf import read_json

    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json; expected a Hugging Face directory, a .gguf or a .bin file")
    config, checkpoint = read_json(path / "config.json"), open_onnx(path) if is_onnx(path) else open_folder(path)
    reader = reader_of(config)
    tensors = (checkpoint if reader is None else reader.open(config, checkpoint)).tensors
    kind = "Hugging Face directory" if reader is None else f"Hugging Face directory, {reader.name}"
    return kind, config, [_row(name, t.shape, t.dtype, t.nbytes) for name, t in tensors.items()]


def _llama2c(path: Path) -> tuple[str, Mapping[str, Any], list[dict[str, Any]]]:
    from qjax.evaluate.sizes import named_leaves
    from qjax.io.llama2c import load_llama2c

    model = load_llama2c(path)
    rows = [_row(name, leaf.shape, "F32", leaf.nbytes) for name, leaf in named_leaves(model.params).items()]
    return "llama2.c checkpoint", dataclasses.asdict(model.config), rows


def _print(found: Mapping[str, Any], brief: bool) -> None:
    print(shown(f"{found['file']}: {found['kind']}"))
    output.table(("key", "value"), [(key, _shown(value)) for key, value in found["metadata"].items()])
    if not brief:
        listed = (
            (t["name"], " x ".join(map(str, t["shape"])), t["type"], f"{t['bits_per_weight']:.4g}")
            for t in found["tensors"]
        )
        output.table(("tensor", "shape", "type", "bits"), listed, numbers=(1, 3))
    everything = {
        "tensors": len(found["tensors"]),
        "weights": found["weights"],
        "bytes": found["bytes"],
    }
    totals = [
        (name, t["tensors"], f"{t['weights']:,}", output.size(t["bytes"]), _bits(t))
        for name, t in (*found["types"].items(), ("all", everything))
    ]
    output.table(("type", "tensors", "weights", "size", "bits"), totals, numbers=(1, 2, 3, 4))


def _bits(t: Mapping[str, int]) -> str:
    return f"{8 * t['bytes'] / max(t['weights'], 1):.4f}"


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} items: {', '.join(_shown(v)[:16] for v in value[:4])} ..."
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
