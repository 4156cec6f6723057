"""Fake quantization is the exported value, bit for bit; its gradients are the formulas of the papers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.training.grid.estimators import clipped, estimator, ewgs, soft_round, ste, trust
from qjax.training.grid.fake_quant import fake_quant
from qjax.training.grid.quantizer import Quantizer
from qjax.training.grid.scale_rules import ScaleRule

pytestmark = pytest.mark.optimized  # what trains is what is exported, bit for bit

N, OUT = 512, 8


def masters(dtype=jnp.float32, seed=0, out=OUT):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((N, out)) * 0.03, jnp.float32).astype(dtype)


HALVES = ("Q4_0", "Q4_K", "IQ4_NL", "NVFP4", "int3_g64_mid_mse", "uint4_g64_zf16", "NF4_dq", "FP8_E5M2_b128")
MASTERS = [(name, jnp.float32) for name in qjax.format_names()] + [(name, jnp.bfloat16) for name in HALVES]


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", MASTERS)
def test_export_parity_is_exact(name, dtype):
    w = masters(dtype, out=max(OUT, qjax.format(name).rows))
    stored = np.asarray(qjax.dequantize(qjax.quantize(w, name, axis=0)))
    np.testing.assert_array_equal(fake_quant(w, name, axis=0), stored)

    def loss(w, x):  # a program around it, with a gradient
        w_fake = fake_quant(w * jnp.asarray(1.0, dtype), name, axis=0)
        return (jnp.tanh(x @ w_fake) ** 2).sum(), w_fake

    (_, inside), g = jax.jit(jax.value_and_grad(loss, has_aux=True))(w, jnp.ones((4, N)))
    np.testing.assert_array_equal(inside, stored)
    assert g.dtype == dtype and float(jnp.abs(g.astype(jnp.float32)).max()) > 0


def test_an_estimator_that_asks_for_levels_takes_no_vectors():
    with pytest.raises(UserError, match="E8P_2 rounds 1 x 8 weights together, and one of them alone has no levels"):
        jax.grad(lambda w: fake_quant(w, "E8P_2", estimator=ewgs()).sum())(masters().T)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["Q4_0", "int4_g32", "NF4", "MXFP4", "FP8_E4M3"])
def test_parity_through_a_file_of_ggml_or_leaves(name):
    w = masters().T
    q = qjax.quantize(w, name)
    if name in ("Q4_0", "MXFP4"):
        q = qjax.from_bytes(name, qjax.to_bytes(q), (OUT, N))
    np.testing.assert_array_equal(qjax.dequantize(q), jax.jit(lambda w: fake_quant(w, name))(w))


def test_scales_are_rounded_to_storage_before_use_under_jit():
    """XLA may drop a pair of casts: a jitted bf16 scale that is not rounded gives other codes and values."""
    w = np.asarray(masters(), np.float32).T
    groups = w.reshape(OUT, -1, 32)
    low, high = groups.min(-1), groups.max(-1)
    s = np.maximum(high / np.float32(7), -low / np.float32(8)).astype(np.float32)
    rounded = s.astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.clip(np.round(groups / rounded[..., None]), -8, 7)
    expected = (codes * rounded[..., None]).reshape(w.shape)
    naive = (np.clip(np.round(groups / s[..., None]), -8, 7) * s[..., None]).reshape(w.shape)
    assert (naive != expected).mean() > 0.5  # what excess precision would give is another result

    got = jax.jit(lambda w: fake_quant(w, "int4_g32_bf16"))(jnp.asarray(w))
    np.testing.assert_array_equal(got, expected)


def test_straight_through_is_the_identity_and_keeps_types():
    w, x = masters(jnp.bfloat16), jnp.ones((3, N))
    g = jax.grad(lambda w: (x @ fake_quant(w, "Q4_0", axis=0)).sum())(w)
    assert g.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(g, np.float32), 3.0)


@pytest.mark.slow
def test_the_weight_of_the_error_reaches_the_search():
    w, h = masters().T, jnp.asarray(np.random.default_rng(1).uniform(0.01, 4, N), jnp.float32)
    weighted = fake_quant(w, "int3_g128_mse", weight=h)
    np.testing.assert_array_equal(weighted, qjax.dequantize(qjax.quantize(w, "int3_g128_mse", weight=h)))
    assert float(jnp.abs(weighted - fake_quant(w, "int3_g128_mse")).max()) > 0


@pytest.mark.parametrize(
    "w, format, axis, message",
    [
        (jnp.ones((33,)), "Q4_0", -1, "multiple of 32"),
        (jnp.ones((32,)), "Q4_0", 1, "out of range"),
        (jnp.ones((32,)), "Q4_9", -1, "Q4_9"),
    ],
)
def test_bad_input(w, format, axis, message):
    with pytest.raises(UserError, match=message):
        fake_quant(w, format, axis)


# Estimators, on a grid that can be read off: int4 with group 8, s = 1/2 and 7 s the largest weight.

S = 0.5
W = np.array([3.5, 3.0, 0.1, -0.2, 0.24, -0.26, 1.0, -4.0], np.float32)


def passed(how, w=W, g=None):
    g = np.arange(1, 9, dtype=np.float32) * np.array([1, -1] * 4, np.float32) if g is None else g
    return g, np.asarray(jax.grad(lambda w: (fake_quant(w, "int4_g8", estimator=how) * g).sum())(jnp.asarray(w)))


def test_ties_at_the_end_of_the_grid_pass_whole():
    w_hat = np.asarray(fake_quant(jnp.asarray(W), "int4_g8"))
    np.testing.assert_array_equal(w_hat[[0, 7]], W[[0, 7]])  # both ends are levels
    for how in (ste(), clipped(), clipped("levels")):
        g, dw = passed(how)
        np.testing.assert_array_equal(dw, g)


def test_clipped_stops_what_lies_outside():
    frozen = Quantizer(qjax.format("int4_g8"), scales="frozen", estimator=clipped())
    _, kept = frozen.init(jnp.asarray(W))
    moved = W + np.array([0.2, 0, 0, 0, 0, 0, 0, -0.3], np.float32)
    for reach, expected in (("cells", [1, 1, 1, 1, 1, 1, 1, 0]), ("levels", [0, 1, 1, 1, 1, 1, 1, 0])):
        q = Quantizer(qjax.format("int4_g8"), scales="frozen", estimator=clipped(reach))
        np.testing.assert_array_equal(jax.grad(lambda w, q=q: q.fake(w, {}, kept).sum())(jnp.asarray(moved)), expected)


def test_ewgs_scales_by_the_distance_to_the_level():
    g, dw = passed(ewgs(0.5))
    u = W / S
    np.testing.assert_allclose(dw, g * (1 + 0.5 * np.sign(g) * (u - np.round(u))), rtol=1e-6)
    np.testing.assert_array_equal(passed(ewgs(0.0))[1], g)


def test_trust_forgets_what_is_far_from_its_level():
    g, dw = passed(trust(0.5))  # within a quarter of a step
    u = W / S
    np.testing.assert_array_equal(dw, np.where(np.abs(u - np.round(u)) <= 0.25, g, 0))
    np.testing.assert_array_equal(passed(trust(1.0))[1], g)  # on even levels: all that is not clipped


def test_soft_round_has_mean_one_over_a_gap_and_peaks_between_levels():
    u = np.linspace(0, 1, 2001, dtype=np.float32)[:-1]
    w = np.concatenate([u * S, np.zeros(2008 - u.size - 1), [3.5]]).astype(np.float32)
    q = Quantizer(qjax.format("int4_g2008"), scales="frozen", estimator=soft_round(3.0))
    kept = q.init(jnp.asarray(w))[1]
    slope = np.asarray(jax.grad(lambda w: q.fake(w, {}, kept).sum())(jnp.asarray(w)))[: u.size]
    assert slope.mean() == pytest.approx(1.0, abs=2e-3)
    assert slope.argmax() in (999, 1000, 1001) and slope[0] == pytest.approx(
        3 * (1 - np.tanh(3) ** 2) / np.tanh(3), 1e-4
    )
    flat = Quantizer(qjax.format("int4_g2008"), scales="frozen", estimator=soft_round(1e-2))
    np.testing.assert_allclose(jax.grad(lambda w: flat.fake(w, {}, kept).sum())(jnp.asarray(w)), 1.0, atol=1e-3)


def test_estimators_by_name():
    assert estimator("clipped(levels)") == clipped("levels") and estimator("ste") == ste()
    for bad in ("stee", "ewgs(x)", "ewgs(-1)", "clipped(here)", "trust(0)", "soft_round(0)"):
        with pytest.raises(UserError):
            estimator(bad)


# The errors that qat.md's table of weights in groups of 128 gives: relative, Gaussian and Laplace.

ORACLE = {
    "symmetric absmax": ("int{}_g128", "absmax", {2: (0.585, 0.615), 3: (0.074, 0.125), 4: (0.0136, 0.0252)}),
    "symmetric, least squares": ("int{}_g128_mse", "own", {2: (0.145, 0.198), 3: (0.038, 0.064), 4: (0.0101, 0.0187)}),
    "min-max": ("uint{}_g128", "own", {2: (0.253, 0.322), 3: (0.046, 0.074), 4: (0.0100, 0.0169)}),
    "shrunk range": ("uint{}_g128_mse", "own", {2: (0.136, 0.179), 3: (0.035, 0.056), 4: (0.0090, 0.0152)}),
    "SEQ absmax": ("int{}_g128_mid", "seq", {2: (0.170, 0.402), 3: (0.043, 0.087), 4: (0.0107, 0.0207)}),
    "SEQ, least squares": ("int{}_g128_mid_mse", "own", {2: (0.116, 0.189), 3: (0.035, 0.064), 4: (0.0098, 0.0189)}),
}


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((256, 2048)).astype(np.float32), rng.laplace(size=(256, 2048)).astype(np.float32)]


def relative_error(x, name, rule, per="group"):
    q = Quantizer(qjax.format(name), rule=ScaleRule(rule, per))
    d = np.asarray(q.fake(jnp.asarray(x), {}, {}), np.float64) - x
    return (d**2).sum() / (x.astype(np.float64) ** 2).sum()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scheme", ORACLE)
def test_error_at_step_0(scheme, bits, draws):
    name, rule, table = ORACLE[scheme]
    for x, expected in zip(draws, table[bits], strict=True):
        assert relative_error(x, name.format(bits), rule) == pytest.approx(expected, rel=0.05)


def test_ternary_errors(draws):
    gaussian, laplace = draws
    assert relative_error(gaussian, "TQ2_0", "absmean") == pytest.approx(0.260, rel=0.05)
    assert relative_error(laplace, "TQ2_0", "absmean") == pytest.approx(0.387, rel=0.05)
    assert relative_error(gaussian, "TQ2_0", "twn") == pytest.approx(0.190, rel=0.05)  # 0.187 is the optimum


def test_rms_is_near_the_best_scale_for_gaussian_weights(draws):
    for bits, best in ((2, 0.116), (3, 0.035)):
        assert relative_error(draws[0], f"int{bits}_g128_mid", "rms") < best * 1.06


def test_bitnet_has_one_scale_for_a_matrix():
    w = masters().T
    q = Quantizer(qjax.format("TQ2_0"), rule=ScaleRule("absmean", "matrix"))
    w_hat = np.asarray(q.fake(w, {}, {}))
    gamma = np.abs(np.asarray(w, np.float64)).mean()
    levels = np.unique(np.abs(w_hat))
    assert levels.size == 2 and levels[0] == 0 and levels[1] == pytest.approx(gamma, rel=1e-3)
    np.testing.assert_array_equal(w_hat / levels[1], np.clip(np.round(np.asarray(w) / levels[1]), -1, 1))


@pytest.mark.parametrize(
    "kind, name, message",
    [
        ("twn", "Q4_0", "three levels"),
        ("rms", "NF4", "even levels"),
        ("rms", "int2_g64", "even levels"),
        ("absmax", "uint4_g64", "offsets too"),
    ],
)
def test_rules_say_what_they_are_for(kind, name, message):
    with pytest.raises(UserError, match=message):
        Quantizer(qjax.format(name), rule=ScaleRule(kind)).fake(masters().T, {}, {})
