"""What each change of variables is for, against float64: the gain itself, which a test of exactness does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reparam_problems import site, stats_of

import qjax
from qjax.reparam import Site, awq_scale, low_rank, permute, rescale, smooth


def weight_and_H(s: Site) -> tuple[np.ndarray, np.ndarray]:
    return np.float64(s.w), np.float64(s.stats.H)


def test_rescale_reaches_the_least_bound_of_all_diagonals():
    """QuIP bounds the loss by tr(W W^T) tr(H); by Cauchy-Schwarz no diagonal gets it below (sum_j |W_j| x_j)^2."""

    def bound(s):
        w, H = weight_and_H(s)
        return (w * w).sum() * np.trace(H)

    before = site()
    w, H = weight_and_H(before)
    least = (np.linalg.norm(w, axis=0) * np.sqrt(np.diag(H))).sum() ** 2
    assert bound(before) > 2 * least
    assert bound(rescale()(before)[0]) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("by", ["h", "norm"])
def test_permute_puts_the_largest_first(by):
    w, H = weight_and_H(permute(by)(site())[0])
    key = np.diag(H) if by == "h" else (w * w).sum(axis=0)
    assert (np.diff(key) <= 0).all() and key[0] > 1.5 * key[-1]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_smooth_shares_the_outliers_out_by_alpha(alpha):
    """max|W'_j|^(1 - a) = max|x'_j|^a up to one factor: 0 evens the weights out, 1 the inputs."""

    def spread(s):
        w, x = np.abs(np.float64(s.w)).max(axis=0), np.float64(s.stats.absmax)
        share = w ** (1 - alpha) / x**alpha
        return share.max() / share.min()

    before = site()
    assert spread(before) > 2
    assert spread(smooth(alpha)(before)[0]) == pytest.approx(1, rel=1e-4)


def test_low_rank_is_the_best_of_its_rank_in_the_metric_of_h():
    """Eckart and Young on W diag(h)^(1/2): what is left weighs as much as the singular values beyond the rank."""
    s = site()
    w, H = weight_and_H(s)
    root = np.sqrt(np.diag(H))
    least = (np.linalg.svd(w * root, compute_uv=False)[4:] ** 2).sum()
    left, plain = (np.float64(low_rank(4, by=by)(s)[0].w) for by in ("h", "none"))
    assert ((left * root) ** 2).sum() == pytest.approx(least, rel=1e-3)
    assert ((plain * root) ** 2).sum() > 1.2 * least


@pytest.fixture(scope="module")
def uneven():
    """Inputs that are correlated and of very different size, columns of very different size."""
    rng = np.random.default_rng(11)  # one whose diagonal leads astray
    mix = np.arange(1, 65)[:, None] ** -0.5 * np.linalg.qr(rng.standard_normal((64, 64)))[0]
    x = rng.standard_normal((256, 64)) @ mix * rng.lognormal(0, 1.0, 64)
    w = rng.standard_normal((8, 64)) * rng.lognormal(0, 1.0, 64)
    return Site(jnp.asarray(w, jnp.float32), stats_of(x.astype(np.float32)), qjax.format("uint3_g32"))


@pytest.mark.parametrize("duo", [False, True])
def test_awq_finds_the_best_power_in_the_metric_of_H(duo, uneven):
    """Every candidate judged in float64: the one chosen is the best of the paper's 20, or of duo's 40."""
    w, H = weight_and_H(uneven)
    x, mean_w, powers = np.float64(uneven.stats.absmean), np.abs(w).mean(axis=0), np.arange(20) / 20
    fmt = uneven.format
    nearest = jax.jit(lambda v: fmt.decode(*fmt.encode(v)))

    def loss(s, M):
        e = w - np.float64(nearest(jnp.asarray(w * s, jnp.float32))) / s
        return np.einsum("ri,ij,rj->", e, M, e)

    single, double = [x**a for a in powers], [x**a / mean_w ** (1 - a) for a in powers]
    tried = [s / np.sqrt(s.max() * s.min()) for s in (single + double if duo else single)]
    found = np.array([loss(s, H) for s in tried])
    chosen = loss(np.float64(awq_scale(duo=duo)(uneven)[1].s), H)
    assert chosen == pytest.approx(found.min(), rel=1e-2)
    assert found[0] > 2 * chosen  # plain rounding
    assert not duo or found[:20].min() > 1.2 * chosen
    by_h = np.argmin([loss(s, np.diag(np.diag(H))) for s in tried])
    assert found[by_h] > 1.05 * chosen  # the diagonal alone chooses another
