"""Statistics of weights that the program joins, or multiplies group by group, equal explicit ones."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import qjax
from qjax.calibrate import observe
from qjax.lifting import replace_inputs, substitute


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / shape[-2] ** 0.5, jnp.float32)


def moment(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def test_fused_qkv_and_stacked_experts_are_seen_part_by_part(rng):
    params = {k: normal(rng, 16, n) for k, n in (("q", 8), ("k", 4), ("v", 4), ("a", 6), ("b", 6))}

    def apply(p, x):
        y = x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
        both = jnp.stack([x, jnp.tanh(x)])
        return y, jnp.einsum("eti,eio->eto", both, jnp.stack([p["a"], p["b"]]))

    x = normal(rng, 50, 16)
    stats = observe(apply, params, [x])
    assert set(stats) == set(params) and stats["q"].axis == -2
    for name in params:
        np.testing.assert_allclose(stats[name].H, moment(jnp.tanh(x) if name == "b" else x), rtol=1e-4, atol=1e-6)
    doubled = substitute(apply, lambda use, w: 2.0 * w)(params, x)
    halved = replace_inputs(apply, lambda use, x: 0.5 * x)(params, x)
    for got, want, times in zip(
        jax.tree.leaves((doubled, halved)), 2 * apply(params, x), (2, 2, 0.5, 0.5), strict=True
    ):
        np.testing.assert_allclose(got, times * want, rtol=1e-4, atol=1e-5)


def test_ragged_experts_have_the_sums_of_their_rows(rng):
    """The last two rows belong to no group."""
    params, x, sizes = {"w": normal(rng, 3, 16, 8)}, normal(rng, 30, 16), jnp.array([12, 5, 11])
    stats = observe(lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes), params, [(x, sizes)])["w"]
    for e, (a, b) in enumerate(((0, 12), (12, 17), (17, 28))):
        np.testing.assert_allclose(stats.H[e], moment(x[a:b]), rtol=1e-4, atol=1e-6)
    assert stats.count.tolist() == [12, 5, 11] and stats.axis == -2


def test_an_lstm_is_calibrated_and_rounded_gate_by_gate(rng):
    model, x = nn.RNN(nn.OptimizedLSTMCell(32)), normal(rng, 3, 5, 64)
    params = model.init(jax.random.key(0), x)["params"]

    def apply(p, x):
        return model.apply({"params": p}, x)

    stats = observe(apply, params, [x])
    kernels = {f"cell/{a}{gate}/kernel" for a in "ih" for gate in "ifgo"}
    assert set(stats) == kernels
    states = np.asarray(apply(params, x))[:, :-1]  # the zero state before the first step is no token
    for path in kernels:
        seen = x if path.startswith("cell/i") else states
        np.testing.assert_allclose(stats[path].H, moment(seen), rtol=1e-3, atol=1e-5)
    q, _ = qjax.quantize_params(params, "Q8_0", stats, recipe="gptq")
    y = apply(params, x)
    got = jax.jit(qjax.lift(apply))(q, x)
    assert 0 < float(jnp.linalg.norm(got - y)) < 0.02 * float(jnp.linalg.norm(y))
