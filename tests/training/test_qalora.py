"""QA-LoRA against numpy in float64: pooled inputs, zeros that take the adapter in, and an export that is exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_arrays import equal, f64, normal

import qjax
from qjax.errors import UserError
from qjax.formats.integer import affine
from qjax.lifting import lift
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.training.adapters.lora import Adapter, apply_adapted, init_adapters
from qjax.training.adapters.qalora import apply_pooled, init_pooled, merge_zeros, pooled_weight

KEY = jax.random.key(7)
PATH = "layers_0/kernel"
FORMATS = ["uint4_g32_zf16", "uint2_g32_mse_zbf16", "uint4_g32_f32_zf16", "uint3_g32_u6x2_zf16", "Q4_1", "Q5_1"]


def linear(p, x):
    return x @ p["layers_0"]["kernel"]


def site(format, n=128, out=48, rank=3, alpha=1.5):
    """One packed kernel, and an adapter of it that is not zero."""
    params = {"layers_0": {"kernel": qjax.quantize(normal(0, n, out), format, axis=0)}}
    made = init_pooled(params, rank, alpha, key=KEY)
    return params, {p: dataclasses.replace(m, b=normal(1, *m.b.shape, size=0.5)) for p, m in made.items()}


def beside(params, adapters, x):
    """The paper's forward: the adapter on inputs that are summed by groups, its rounding left to the merge."""
    every = {p: dataclasses.replace(m, a=jnp.repeat(m.a, 32, axis=-2)) for p, m in adapters.items()}
    return apply_adapted(linear, params, every, x)


def groups(m):
    """scale A B in float64: [G, out]."""
    return m.scale * f64(m.a) @ f64(m.b)


def test_start():
    params, _ = site("uint4_g32_zf16")
    (m,) = init_pooled(params, 3, 1.5, key=KEY).values()
    assert (m.a.shape, m.b.shape, m.scale) == ((4, 3), (3, 48), 0.5)
    assert not np.any(m.b) and 0.3 < np.abs(m.a).max() * np.sqrt(128) <= 1
    merged = merge_zeros(params, {PATH: m})
    assert equal(merged.params, params) and merged.errors == {PATH: 0.0}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("format", FORMATS)
def test_merge_moves_zeros_and_nothing_else(format):
    params, adapters = site(format)
    merged = merge_zeros(params, adapters)
    old, new, (m,) = params["layers_0"]["kernel"], merged.params["layers_0"]["kernel"], adapters.values()
    assert (type(new), new.format, new.axis, new.applied, new.nbytes) == (
        qjax.QTensor,
        old.format,
        old.axis,
        (),
        old.nbytes,
    )
    (was, codes), (now, kept) = (q.format.unpack(q.leaves) for q in (old, new))
    assert np.array_equal(codes, kept)
    assert all(np.array_equal(was[k], now[k]) for k in was if k not in ("zero", "m"))
    s, offset = (f64(v) for v in old.format.columns(was, codes.shape))
    if "zero" in was:
        want = f64(was["zero"]) - groups(m).T / s
        digits, got = 8 if "bf16" in format else 11, f64(now["zero"])
    else:
        want, digits, got = offset + groups(m).T, 11, f64(now["m"])
    assert np.all(np.abs(got - want) <= 1.001 * np.maximum(np.abs(want) * 2.0**-digits, 2.0**-24))
    assert np.any(got != (f64(was["zero"]) if "zero" in was else offset))
    # the error that is reported is that of the rounding alone
    full = f64(qjax.dequantize(old)) + np.repeat(groups(m), 32, axis=0)
    error = np.linalg.norm(f64(qjax.dequantize(new)) - full) / np.linalg.norm(full)
    assert merged.semantics == "exact-zeros" and 0 < error < (0.02 if "bf16" in format else 0.003)
    assert merged.errors[PATH] == pytest.approx(error, rel=1e-2)
    x = normal(2, 5, 128)
    out = beside(params, adapters, x)
    assert np.linalg.norm(lift(linear)(merged.params, x) - out) < 3 * error * np.linalg.norm(out)


