"""How far a quantized model's predictions are from those of the model it was made from, token by token.

    KL(p || q) = sum_v p_v ln(p_v / q_v),   p the baseline's distribution, q the quantized model's

with the summary llama.cpp's `--kl-divergence` prints: mean, median, percentiles, how often both name the same most
probable token, and by how much the probability of the true token moved (delta-p). Two deliberate differences: the
baseline is exact float32 here (llama.cpp stores it in 16 bits, which alone costs about 0.0005), and no token is left
out of the sum.

KL is evaluated through the difference of the logits, d = z_q - z_p. With delta = d - E_p[d],

    KL = ln E_p[e^delta] = ln(1 + E_p[e^delta - 1 - delta]),

whose terms are all non-negative: nothing cancels, equal logits give exactly 0, and a KL of 1e-9 still has correct
digits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.evaluate.perplexity import (
    Network,
    Params,
    Perplexity,
    Progress,
    Windows,
    as_network,
    batches,
    mean_and_errors,
    nll_of,
    over_positions,
    perplexity_of_tokens,
    run_trunk,
    vocab_of,
)
from qjax.io.space import scratch
from qjax.typing import Array, Float, Int

CACHE_BYTES = 4 << 30


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

    network: Network
    params: Params
    windows: Windows
    hidden: np.ndarray | None = None


def make_baseline(
    network: Network | Callable[[Params, Array], Array],
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
    network = as_network(network)
    window = jax.ShapeDtypeStruct((1, windows.context), jnp.int32)
    one = jax.eval_shape(lambda p, t: network.trunk(p, t)[:, windows.first : -1], params, window)
    shape = (len(windows), *one.shape[1:])
    if math.prod(shape) * one.dtype.itemsize > cache_bytes:
        return Baseline(network, params, windows)
    hidden = scratch(one.dtype, shape)
    for rows, tokens in batches(windows, batch, progress):
        hidden[rows] = np.asarray(run_trunk(network, params, tokens, windows.first))[: len(hidden[rows])]
    return Baseline(network, params, windows, hidden)


def divergence(
    network: Network | Callable[[Params, Array], Array],
    params: Params,
    baseline: Baseline,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[Perplexity, Divergence]:
    """Perplexity of a model and its divergence from a baseline, in one pass over the baseline's windows.

    Args:
      network: the model to judge; a Network or a function (params, tokens [b, t]) -> logits [b, t, vocab].
      params: its arrays.
      baseline: from `make_baseline`, or a bare `Baseline(network, params, windows)`, which runs along batch by batch.
      batch: windows a step; None: about 2048 tokens. It does not change the result.
      progress: called with (windows done, windows).

    Raises:
      UserError: another vocabulary than the baseline's, or logits that are NaN or infinite.
    """
    token, windows = by_token(network, params, baseline, batch=batch, progress=progress), baseline.windows
    return perplexity_of_tokens(token["nll"], windows), divergence_of_tokens(**token, windows=windows)


def by_token(
    network: Network | Callable[[Params, Array], Array],
    params: Params,
    baseline: Baseline,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """{"nll", "nll_base", "kl", "same_top"} token by token, f32[windows, scored]; arguments as in `divergence`."""
    network, windows = as_network(network), baseline.windows
    shape = (len(windows), windows.scored)
    token = {name: np.empty(shape, np.float32) for name in ("nll", "nll_base", "kl", "same_top")}
    for rows, tokens in batches(windows, batch, progress):
        count = rows.stop - rows.start
        hidden = run_trunk(network, params, tokens, windows.first)
        if baseline.hidden is None:
            base = run_trunk(baseline.network, baseline.params, tokens, windows.first)
        else:
            kept = baseline.hidden[rows]
            base = jnp.asarray(np.pad(kept, ((0, len(tokens) - count), (0, 0), (0, 0))))
        targets = tokens[:, windows.first + 1 :]
        part = _compare(network, params, hidden, baseline.network, baseline.params, base, targets)
        for name, values in part.items():
            token[name][rows] = np.asarray(values)[:count]
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


@partial(jax.jit, static_argnums=(0, 3))
def _compare(
    network: Network,
    params: Params,
    hidden: Array,
    base_network: Network,
    base_params: Params,
    base_hidden: Array,
    targets: Int[Array, "b s"],
) -> dict[str, Float[Array, "b s"]]:
    vocab, base_vocab = vocab_of(network, params, hidden), vocab_of(base_network, base_params, base_hidden)
    if vocab != base_vocab:
        raise UserError(f"the model has {vocab} tokens and its baseline {base_vocab}; they must share a vocabulary")

    def score(x, x_base, target):
        z = network.head(params, x).astype(jnp.float32)
        z_base = base_network.head(base_params, x_base).astype(jnp.float32)
        return {
            "nll": nll_of(z, target),
            "nll_base": nll_of(z_base, target),
            "kl": kl_of(z_base, z),
            "same_top": (jnp.argmax(z, axis=1) == jnp.argmax(z_base, axis=1)).astype(jnp.float32),
        }

    return over_positions(score, vocab, (hidden, base_hidden, targets))


def kl_of(z_base: Float[Array, "n v"], z: Float[Array, "n v"]) -> Float[Array, "n"]:
    """KL(softmax(z_base) || softmax(z)) of each row, without cancellation; see the module's docstring."""
    log_p = jax.nn.log_softmax(z_base, axis=1)
    p = jnp.exp(log_p)
    d = z - z_base
    delta = d - jnp.sum(p * d, axis=1, keepdims=True)
    # Where q lifts a token by more than e^10, the exponential could overflow; there the plain sum is accurate enough.
    far = jnp.max(delta, axis=1) > 10
    near = jnp.log1p(jnp.sum(p * _exp_remainder(jnp.minimum(delta, 10.0)), axis=1))
    plain = jnp.sum(p * (log_p - jax.nn.log_softmax(z, axis=1)), axis=1)
    return jnp.where(far, jnp.maximum(plain, 0.0), near)


def _exp_remainder(x: Array) -> Array:
    """e^x - 1 - x >= 0, by its series near 0, where the difference would cancel."""
    series = 0.5 * x * x * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return jnp.where(jnp.abs(x) < 0.25, series, jnp.expm1(x) - x)
