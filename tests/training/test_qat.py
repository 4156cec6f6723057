"""`qjax.qat`: any model, any loss, any optimizer; what is exported is what trained, and it gets better."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.errors import UserError
from qjax.training.grid.estimators import clipped

D = 64


class Classifier(nn.Module):
    """Linen: an embedding, vectors, kernels (in, out)."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, D)(tokens).mean(-2)
        x = nn.LayerNorm()(nn.Dense(2 * D)(x))
        return nn.Dense(8)(jax.nn.gelu(x))


def linen(rng):
    tokens = jnp.asarray(rng.integers(0, 32, (64, 6)), jnp.int32)
    params = Classifier().init(jax.random.key(1), tokens)["params"]
    return lambda p, x: Classifier().apply({"params": p}, x), params, tokens


def plain(rng):
    """Rows (out, in), as no flax model stores them."""
    p = {n: jnp.asarray(rng.normal(size=(D, D)) / 8, jnp.float32) for n in ("a", "b")}
    x = jnp.asarray(rng.normal(size=(64, D)), jnp.float32)
    return lambda p, x: jnp.tanh(x @ p["a"].T) @ p["b"].T, p, x


def trained(tree, loss, steps=30, rate=3e-3):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

    @jax.jit
    def step(tree, state):
        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    with jax.numpy_dtype_promotion("standard"):  # as optax, and users, have it
        state = optimizer.init(tree)
        for _ in range(steps):
            tree, state = step(tree, state)
    return tree


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "scales, format", [("refit", "Q4_0"), ("frozen", "NF4"), ("learned", "int2_g64_mid_mse"), ("learned", "uint3_g32")]
)
@pytest.mark.parametrize("model", [linen, plain])
def test_what_is_exported_is_what_trained(rng, model, scales, format):
    apply, params, x = model(rng)
    start, fake, export = qjax.qat(apply, params, format, x, scales=scales)
    target = apply(params, x) + 0.3 * jnp.asarray(rng.normal(size=apply(params, x).shape), jnp.float32)

    def loss(tree):
        return jnp.mean(jnp.square(apply(fake(tree), x) - target))

    tree = trained(start, loss)
    assert loss(tree) < 0.9 * loss(start)
    packed = export(tree)
    found = jax.tree.leaves(packed, is_leaf=qjax.is_qtensor)
    assert any(qjax.is_qtensor(q) for q in found)
    for values in (fake(tree), jax.jit(lambda fake, tree: fake(tree))(fake, tree)):
        for q, w in zip(found, jax.tree.leaves(values), strict=True):
            np.testing.assert_array_equal(qjax.dequantize(q) if qjax.is_qtensor(q) else q, w)
    lifted = jax.jit(qjax.lift(apply))(packed, x)
    np.testing.assert_allclose(lifted, apply(fake(tree), x), rtol=1e-4, atol=1e-5)
    if scales == "learned":
        assert all(float(jnp.max(jnp.abs(s))) > 0 for s in jax.tree.leaves(tree["scales"]))
    else:
        assert tree["scales"] == {}