def test_merge_is_exact_where_the_zeros_are_storable():
    fmt = affine(4, 32, zero="f16")
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (48, 128))
    codes.reshape(48, 4, 32)[..., :2] = (0, 15)  # every group uses its whole range, so that its scale is known
    w = 0.25 * (codes - 5.0)
    params = {"layers_0": {"kernel": qjax.quantize(jnp.asarray(w.T, jnp.float32), fmt, axis=0)}}
    a, b = rng.integers(-3, 4, (4, 2)) / 8, rng.integers(-3, 4, (2, 48)) / 4
    adapters = {PATH: Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 0.5)}
    merged = merge_zeros(params, adapters)
    assert merged.errors == {PATH: 0.0}
    assert np.array_equal(
        qjax.dequantize(merged.params["layers_0"]["kernel"]), w.T + np.repeat(0.5 * a @ b, 32, axis=0)
    )
    x = normal(2, 5, 128)
    out = beside(params, adapters, x)
    np.testing.assert_allclose(lift(linear)(merged.params, x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("format", FORMATS)
def test_the_merged_model_is_the_trained_one_bit_for_bit(format):
    params, adapters = site(format)
    (m,), q = adapters.values(), params["layers_0"]["kernel"]
    stored = qjax.dequantize(merge_zeros(params, adapters).params["layers_0"]["kernel"])
    assert np.array_equal(pooled_weight(PATH, q, m), stored)
    busy = jax.jit(lambda q, m: (jnp.cos(pooled_weight(PATH, q, m)), pooled_weight(PATH, q, m)))
    assert np.array_equal(busy(q, m)[1], stored)
    x = normal(2, 5, 128)
    got = jax.jit(lambda m: apply_pooled(linear, params, m, x))(adapters)
    np.testing.assert_allclose(got, x @ stored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["uint4_g32_zf16", "Q4_1"])
def test_gradients_go_straight_through_the_rounding_of_zeros(format):
    """Of a linear loss <c, y>: dA = scale X^T c B^T and dB = scale A^T X^T c, X the pooled inputs."""
    params, adapters = site(format)
    (m,), x, c = adapters.values(), normal(2, 5, 128), normal(3, 5, 48)
    G = f64(x).reshape(5, 4, 32).sum(-1).T @ f64(c)
    (g,) = jax.grad(lambda m: jnp.sum(c * apply_pooled(linear, params, m, x)))(adapters).values()
    np.testing.assert_allclose(g.a, m.scale * G @ f64(m.b).T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(g.b, m.scale * f64(m.a).T @ G, rtol=1e-4, atol=1e-3)


def test_a_group_without_a_scale_stays_as_it_is():
    w = normal(0, 128, 8).at[:32].set(0.0)
    params = {"layers_0": {"kernel": qjax.quantize(w, "uint4_g32_zf16", axis=0)}}
    adapters = {PATH: Adapter(normal(1, 4, 2), normal(2, 2, 8), 1.0)}
    merged = qjax.dequantize(merge_zeros(params, adapters).params["layers_0"]["kernel"])
    assert np.all(np.isfinite(merged)) and not np.any(merged[:32]) and np.all(merged[32:] != w[32:])


def test_rows_and_stacks():
    w, m = normal(0, 128, 48), Adapter(normal(1, 4, 2), normal(2, 2, 48), 0.1)
    kernel, rows = qjax.quantize(w, "Q4_1", axis=0), qjax.quantize(w.T, "Q4_1")
    merged = merge_zeros({"k": kernel, "r": rows}, {"k": m, "r": m})
    assert np.array_equal(qjax.dequantize(merged.params["k"]), qjax.dequantize(merged.params["r"]).T)
    assert merged.errors["k"] == pytest.approx(merged.errors["r"], rel=1e-3)
    again = qjax.from_bytes("Q4_1", qjax.to_bytes(merged.params["r"]), rows.shape)  # what a GGUF file holds
    assert equal(again, merged.params["r"])
    assert np.array_equal(pooled_weight("r", rows, m), qjax.dequantize(merged.params["r"]))
    pair = jax.tree.map(lambda a: jnp.stack([a, a]), (kernel, m))
    assert np.array_equal(pooled_weight("k", *pair)[1], qjax.dequantize(merged.params["k"]))
    assert init_pooled({"layers_0": {"kernel": pair[0]}}, 2, key=KEY)[PATH].a.shape == (2, 4, 2)


@pytest.mark.parametrize("format", ["NF4", "uint4_g32", "int4_g32", "Q4_0", "Q4_K", None])
def test_formats_without_float_zeros_are_refused(format):
    w = normal(0, 256, 48)
    params = {"layers_0": {"kernel": w if format is None else qjax.quantize(w, format, axis=0)}}
    with pytest.raises(UserError, match=f"layers_0/kernel is {format or 'dense'}: exact merging wants .* float zeros"):
        init_pooled(params, 2, key=KEY)
    with pytest.raises(UserError, match="float zeros"):
        merge_zeros(params, init_adapters(params, 2, key=KEY))


def test_mistakes_are_named():
    params, adapters = site("uint4_g32_zf16")
    with pytest.raises(UserError, match="layers_0/kernel, by groups: rank 5 does not fit 4 x 48"):
        init_pooled(params, 5, key=KEY)
    whole = init_adapters(params, 3, key=KEY)
    with pytest.raises(UserError, match=r"a \(128, 3\) .* does not fit; 4 groups want a \(4, 3\) and b \(3, 48\)"):
        merge_zeros(params, whole)
    with pytest.raises(UserError, match="'nowhere'"):
        merge_zeros(params, {"nowhere": adapters[PATH]})


@pytest.mark.slow
def test_a_decoder_trains_and_exports_what_it_trained():
    config = DecoderConfig(vocab=48, dim=64, hidden=128, layers=1, heads=4, kv_heads=2, head_dim=16)
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    layer = params["layers_0"]
    packed = jax.tree.map(lambda w: qjax.quantize(w, "uint3_g16_zf16", axis=-2), layer["mlp"])
    base = params | {"layers_0": layer | {"mlp": packed}}
    before = jax.tree.map(np.array, base)
    adapters = init_pooled(base, 4, 16.0, patterns=("layers_*/mlp/*/kernel",), key=KEY)
    assert len(adapters) == 3
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (4, 16)), jnp.int32)

    def apply(p, tokens):
        return model.apply({"params": p}, tokens)

    def cost(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    def loss(adapters):
        return cost(apply_pooled(apply, base, adapters, tokens))

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    state, values = optimizer.init(adapters), []
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        for _ in range(12):
            adapters, state, value = step(adapters, state)
            values.append(float(value))
    assert values[-1] < 0.8 * values[0] and equal(base, before)
    merged = merge_zeros(base, adapters).params
    np.testing.assert_allclose(jax.jit(lambda p: cost(lift(apply)(p, tokens)))(merged), loss(adapters), rtol=1e-5)
