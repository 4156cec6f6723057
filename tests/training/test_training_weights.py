"""A tree of weights in training: what a plan says, exact export, gradients where they belong, inputs and caches too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.models.cache import empty_cache
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.plan import Plan
from qjax.reparam.hadamard import randomized
from qjax.training.grid import weights
from qjax.training.grid.activations import quantized_cache, quantized_inputs, token_quant
from qjax.training.grid.quantizer import Quantizer

CONFIG = DecoderConfig(
    vocab=64, dim=64, hidden=96, layers=3, heads=2, kv_heads=1, head_dim=32, context=64, tied=True
)  # fmt: skip


def apply(params, tokens):
    return Decoder(CONFIG).apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (2, 12), 0, CONFIG.vocab)


@pytest.fixture(scope="module")
def params(tokens):
    return Decoder(CONFIG).init(jax.random.key(1), tokens)["params"]


def paths_with(tree, test):
    return {p for p, leaf in weights.leaves_by_path(tree).items() if test(leaf)}


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["refit", "frozen", "learned"])
def test_export_is_what_trained(params, tokens, scales):
    quantizers = weights.quantizers_of(
        params,
        Plan.from_dict({"rules": {"layers_*/attn/*": "Q4_0", "layers_*": "int3_g32", "*": "Q8_0"}}),
        scales=scales,
    )
    assert len(quantizers) == 3 * 7 + 1 and quantizers["embed/embedding"].axis == -1
    trained, kept = weights.init(params, quantizers)
    trained = jax.tree.map(lambda t: t + 0.03, trained)

    def loss(params, trained):
        fake = weights.fake_params(params, quantizers, trained, kept)
        return -jax.nn.log_softmax(apply(fake, tokens))[..., 0].mean(), fake

    (value, fake), (by_params, by_scales) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, trained)
    packed = weights.packed_params(params, quantizers, trained, kept)
    assert paths_with(packed, qjax.is_qtensor) == set(quantizers)
    weights.check_same_values(packed, fake)
    same_path = jax.jit(lambda p: -jax.nn.log_softmax(apply(p, tokens))[..., 0].mean())
    decoded = jax.tree.map(lambda x: qjax.dequantize(x) if qjax.is_qtensor(x) else x, packed, is_leaf=qjax.is_qtensor)
    assert float(same_path(decoded)) == float(same_path(fake)) == pytest.approx(float(value), abs=1e-6)
    for path, g in weights.leaves_by_path(by_params).items():
        assert float(jnp.abs(g).max()) > 0, path
    for path, g in weights.leaves_by_path(by_scales).items():
        assert path.endswith("offset") or float(jnp.abs(g).max()) > 0, path
    assert bool(by_scales) == (scales == "learned")


@pytest.mark.slow
def test_what_differs_is_found(params):
    quantizers = weights.quantizers_of(params, Plan.from_dict({"rules": {"layers_*": "Q4_0", "*": "keep"}}))
    packed = weights.packed_params(params, quantizers, {}, {})
    fake = weights.fake_params(params, quantizers, {}, {})
    fake["layers_1"]["mlp"]["up"]["kernel"] = fake["layers_1"]["mlp"]["up"]["kernel"].at[3, 5].add(1e-6)
    with pytest.raises(UserError, match="layers_1/mlp/up/kernel: 1 of"):
        weights.check_same_values(packed, fake)


@pytest.mark.slow
def test_importance_and_refresh(params):
    quantizers = weights.quantizers_of(
        params, Plan.from_dict({"rules": {"layers_*/attn/q/kernel": "int2_g64_mid_mse", "*": "keep"}}), scales="frozen"
    )
    path = "layers_0/attn/q/kernel"
    h = jnp.asarray(np.random.default_rng(0).uniform(0.01, 9, 64), jnp.float32)
    plain, weighted = weights.init(params, quantizers)[1], weights.init(params, quantizers, {path: h})[1]
    assert float(jnp.abs(plain[path]["scales"]["scale"] - weighted[path]["scales"]["scale"]).max()) > 0
    doubled = jax.tree.map(lambda p: 2 * p, params)
    renewed = weights.refit(doubled, quantizers, plain)
    np.testing.assert_allclose(renewed[path]["scales"]["scale"], 2 * plain[path]["scales"]["scale"], rtol=2e-3)
    # a refresh fits by the same importance, and values are those of the scales alone
    again = weights.refit(doubled, quantizers, weighted)
    anew = weights.init(doubled, quantizers, {path: h})[1]
    jax.tree.map(np.testing.assert_array_equal, again, anew)
    assert float(jnp.abs(again[path]["scales"]["scale"] - renewed[path]["scales"]["scale"]).max()) > 0
    values, packed = (f(doubled, quantizers, {}, again) for f in (weights.fake_params, weights.packed_params))
    weights.check_same_values(packed, values)


@pytest.mark.slow
def test_measures(params):
    quantizers = weights.quantizers_of(params, Plan.from_dict({"rules": {"layers_*": "Q4_0", "*": "keep"}}))
    out, codes = weights.statistics(params, quantizers, {}, {})
    fake = weights.fake_params(params, quantizers, {}, {})
    leaves, faked = weights.leaves_by_path(params), weights.leaves_by_path(fake)
    noise = sum(float(((faked[p] - leaves[p]) ** 2).sum()) for p in quantizers)
    power = sum(float((leaves[p] ** 2).sum()) for p in quantizers)
    assert float(out["quant_noise"]) == pytest.approx(np.sqrt(noise / power), rel=1e-4)
    assert weights.flip_rate(codes, codes) == 0
    other = weights.statistics(jax.tree.map(lambda p: jnp.roll(p, 1, axis=0), params), quantizers, {}, {})[1]
    assert 0.5 < weights.flip_rate(codes, other) <= 1


@pytest.mark.slow
def test_plans_that_do_nothing_are_errors(params):
    with pytest.raises(UserError, match="matches no weight"):
        weights.quantizers_of(params, Plan.from_dict({"rules": {"blocks_*": "Q4_0", "*": "keep"}}))
    with pytest.raises(UserError, match="nothing to train through"):
        weights.quantizers_of(params, Plan.from_dict({"rules": {"*": "keep"}}))
    with pytest.raises(UserError, match="no weight is called 'x'"):
        weights.fake_params(params, {"x": Quantizer(qjax.format("Q4_0"))}, {}, {})


# Activations


def test_token_quant_is_what_act_runs():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 64)), jnp.float32)
    s = np.abs(np.asarray(x)).max(-1, keepdims=True) / np.float32(7)
    np.testing.assert_allclose(token_quant("int4", x), np.round(np.asarray(x) / s) * s, rtol=1e-6)
    g = jax.grad(lambda x: (token_quant("int4", x) * x[::-1]).sum())(x)
    np.testing.assert_allclose(
        g, x[::-1] + token_quant("int4", x)[::-1], rtol=1e-5
    )  # straight through, and the other use


@pytest.mark.slow
def test_rounded_inputs_by_pattern(params, tokens):
    plain = apply(params, tokens)
    all_of = quantized_inputs(apply, "int4")(params, tokens)
    some = quantized_inputs(apply, "int4", ["*/down/kernel"])(params, tokens)
    assert float(jnp.abs(all_of - plain).max()) > float(jnp.abs(some - plain).max()) > 0
    eight = quantized_inputs(apply, "int8")(params, tokens)
    assert float(jnp.abs(eight - plain).max()) < 0.2 * float(jnp.abs(all_of - plain).max())
    with pytest.raises(UserError, match="fits no weight"):
        quantized_inputs(apply, "int4", ["*/dawn/*"])(params, tokens)
    grads = jax.jit(jax.grad(lambda p: quantized_inputs(apply, "int4")(p, tokens).mean()))(params)
    assert not paths_with(grads, lambda g: not float(jnp.abs(g).max()) > 0)


@pytest.mark.slow
def test_prefill_and_decoding_see_the_same_cache(params, tokens):
    model = Decoder(CONFIG, stored=quantized_cache("Q8_0", "Q4_0"))
    full = model.apply({"params": params}, tokens)
    assert float(jnp.abs(full - apply(params, tokens)).max()) > 1e-4
    cache, outs = empty_cache(CONFIG, 2, 16), []
    for i in range(tokens.shape[1]):
        logits, cache = model.apply({"params": params}, tokens[:, i : i + 1], cache)
        outs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), full, atol=2e-5)
    values = np.asarray(cache["layers_0"]["v"])[:, : tokens.shape[1]]
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(values, "Q4_0")), values)  # on the grid already
    grads = jax.grad(lambda p: model.apply({"params": p}, tokens).mean())(params)
    assert float(jnp.abs(grads["layers_1"]["attn"]["k"]["kernel"]).max()) > 0


def test_rotated_keys_lose_less_and_answer_rotated_queries(params, tokens, rng):
    exact = Decoder(CONFIG, stored=quantized_cache("hadamard() >> F32")).apply({"params": params}, tokens)
    np.testing.assert_allclose(exact, apply(params, tokens), rtol=1e-5, atol=1e-5)
    k = rng.standard_normal((64, 2, 32)).astype(np.float32)
    k[..., 5] *= 20.0  # a large channel, as keys have them
    plain, turned = (quantized_cache(line)("k", jnp.asarray(k)) for line in ("Q4_0", "hadamard(seed=3) >> Q4_0"))
    small = np.arange(32) != 5
    assert np.square(turned - k)[..., small].mean() < 0.4 * np.square(plain - k)[..., small].mean()
    # What the cache holds are blocks of R k; a query turned likewise finds the same scores.
    q, held = rng.standard_normal(32).astype(np.float32), randomized(jnp.asarray(k), 3)
    scores = qjax.dequantize(qjax.quantize(held, "Q4_0")) @ randomized(jnp.asarray(q), 3)
    np.testing.assert_allclose(np.asarray(turned) @ q, scores, rtol=1e-4, atol=1e-4)
    ones = jax.grad(lambda k: quantized_cache("hadamard(seed=3) >> Q4_0")("k", k).sum())(jnp.asarray(k))
    np.testing.assert_allclose(ones, 1.0, atol=1e-5)
    with pytest.raises(UserError, match="only a rotation may stand in front"):
        quantized_cache("smooth() >> Q4_0")


def test_what_quantization_computes_on_the_way_is_in_memory_for_few_weights():
    """Of a real decoder all weights at once are forty times their size; one after another they are a few times."""
    plan = Plan.from_dict({"rules": {"*/kernel": "int2_g64_mid_mse"}})
    shapes = {f"layers_{i}": {"kernel": jax.ShapeDtypeStruct((1024, 2048), jnp.float32)} for i in range(16)}
    quantizers = weights.quantizers_of(shapes, plan, scales="learned")
    trained, constants = jax.eval_shape(lambda params: weights.init(params, quantizers), shapes)

    def loss(params, trained, constants):
        fake = weights.fake_params(params, quantizers, trained, constants)
        return sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(fake))

    program = jax.jit(jax.grad(loss, argnums=1)).lower(shapes, trained, constants).compile()
    assert program.memory_analysis().temp_size_in_bytes < 6 * 16 * 4 * 1024 * 2048
