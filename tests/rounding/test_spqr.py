"""SpQR: without outliers it is GPTQ; with them it is the published loop; what it stores counts and runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, problem
from rounding_reference import nearest_level

import qjax
from qjax.errors import UserError
from qjax.pipeline.rounded import round_leaf
from qjax.recipes import Recipe, recipe
from qjax.reparam import columns, hadamard
from qjax.rounding import clip, ldlq, nearest, round_weight, spqr
from qjax.stats import Stats

DAMPING = 0.05
INFINITE = float("inf")


@pytest.fixture(scope="module")
def spiky():
    """Weights with a few spikes, and their H."""
    w, H = problem(48, 128, seed=3)
    rng = np.random.default_rng(0)
    spikes = rng.random(w.shape) < 0.01
    return jnp.asarray(np.where(spikes, 12 * np.sign(w), w), jnp.float32), H


def run(w, H, *roundings, format="uint3_g16"):
    return round_weight(w, qjax.format(format), roundings, Stats(H=H), DAMPING)


def w_hat_of(r, format="uint3_g16"):
    w_hat = qjax.format(format).decode(r.scales, r.codes)
    return np.asarray(w_hat if r.outliers is None else jnp.where(*r.outliers, w_hat))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["act", "natural"])
@pytest.mark.parametrize("format", ["uint3_g16", "uint3_g16_mse_u3x8", "uint3_g16_bilevel3x8"])
def test_without_outliers_it_is_gptq(order, format, spiky):
    ours, gptq = (run(*spiky, *c, format=format) for c in ((spqr(INFINITE, order),), (nearest(), ldlq(order))))
    np.testing.assert_array_equal(ours.codes, gptq.codes)
    assert not np.any(ours.outliers[0])


def published(w, H, threshold, levels_of):
    """GPTQ front to back in float64, on the damped H, with weights kept where missing them costs more than tau."""
    order = np.argsort(-np.diag(H))
    n = len(order)
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    d = np.empty(n)
    d[order] = np.diag(U) ** -2
    tau = threshold * np.mean(w.var(0) * d)
    now, w_hat, kept = w[:, order].copy(), np.empty_like(w), np.zeros(w.shape, bool)
    for i, j in enumerate(order):
        q, _ = nearest_level(now[:, i], levels_of(j))
        kept[:, j] = (now[:, i] - q) ** 2 * d[j] > tau
        w_hat[:, j] = np.where(kept[:, j], now[:, i], q)
        now[:, i:] -= np.outer((now[:, i] - w_hat[:, j]) / U[i, i], U[i, i:])
    return w_hat, kept


@pytest.mark.sampled(1)
@pytest.mark.parametrize("threshold", [0.2, 1.0])
def test_it_is_the_published_loop(threshold, spiky):
    w, H = spiky
    r = run(w, H, spqr(threshold))
    fmt = qjax.format("uint3_g16")
    s, m = (np.repeat(np.asarray(a), 16, axis=1) for a in fmt.columns(r.scales, w.shape))
    levels = s[:, :, None] * np.arange(8) + m[:, :, None]
    w_hat, kept = published(np.float64(w), damped64(H, DAMPING), threshold, lambda j: levels[:, j])
    mask = np.asarray(r.outliers[0])
    assert 0.002 < mask.mean() < 0.2
    assert np.mean(mask != kept) < 2e-3  # near ties, in float32
    ours, theirs = (losses(w, v, damped64(H, DAMPING)).sum() for v in (w_hat_of(r), w_hat))
    assert ours == pytest.approx(theirs, rel=2e-2)


def test_spikes_leave_their_groups_range(spiky):
    """Far below GPTQ on the same groups at 1 bit more, and the leave-one-out fit is what makes room."""
    w, H = spiky
    made = {"spqr": (spqr(),), "no leave-one-out": (spqr(loo=False),), "gptq": (nearest(), ldlq())}
    rounded = {name: run(w, H, *chain) for name, chain in made.items()}
    loss = {name: losses(w, w_hat_of(r), H).sum() for name, r in rounded.items()}
    assert loss["spqr"] < 0.4 * loss["gptq"]
    assert loss["spqr"] < 0.6 * loss["no leave-one-out"]
    mask = np.asarray(rounded["spqr"].outliers[0])
    assert 32 * mask.mean() < 1.1
    assert mask[np.abs(w) > 11].mean() > 0.9


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "format", ["Q4_0", "Q4_1", "Q3_K", "IQ4_NL", "TQ2_0", "MXFP4", "NVFP4", "int3_g32", "NF4", "NF4_dq", "FP4_dq"]
)
def test_on_every_kind_of_levels(format):
    """Outliers know no format: those of spikes help any, and leaving them out of the fit helps further."""
    w, H = problem(16, 256, seed=3)
    spikes = np.random.default_rng(0).random(w.shape) < 0.01
    w = jnp.asarray(np.where(spikes, 12 * np.sign(w), w), jnp.float32)
    chains = {"gptq": (nearest(), ldlq()), "in the range": (spqr(loo=False),), "spqr": (spqr(),)}
    loss = {k: losses(w, w_hat_of(run(w, H, *c, format=format), format), H).sum() for k, c in chains.items()}
    assert loss["in the range"] < 0.9 * loss["gptq"]
    assert loss["spqr"] < (1.01 if format == "TQ2_0" else 0.85) * loss["in the range"]  # three levels leave little room


@pytest.mark.sampled(1)
@pytest.mark.parametrize("format, same", [("F32", True), ("F16", False)])
def test_floats_have_no_outliers(format, same, spiky):
    w, H = spiky
    made = run(w, H, spqr(), format=format)
    assert not np.any(made.outliers[0])
    np.testing.assert_allclose(w_hat_of(made, format), w, rtol=0, atol=0 if same else 2**-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reparams", [(), (hadamard("in"),), (columns(share=0.02, by="h"),)], ids=["", "rotated", "columns"]
)
def test_the_packed_weight(reparams, spiky, tmp_path):
    w, H = spiky
    fmt = qjax.format("uint3_g16_bilevel3x8")
    q, report = round_leaf("w", w, -1, fmt, Recipe((spqr(),), reparams=reparams), Stats(H=H))
    w_hat = qjax.dequantize(q)
    expected = losses(w, w_hat, H).sum() / losses(w, 0 * w, H).sum()
    assert report.loss == pytest.approx(expected, rel=2e-2)  # outliers are f16
    x = jax.random.normal(jax.random.key(0), (5, 128))
    np.testing.assert_allclose(jax.jit(lambda x, q: qjax.dot(x, q))(x, q), x @ w_hat.T, atol=2e-4)
    plain, _ = round_leaf("w", w, -1, fmt, Recipe((spqr(INFINITE),), reparams=reparams), Stats(H=H))
    part = q.applied[-1]
    assert q.nbytes - plain.nbytes == part.values.size * 4
    for i, leaf in enumerate(jax.tree.leaves((q.leaves, q.applied))):
        np.asarray(leaf).tofile(tmp_path / f"{i}.bin")
    assert q.bits_per_weight == 8 * sum(f.stat().st_size for f in tmp_path.iterdir()) / q.size < 6


def test_dead_columns_have_no_outliers(spiky):
    """Nothing flows through them, so that a miss costs nothing, and the others keep theirs."""
    w, H = spiky
    dead = np.arange(128) % 4 == 0
    cut = jnp.where(dead[:, None] | dead[None, :], 0.0, H)
    mask = np.asarray(run(w, cut, spqr()).outliers[0])
    assert not mask[:, dead].any() and 0.002 < mask[:, ~dead].mean() < 0.2


@pytest.mark.slow
def test_a_stack_has_outliers_of_its_own(spiky):
    w, H = spiky
    stack = jnp.stack([w, 0.5 * w.at[:, :40].multiply(0.2)])
    fmt = qjax.format("uint3_g16")
    q, _ = round_leaf("w", stack, -1, fmt, Recipe((spqr(),)), Stats(H=H))
    for i in range(2):
        one, _ = round_leaf("w", stack[i], -1, fmt, Recipe((spqr(),)), Stats(H=H))
        np.testing.assert_allclose(qjax.dequantize(q)[i], qjax.dequantize(one), atol=1e-6)
        x = jax.random.normal(jax.random.key(0), (5, 128))
        np.testing.assert_allclose(jax.vmap(qjax.dot, (None, 0))(x, q)[i], qjax.dot(x, one), atol=1e-4)


@pytest.mark.parametrize("threshold", [0.5, INFINITE])
def test_recipe_reads_back(threshold):
    made = Recipe((spqr(threshold, loo=False),), qjax.format("uint3_g16"))
    assert recipe(str(made)) == made


def test_errors(spiky):
    w, H = spiky
    for stage in (clip(), ldlq()):  # they begin with the weight
        with pytest.raises(UserError, match=r"nearest|throw away the codes of SpQR"):
            round_leaf("w", w, -1, qjax.format("uint3_g16"), Recipe((spqr(), stage)), Stats(H=H))
    with pytest.raises(UserError, match="must be positive"):
        spqr(0.0)
    with pytest.raises(UserError, match="needs the statistic 'H'"):
        round_leaf("w", w, -1, qjax.format("uint3_g16"), Recipe((spqr(),)), Stats())
