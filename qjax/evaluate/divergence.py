"""How far a quantized model's predictions are from those of the model it was made from, token by token.

    KL(p || q) = sum_v p_v ln(p_v / q_v),   p the baseline's distribution, q the quantized model's

with the summary llama.cpp's `--kl-divergence` prints: mean, median, percentiles, how often both name the same most
probable token, and by how much the probability of the true token moved (delta-p). Two deliberate differences: the
baseline is exact float32 here (llama.cpp stores it in 16 bits, which alone costs about 0.0005), and no token is left
out of the sum.

How KL is summed without losing its digits stands in `qjax.evaluate.vocabulary`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.evaluate.network import Params, Progress, Reader, as_reader, batch_of, token_values
from qjax.evaluate.perplexity import Perplexity, Windows, mean_and_errors, perplexity_of_tokens, readings
from qjax.evaluate.vocabulary import kl_of
from qjax.io.space import scratch
from qjax.models.parts import batches
from qjax.typing import Array

CACHE_BYTES = 4 << 30
TOKEN_VALUES = ("nll", "nll_base", "kl", "same_top")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A quantized model against its baseline. Probability changes are in percent; `*_se_clustered` as in Perplexity."""

    base_perplexity: float
    base_perplexity_se: float
    log_ratio: float  # ln(PPL(q) / PPL(base)), nats a token
    log_ratio_se: float
    log_ratio_se_clustered: float | None
    kl_mean: float
    kl_mean_se: float
    kl_mean_se_clustered: float | None
    kl_median: float
    kl_p90: float
    kl_p95: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    same_top_percent: float
    same_top_percent_se: float
    mean_dp_percent: float
    mean_dp_percent_se: float
    rms_dp_percent: float
    rms_dp_percent_se: float


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """The model others are compared with, on its windows, with what its head reads kept so that it runs only once.

    Attributes:
      hidden: [windows, scored, d] in a temporary file that vanishes with it; None: too large, run the model again.
    """

    network: Reader
    params: Params
    windows: Windows
    hidden: np.ndarray | None = None


def make_baseline(
    network: Reader | Callable[[Params, Array], Array],
    params: Params,
    windows: Windows,
    *,
    batch: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: Progress | None = None,
) -> Baseline:
    """Run the baseline once and keep what its head reads, if that fits into `cache_bytes` of temporary disk.

    A decoder needs `dim` floats a scored token, 16 to 32 times less than its logits.
    """
    reader = as_reader(network)
    shape = (len(windows), windows.scored, reader.width(params, windows.context))
    if 4 * math.prod(shape) > cache_bytes:
        return Baseline(reader, params, windows)
    hidden = scratch(np.float32, shape)
    for rows, some in readings(reader, params, windows, batch, progress):
        hidden[rows] = some
    return Baseline(reader, params, windows, hidden)


def divergence(
    network: Reader | Callable[[Params, Array], Array],
    params: Params,
    baseline: Baseline,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[Perplexity, Divergence]:
    """Perplexity of a model and its divergence from a baseline, in one pass over the baseline's windows.

    Args:
      network: the model to judge, as for `perplexity`.
      params: its arrays.
      baseline: from `make_baseline`, or a bare `Baseline(network, params, windows)`, which runs along batch by batch.
      batch: windows a step; None: about 2048 tokens. It does not change the result.
      progress: called with (windows done, windows).

    Raises:
      UserError: another vocabulary than the baseline's, or logits that are NaN or infinite.
    """
    token = token_divergences(network, params, baseline, batch=batch, progress=progress)
    return perplexity_of_tokens(token["nll"], baseline.windows), divergence_of_tokens(**token, windows=baseline.windows)


def token_divergences(
    network: Reader | Callable[[Params, Array], Array],
    params: Params,
    baseline: Baseline,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """What `divergence` sums up, as f32[windows, scored]: "nll", "nll_base", "kl" and "same_top" of every token."""
    reader, base, windows = as_reader(network), as_reader(baseline.network), baseline.windows
    token = {name: np.empty((len(windows), windows.scored), np.float32) for name in TOKEN_VALUES}
    batch = batch_of(windows.context, len(windows), batch)
    size = min(r.at_once(windows.context, batch) for r in (reader, base))
    along: Any = readings(base, baseline.params, windows, batch, None, size)
    if baseline.hidden is not None:
        along = ((rows, baseline.hidden[rows]) for rows in batches(len(windows), size))
    for (rows, hidden), (_, kept) in zip(readings(reader, params, windows, batch, progress, size), along, strict=True):
        model = reader.scoring(params, hidden.shape[-1]), hidden
        other = base.scoring(baseline.params, kept.shape[-1]), kept
        values = token_values(windows.targets[rows], model, other)
        for name in TOKEN_VALUES:
            token[name][rows] = values[name]
    return token


def divergence_of_tokens(
    nll: np.ndarray, nll_base: np.ndarray, kl: np.ndarray, same_top: np.ndarray, windows: Windows
) -> Divergence:
    """llama.cpp's summary of per-token values f[windows, scored]; percentiles interpolate linearly at q (n - 1)."""
    base = perplexity_of_tokens(nll_base, windows)
    ratio, ratio_se, ratio_clustered = mean_and_errors(nll.astype(np.float64) - nll_base)
    mean, se, clustered = mean_and_errors(kl)
    median, p90, p95, p99, p999 = np.quantile(kl.astype(np.float64), [0.5, 0.9, 0.95, 0.99, 0.999]).tolist()
    dp = np.exp(-nll.astype(np.float64)) - np.exp(-nll_base.astype(np.float64))
    mean_dp, mean_dp_se, _ = mean_and_errors(dp)
    square, square_se, _ = mean_and_errors(dp**2)
    rms = math.sqrt(square)
    same, same_se, _ = mean_and_errors(same_top)
    return Divergence(
        base.perplexity, base.perplexity_se, ratio, ratio_se, ratio_clustered,
        mean, se, clustered, median, p90, p95, p99, p999, float(kl.max()),
        100 * same, 100 * same_se, 100 * mean_dp, 100 * mean_dp_se,
        100 * rms, 100 * (0.5 / rms * square_se if rms else 0.0),
    )  # fmt: skip


__all__ = [
    "Baseline", "Divergence", "divergence", "divergence_of_tokens", "kl_of", "make_baseline", "token_divergences",
]  # fmt: skip
