"""QTensor as a citizen of JAX: trees, transformations, sharding, checkpoints; quantize, dot and the byte layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax.errors import UserError

pytestmark = pytest.mark.optimized  # the bytes of a file


@pytest.fixture
def w(rng):
    return rng.standard_normal((48, 64)).astype(np.float32)


def test_shape_follows_axis_and_leading_axes(w):
    assert qjax.quantize(w, "Q8_0").shape == (48, 64)
    kernel = qjax.quantize(w.T, "Q8_0", axis=0)
    assert (kernel.shape, kernel.axis) == ((64, 48), -2)
    stacked = jax.vmap(lambda m: qjax.quantize(m, "Q8_0", axis=0))(jnp.stack([w.T, 2 * w.T]))
    assert stacked.shape == (2, 64, 48)
    middle = qjax.quantize(w.reshape(6, 64, 8), "Q8_0", axis=1)
    assert middle.shape == (6, 64, 8)
    np.testing.assert_array_equal(
        qjax.dequantize(middle),
        jnp.moveaxis(qjax.dequantize(qjax.quantize(np.moveaxis(w.reshape(6, 64, 8), 1, 2), "Q8_0")), 2, 1),
    )


def test_axis_is_only_a_view(w):
    rows = qjax.dequantize(qjax.quantize(w, "Q8_0"))
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(w.T, "Q8_0", axis=0)), rows.T)


def test_dot_equals_the_dense_product(w, rng):
    x = rng.standard_normal((3, 5, 64)).astype(np.float32)
    q = qjax.quantize(w, "Q8_0")
    y = qjax.dot(jnp.asarray(x), q)
    expected = x.astype(np.float64) @ np.asarray(qjax.dequantize(q), np.float64).T
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    kernel = qjax.quantize(w.T, "Q8_0", axis=0)
    np.testing.assert_allclose(qjax.dot(jnp.asarray(x), kernel), expected, rtol=1e-5, atol=1e-5)
    half = qjax.dot(jnp.asarray(x, jnp.bfloat16), q)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_dot_with_whole_numbers_is_the_float_product(w, dtype):
    x = jnp.arange(128).reshape(2, 64) % 3
    q = qjax.quantize(0.1 * w, "Q8_0")
    y = qjax.dot(x.astype(dtype), q)
    np.testing.assert_array_equal(y, qjax.dot(x.astype(dtype).astype(jnp.float32), q))
    assert y.dtype == jnp.float32 and np.abs(y).max() > 0.1


def test_dot_gradient_is_the_dense_gradient(w, rng):
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    q = qjax.quantize(w, "Q8_0")
    g = jax.grad(lambda x: jnp.sum(qjax.dot(x, q) ** 2))(x)
    w_hat = np.asarray(qjax.dequantize(q), np.float64)
    np.testing.assert_allclose(g, 2 * (np.asarray(x, np.float64) @ w_hat.T) @ w_hat, rtol=1e-4, atol=1e-4)


def test_scan_slices_a_stack_of_qtensors(rng):
    w = rng.standard_normal((4, 64, 64)).astype(np.float32) / 8
    x = rng.standard_normal((2, 64)).astype(np.float32)
    q = qjax.quantize(w, "Q8_0")
    y, shapes = lax.scan(lambda x, layer: (qjax.dot(x, layer), jnp.zeros(layer.shape)), jnp.asarray(x), q)
    assert shapes.shape == (4, 64, 64)
    expected = x
    for w_hat in np.asarray(qjax.dequantize(q)):
        expected = expected @ w_hat.T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_sharded_over_rows(w):
    mesh = Mesh(np.array(jax.devices()[:8]), ("rows",))
    q = qjax.quantize(w, "Q8_0")
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), q)
    assert len(placed.leaves["blocks"].sharding.device_set) == 8
    np.testing.assert_array_equal(qjax.dequantize(placed), qjax.dequantize(q))
    out = jax.jit(lambda w: qjax.quantize(w, "Q8_0"), in_shardings=sharding)(jax.device_put(w, sharding))
    assert len(out.leaves["blocks"].sharding.device_set) == 8
    assert qjax.to_bytes(out) == qjax.to_bytes(q)


def test_orbax_round_trip(w, tmp_path):
    params = {"layer": {"kernel": qjax.quantize(w, "Q8_0"), "bias": jnp.ones(48)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params", jax.tree.map(jnp.zeros_like, params))
    assert qjax.to_bytes(restored["layer"]["kernel"]) == qjax.to_bytes(params["layer"]["kernel"])
    assert restored["layer"]["kernel"].format == params["layer"]["kernel"].format


def test_optax_maps_over_it(w):
    params = {"kernel": qjax.quantize(w, "Q8_0"), "bias": jnp.ones(48)}
    labels = {"kernel": "frozen", "bias": "train"}
    tx = optax.partition({"frozen": optax.set_to_zero(), "train": optax.sgd(0.5)}, labels)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert qjax.to_bytes(new["kernel"]) == qjax.to_bytes(params["kernel"])
    np.testing.assert_array_equal(new["bias"], 0.5)


def test_abstract_shapes():
    q = jax.eval_shape(lambda w: qjax.quantize(w, "Q8_0"), jax.ShapeDtypeStruct((1024, 4096), jnp.float32))
    assert (q.shape, q.bits_per_weight) == ((1024, 4096), 8.5)


def test_bytes_round_trip(w):
    q = qjax.quantize(w, "Q8_0")
    raw = qjax.to_bytes(q)
    assert len(raw) == 48 * 2 * 34
    again = qjax.from_bytes("Q8_0", raw, (48, 64))
    np.testing.assert_array_equal(qjax.dequantize(again), qjax.dequantize(q))


def test_weight_per_column_broadcasts(w):
    h = np.linspace(0.1, 2, 64).astype(np.float32)
    a = qjax.quantize(w.T, "Q4_0", axis=0, weight=jnp.asarray(h))
    b = qjax.quantize(w.T, "Q4_0", axis=0, weight=jnp.broadcast_to(h[:, None], (64, 48)))
    np.testing.assert_array_equal(a.leaves["blocks"], b.leaves["blocks"])


@pytest.mark.parametrize("name", ["Q4_0", "F16"])
def test_a_kernel_has_the_bytes_of_its_rows(name):
    """Of a stack of kernels too: (e, in, out) along `in` is a file's (e, out, in)."""
    w = jnp.sin(jnp.arange(2 * 64 * 3, dtype=jnp.float32)).reshape(2, 64, 3)
    rows = qjax.quantize(jnp.swapaxes(w, 1, 2), name)
    assert qjax.to_bytes(qjax.quantize(w, name, axis=1)) == qjax.to_bytes(rows)
    assert qjax.to_bytes(qjax.quantize(w[0], name, axis=0)) == qjax.to_bytes(rows)[: rows.nbytes // 2]
    back = qjax.from_bytes(name, qjax.to_bytes(qjax.quantize(w[0], name, axis=0)), (3, 64))
    np.testing.assert_array_equal(qjax.dequantize(back), qjax.dequantize(rows)[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: qjax.quantize(w[:, :40], "Q8_0"), "multiple of 32 weights"),
        (lambda w: qjax.quantize(w, "Q4_Q"), "did you mean"),
        (lambda w: qjax.quantize(w, "Q8_0", axis=2), "out of range"),
        (lambda w: qjax.quantize(w.astype(np.int32), "Q8_0"), "floating-point"),
        (lambda w: qjax.quantize(np.where(w > 2, np.nan, w), "Q8_0"), "NaN or infinite"),
        (lambda w: qjax.quantize(w, "Q8_0", weight=-jnp.ones(64)), "negative"),
        (lambda w: qjax.quantize(w, "Q8_0", weight=jnp.ones(63)), "weight has shape"),
        (lambda w: qjax.from_bytes("Q8_0", b"123", (1, 32)), "takes 34 bytes, got 3"),
        (lambda w: qjax.dot(jnp.ones((2, 63)), qjax.quantize(w, "Q8_0")), "contracts"),
    ],
)
def test_bad_input_is_one_clear_line(w, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(w)
    assert "\n" not in str(error.value)
