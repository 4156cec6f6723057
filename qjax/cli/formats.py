"""`qjax formats`: every format by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from qjax.cli import output
from qjax.cli.targets import check_json

ABOUT = {
    "F32": "32-bit floats",
    "F16": "16-bit floats",
    "BF16": "bfloat16",
    "Q4_0": "GGUF: 16 signed levels, one fp16 scale",
    "Q4_1": "GGUF: 16 levels between the block's minimum and maximum",
    "Q5_0": "GGUF: 32 signed levels, one fp16 scale",
    "Q5_1": "GGUF: 32 levels between the block's minimum and maximum",
    "Q8_0": "GGUF: signed bytes, one fp16 scale",
    "Q2_K": "GGUF K-quant: 2 bits, 16 groups with 4-bit scales and minima",
    "Q3_K": "GGUF K-quant: 3 bits signed, 16 groups with 6-bit scales",
    "Q4_K": "GGUF K-quant: 4 bits, 8 groups with 6-bit scales and minima",
    "Q5_K": "GGUF K-quant: 5 bits, 8 groups with 6-bit scales and minima",
    "Q6_K": "GGUF K-quant: 6 bits signed, 16 groups with 8-bit scales",
    "IQ4_NL": "GGUF: 16 levels spaced for bell-shaped weights, one fp16 scale",
    "IQ4_XS": "GGUF: IQ4_NL's levels, 8 groups with 6-bit scales",
    "TQ1_0": "GGUF: ternary, five weights in a byte",
    "TQ2_0": "GGUF: ternary, four weights in a byte",
    "MXFP4": "OCP microscaling: 4-bit floats (E2M1), a power of two per block",
    "NVFP4": "4-bit floats (E2M1), an 8-bit float scale per 16",
}


@dataclasses.dataclass(frozen=True)
class Formats:
    """List every format: what it stores per weight, how many weights share scales, what it is.

        qjax formats
        qjax formats --json formats.json

    These are the names `qjax.quantize`, plans and configs take. Block 0: a whole row (or matrix) shares its scales.
    Families with parameters know more names than are listed: int5_g64, uint3_g32_mse, uint2_g8_bilevel4x8,
    NF4_b128_dq, FP8_E5M2_b64 ...
    """

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.formats import FAMILIES

        check_json(self.json)
        rows = [
            {
                "name": fmt.name,
                "bits_per_weight": fmt.bits_per_weight,
                "block": fmt.block,
                "family": family.__name__.rsplit(".", 1)[-1],
                "about": about(fmt),
            }
            for family in FAMILIES
            for fmt in family.FORMATS
        ]
        if output.write_json(self.json, {"formats": rows}):
            return
        output.table(
            ("name", "bits", "block", "family", "what it is"),
            [(r["name"], f"{r['bits_per_weight']:.4g}", r["block"], r["family"], r["about"]) for r in rows],
            numbers=(1, 2),
        )


def about(fmt: Any) -> str:
    """One line on a format."""
    if fmt.name in ABOUT:
        return ABOUT[fmt.name]
    kind = type(fmt).__name__
    if kind == "IntegerFormat":
        scale = f"a {fmt.scale} scale" if fmt.scale[0] != "u" else f"nested scales ({fmt.scale})"
        words = [
            f"{fmt.bits}-bit {'symmetric' if fmt.symmetric else 'affine'} integers",
            f"{scale} per {fmt.group or 'row'}",
            "" if fmt.zero in ("none", "int") else f"{fmt.zero} zeros",
            "half-integer levels" if fmt.levels == "mid-rise" else "",
            "searched for least squared error" if fmt.search == "mse" else "",
        ]
        return ", ".join(filter(None, words))
    if kind == "Bilevel":
        per = f"a scale and a zero of {fmt.second} bits per {fmt.group}, ranges of these per {fmt.groups} groups"
        return f"SpQR: {fmt.bits}-bit integers, {per}"
    if kind == "Codebook":
        levels = "16 quantiles of a normal (QLoRA)" if fmt.name.startswith("NF4") else "16 four-bit floats"
        return f"bitsandbytes: {levels}, {'8-bit' if fmt.double else 'f32'} absmax per {fmt.block}"
    if kind == "Float8":
        per = {"channel": "row", "tensor": "matrix", "block": f"{fmt.block}"}[fmt.scope]
        return f"8-bit floats {fmt.kind}, an f32 scale per {per}"
    return ""
