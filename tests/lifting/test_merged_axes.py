"""Weights contracted along several axes at once, as an attention's output: blocks and statistics of the merged axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from lift_programs import assert_close, dense_params, normal, pack

import qjax
from qjax.errors import UserError
from qjax.io.tree import load_tree, save_tree
from qjax.lifting import lift


def out_projection(p, x):
    return jnp.einsum("BTNH,NHD->BTD", x, p["w"])


def test_calibrated_rounding_of_merged_axes_is_that_of_the_matrix():
    params, x = {"w": normal(0, 4, 16, 32)}, normal(1, 8, 32, 4, 16) * jnp.linspace(0.1, 3, 16)[None, None, None]
    stats = qjax.observe(out_projection, params, [x])
    flat = np.asarray(x, np.float64).reshape(-1, 64)
    assert stats["w"].axis == (-3, -2)
    np.testing.assert_allclose(stats["w"].H, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)
    q, report = qjax.quantize_params(params, "Q4_0", stats, recipe="gptq")
    alone, _ = qjax.quantize_params(
        {"w": params["w"].reshape(64, 32)}, "Q4_0", {"w": qjax.Stats(H=stats["w"].H)}, recipe="gptq"
    )
    assert q["w"].shape == (4, 16, 32) and report.tensors[0].shape == (32, 64)
    np.testing.assert_array_equal(qjax.dequantize(q["w"]).reshape(64, 32), qjax.dequantize(alone["w"]))
    assert qjax.to_bytes(q["w"]) == qjax.to_bytes(alone["w"])
    assert_close(lift(out_projection)(q, x), out_projection(dense_params(q), x))
    plain, _ = qjax.quantize_params(params, "Q4_0", apply=out_projection, inputs=(x,))
    assert plain["w"].split == (4, 16) and plain["w"].axis == -2


def test_attention_is_quantized_by_its_trace():
    """(in, heads, head_dim) along `in`; (heads, head_dim, out) along both, in blocks larger than a head."""
    model, x = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=64), normal(1, 2, 7, 64)
    params = model.init(jax.random.key(0), x)["params"]

    def apply(p, x):
        return model.apply({"params": p}, x)

    axes = qjax.contracted_axes(apply, params, x)
    assert axes == {"out/kernel": (-3, -2)} | {f"{name}/kernel": -3 for name in ("key", "query", "value")}
    stats = qjax.observe(apply, params, [x])
    plan = qjax.Plan((qjax.Rule("*/bias", "keep"), qjax.Rule("*", "Q8_0")))
    q, report = qjax.quantize_params(params, plan, stats, recipe="gptq")
    assert {t.name for t in report.tensors if t.kept is None} == set(axes)
    assert_close(jax.jit(lift(apply))(q, x), apply(dense_params(q), x))
    y = apply(params, x)
    assert float(jnp.linalg.norm(lift(apply)(q, x) - y)) < 0.02 * float(jnp.linalg.norm(y))


def test_axes_that_are_not_adjacent_are_refused():
    params, x = {"w": normal(0, 4, 32, 16)}, normal(1, 5, 4, 16)
    with pytest.raises(UserError, match=r"w: contracted along \(-3, -1\) by dot_general.*keep it in the plan"):
        qjax.contracted_axes(lambda p, x: jnp.einsum("thd,hod->to", x, p["w"]), params, x)
    with pytest.raises(UserError, match=r"axes \(0, 2\) of shape \(4, 32, 16\) cannot be merged"):
        pack(params["w"], (0, 2))


def test_merged_axes_in_files_and_gradients(tmp_path):
    q = pack(normal(0, 4, 16, 32), (0, 1))
    save_tree({"w": q}, tmp_path / "tree.safetensors")
    back = load_tree(tmp_path / "tree.safetensors")["w"]
    assert (back.shape, back.split) == ((4, 16, 32), (4, 16))
    x = normal(1, 2, 3, 4, 16)
    got = jax.grad(lambda x: lift(out_projection)({"w": back}, x).sum())(x)
    assert_close(got, jax.grad(lambda x: out_projection({"w": qjax.dequantize(q)}, x).sum())(x))
