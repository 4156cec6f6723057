"""Milliseconds to encode a matrix into each format."""

import jax
import jax.numpy as jnp
from timing import first_and_next

import qjax

NAMES = (
    "Q4_0",
    "Q4_1",
    "Q8_0",
    "Q4_K",
    "Q6_K",
    "Q3_K",
    "Q2_K",
    "IQ4_NL",
    "NF4",
    "int4_g128",
    "uint4_g64_zf16",
    "FP8_E4M3",
)


def measure(dry: bool) -> dict:
    shape = (4, 512) if dry else (14336, 4096)
    w = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    rows = []
    for name in NAMES[:2] if dry else NAMES:
        first, second = first_and_next(lambda name=name: qjax.quantize(w, name).leaves)
        rows.append({"format": name, "shape": shape, "first": first, "second": second})
    lines = [f"{r['format']}: {1e3 * r['second']:.2f} ms (first {r['first']:.1f} s)" for r in rows]
    return {"ok": True, "lines": lines, "rows": rows}
