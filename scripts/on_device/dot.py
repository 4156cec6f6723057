"""Microseconds of `qjax.dot`, beside a bfloat16 product of the same shape, and how near the machine's roof it comes."""

import jax
import jax.numpy as jnp
from timing import each

import qjax

NAMES = ("Q4_0", "Q8_0", "Q4_K", "int4_g128", "FP8_E4M3")


def measure(dry: bool) -> dict:
    out, n = (32, 256) if dry else (14336, 4096)
    w = jax.random.normal(jax.random.key(0), (out, n), jnp.float32)
    half, rows = w.astype(jnp.bfloat16), []
    plain = jax.jit(lambda x, w: x @ w.T)
    packed = jax.jit(qjax.dot)
    top = roof(64 if dry else 8192)
    for batch in (1,) if dry else (1, 16):
        x = jax.random.normal(jax.random.key(1), (batch, n), jnp.bfloat16)
        base = each(lambda x=x: plain(x, half))
        for name in NAMES[:2] if dry else NAMES:
            q = qjax.quantize(w, name)
            time = each(lambda x=x, q=q: packed(x, q))
            moved = q.nbytes + x.nbytes + jax.eval_shape(packed, x, q).dtype.itemsize * batch * out
            rows.append({
                "name": f"{name}, batch {batch}", "format": name, "out": out, "n": n, "batch": batch, "seconds": time,
                "bfloat16": base, "flops": 2 * batch * out * n, "bytes": moved, **top,
            })  # fmt: skip
    lines = [
        f"{r['format']}, {r['out']} x {r['n']}, batch {r['batch']}: {1e6 * r['seconds']:.0f} us, bfloat16 "
        f"{1e6 * r['bfloat16']:.0f} us" for r in rows
    ]  # fmt: skip
    lines.append(f"roof: {top['peak_flops'] / 1e12:.3g} Tflop/s in bfloat16, {top['peak_bytes'] / 1e9:.3g} GB/s")
    return {"ok": True, "lines": lines, "rows": rows}


def roof(side: int) -> dict[str, float]:
    """What the machine was seen to do: operations a second of a square product, bytes a second of a copy."""
    a = jnp.ones((side, side), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda a: a + 1)
    return {
        "peak_flops": 2.0 * side**3 / each(lambda: product(a, a)),
        "peak_bytes": 2.0 * a.nbytes / each(lambda: copy(a)),
    }
