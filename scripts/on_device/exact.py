"""Are codes, scales and values the same under jit, outside, under vmap and on the CPU, for every format?"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.formats.storage import fp16_bits, quotient
from qjax.reparam.inputs import RoundedInput


def measure(dry: bool) -> dict:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((4, 16, 1024)) * np.exp(rng.standard_normal((4, 16, 1)))).astype(np.float32)
    names = ["F16", "Q4_1", "int4_g128"] if dry else qjax.format_names()
    cpu = jax.devices("cpu")[0]

    def one(name: str) -> dict:
        def there_and_back(w):
            q = qjax.quantize(w, name)
            return q.leaves, qjax.dequantize(q)

        outside = there_and_back(jnp.asarray(w))
        with jax.default_device(cpu):
            by_cpu = there_and_back(jnp.asarray(w))
        found = {
            "jit": differing(outside, jax.jit(there_and_back)(w)),
            "vmap": 0 if qjax.format(name).tile > 1 else differing(outside, jax.jit(jax.vmap(there_and_back))(w)),
            "cpu": differing(outside, by_cpu),
        }
        return {"format": name, "searched": searched(name), "values": w.size, **found}

    with ThreadPoolExecutor(2 if dry else 12) as pool:
        rows = list(pool.map(one, names))
    arithmetic = {"fp16": wrong_fp16(rng), "quotient": wrong_quotients(rng), **inputs(rng, cpu)}
    wrong = [r for r in rows if r["jit"] or ((r["vmap"] or r["cpu"]) and not r["searched"])]
    lines = [f"{r['format']}: differing under jit {r['jit']}, vmap {r['vmap']}, on the CPU {r['cpu']}" for r in wrong]
    apart = [f"{r['format']} {r['cpu']}" for r in rows if r["searched"] and r["cpu"]]
    lines += [f"{name}: {count} wrong" for name, count in arithmetic.items() if count]
    lines += [f"searched formats whose search ends elsewhere than on the CPU, bytes: {', '.join(apart) or 'none'}"]
    lines += [f"{len(rows) - len(wrong)} of {len(rows)} formats alike"]
    return {"ok": not wrong and not any(arithmetic.values()), "lines": lines, "rows": rows, "arithmetic": arithmetic}


def searched(name: str) -> bool:
    """Whether sums, in an order that is each backend's own, choose the scales."""
    return "_mse" in name or name.endswith("_K") or name.startswith("IQ4")


def differing(a, b) -> int:
    """Bytes that differ."""
    raw = ([np.asarray(x).view(np.uint8) for x in jax.tree.leaves(t)] for t in (a, b))
    return int(sum(np.count_nonzero(x != y.reshape(x.shape)) for x, y in zip(*raw, strict=True)))


def wrong_fp16(rng) -> int:
    x = rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        return int(np.count_nonzero(np.asarray(jax.jit(fp16_bits)(x)) != x.astype(np.float16).view(np.uint16)))


def wrong_quotients(rng) -> int:
    x, y = (rng.integers(1 << 23, 255 << 23, (2, 2**20), dtype=np.uint32)).view(np.float32)
    with np.errstate(all="ignore"):
        expected = x / y
    kept = expected >= np.finfo(np.float32).tiny
    return int(np.count_nonzero(np.asarray(quotient(x, y))[kept] != expected[kept]))


def inputs(rng, cpu) -> dict:
    x = rng.standard_normal((64, 512)).astype(np.float32)

    def wrong(kind) -> int:
        run = jax.jit(lambda x: RoundedInput(None, kind).input(x))
        with jax.default_device(cpu):
            expected = run(jnp.asarray(x))
        return differing(expected, run(jax.device_put(x, jax.devices()[0])))

    return {f"act({kind})": wrong(kind) for kind in ("int8", "int4", "e4m3", "e5m2")}
