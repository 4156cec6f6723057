"""How long AWQ's search takes: `awq_scale` against a plain torch loop of it, on the same W and inputs' statistics.

    qjax run configs/bench_awq.toml

The torch loop is AWQ's (arXiv:2306.00978): for each of 20 powers scale, round to nearest in groups with the published
min-max grid, unscale, and measure the layer's output error, here as tr(E H E^T) with the same H, which is cheaper than
the outputs of the calibration tokens that the original multiplies out. Both in this process, one after the other.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import qjax
from qjax import rundir
from qjax.errors import UserError
from qjax.formats import Format
from qjax.reparam.scale import searched
from qjax.stats import Stats


@dataclasses.dataclass(frozen=True)
class Config:
    """The weight and the contest."""

    shape: tuple[int, int] = (1024, 1024)  # (out, in)
    bits: int = 4
    group: int = 128
    grid: int = 20
    rounds: int = 5
    seed: int = 0


def run(config: Config, out: Path) -> dict[str, Any]:
    """Time both; returns the rows."""
    try:
        import torch
    except ImportError:
        raise UserError("torch is not installed: there is no loop to compare with") from None
    torch.set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(config.seed)
    rows, n = config.shape
    w = (rng.standard_t(5, (rows, n)) * 0.02).astype(np.float32)
    x = (rng.standard_normal((2 * n, n)) * np.exp(rng.standard_normal(n))).astype(np.float32)
    H, absmean = x.T @ x / len(x), np.abs(x).mean(0)
    format: Any = qjax.format(f"uint{config.bits}_g{config.group}")
    stats = Stats(H=jnp.asarray(H))
    contestants: dict[str, Callable[[], np.ndarray]] = {
        "awq_scale": lambda: np.asarray(searched(jnp.asarray(w), jnp.asarray(absmean), stats, format, config.grid)),
        "torch loop": lambda: torch_search(w, H, absmean, config),
    }
    clock = time.perf_counter()
    contestants["awq_scale"]()
    first = time.perf_counter() - clock
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    for _ in range(config.rounds):
        for name, one in contestants.items():
            clock = time.perf_counter()
            s = one()
            seconds[name].append(time.perf_counter() - clock)
            losses[name] = loss(w, s, H, format)
            rundir.log(out, {"name": name, "seconds": seconds[name][-1]})
    ratios = [a / b for a, b in zip(seconds["awq_scale"], seconds["torch loop"], strict=True)]
    made = [
        {"name": k, "seconds": statistics.median(v), "runs": v, "relative_loss": losses[k]} for k, v in seconds.items()
    ]
    print(f"awq_scale over the torch loop: {statistics.median(ratios):.2f}; losses {losses}; first call {first:.1f} s")
    return {"rows": made, "ratios": ratios, "first_call_seconds": first, "machine": rundir.machine()}


def loss(w: np.ndarray, s: np.ndarray, H: np.ndarray, format: Format) -> float:
    """tr(E H E^T) / tr(W H W^T) of nearest rounding under the scales."""
    e = w - np.asarray(qjax.dequantize(qjax.quantize(jnp.asarray(w * s), format))) / s
    return float(((e @ H) * e).sum() / ((w @ H) * w).sum())


def torch_search(w: np.ndarray, H: np.ndarray, absmean: np.ndarray, config: Config) -> np.ndarray:
    """The scales of least loss, one power after the other."""
    import torch

    W, C, a = (torch.from_numpy(v) for v in (w, H, absmean))
    best, kept = float("inf"), torch.ones_like(a)
    top = 2**config.bits - 1
    with torch.no_grad():
        for i in range(config.grid):
            s = a.pow(i / config.grid).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            g = (W * s).reshape(-1, config.group)
            low, high = g.amin(1, keepdim=True).clamp(max=0), g.amax(1, keepdim=True).clamp(min=0)
            step = ((high - low) / top).clamp(min=1e-9)
            zero = torch.round(-low / step)
            q = (torch.clamp(torch.round(g / step) + zero, 0, top) - zero) * step
            e = W - q.reshape(W.shape) / s
            found = float(((e @ C) * e).sum())
            if found < best:
                best, kept = found, s
    return kept.numpy()
