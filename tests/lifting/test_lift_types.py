"""A packed weight gives the program the type that it had, and keeps it through trees, files and arrangements."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lift_programs import assert_close, dense_params, normal, pack, plain_and_packed

import qjax
from qjax.io.tree import load_tree, save_tree
from qjax.lifting import lift


def half(params):
    """bfloat16 weights, each the rounded value that its packed twin is cast to."""
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16), dense_params(params))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_scan_carries_the_type_of_the_weights_that_were_packed(dtype):
    """In float32 the carry would come in as bfloat16 and go out as float32, which scan refuses."""

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p["w"])

    params = {"w": pack(normal(0, 3, 64, 64).astype(dtype) / 8)}
    x = normal(1, 5, 64).astype(dtype)
    got = jax.jit(lift(fn))(params, x)
    want = jax.jit(fn)(jax.tree.map(lambda w: w.astype(dtype), dense_params(params)), x)
    assert got[0].dtype == dtype
    assert_close(got, want, rtol=2e-2)


def test_lookups_and_dots_have_the_programs_type():
    def fn(p, ids):
        return p["e"][ids] @ p["w"]

    params = {"e": pack(normal(0, 10, 64).astype(jnp.bfloat16), -1), "w": pack(normal(1, 64, 32).astype(jnp.bfloat16))}
    ids = jnp.array([3, 1, 4])
    got, want = lift(fn)(params, ids), fn(half(params), ids)
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=2e-2, atol=0.2)


def test_arrangements_trees_and_files_keep_the_type(tmp_path):
    q = pack(normal(0, 64, 32).astype(jnp.bfloat16))
    assert jax.vmap(lambda w: pack(w, 0))(normal(0, 3, 64, 32).astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert qjax.dequantize(q).dtype == jnp.float32  # the values themselves, unrounded
    save_tree({"w": q, "f": pack(normal(0, 64, 32))}, tmp_path / "tree.safetensors")
    back = load_tree(tmp_path / "tree.safetensors")
    assert (back["w"].dtype, back["f"].dtype) == (jnp.bfloat16, jnp.float32)
    wide = {"w": dataclasses.replace(q, dtype=jnp.dtype("float32"))}
    got, want = plain_and_packed(lambda p, x: x @ p["w"].T.T, wide, normal(1, 5, 64))
    assert_close(got, want)


def test_what_was_saved_before_is_float32():
    """Objects of an earlier version have no type of their own."""
    q = pack(normal(0, 64, 32))
    state = {k: v for k, v in vars(q).items() if k != "dtype"}
    old = object.__new__(qjax.QTensor)
    vars(old).update(pickle.loads(pickle.dumps(state)))
    assert old.dtype == jnp.float32
    assert_close(lift(lambda p, x: x @ p)(old, jnp.ones((2, 64))), jnp.ones((2, 64)) @ qjax.dequantize(q))
