"""Sites for the reparametrization tests: a weight with outliers and the statistics of inputs that have some too."""

import jax.numpy as jnp
import numpy as np

import qjax
from qjax.reparam import (
    Site,
    act,
    awq_scale,
    columns,
    hadamard,
    kronecker,
    low_rank,
    orthogonal,
    permute,
    rescale,
    sparse,
)
from qjax.reparam import smooth as smooth_
from qjax.stats import Stats

OUT, N = 24, 64


def inputs(tokens=512, n=N, seed=0) -> np.ndarray:
    """Correlated, with two outlier channels: f32[tokens, n]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, n // 2)) @ rng.standard_normal((n // 2, n)) + 0.3 * rng.standard_normal(
        (tokens, n)
    )
    x[:, 3] *= 25.0
    x[:, n - 2] *= 12.0
    return x.astype(np.float32)


def stats_of(x) -> Stats:
    x = jnp.asarray(x)
    return Stats(
        H=jnp.matmul(x.T, x, precision="highest") / len(x), absmean=jnp.mean(jnp.abs(x), axis=0),
        absmax=jnp.max(jnp.abs(x), axis=0), count=jnp.float32(len(x)),
    )  # fmt: skip


def weight(out=OUT, n=N, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_t(4, (out, n)), jnp.float32)


def site(format="uint4_g32", out=OUT, n=N, **options) -> Site:
    return Site(weight(out, n), stats_of(inputs(n=n)), qjax.format(format), **options)


EXACT = {
    "permute": permute(),
    "permute by norm": permute("norm"),
    "smooth": smooth_(),
    "equalize": smooth_(0.0),
    "awq": awq_scale(),
    "awq duo": awq_scale(10, duo=True),
    "rescale": rescale(),
    "hadamard": hadamard(),
    "hadamard in": hadamard("in", seed=3),
    "hadamard out": hadamard("out", seed=4),
    "hadamard blocks": hadamard(block=16, block_out=8),
    "kronecker": kronecker(seed=1),
    "orthogonal": orthogonal(seed=2),
}
SPLITS = {
    "columns": columns(share=0.05),
    "columns by threshold": columns(threshold=40.0),
    "columns by h": columns(share=0.1, by="h"),
    "sparse": sparse(0.02),
    "sparse by magnitude": sparse(0.02, by="magnitude"),
    "low rank": low_rank(4),
}
INPUTS = {kind: act(kind) for kind in ("int8", "int4", "e4m3", "e5m2")}
