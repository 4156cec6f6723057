"""LoRA on frozen weights, and the merges that round: against numpy in float64 and explicit computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_arrays import equal, f64, normal

import qjax
from qjax.errors import UserError
from qjax.lifting import lift, report
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.training.adapters.lora import Adapter, apply_adapted, init_adapters, lora_weight, map_adapted
from qjax.training.adapters.merging import merge_fake_quantized, merge_requantized

CONFIG = DecoderConfig(vocab=48, dim=64, hidden=128, layers=1, heads=4, kv_heads=2, head_dim=16)
KEY = jax.random.key(7)


def mlp(p, x):
    return jnp.tanh(x @ p["layers_0"]["up"]["kernel"]) @ p["layers_0"]["down"]["kernel"]


def mlp_params():
    return {"layers_0": {"up": {"kernel": normal(0, 64, 128)}, "down": {"kernel": normal(1, 128, 32)}}}


def pack(params, format):
    return jax.tree.map(lambda w: qjax.quantize(w, format, axis=-2), params)


def trained(adapters, seed=3):
    """The same adapters with random B."""
    return {
        p: dataclasses.replace(m, b=normal(seed + i, *m.b.shape, size=0.3)) for i, (p, m) in enumerate(adapters.items())
    }


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return lambda p, tokens: model.apply({"params": p}, tokens), params


# --- the adapters --------------------------------------------------------------------------------------------------


def test_default_adapters_sit_on_every_matrix_but_embedding_and_head(decoder):
    apply, params = decoder
    adapters = init_adapters(params, rank=8, alpha=16.0, key=KEY)
    dots = {use.path: use.shape for use in report(apply, params, jnp.zeros((1, 4), jnp.int32)) if use.kind == "dot"}
    del dots["head/kernel"]
    assert set(adapters) == set(dots)
    for path, m in adapters.items():
        n, out = dots[path]
        a = f64(m.a)
        assert (a.shape, m.b.shape, m.scale) == ((n, 8), (8, out), 2.0)
        assert not np.any(m.b)
        assert np.abs(a).max() <= n**-0.5 and abs(a.std() * np.sqrt(3 * n) - 1) < 0.1  # uniform, to its bounds


def test_an_adapter_depends_on_key_and_path_alone():
    params = mlp_params()
    both = init_adapters(params, 4, key=KEY)
    one = init_adapters(params, 4, patterns=("re:.*/down/kernel",), key=KEY)
    assert list(one) == ["layers_0/down/kernel"] and equal(one["layers_0/down/kernel"], both["layers_0/down/kernel"])
    assert not equal(
        both["layers_0/down/kernel"].a, init_adapters(params, 4, key=jax.random.key(8))["layers_0/down/kernel"].a
    )
    assert not np.array_equal(both["layers_0/up/kernel"].a[:32], both["layers_0/down/kernel"].a[:32])


def test_shapes_are_logical_for_packed_stacked_and_abstract_weights():
    w = normal(0, 64, 96)
    params = {
        "kernel": qjax.quantize(w, "NF4_dq", axis=0),
        "rows": qjax.quantize(w.T, "NF4_dq"),
        "stack": w.reshape(2, 32, 96),
    }
    params |= {"shape": jax.eval_shape(lambda: w), "bias": jnp.ones(96)}
    got = {p: (m.a.shape, m.b.shape) for p, m in init_adapters(params, 4, patterns="*", key=KEY).items()}
    assert got == {"stack": ((2, 32, 4), (2, 4, 96))} | dict.fromkeys(("kernel", "rows", "shape"), ((64, 4), (4, 96)))


def test_mistakes_are_named():
    params = mlp_params()
    with pytest.raises(UserError, match=r"'blocks_\*' matches no matrix; they are named like 'layers_0/down/kernel'"):
        init_adapters(params, 4, patterns=("layers_*", "blocks_*"), key=KEY)
    with pytest.raises(UserError, match=r"layers_0/down/kernel: rank 33 does not fit 128 x 32; take 1 to 32"):
        init_adapters(params, 33, key=KEY)
    with pytest.raises(UserError, match="rank 0"):
        init_adapters(params, 0, key=KEY)
    adapters = init_adapters(params, 4, key=KEY)
    with pytest.raises(UserError, match="'nowhere'"):
        apply_adapted(mlp, params, {"nowhere": adapters["layers_0/up/kernel"]}, normal(9, 5, 64))
    with pytest.raises(UserError, match="'nowhere'"):
        map_adapted(lambda path, w, m: w, params, {"nowhere": adapters["layers_0/up/kernel"]})
    with pytest.raises(UserError, match="does not fit a weight"):
        lora_weight(normal(0, 96, 64), adapters["layers_0/up/kernel"])


# --- the forward ---------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("format", [None, "NF4_dq"])
def test_new_adapters_change_nothing(decoder, format):
    apply, params = decoder
    if format:
        kernels = init_adapters(params, 4, key=KEY)
        params = map_adapted(lambda path, w, m: qjax.quantize(w, format, axis=-2), params, kernels)
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    adapters = init_adapters(params, 4, key=KEY)
    got = jax.jit(lambda m: apply_adapted(apply, params, m, tokens))(adapters)
    np.testing.assert_allclose(got, jax.jit(lift(apply))(params, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_gradients_equal_those_of_the_sum(packed):
    params, x = mlp_params(), normal(9, 5, 64)
    params = pack(params, "NF4") if packed else params
    adapters = trained(init_adapters(params, 4, alpha=2.0, key=KEY))
    dense = jax.tree.map(lambda w: qjax.dequantize(w) if packed else w, params, is_leaf=qjax.is_qtensor)

    def summed(adapters):
        plus = {
            k: dense["layers_0"][k]["kernel"]
            + 0.5 * adapters[f"layers_0/{k}/kernel"].a @ adapters[f"layers_0/{k}/kernel"].b
            for k in ("up", "down")
        }
        return mlp({"layers_0": {k: {"kernel": w} for k, w in plus.items()}}, x)

    np.testing.assert_allclose(apply_adapted(mlp, params, adapters, x), summed(adapters), rtol=2e-4, atol=2e-4)
    got = jax.grad(lambda m: jnp.sum(jnp.sin(apply_adapted(mlp, params, m, x))))(adapters)
    want = jax.grad(lambda m: jnp.sum(jnp.sin(summed(m))))(adapters)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-3, atol=2e-3), got, want)


def test_only_adapters_learn_and_first_only_B():
    x, y = normal(9, 40, 64), normal(10, 40, 32)

    def loss(params, adapters):
        return jnp.mean((apply_adapted(mlp, params, adapters, x) - y) ** 2)

    for params in (mlp_params(), pack(mlp_params(), "NF4_dq")):
        adapters = init_adapters(params, 4, key=KEY)
        before = jax.tree.map(np.array, params)
        grads = jax.grad(loss, argnums=1)(params, adapters)
        assert jax.tree.structure(grads) == jax.tree.structure(adapters)
        for g in grads.values():
            assert not np.any(g.a) and np.all(np.any(g.b, axis=1))
        stepped = jax.tree.map(lambda m, g: m - 0.1 * g, adapters, grads)
        for g in jax.grad(loss, argnums=1)(params, stepped).values():
            assert np.any(g.a) and np.any(g.b)
        assert equal(params, before)
    base = jax.grad(loss)(mlp_params(), trained(init_adapters(mlp_params(), 4, key=KEY)))
    assert not any(np.any(g) for g in jax.tree.leaves(base))


def test_stacked_adapters_run_in_a_scan():
    stack = {"layers_": {"kernel": normal(0, 3, 64, 64, size=0.1)}}
    x = normal(9, 5, 64)

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers_"]["kernel"])[0]

    adapters = trained(init_adapters(stack, 4, key=KEY))
    summed = map_adapted(lambda path, w, m: lora_weight(w, m), stack, adapters)
    for params in (stack, jax.tree.map(lambda w: qjax.quantize(w, "F32", axis=-2), stack)):
        np.testing.assert_allclose(apply_adapted(fn, params, adapters, x), fn(summed, x), rtol=1e-4, atol=1e-5)


# --- merging -------------------------------------------------------------------------------------------------------


def test_lora_weight_is_the_sum_in_any_program():
    w = normal(0, 64, 96)
    m = Adapter(normal(1, 64, 4), normal(2, 4, 96), 0.37)
    want = f64(w) + 0.37 * f64(m.a) @ f64(m.b)
    np.testing.assert_allclose(lora_weight(w, m), want, rtol=1e-5, atol=1e-5)
    rows = qjax.quantize(w.T, "NF4")
    np.testing.assert_allclose(
        lora_weight(rows, m), f64(qjax.dequantize(rows)) + (want - f64(w)).T, rtol=1e-5, atol=1e-5
    )
    many = jax.jit(lambda w, m: jnp.sin(3.0 * lora_weight(w, m) + w) + lora_weight(w, m))(w, m)
    sums = lora_weight(w, m)
    assert np.array_equal(jax.jit(lora_weight)(w, m), sums)
    np.testing.assert_allclose(many, jnp.sin(3.0 * sums + w) + sums, rtol=1e-5, atol=1e-5)
    assert lora_weight(w.astype(jnp.bfloat16), m).dtype == jnp.float32


@pytest.mark.parametrize("format", ["NF4_dq", "Q4_0", "uint3_g64_mse"])
def test_requantized_merge_rounds_the_sum_and_says_what_it_costs(format):
    params = pack({"layers_0": {"up": {"kernel": normal(0, 64, 64)}}}, format)
    adapters = trained(init_adapters(params, 4, alpha=2.0, key=KEY))
    merged = merge_requantized(params, adapters)
    (path, m), q, new = (
        next(iter(adapters.items())),
        params["layers_0"]["up"]["kernel"],
        merged.params["layers_0"]["up"]["kernel"],
    )
    want = f64(qjax.dequantize(q)) + 0.5 * f64(m.a) @ f64(m.b)
    again = qjax.quantize(jnp.asarray(want, jnp.float32), format, axis=0)
    assert (new.format, new.axis, merged.semantics) == (q.format, q.axis, "requantized")
    assert np.mean(np.asarray(qjax.dequantize(new)) == np.asarray(qjax.dequantize(again))) > 0.99
    error = np.linalg.norm(f64(qjax.dequantize(new)) - want) / np.linalg.norm(want)
    assert merged.errors == {path: pytest.approx(error, rel=1e-4)} and error > 0.01
    x = normal(9, 5, 64)

    def fn(p, x):
        return x @ p["layers_0"]["up"]["kernel"]

    beside, alone = apply_adapted(fn, params, adapters, x), lift(fn)(merged.params, x)
    off = np.linalg.norm(beside - alone) / np.linalg.norm(beside)
    assert 0.3 * error < off < 3 * error


def test_merging_into_dense_weights_loses_nothing():
    params = mlp_params()
    adapters = trained(init_adapters(params, 4, key=KEY))
    merged, x = merge_requantized(params, adapters), normal(9, 5, 64)
    np.testing.assert_allclose(mlp(merged.params, x), apply_adapted(mlp, params, adapters, x), rtol=1e-3, atol=1e-3)
    assert list(merged.errors.values()) == [0.0, 0.0]
    half = merge_requantized(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), adapters)
    assert {w.dtype for w in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    assert all(1e-4 < e < 4e-3 for e in half.errors.values())


def test_a_merge_behind_a_reparametrization_is_refused():
    params = {"layers_0": {"kernel": normal(0, 64, 64)}}
    plan = qjax.plan.Plan((qjax.plan.Rule("*", "hadamard() >> Q4_0 >> nearest()"),))
    packed, _ = qjax.quantize_params(params, plan)
    adapters = trained(init_adapters(packed, 4, key=KEY))
    with pytest.raises(UserError, match="layers_0/kernel: its codes lie behind"):
        merge_requantized(packed, adapters)
    x = normal(9, 5, 64)  # beside the weight it works
    want = f64(x) @ (f64(qjax.dequantize(packed["layers_0"]["kernel"])) + f64(lora_delta(adapters)))
    got = apply_adapted(lambda p, x: x @ p["layers_0"]["kernel"], packed, adapters, x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def lora_delta(adapters):
    (m,) = adapters.values()
    return m.scale * m.a @ m.b


@pytest.mark.sampled(1)
@pytest.mark.parametrize("format", ["NF4_dq", "Q4_K", "int2_g64_mid", "uint4_g32"])
def test_fake_quantized_merge_is_the_training_forward_bit_for_bit(format):
    size = 256 if format == "Q4_K" else 64
    params, x = {"layers_0": {"kernel": normal(0, size, 96)}}, normal(9, 5, size)
    adapters = trained(init_adapters(params, 4, key=KEY))

    def fake(path, w, m):
        full = lora_weight(w, m)
        return full + jax.lax.stop_gradient(qjax.dequantize(qjax.quantize(full, format, axis=-2)) - full)

    def fn(p, x):
        return x @ p["layers_0"]["kernel"]

    def forward(adapters):
        return fn(map_adapted(fake, params, adapters), x)

    merged = merge_fake_quantized(params, adapters, format)
    assert merged.semantics == "fake-quantized" and list(merged.errors.values()) == [0.0]
    stored = qjax.dequantize(merged.params["layers_0"]["kernel"])

    @jax.jit
    def values(adapters):
        (m,) = adapters.values()
        return qjax.dequantize(qjax.quantize(lora_weight(params["layers_0"]["kernel"], m), format, axis=-2))

    assert np.array_equal(values(adapters), stored)
    np.testing.assert_allclose(forward(adapters), lift(fn)(merged.params, x), rtol=1e-4, atol=1e-4)
    # straight through: dA = scale G B^T, dB = scale A^T G with G = x^T dy
    (g,) = jax.grad(lambda m: jnp.sum(forward(m)))(adapters).values()
    (m,) = adapters.values()
    G = f64(x).T @ np.ones((5, 96))
    np.testing.assert_allclose(g.a, m.scale * G @ f64(m.b).T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(g.b, m.scale * f64(m.a).T @ G, rtol=1e-3, atol=1e-3)


def test_fake_quantized_merge_wants_a_format_for_each_weight():
    params = mlp_params()
    adapters = init_adapters(params, 4, key=KEY)
    formats = {"layers_0/up/kernel": "NF4", "layers_0/down/kernel": "Q4_0"}
    merged = merge_fake_quantized(params, adapters, formats)
    assert merged.params["layers_0"]["down"]["kernel"].format.name == "Q4_0"
    with pytest.raises(UserError, match="layers_0/down/kernel has an adapter, but no format"):
        merge_fake_quantized(params, adapters, {"layers_0/up/kernel": "NF4"})


# --- a model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_qlora_trains_a_decoder_on_an_nf4_base(decoder):
    apply, params = decoder
    adapters = init_adapters(params, rank=8, alpha=16.0, key=KEY)
    base = map_adapted(lambda path, w, m: qjax.quantize(w, "NF4_dq", axis=-2), params, adapters)
    before = jax.tree.map(np.array, base)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (4, 16)), jnp.int32)
    optimizer = optax.adam(1e-2)

    def loss(adapters):
        logits = apply_adapted(apply, base, adapters, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    state, values = optimizer.init(adapters), []
    start = adapters
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        for _ in range(12):
            adapters, state, value = step(adapters, state)
            values.append(float(value))
    assert values[-1] < 0.7 * values[0]
    assert equal(base, before)
    for path, m in adapters.items():
        assert not np.array_equal(m.a, start[path].a) and np.any(m.b)
    merged = merge_requantized(base, adapters)
    assert all(0 < e < 0.2 for e in merged.errors.values())
    assert jax.tree.structure(merged.params) == jax.tree.structure(base)