def test_axes_are_those_of_the_function(rng):
    apply, params, x = plain(rng)
    _, _, export = qjax.qat(apply, params, "Q8_0", x)
    assert export(qjax.qat(apply, params, "Q8_0", x).start)["a"].axis == -1
    start, _, export = qjax.qat(apply, params, "Q8_0", jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert export(start)["b"].axis == -1
    start, _, export = qjax.qat(apply, params, "Q8_0")  # by name: a flax kernel
    assert export(start)["a"].axis == -2


def test_a_kernel_of_three_axes_trains_along_its_own_or_is_kept(rng):
    """The first axis is contracted: blocks run along it. Two axes at once are refused, and may be kept."""
    w = {"heads": jnp.asarray(rng.normal(size=(D, 2, 8)), jnp.float32), "out": {}}
    x = jnp.asarray(rng.normal(size=(4, D)), jnp.float32)
    w["out"]["kernel"] = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)

    def apply(p, x):
        return jnp.tile(jnp.tensordot(x, p["heads"], 1).reshape(4, -1), (1, 4)) @ p["out"]["kernel"]

    start, fake, export = qjax.qat(apply, w, "int4_g32", x)
    assert export(start)["heads"].axis == -3
    np.testing.assert_array_equal(qjax.dequantize(export(start)["heads"]), fake(start)["heads"])
    both = {"w": jnp.asarray(rng.normal(size=(4, 16, 8)), jnp.float32), "v": w["out"]["kernel"]}

    def merged(p, x):
        return jnp.einsum("thd,hdo->to", x.reshape(4, 4, -1), p["w"]).sum() + (x @ p["v"]).sum()

    with pytest.raises(UserError, match=r"w: is contracted along \(-3, -2\) together.*keep it in the plan"):
        qjax.qat(merged, both, "int4_g32", x)
    plan = qjax.Plan((qjax.Rule("w", "keep"), qjax.Rule("*", "int4_g32")))
    start, fake, export = qjax.qat(merged, both, plan, x)
    assert fake(start)["w"] is start["weights"]["w"] and qjax.is_qtensor(export(start)["v"])


def test_it_goes_on_from_any_recipe(rng):
    apply, params, x = plain(rng)
    axes = qjax.contracted_axes(apply, params, x)
    stats = qjax.observe(apply, params, [x], kinds=("H",))
    recipe = "nearest('h') >> ldlq()"
    rounded, _ = qjax.quantize_params(params, "int2_g64_mid_mse", stats, recipe=recipe, axes=axes)
    start, fake, export = qjax.qat(apply, params, "int2_g64_mid_mse", x, scales="learned", rounded=rounded)
    nearest = qjax.qat(apply, params, "int2_g64_mid_mse", x)
    for path in params:
        w_hat = qjax.dequantize(rounded[path])
        np.testing.assert_array_equal(fake(start)[path], w_hat)
        assert (w_hat != nearest.fake(nearest.start)[path]).any()
        assert (start["weights"][path] != w_hat).any()  # on their way to the float weights, inside of their cells
    assert export(start)["a"].format.name == "int2_g64_mid_mse"


@pytest.mark.slow
def test_importance_and_estimator_reach_the_weights(rng):
    apply, params, x = plain(rng)
    weight = {p: jnp.asarray(rng.uniform(0.01, 1, D) ** 4, jnp.float32) for p in params}
    start, fake, _ = qjax.qat(apply, params, "int2_g64_mid_mse", x, scales="frozen", importance=weight)
    without = qjax.qat(apply, params, "int2_g64_mid_mse", x, scales="frozen")
    assert (fake(start)["a"] != without.fake(start)["a"]).any()
    far = {"weights": {p: 100 * w for p, w in params.items()}, "scales": {}}
    kinds = (None, clipped())
    through = [qjax.qat(apply, params, "int2_g64_mid_mse", x, scales="frozen", estimator=e).fake for e in kinds]
    sums = [sum(jax.tree.leaves(jax.tree.map(jnp.sum, jax.grad(lambda t, f=f: f(t)["a"].sum())(far)))) for f in through]
    assert sums[0] == D * D and sums[1] < 0.2 * D * D  # beyond the grid nothing passes a clipped estimator


def test_mistakes_name_the_weight(rng):
    apply, params, x = plain(rng)
    packed = {"a": qjax.quantize(params["a"], "Q4_0"), "b": params["b"]}
    with pytest.raises(UserError, match="a: is packed already; train its floats"):
        qjax.qat(apply, packed, "Q4_0", x)
    with pytest.raises(UserError, match="a: refit scales would not keep a recipe's grid"):
        qjax.qat(apply, params, "Q4_0", x, rounded=packed)
    plan = qjax.Plan((qjax.Rule("a", "keep"), qjax.Rule("b", "Q4_0")))
    with pytest.raises(UserError, match="a: the start has it in Q4_0, here it trains in float"):
        qjax.qat(apply, params, plan, x, scales="frozen", rounded=packed)
    with pytest.raises(UserError, match="matches no weight"):
        qjax.qat(apply, params, qjax.Plan((qjax.Rule("c", "Q4_0"),)), x)
