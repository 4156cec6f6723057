"""`report` and `watch`: what is used where, and statistics equal to explicit computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from lift_programs import TOKENS, assert_close, decoder, kernel, normal, pack, pack_decoder

import qjax
from qjax.errors import UserError
from qjax.lifting import Use, report, watch


def second_moment(use, x):
    """sum x x^T over tokens; lookups have none."""
    if use.kind == "gather":
        return None
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return x.T @ x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_report_of_the_decoder(dtype):
    """q, k, v share their input, gate and up theirs, in bf16 too; a tied embedding is seen as gather and as dot."""
    apply, params = decoder(dtype)
    uses = {use.key: use for use in report(apply, params, TOKENS) if use.kind != "other"}
    order = ["embed/embedding"]
    for i in range(2):
        order += [f"layers_{i}/{part}/kernel" for part in ("attn/q", "attn/k", "attn/v", "attn/o")]
        order += [f"layers_{i}/{part}/kernel" for part in ("mlp/gate", "mlp/up", "mlp/down")]
    assert list(uses) == [*order, "embed/embedding#1"]
    source = {key: use.source for key, use in uses.items()}
    for i in range(2):
        q, k, v, o = (source[f"layers_{i}/attn/{name}/kernel"] for name in "qkvo")
        gate, up, down = (source[f"layers_{i}/mlp/{name}/kernel"] for name in ("gate", "up", "down"))
        assert q == k == v and gate == up and len({q, o, gate, down}) == 4
    assert len(set(source.values())) == 2 + 4 * 2  # no layer shares with another; the lookup and the head by themselves
    assert sorted(set(source.values())) == list(range(10))  # numbered in order of appearance
    lookup, head = uses["embed/embedding"], uses["embed/embedding#1"]
    assert (lookup.kind, lookup.axis, head.kind, head.axis) == ("gather", -1, "dot", -1)
    assert uses["layers_1/mlp/down/kernel"] == Use(
        "layers_1/mlp/down/kernel", "dot", -2, source["layers_1/mlp/down/kernel"], (96, 64), axes=(-2,),
        primitive="dot_general",
    )  # fmt: skip
    others = [use.path for use in report(apply, params, TOKENS) if use.kind == "other"]
    assert others == [
        *(f"layers_{i}/{n}_norm/scale" for i in range(2) for n in ("attn", "mlp")),
        "final_norm/scale",
    ]


def test_report_needs_no_values_and_no_work():
    apply, params = decoder()
    shapes = jax.eval_shape(lambda: params)
    assert report(apply, shapes, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)) == report(apply, params, TOKENS)


def test_report_of_packed_params_equals_that_of_dense():
    apply, params = decoder(tied=False)
    q = pack_decoder(params, "Q8_0")
    assert report(apply, q, TOKENS) == report(apply, params, TOKENS)


def test_unused_leaves_are_absent_and_vectors_are_other():
    params = {"used": normal(0, 4), "unused": normal(1, 4, 4), "only_passed": normal(2, 4, 4)}

    def fn(p, x):
        p["only_passed"].T.reshape(2, 8)
        return x @ p["used"]

    assert report(fn, params, normal(3, 2, 4)) == (Use("used", "other", None, -1, (4,), primitive="dot_general"),)


def test_axes_are_those_of_the_stored_leaf():
    """Transposed, reshaped, split and merged on the way: the axis is still that of the params tree."""
    params = {
        "t": normal(0, 8, 6),
        "heads": normal(1, 2, 3, 8),
        "fused": normal(2, 6, 24),
        "split": normal(3, 6, 8),
        "conv": normal(4, 5, 6, 1, 1),
        "part": normal(5, 12, 4),
    }

    def fn(p, x):
        y = x @ p["t"].T  # [n, 8]
        y = jnp.einsum("nhd,hdo->no", x.reshape(-1, 2, 3), p["heads"]) + y
        a, b, _ = jnp.split(p["fused"], 3, axis=1)
        y = y + x @ a + x @ b + jnp.einsum("ni,ihd->nhd", x, p["split"].reshape(6, 2, 4)).reshape(-1, 8)
        z = lax.conv(x.reshape(1, 6, -1, 1), p["conv"], (1, 1), "SAME")
        return y.sum() + z.sum() + (x @ p["part"][:6]).sum()

    uses = report(fn, params, normal(9, 3, 6))
    found = [(use.key, use.kind, use.axis, use.axes) for use in uses]
    assert found == [
        ("t", "dot", -1, (-1,)),
        ("heads", "dot", -2, (-3, -2)),
        ("fused", "dot", -2, (-2,)),
        ("fused#1", "dot", -2, (-2,)),
        ("split", "dot", -2, (-2,)),
        ("conv", "conv", None, ()),
        ("part", "other", None, ()),  # half of the contracted axis: no statistic of the whole
    ]
    assert uses[2].source == uses[3].source == uses[4].source == uses[0].source != uses[1].source


def test_sources_are_seen_through_calls_and_conversions():
    def fn(p, x):
        dense = jax.jit(lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))
        a, b = dense(p["a"], x), jax.checkpoint(dense)(p["b"], x)
        y = jax.jit(lambda a: jnp.tanh(a))(a + b).astype(jnp.float32)
        return y @ p["c"], (y * 1.0) @ p["d"], lax.convert_element_type(y, jnp.float32) @ p["e"]

    params = {k: normal(i, 8, 8) for i, k in enumerate("abcde")}
    assert [(u.path, u.source) for u in report(fn, params, normal(9, 3, 8))] == [
        ("a", 0), ("b", 0), ("c", 1), ("d", 2), ("e", 1),
    ]  # fmt: skip


def test_watched_hessians_equal_explicit_ones():
    apply, params = decoder()
    want_out = jax.jit(apply)(params, TOKENS)
    (out, stats), uses = jax.jit(watch(apply, second_moment))(params, TOKENS), report(apply, params, TOKENS)
    assert_close(out, want_out)
    assert set(stats) == {use.source for use in uses if use.source >= 0}

    inputs = {}  # flax's own record of what enters each Dense

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            inputs["/".join((*context.module.path, "kernel"))] = args[0]
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        apply(params, TOKENS)
    dots = [use for use in uses if use.kind == "dot" and use.path in inputs]
    assert len(dots) == 14
    for use in dots:
        assert_close(stats[use.source], second_moment(use, inputs[use.path]))
    assert stats[uses[0].source] is None


def test_each_source_is_collected_once():
    apply, params = decoder()
    seen = []
    _, stats = watch(apply, lambda use, x: seen.append(use.source) or x)(params, TOKENS)
    assert sorted(seen) == sorted(stats) == list(range(10))
    np.testing.assert_array_equal(stats[0], TOKENS)  # a lookup's statistic is its indices
    assert stats[1].shape == (2, 5, 64)


def test_watch_runs_packed_weights():
    params, x = {"w": kernel(0, 64, 32)}, normal(1, 5, 64)
    out, stats = watch(lambda p, x: x @ p["w"], second_moment)(params, x)
    assert_close((out, stats[0]), (qjax.dot(x, params["w"]), x.T @ x))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        def step(dense, x, _):
            return nn.tanh(dense(x)), None

        step = nn.remat(step, prevent_cse=False)
        return nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            nn.Dense(16, name="dense"), x, None
        )[0]


def test_statistics_under_scan_and_remat_are_stacked_by_layer():
    model, x = Layers(), normal(1, 5, 16)
    params = model.init(jax.random.key(0), x)["params"]

    def apply(p, x):
        return model.apply({"params": p}, x)

    (use,) = (use for use in report(apply, params, x) if use.kind == "dot")
    assert (use.path, use.axis, use.shape, use.stacked, use.scanned) == (
        "dense/kernel", -2, (3, 16, 16), (3,), (-3,)
    )  # fmt: skip
    out, stats = jax.jit(watch(apply, second_moment))(params, x)
    want = []
    for i in range(3):
        want.append(x.T @ x)
        x = jnp.tanh(x @ params["dense"]["kernel"][i] + params["dense"]["bias"][i][None])
    assert_close((out, stats[use.source]), (x, jnp.stack(want)))


def test_a_weight_shared_by_all_steps():
    def fn(p, xs):
        return lax.scan(lambda c, x: (c + (x @ p["w"]).sum(), None), 0.0, xs)[0]

    params, xs = {"w": normal(0, 8, 4)}, normal(1, 3, 5, 8)
    (use,) = report(fn, params, xs)
    assert (use.stacked, use.scanned) == ((3,), ())
    _, stats = watch(fn, second_moment)(params, xs)
    assert_close(stats[0], jnp.einsum("sni,snj->sij", xs, xs))


@pytest.mark.parametrize("taken", [0, 1])
def test_a_branch_not_taken_gives_zeros(taken):
    def fn(p, x, i):
        return lax.switch(i, [lambda: x @ p["a"], lambda: jnp.sin(x) @ p["b"]])

    params, x = {"a": normal(0, 8, 4), "b": normal(1, 8, 4)}, normal(2, 5, 8)
    a, b = (use.source for use in report(fn, params, x, 0))
    _, stats = watch(fn, second_moment)(params, x, jnp.int32(taken))
    want = {a: x.T @ x, b: jnp.sin(x).T @ jnp.sin(x)}
    done, idle = (a, b) if taken == 0 else (b, a)
    assert_close(stats[done], want[done])
    assert not stats[idle].any()


def test_custom_derivatives_let_statistics_out():
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    w, x = normal(0, 8, 4), normal(1, 5, 8)
    _, stats = watch(lambda p, x: product(p["w"], x), second_moment)({"w": w}, x)
    assert_close(stats[0], x.T @ x)


def test_no_statistic_leaves_a_while_loop():
    def fn(p, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1]

    params, x = {"w": normal(0, 8, 8)}, normal(1, 5, 8)
    with pytest.raises(UserError, match="'w' is used in a while"):
        watch(fn, second_moment)(params, x)
    out, _ = watch(fn, lambda use, x: None)(params, x)
    assert_close(out, fn(params, x))


def test_a_body_that_is_not_looked_into_is_an_error_of_watch_and_a_note_of_report():
    def fn(p, x):
        return lax.custom_linear_solve(lambda v: p["w"] @ v, x, lambda mv, b: jnp.linalg.solve(p["w"], b))

    params, x = {"w": normal(0, 8, 8) + 4 * jnp.eye(8)}, normal(1, 8)
    assert "not looked into" in report(fn, params, x)[0].note
    with pytest.raises(UserError, match=r"'w'.*custom_linear_solve"):
        watch(fn, second_moment)(params, x)


def test_batched_weights_give_batched_statistics():
    params, x = {"w": normal(0, 4, 8, 3)}, normal(1, 5, 4, 8)
    _, stats = watch(lambda p, x: jnp.einsum("tei,eio->teo", x, p["w"]), lambda use, x: x)(params, x)
    np.testing.assert_array_equal(stats[0], x.transpose(1, 0, 2))  # [expert, token, in]


def test_contracted_axes_merge_in_the_order_of_the_stored_weight():
    """H's rows are those of w.reshape(n, out), whatever the order in the program."""
    params, x = {"w": normal(0, 2, 3, 5)}, normal(1, 7, 3, 2)
    _, stats = watch(lambda p, x: jnp.einsum("tdh,hdo->to", x, p["w"]), lambda use, x: x)(params, x)
    np.testing.assert_allclose(
        stats[0] @ params["w"].reshape(6, 5), jnp.einsum("tdh,hdo->to", x, params["w"]), rtol=1e-4, atol=1e-5
    )


def test_packed_lookup_reports_what_it_cannot_do():
    params = {"e": pack(normal(0, 64, 10), 0)}
    (use,) = report(lambda p, i: p["e"][i], params, jnp.array([1]))
    assert (use.kind, use.axis, use.source) == ("other", None, -1)
    assert use.note == "gather takes single weights along the quantized axis"
