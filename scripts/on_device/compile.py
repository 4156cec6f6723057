"""First and second calls of the sweeps, beside what they should take."""

import jax
import jax.numpy as jnp
from timing import first_and_next

from qjax.recipes import recipe
from qjax.rounding import round_weight
from qjax.stats import Stats

# recipe, rows, n, most seconds of the first call and of the next ones
CASES = (
    ("gptq:uint4_g128", 4096, 4096, 10.0, 0.1),
    ("best_gguf:Q4_K", 4096, 4096, 15.0, 0.4),
    ("gptq:uint4_g128", 4096, 14336, None, 0.8),
    ("best_gguf:Q4_K", 4096, 14336, None, 2.0),
)


def measure(dry: bool) -> dict:
    rows = [one(text, *((8, 256) if dry else (rows, n)), first, following) for text, rows, n, first, following in CASES]
    for r in rows:
        r["ok"] = dry or (
            r["second"] <= r["second_most"] and (r["first_most"] is None or r["first"] <= r["first_most"])
        )
    lines = [
        f"{r['recipe']} {r['rows']} x {r['n']}: first {r['first']:.2f} s ({r['first_most'] or '-'}), "
        f"second {r['second']:.3f} s ({r['second_most']}), proxy loss {r['loss']:.4f}{'' if r['ok'] else '  SLOW'}"
        for r in rows
    ]
    return {"ok": all(r["ok"] for r in rows), "lines": lines, "rows": rows}


def one(text: str, rows: int, n: int, first_most: float | None, second_most: float) -> dict:
    r = recipe(text)
    w = jax.random.normal(jax.random.key(0), (rows, n), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2 * n, n), jnp.float32) * jnp.linspace(0.2, 3.0, n)[None, :]
    H = jnp.matmul(x.T, x, precision="highest") / x.shape[0]
    stats = Stats(H=H, h=jnp.diagonal(H), cross=jnp.zeros_like(H))
    jax.block_until_ready(stats)

    first, second = first_and_next(lambda: round_weight(w, r.format, r.roundings, stats))
    loss = float(round_weight(w, r.format, r.roundings, stats).loss)
    return {
        "recipe": text, "rows": rows, "n": n, "first": first, "second": second, "first_most": first_most,
        "second_most": second_most, "loss": loss,
    }  # fmt: skip
