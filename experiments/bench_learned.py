"""How long learned rounding takes: `learned` against a plain torch loop of the same objective, on the same W and H.

    qjax run configs/bench_learned.toml

Both run in this process, one after the other, `rounds` times; compile time is told apart. The torch loops are
AutoRound's update (arXiv:2309.05516: V and both ends of each group's range by signed gradients, linearly falling steps,
the best row by row) with integer zeros and fp16 scales, float32. One leaves the loss to autograd, which
multiplies by H twice a step; the other hands it the gradient -2 E H, as qjax has it. Without torch, only qjax's side
runs.
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

import qjax
from qjax import rundir
from qjax.evaluate.report import timing_table
from qjax.rounding import nearest, round_weight
from qjax.rounding.learned import learned
from qjax.rounding.protocol import DAMPING
from qjax.stats import Stats


@dataclasses.dataclass(frozen=True)
class Config:
    """The weights and the contest."""

    shapes: tuple[tuple[int, int], ...] = ((1024, 1024),)  # (out, in)
    bits: int = 4
    group: int = 128
    steps: int = 200
    rounds: int = 3
    seed: int = 0
    torch: bool = True  # the loops to compare with, where torch is installed
    threads: int = 0  # torch's; 0: one a core. On cores that others share too its threads wait for each other: take 1


def run(config: Config, out: Path) -> dict[str, Any]:
    """Time every contestant on every shape; returns the rows."""
    rows = [row for shape in config.shapes for row in contest(config, shape, out)]
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(timing_table(rows))
    return {"rows": rows, "machine": rundir.machine()}


def contest(config: Config, shape: tuple[int, int], out: Path) -> list[dict[str, Any]]:
    """All contestants on one shape, in turn."""
    w, H = problem(*shape, config.seed)
    fmt = qjax.format(f"uint{config.bits}_g{config.group}")
    name = f"learned({config.steps}) on {fmt.name}"
    contestants: dict[str, Callable[[], np.ndarray]] = {
        name: partial(_ours, fmt, learned(config.steps), jnp.asarray(w), Stats(H=jnp.asarray(H)))
    }
    clock = time.perf_counter()
    contestants[name]()  # compiles; its own run is taken off below
    compiled = time.perf_counter() - clock
    loop = torch_loop(config) if config.torch else None
    if loop is not None:
        contestants["torch, autograd"] = partial(loop, w, H, False)
        contestants["torch, -2 E H by hand"] = partial(loop, w, H, True)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    for _ in range(config.rounds):
        for who, one in contestants.items():
            clock, cpu = time.perf_counter(), time.process_time()
            w_hat = one()
            seconds[who].append(time.perf_counter() - clock)
            cpu_seconds[who].append(time.process_time() - cpu)
            used = {"seconds": seconds[who][-1], "cpu_seconds": cpu_seconds[who][-1]}
            losses[who] = loss_of(w, w_hat, H)  # outside of the clock
            rundir.log(out, {"shape": list(shape), "name": who, **used})
            print(f"{shape} {who}: {used}", file=sys.stderr)
    return [
        {
            "shape": list(shape), "name": who, "seconds": statistics.median(seconds[who]), "runs": seconds[who],
            "cpu_seconds": cpu_seconds[who],
            "compile_seconds": compiled - seconds[who][0] if who == name else None, "relative_loss": losses[who],
        }
        for who in contestants
    ]  # fmt: skip


def _ours(fmt: qjax.Format, stage: Any, w: jax.Array, stats: Stats) -> np.ndarray:
    r = round_weight(w, fmt, (nearest(), stage), stats)
    return np.asarray(fmt.decode(r.scales, r.codes))


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


def torch_loop(config: Config) -> Callable[[np.ndarray, np.ndarray, bool], np.ndarray] | None:
    """AutoRound on tr(E H E^T) as a torch loop over steps; None without torch."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: no loop to compare with", file=sys.stderr)
        return None
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    top = 2**config.bits - 1

    def through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return x + (value - x).detach()

    def autoround(w: np.ndarray, H: np.ndarray, by_hand: bool) -> np.ndarray:
        W, metric = torch.from_numpy(w), torch.from_numpy(H)
        metric = metric + DAMPING * torch.diag(torch.diagonal(metric))
        x = W.reshape(W.shape[0], -1, config.group)
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        v = torch.zeros_like(x, requires_grad=True)
        alpha, beta = (torch.ones_like(low, requires_grad=True) for _ in range(2))
        best, least = W.clone(), torch.full((W.shape[0],), torch.inf)
        for t in range(config.steps):
            s = ((high * beta - low * alpha) / top).clamp(min=1e-9)
            s = through(s, s.half().float())
            z = -low * alpha / s
            z = through(z, z.round().clamp(0, top))
            u = x / s[..., None] + v
            q = (through(u, u.round()) + z[..., None]).clamp(0, top)
            w_hat = (s[..., None] * (q - z[..., None])).reshape(W.shape)
            e = W - w_hat
            if by_hand:
                with torch.no_grad():
                    pulled = e @ metric
                    loss = (pulled * e).sum(-1)
                w_hat.backward(-2 * pulled)
            else:
                loss = ((e @ metric) * e).sum(-1)
                loss.sum().backward()
            with torch.no_grad():
                better = loss < least
                least = torch.where(better, loss, least)
                best = torch.where(better[:, None], w_hat, best)
                lr = (1 - t / config.steps) / config.steps
                for p, (a, b) in ((v, (-0.5, 0.5)), (alpha, (0.0, 1.0)), (beta, (0.0, 1.0))):
                    assert p.grad is not None
                    p.sub_(lr * p.grad.sign()).clamp_(a, b)
                    p.grad = None
        return best.numpy()

    return autoround
