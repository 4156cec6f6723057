"""compressed-tensors, what llm-compressor writes and vLLM and transformers read: one config group a format.

    quantization_config.config_groups.group_0    targets: modules, by name, `re:` pattern, or all that are Linear
                                                 weights: bits, type, strategy, group_size ...    format: the scheme
                                                 input_activations: null, or 8 bits, dynamic, token by token
    quantization_config.ignore                   matrices that stay floats

How a scheme stores a weight: compressed_schemes.py. Two records write: `WEIGHTS` weights alone, `W8A8` bytes that meet
inputs of 8 bits, int8 with int8 and FP8 with FP8, as that library's schemes W8A8 and FP8_DYNAMIC say it. Such weights
are read behind `RoundedInput`. Source: the compressed-tensors package.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.exports.compressed_schemes import ALONE, SCHEMES, WITH_INPUTS, Scheme
from qjax.io.exports.container import Members, Settings, joined, members, said_of
from qjax.io.safetensors import Checkpoint
from qjax.reparam.inputs import Kind, RoundedInput
from qjax.tensor import QTensor

_INPUTS: Mapping[str, Kind] = MappingProxyType({"int": "int8", "float": "e4m3"})
_ROUNDED = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """See the module's docstring."""

    name: str
    about: str
    schemes: tuple[Scheme, ...]  # that are written
    inputs: bool  # whether those are rounded too
    everything: bool = False

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        self._scheme(format)

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        scheme = self._scheme(q.format)
        if self.inputs and q.applied:
            q = _bare(q, scheme)
        elif q.rounds_inputs:
            raise UserError("its inputs are rounded too: --to compressed-tensors_w8a8 says so")
        return scheme.tensors(q)

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        formats = {f.name: f for f in packed.values()}
        groups = {}
        for i, (name, f) in enumerate(formats.items()):
            targets = ["Linear"] if len(formats) == 1 else [m for m, g in packed.items() if g.name == name]
            scheme = self._scheme(f)
            args = scheme.args(f) or {}
            groups[f"group_{i}"] = {
                "targets": targets, "weights": args, "input_activations": args | _ROUNDED if self.inputs else None,
                "output_activations": None, "format": scheme.format,
            }  # fmt: skip
        kinds = {group["format"] for group in groups.values()}
        said = {
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": groups,
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision", "ignore": list(floats),
            "kv_cache_scheme": None, "global_compression_ratio": None,
        }  # fmt: skip
        return {"quantization_config": said}

    def reads(self, config: Settings) -> bool:
        said = said_of(config)
        return said.get("quant_method") == "compressed-tensors" and self.inputs == _rounds_inputs(said)

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

    def _scheme(self, format: Format) -> Scheme:
        for scheme in self.schemes:
            if scheme.args(format) is not None:
                return scheme
        fits = (
            "int8_row or FP8_E4M3" if self.inputs else "integers under plain group scales (int4_g128, uint3_g64), "
            "FP8_E4M3, FP8_E4M3_tensor, MXFP4 or NVFP4"
        )  # fmt: skip
        raise UserError(f"{self.name} has no place for {format.name}; take {fits}")


WEIGHTS = CompressedTensors(
    "compressed-tensors",
    "vLLM, transformers: int2 to int8, uint2 to uint8 of any group or row; FP8; MXFP4; NVFP4",
    ALONE,
    inputs=False,
)
W8A8 = CompressedTensors(
    "compressed-tensors_w8a8",
    "vLLM, transformers: int8_row or FP8, inputs in 8 bits too, token by token",
    WITH_INPUTS,
    inputs=True,
)


def _bare(q: QTensor, scheme: Scheme) -> QTensor:
    """A weight without the rounding of its inputs, which the config says. Raises UserError where it is another."""
    kind = _INPUTS[(scheme.args(q.format) or {})["type"]]
    if q.applied != (RoundedInput(None, kind),):
        found = " and ".join(type(one).__name__ for one in q.applied)
        raise UserError(f"the weight lies behind {found}; {scheme.format} has inputs in {kind}, by token, and no more")
    return dataclasses.replace(q, applied=())


def _rounds_inputs(said: Settings) -> bool:
    """Whether a config has a group whose inputs are rounded."""
    groups = said.get("config_groups")
    each = groups.values() if isinstance(groups, dict) else ()
    return any(isinstance(group, dict) and bool(group.get("input_activations")) for group in each)


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
    kind = _INPUTS.get(str(said.get("type")))
    if group.get("output_activations") or {k: said.get(k) for k in _ROUNDED} != _ROUNDED or kind is None:
        raise UserError(
            f"{checkpoint.path}: config.json: of rounded activations only inputs in 8 bits, dynamic and token by "
            "token, are read"
        )
    return (RoundedInput(None, kind),)


def _targeted(module: str, targets: Sequence[str]) -> bool:
    """Whether a group is about a module: the class of all, its name, or a regular expression of names."""
    try:
        return any(
            t in ("Linear", module) or (t.startswith("re:") and re.match(t[3:], module) is not None) for t in targets
        )
    except re.error as e:
        raise UserError(f"config.json: a target is no regular expression: {e}") from None
