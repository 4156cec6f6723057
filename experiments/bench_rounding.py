"""How long one weight takes: qjax's recipes against a plain torch loop of the published GPTQ, on the same W and H.

    qjax run configs/bench_rounding.toml

Both run in this process, one after the other, `rounds` times; compile time is told apart. The torch loop is GPTQ as its
paper's algorithm 1 has it (blocks of 128 columns, act-order, static groups of 128, 4 bits), float32, all cores. Without
torch, only qjax's side runs. The recipes do more than the loop: fit K-quant scales, descend, refit.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate.report import timing_table
from qjax.pipeline.rounded import round_leaf
from qjax.stats import Stats
from qjax.tensor import dequantize


@dataclasses.dataclass(frozen=True)
class Config:
    """The weights and the contest."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096),)  # (out, in)
    recipes: tuple[str, ...] = ("best_gguf:Q4_K", "gptq:uint4_g128")
    rounds: int = 2
    seed: int = 0
    torch: bool = True  # the loop to compare with, where torch is installed


def run(config: Config, out: Path) -> dict[str, Any]:
    """Time every recipe on every shape; returns the rows."""
    rows = [row for shape in config.shapes for row in contest(config, shape, out)]
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(timing_table(rows))
    return {"rows": rows, "machine": rundir.machine()}


def contest(config: Config, shape: tuple[int, int], out: Path) -> list[dict[str, Any]]:
    """All contestants on one shape, in turn."""
    w, H = problem(*shape, config.seed)
    stats = Stats(H=jnp.asarray(H), cross=jnp.zeros_like(H))
    contestants: dict[str, Callable[[], np.ndarray]] = {}
    compiled: dict[str, float] = {}
    for name in config.recipes:
        recipe = recipes.recipe(name)
        if recipe.format is None:
            raise UserError(f"recipes: {name!r} names no format; write {name}:Q4_K")
        contestants[name] = partial(_ours, recipe, jnp.asarray(w), stats)
        clock = time.perf_counter()
        contestants[name]()  # compiles; its own run is taken off below
        compiled[name] = time.perf_counter() - clock
    loop = torch_gptq() if config.torch else None
    if loop is not None:
        contestants["torch loop, int4 g128"] = partial(loop, w, H)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    for _ in range(config.rounds):
        for name, one in contestants.items():
            clock, cpu = time.perf_counter(), time.process_time()
            w_hat = one()
            seconds[name].append(time.perf_counter() - clock)
            used = {"seconds": seconds[name][-1], "cpu_seconds": time.process_time() - cpu}
            losses[name] = loss_of(w, w_hat, H)  # outside of the clock
            rundir.log(out, {"shape": list(shape), "name": name, **used})
            print(f"{shape} {name}: {used}", file=sys.stderr)
    return [
        {
            "shape": list(shape), "name": name, "seconds": statistics.median(seconds[name]), "runs": seconds[name],
            "compile_seconds": compiled[name] - seconds[name][0] if name in compiled else None,
            "relative_loss": losses[name],
        }
        for name in contestants
    ]  # fmt: skip


def _ours(recipe: recipes.Recipe, w: jax.Array, stats: Stats) -> np.ndarray:
    assert recipe.format is not None
    q, _ = round_leaf("w", w, -1, recipe.format, recipe, stats)
    return np.asarray(dequantize(q))


def problem(rows: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A heavy-tailed weight and the H of correlated inputs with outlier channels."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(5, (rows, n)) * 0.02).astype(np.float32)
    rank = n // 8
    basis = rng.standard_normal((rank, n)).astype(np.float32) * np.geomspace(1, 0.03, rank, dtype=np.float32)[:, None]
    scale = np.exp(rng.standard_normal(n)).astype(np.float32)
    H = (basis.T @ basis + 0.3 * np.eye(n, dtype=np.float32)) * scale[:, None] * scale[None, :]
    return w, H.astype(np.float32)


def loss_of(w: np.ndarray, w_hat: np.ndarray, H: np.ndarray) -> float:
    """tr(E H E^T) / tr(W H W^T)."""
    e = w - w_hat
    return float(((e @ H) * e).sum(dtype=np.float64) / ((w @ H) * w).sum(dtype=np.float64))


def torch_gptq() -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """GPTQ with static groups of 128 and act-order, as a torch loop over columns; None without torch."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: no loop to compare with", file=sys.stderr)
        return None
    torch.set_num_threads(os.cpu_count() or 1)

    @torch.no_grad()
    def gptq(w: np.ndarray, metric: np.ndarray, group: int = 128, block: int = 128) -> np.ndarray:
        W, H = torch.from_numpy(w.copy()), torch.from_numpy(metric.copy())
        n = W.shape[1]
        x = W.reshape(W.shape[0], -1, group)
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = (high - low).clamp(min=1e-9) / 15
        zero = torch.round(-low / scale)
        order = torch.argsort(torch.diagonal(H), descending=True)
        W, H = W[:, order], H[order][:, order]
        of = order // group
        H = H + 0.01 * torch.diagonal(H).mean() * torch.eye(n)
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        Q = torch.zeros_like(W)
        for i in range(0, n, block):
            j = min(i + block, n)
            W_block, errors, U_block = W[:, i:j].clone(), torch.zeros(W.shape[0], j - i), U[i:j, i:j]
            for k in range(j - i):
                s, z = scale[:, of[i + k]], zero[:, of[i + k]]
                column = W_block[:, k]
                q = s * (torch.clamp(torch.round(column / s) + z, 0, 15) - z)
                Q[:, i + k] = q
                e = (column - q) / U_block[k, k]
                W_block[:, k:] -= e[:, None] * U_block[k, k:][None, :]
                errors[:, k] = e
            W[:, j:] -= errors @ U[i:j, j:]
        return Q[:, torch.argsort(order)].numpy()

    return gptq
