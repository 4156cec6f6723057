"""Recipes on real matrices with real outliers, under a synthetic heavy-tailed H: the loss on seen and unseen tokens.

    qjax run configs/real_weights.toml --weights layer11.npz

The file holds GPT-2's last attention layer (arrays (in, out); every matrix is taken). Inputs are drawn with a power-law
spectrum and log-normal channel scales; H of one draw is rounded in, that of another reports. For the cross term the
input is the float model's plus a part that depends on it, as predecessors' errors do.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.pipeline.rounded import round_leaf
from qjax.recipes import Recipe
from qjax.stats import Stats
from qjax.tensor import dequantize


@dataclasses.dataclass(frozen=True)
class Config:
    """The matrices and the grid of recipes."""

    weights: Path = Path("layer11.npz")  # .npz of matrices (in, out)
    formats: tuple[str, ...] = ("uint4_g128", "uint3_g128", "Q4_K", "Q2_K")
    recipes: tuple[str, ...] = ("rtn", "imatrix", "gptq", "gptaq", "best_gguf")
    tokens: int = 8192  # drawn to round in, and as many to report on
    seeds: tuple[int, ...] = (0, 1, 2)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns the rows and their means over matrices and seeds."""
    try:
        with np.load(config.weights) as file:
            matrices = {k: file[k].astype(np.float32) for k in file.files if file[k].ndim == 2}
    except (OSError, ValueError) as e:
        raise UserError(f"weights: {config.weights} is no .npz of matrices: {e}") from None
    rows: list[dict[str, Any]] = []
    for seed in config.seeds:
        for name, w in matrices.items():
            seen, x, x_float = inputs(w.shape[0], config.tokens, seed)
            unseen, y, y_float = inputs(w.shape[0], config.tokens, seed, draw=1)
            for format in config.formats:
                for text in config.recipes:
                    recipe = recipes.recipe(text).on(format)
                    clock = time.perf_counter()
                    q, line = rounded(name, w, recipe, seen, unseen)
                    seconds = time.perf_counter() - clock
                    w_hat = np.asarray(dequantize(q))
                    row = {
                        "seed": seed, "matrix": name, "format": format, "recipe": text,
                        "bits": q.bits_per_weight, "loss": line.loss,
                        "heldout_loss": line.heldout_loss, "output_error": output_error(w, w_hat, x, x_float),
                        "heldout_output_error": output_error(w, w_hat, y, y_float), "seconds": round(seconds, 2),
                    }  # fmt: skip
                    rows.append(row)
                    rundir.log(out, row)
            print(f"seed {seed} {name}: done", file=sys.stderr)
    summary = summarize(rows)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table(summary))
    return {"rows": rows, "summary": summary}


def inputs(n: int, tokens: int, seed: int, draw: int = 0) -> tuple[Stats, np.ndarray, np.ndarray]:
    """Statistics of a draw of tokens, the tokens as the weight sees them, and as the float model had them."""
    fixed = np.random.default_rng(seed)
    basis = np.linalg.qr(fixed.standard_normal((n, n)))[0] * np.arange(1, n + 1) ** -0.5
    scale = np.exp(fixed.standard_normal(n))
    drift = fixed.standard_normal((n, n)) / np.sqrt(n)
    rng = np.random.default_rng((seed, draw + 1))
    x_float = rng.standard_t(4, (tokens, n)) @ basis.T * scale
    x = x_float + 0.1 * (x_float / scale) @ drift * scale
    H, cross = x.T @ x / tokens, (x_float - x).T @ x / tokens
    stats = Stats(H=jnp.asarray(H, jnp.float32), cross=jnp.asarray(cross, jnp.float32), count=jnp.float32(tokens))
    return stats, x, x_float


def rounded(name: str, w: np.ndarray, recipe: Recipe, seen: Stats, unseen: Stats) -> Any:
    """One matrix (in, out) through a recipe."""
    assert recipe.format is not None
    return round_leaf(name, jnp.asarray(w), -2, recipe.format, recipe, dataclasses.replace(seen), unseen)


def output_error(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray, x_float: np.ndarray) -> float:
    """|x_float W - x W_hat|^2 / |x_float W|^2: what the layer's output has become."""
    was = x_float @ w
    return float(np.square(was - x @ w_hat).sum() / np.square(was).sum())


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over matrices and seeds, and the ratio to rtn's, with rtn = 1."""
    keys = ("loss", "heldout_loss", "output_error", "heldout_output_error")
    made: list[dict[str, Any]] = []
    for format, recipe in dict.fromkeys((r["format"], r["recipe"]) for r in rows):
        mine = [r for r in rows if (r["format"], r["recipe"]) == (format, recipe)]
        bits = statistics.fmean(r["bits"] for r in mine)
        means = {k: statistics.geometric_mean(r[k] for r in mine) for k in keys if mine[0][k] is not None}
        made.append(
            {
                "format": format,
                "recipe": recipe,
                "bits": bits,
                **means,
                "seconds": statistics.fmean(r["seconds"] for r in mine),
            }
        )
    return made


def table(summary: list[dict[str, Any]]) -> Table:
    """For `rich.print`."""
    made = Table()
    for column in ("format", "recipe", "bits", "loss", "held out", "output error", "held out", "s"):
        made.add_column(column, justify="left" if column in ("format", "recipe") else "right")
    for s in summary:
        numbers = [
            f"{s[k]:.5f}" if k in s else "" for k in ("loss", "heldout_loss", "output_error", "heldout_output_error")
        ]
        made.add_row(s["format"], s["recipe"], f"{s['bits']:.2f}", *numbers, f"{s['seconds']:.2f}")
    return made
