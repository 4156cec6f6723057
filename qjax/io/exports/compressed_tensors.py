"""compressed-tensors, what llm-compressor writes and vLLM and transformers read: one config group a format.

    quantization_config.config_groups.group_0    targets: modules, by name, `re:` pattern, or all that are Linear
                                                 weights: bits, type, strategy, group_size ...    format: the scheme
    quantization_config.ignore                   matrices that stay floats

How a scheme stores a weight: compressed_schemes.py. Weights alone are written; where a group rounds its inputs too, to
8 bits token by token, they are read behind `RoundedInput`. Source: the compressed-tensors package.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.exports.compressed_schemes import SCHEMES, Scheme
from qjax.io.exports.container import Members, Settings, joined, members, said_of
from qjax.io.safetensors import Checkpoint
from qjax.reparam.inputs import Kind, RoundedInput
from qjax.tensor import QTensor


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """See the module's docstring."""

    name: str = "compressed-tensors"
    about: str = "vLLM, transformers: int2 to int8, uint2 to uint8 of any group or row; FP8; MXFP4; NVFP4"
    everything: bool = False

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        _scheme(format)

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        return _scheme(q.format).tensors(q)

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        formats = {f.name: f for f in packed.values()}
        groups = {}
        for i, (name, f) in enumerate(formats.items()):
            targets = ["Linear"] if len(formats) == 1 else [m for m, g in packed.items() if g.name == name]
            scheme = _scheme(f)
            groups[f"group_{i}"] = {
                "targets": targets, "weights": scheme.args(f), "input_activations": None, "output_activations": None,
                "format": scheme.format,
            }  # fmt: skip
        kinds = {group["format"] for group in groups.values()}
        said = {
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": groups,
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision", "ignore": list(floats),
            "kv_cache_scheme": None, "global_compression_ratio": None,
        }  # fmt: skip
        return {"quantization_config": said}

    def reads(self, config: Settings) -> bool:
        return said_of(config).get("quant_method") == "compressed-tensors"

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        said = said_of(config)
        groups = said.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise UserError(f"{checkpoint.path}: config.json: quantization_config has no config_groups")
        for key in ("transform_config", "sparsity_config"):
            if said.get(key):
                raise UserError(f"{checkpoint.path}: config.json: {key} is not read, only packed weights are")
        for group in groups.values():
            name = group.get("format") or said.get("format")
            scheme = next((s for s in SCHEMES if s.format == name), None)
            if scheme is None:
                known = ", ".join(s.format for s in SCHEMES)
                raise UserError(f"{checkpoint.path}: config.json: the format {name!r} is not read; these are: {known}")
            checkpoint = _group(scheme, group, checkpoint)
        return checkpoint


def _group(scheme: Scheme, group: Settings, checkpoint: Checkpoint) -> Checkpoint:
    args, targets = group.get("weights"), group.get("targets")
    named = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    if not isinstance(args, dict) or targets is None or not named:
        raise UserError(f"{checkpoint.path}: config.json: a config group without weights or targets")
    aimed = {n: stored for n, stored in checkpoint.tensors.items() if _targeted(n.rpartition(".")[0], targets)}
    found = members(dataclasses.replace(checkpoint, tensors=aimed), scheme.key, scheme.beside, scheme.maybe)
    applied = _inputs(checkpoint, group)
    formats: dict[str, Format] = {}

    def shape_of(m: Members) -> tuple[tuple[int, ...], Format]:
        shape, formats[m.module] = scheme.shape_of(m, args)
        return shape, formats[m.module]

    def put(m: Members, a: dict[str, np.ndarray]) -> QTensor:
        q = scheme.put(formats[m.module], a)
        return dataclasses.replace(q, applied=(*q.applied, *applied))

    return joined(checkpoint, found, shape_of, put)


def _inputs(checkpoint: Checkpoint, group: Settings) -> tuple[RoundedInput, ...]:
    """How a group's layers round their inputs: not, or 8 bits of each token as it comes."""
    inputs = group.get("input_activations")
    if not inputs and not group.get("output_activations"):
        return ()
    said = inputs if isinstance(inputs, dict) else {}
    kinds: dict[Any, Kind] = {"int": "int8", "float": "e4m3"}
    wanted = {"dynamic": True, "strategy": "token", "num_bits": 8, "symmetric": True}
    if group.get("output_activations") or {k: said.get(k) for k in wanted} != wanted or said.get("type") not in kinds:
        raise UserError(
            f"{checkpoint.path}: config.json: of rounded activations only inputs in 8 bits, dynamic and token by "
            "token, are read"
        )
    return (RoundedInput(None, kinds[said["type"]]),)


def _targeted(module: str, targets: Sequence[str]) -> bool:
    """Whether a group is about a module: the class of all, its name, or a regular expression of names."""
    try:
        return any(
            t in ("Linear", module) or (t.startswith("re:") and re.match(t[3:], module) is not None) for t in targets
        )
    except re.error as e:
        raise UserError(f"config.json: a target is no regular expression: {e}") from None


def _scheme(format: Format) -> Scheme:
    for scheme in SCHEMES:
        if scheme.args(format) is not None:
            return scheme
    raise UserError(
        f"compressed-tensors has no place for {format.name}; take integers under plain group scales (int4_g128, "
        "uint3_g64), FP8_E4M3, FP8_E4M3_tensor, MXFP4 or NVFP4"
    )
