"""The pictures of a report, as PNG bytes: quality against bits, error by layer, weights on their grid.

Figures are drawn with matplotlib's object interface on the Agg canvas: no window, no global state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.evaluate.judge import Judgement
from qjax.evaluate.sizes import TensorRow
from qjax.formats import format as get_format
from qjax.formats.protocol import Format
from qjax.tensor import dequantize, quantize
from qjax.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, FRONT, POINT = "#222831", "#8a93a0", "#d1495b", "#30638e"

# What may stand against bits: its key in `Judgement.to_json`, its error's key, title, axis label, logarithmic or not.
METRICS = {
    "kl": ("kl_mean", "kl_mean_se_clustered", "KL divergence against size", "KL to the baseline, nats per token", True),
    "perplexity": ("perplexity", "perplexity_se", "Perplexity against size", "perplexity", False),
}
BITS_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16, 24, 32)
HISTOGRAM_WEIGHTS = 1 << 18
GRID_LEVELS = 64  # finer grids than this are not drawn


def pareto_plot(rows: Sequence[Judgement], metric: str = "kl", title: str = "") -> bytes:
    """Quality against bits per weight of the whole model; the Pareto front is the red line.

    Args:
      rows: judged models. For "kl" those without a baseline, or equal to it (KL 0), are left out.
      metric: "kl" or "perplexity".

    Raises:
      UserError: matplotlib is not installed, an unknown metric, or nothing to draw.
    """
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; there are {' and '.join(METRICS)}")
    key, error_key, heading, label, logarithmic = METRICS[metric]
    numbers = [row.to_json() for row in rows]
    numbers = [n for n in numbers if n[key] is not None and math.isfinite(n[key]) and not (logarithmic and n[key] <= 0)]
    if not numbers:
        raise UserError(f"no judged model has a {key} to draw")
    x, y = np.array([n["whole_bits"] for n in numbers]), np.array([n[key] for n in numbers])
    error = np.array([n[error_key] or 0.0 for n in numbers])
    figure, axes = _figure(9.0, 5.6)
    front = pareto_front(x, y)
    if logarithmic or y.max() > 5 * y.min():
        axes.set_yscale("log")
        error = np.minimum(error, 0.9 * y)
    axes.set_xscale("log")  # half the bits are half the size, at 2 as at 16
    _plain_ticks(axes, x, y)
    axes.errorbar(x, y, error, fmt="none", ecolor=SOFT, elinewidth=1, zorder=1)
    axes.plot(x[front], y[front], color=FRONT, linewidth=1.6, alpha=0.8, zorder=2, label="Pareto front")
    axes.scatter(x, y, s=34, color=[FRONT if i in front else POINT for i in range(len(x))], zorder=3, linewidths=0)
    compared = [n["base_perplexity"] for n in numbers if n["base_perplexity"] is not None]
    if metric == "perplexity" and compared:
        axes.axhline(compared[0], color=SOFT, linestyle="--", linewidth=1, zorder=0, label="baseline")
    axes.set_xlabel("bits per weight, whole model")
    axes.set_ylabel(label)
    axes.set_title(title or heading, loc="left", fontweight="bold")
    axes.margins(0.08, 0.08)
    axes.legend(frameon=False, loc="upper right")
    _label_points(figure, axes, x, y, [n["name"] for n in numbers])
    return _png(figure)


def _plain_ticks(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Bits as plain numbers, and the loss too where it spans less than two decades."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(FixedLocator([b for b in BITS_TICKS if 0.9 * x.min() < b < 1.1 * x.max()]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    if axes.get_yscale() == "log" and y.max() < 100 * y.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def pareto_front(bits: np.ndarray, loss: np.ndarray) -> list[int]:
    """Indices of the points no other point beats in both, by rising bits.

    >>> pareto_front(np.array([2.0, 4.0, 3.0, 3.0]), np.array([0.5, 0.1, 0.6, 0.2]))
    [0, 3, 1]
    """
    front: list[int] = []
    for i in np.lexsort((loss, bits)).tolist():
        if not front or loss[i] < loss[front[-1]]:
            front.append(i)
    return front


def error_heatmap(rows: Sequence[TensorRow], title: str = "") -> bytes:
    """Relative error |w_hat - w| / |w| of every layer's weights, in percent: kinds of weights down, layers across.

    Args:
      rows: from `tensor_rows(params, reference)`. Tensors outside of the layers are named in the caption line.

    Raises:
      UserError: matplotlib is not installed, or no quantized tensor of a layer has an error.
    """
    cells: dict[tuple[str, int], float] = {}
    outside = []
    for row in rows:
        if row.relative_rmse is None or len(row.shape) < 2:
            continue
        found = re.fullmatch(r"(.*?)(\d+)/(.+?)(?:/kernel)?", row.path)
        if found:
            cells[found[3].replace("/", " "), int(found[2])] = 100 * row.relative_rmse
        else:
            outside.append(f"{row.path.split('/')[0]} {100 * row.relative_rmse:.2g} %")
    if not cells:
        raise UserError("no tensor of a layer has an error to draw; give tensor_rows a reference")
    kinds, layers = list(dict.fromkeys(kind for kind, _ in cells)), sorted({layer for _, layer in cells})
    grid = np.array([[cells.get((kind, layer), math.nan) for layer in layers] for kind in kinds])
    figure, axes = _figure(max(6.0, 2.2 + 0.55 * len(layers)), 1.7 + 0.42 * len(kinds))
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer" + (f"      (outside the layers: {', '.join(outside)})" if outside else ""))
    axes.set_title(title or "Relative error of the weights, %", loc="left", fontweight="bold")
    if len(layers) <= 16:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (i, j), value in np.ndenumerate(grid):
            if math.isfinite(value):
                color = "white" if value < middle else "black"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
    return _png(figure)


def weight_histogram(w: Array | np.ndarray, format: str | Format, axis: int = -1, title: str = "") -> bytes:
    """Weights and what a format makes of them; beside it the weights on their blocks' own grid, its levels as lines.

    Position on the grid is (w - first level) / (last level - first level) with each weight's own levels, so blocks of
    any scale and offset fall onto one another.

    Args:
      w: floats of at least one axis; of a large tensor, evenly spaced rows are shown.
      format: a name or a Format.
      axis: the contracted axis.
    """
    fmt = get_format(format)
    rows = jnp.moveaxis(jnp.asarray(w).astype(jnp.float32), axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    step = -(-rows.size // HISTOGRAM_WEIGHTS)
    rows = rows[::step]
    q = quantize(rows, fmt)
    values, decoded = np.asarray(rows).ravel(), np.asarray(dequantize(q)).ravel()
    place, levels = _grid_positions(q, values)
    figure, *panels = _figure(11.0, 4.2, panels=1 if place is None else 2)
    axes = panels[0]
    reach = float(np.quantile(np.abs(values), 0.9995)) or 1.0
    bins = np.linspace(-reach, reach, 161).tolist()
    axes.hist(decoded, bins, color=FRONT, alpha=0.45, label=f"{fmt.name}", linewidth=0)
    heights, *_ = axes.hist(values, bins, color=INK, histtype="step", linewidth=1.1, label="weights")
    axes.set_ylim(0, min(axes.get_ylim()[1], 2.5 * float(np.max(heights))))  # the zeros of a coarse grid tower
    axes.set_xlabel("weight")
    axes.set_ylabel("count")
    error = math.sqrt(float(np.sum((decoded - values) ** 2) / max(float(np.sum(values**2)), 1e-38)))
    axes.set_title(title or f"{fmt.name}: relative error {100 * error:.3g} %", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    if place is not None and levels is not None:
        axes = panels[1]
        edge = 0.5 / max(len(levels) - 1, 1)
        axes.hist(place, np.linspace(-edge, 1 + edge, 161).tolist(), color=POINT, alpha=0.75, linewidth=0)
        for level in levels:
            axes.axvline(level, color=FRONT, linewidth=1, alpha=0.9)
        axes.set_xlabel("position between the first and the last level of the weight's block")
        axes.set_title(f"on the grid of {len(levels)} levels", loc="left", fontweight="bold")
    return _png(figure)


def _grid_positions(q: Any, values: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Each weight's and each level's place on its block's grid; None for vector formats and fine grids."""
    if q.format.tile != (1, 1):
        return None, None
    scales, codes = q.format.unpack(q.leaves)
    used = np.unique(np.asarray(codes))
    if not 1 < len(used) <= GRID_LEVELS:
        return None, None
    levels = np.stack([np.asarray(q.format.decode(scales, jnp.full_like(codes, c))).ravel() for c in used])
    # A negative scale turns a block's grid around, so levels are ordered by code, as the code farthest from 0 points.
    turned = np.sign(levels[np.argmax(np.abs(levels).max(axis=1))])
    order = np.argsort(np.median(levels * turned[None, :], axis=1))
    first, last = levels[order[0]], levels[order[-1]]
    if np.median(last - first) < 0:
        first, last = last, first
    live = last != first  # blocks of one value have no grid
    if not live.any():
        return None, None
    width = (last - first)[live]
    relative = np.median((levels[:, live] - first[live]) / width, axis=1)
    return (values[live] - first[live]) / width, np.sort(relative)


def _label_points(figure: Figure, axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> None:
    """Write each name beside its point, where it covers neither points nor names already written."""
    figure.draw_without_rendering()
    points = axes.transData.transform(np.stack([x, y], axis=1))
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in points]
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    for i in np.argsort(-points[:, 1]).tolist():
        px, py = points[i]
        width, height = 5.2 * len(names[i]) * scale, 9.5 * scale
        best, best_cost = (0.0, 0.0), math.inf
        for radius in (9, 16, 26, 38):
            for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False) + 0.4:
                dx, dy = radius * scale * math.cos(angle), radius * scale * math.sin(angle)
                left = px + dx - (width if dx < 0 else 0)
                box = (left, py + dy - height / 2, left + width, py + dy + height / 2)
                cost = radius + 40 * sum(_overlap(box, other) for other in taken) / height
                if box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1:
                    cost += 1000
                if cost < best_cost:
                    best, best_cost, best_box = (dx / scale, dy / scale), cost, box
        taken.append(best_box)
        axes.annotate(
            names[i], (x[i], y[i]), best, textcoords="offset points", fontsize=8.5, color=INK, va="center",
            ha="right" if best[0] < 0 else "left",
            arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, *tuple[Axes, ...]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('plots need matplotlib; install it with: pip install "qjax[report]"') from None
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    made = figure.subplots(1, panels, squeeze=False)[0]
    for axes in made:
        axes.grid(True, color="#e6e9ee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(SOFT)
        axes.tick_params(colors=INK, labelsize=9)
    return figure, *made


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})  # the same picture is the same bytes
    return out.getvalue()
