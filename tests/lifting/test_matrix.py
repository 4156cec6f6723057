"""The matrix of trials: every way to run a model in JAX, packed == dequantize-then-apply, nothing decoded in secret.

Each trial returns (got, want). Those that use the weight's values raise in strict mode, naming weight and primitive.
"""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lift_programs import assert_close, dense_params, eagerly, kernel, normal, pack, plain_and_packed, stacked_kernel

import qjax
from qjax.errors import UserError
from qjax.lifting import lift, report

TRIALS = []
ROUNDED = {"linen-bf16", "stacked-bf16", "bf16-preferred-f32"}  # compared up to bfloat16's step


def trial(fn):
    TRIALS.append(pytest.param(fn, id=f"{len(TRIALS) + 1:02d}-{fn.__name__.replace('_', '-')}"))
    return fn


def needs_values(fn, params, *args, path, primitive):
    """A trial of an operation that needs dense values: strict raises, otherwise it warns and reports, and is right."""
    with pytest.raises(UserError, match=f"(?s)'{path}'.*{primitive}"):
        lift(fn)(params, *args)
    notes = [use for use in report(fn, params, *args) if use.note]
    assert {use.path for use in notes} == {path}
    assert all(primitive in use.note and use.kind == "other" for use in notes)
    with pytest.warns(UserWarning, match=f"'{path}'.*{primitive}"):
        got = lift(fn, strict=False)(params, *args)
    return got, fn(dense_params(params), *args)


# --- linen ---------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        x = nn.gelu(dense(96, dtype=self.dtype)(x))
        return dense(32, dtype=self.dtype)(x)


def mlp(**options):
    """(apply, packed params, x)."""
    model, x = MLP(**options), normal(1, 5, 64)
    params = jax.tree.map(lambda w: pack(w) if w.ndim > 1 else w + 0.1, model.init(jax.random.key(0), x)["params"])
    return lambda p, x: model.apply({"params": p}, x), params, x


@trial
def linen_eager():
    return eagerly(*mlp())


@trial
def linen_jit_outside():
    apply, params, x = mlp()
    return jax.jit(lift(apply))(params, x), apply(dense_params(params), x)


@trial
def linen_jit_inside():
    apply, params, x = mlp()
    return plain_and_packed(jax.jit(apply), params, x)


@trial
def linen_bf16():
    return plain_and_packed(*mlp(dtype=jnp.bfloat16))


@trial
def linen_keyword_arguments():
    model = nn.Dense(32)
    params = {"kernel": kernel(0, 64, 32), "bias": normal(2, 32)}

    def apply(p, x, *, scale, flag):
        return model.apply({"params": p}, x) * scale if flag else x

    return eagerly(apply, params, normal(1, 5, 64), scale=2.0, flag=True)


@trial
def linen_dense_general():
    """Contracted axes of a kernel [heads, head_dim, out]: the packed one through dot, the other summed."""
    model = nn.DenseGeneral(32, axis=(-2, -1), use_bias=False)
    params = {"kernel": pack(normal(0, 2, 32, 32), axis=1)}
    return plain_and_packed(lambda p, x: model.apply({"params": p}, x), params, normal(1, 5, 2, 32))


@trial
def linen_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=64)
    x = normal(1, 2, 7, 64)
    params = model.init(jax.random.key(0), x)["params"]
    axes = {"query": 0, "key": 0, "value": 0, "out": 1}
    params = {k: {"kernel": pack(params[k]["kernel"], axis), "bias": params[k]["bias"]} for k, axis in axes.items()}
    return plain_and_packed(lambda p, x: model.apply({"params": p}, x), params, x)


@trial
def linen_embed():
    model = nn.Embed(50, 64)
    params = {"embedding": pack(normal(0, 50, 64), -1)}
    return plain_and_packed(lambda p, i: model.apply({"params": p}, i), params, jnp.array([[3, 49], [0, 3]]))


# --- gradients -----------------------------------------------------------------------------------------------------


def loss(apply):
    return lambda p, x: jnp.sum(jnp.sin(apply(p, x)))


@trial
def grad_x_outside():
    apply, params, x = mlp()
    grad = functools.partial(jax.grad, argnums=1)
    return grad(loss(lift(apply)))(params, x), grad(loss(apply))(dense_params(params), x)


@trial
def grad_x_inside():
    """The gradient taken inside contracts the other axis of the kernel; taken outside, `dot` is differentiated."""
    apply, params, x = mlp()
    fn = jax.grad(loss(apply), argnums=1)
    with pytest.raises(UserError, match=r"kernel.*contracts axis -1 .* along axis -2"):
        lift(fn)(params, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lift(fn, strict=False)(params, x), fn(dense_params(params), x)


def grad_scales(apply, params, x):
    """Gradient by every float leaf, scales included, against the same through dequantize."""
    grad = functools.partial(jax.grad, allow_int=True)
    return grad(loss(lift(apply)))(params, x), grad(lambda p, x: loss(apply)(dense_params(p), x))(params, x)


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]


@trial
def grad_by_scales():
    got, want = grad_scales(*mlp())
    assert len(floats(got)) == 4  # two biases, two scales
    return floats(got), floats(want)


@trial
def grad_by_scales_jit():
    apply, params, x = mlp()
    got, want = grad_scales(jax.jit(apply), params, x)
    return floats(got), floats(want)


@trial
def value_and_grad_by_biases():
    apply, params, x = mlp()

    def by_bias(run):
        def fn(bias):
            return loss(run)(params | {"Dense_1": params["Dense_1"] | {"bias": bias}}, x)

        return jax.value_and_grad(fn)(params["Dense_1"]["bias"])

    return by_bias(lift(apply)), by_bias(lambda p, x: apply(dense_params(p), x))


# --- vmap ----------------------------------------------------------------------------------------------------------


def affine(p, x):
    y = jnp.tanh(x @ p["w"])
    return y + jnp.broadcast_to(p["b"], y.shape)


def affine_params():
    return {"w": kernel(0, 64, 32), "b": normal(2, 32)}


@trial
def vmap_x_outside():
    params, x = affine_params(), normal(1, 3, 64)
    return jax.vmap(lift(affine), (None, 0))(params, x), jax.vmap(affine, (None, 0))(dense_params(params), x)


@trial
def vmap_x_inside():
    return plain_and_packed(jax.vmap(affine, (None, 0)), affine_params(), normal(1, 3, 64))


@trial
def vmap_weights_outside():
    params, x = {"w": stacked_kernel(0, 3, 64, 32), "b": normal(2, 3, 32)}, normal(1, 64)
    return jax.vmap(lift(affine), (0, None))(params, x), jax.vmap(affine, (0, None))(dense_params(params), x)


@trial
def vmap_weights_inside():
    params = {"w": stacked_kernel(0, 3, 64, 32), "b": normal(2, 3, 32)}
    return plain_and_packed(jax.vmap(affine, (0, None)), params, normal(1, 64))


@trial
def vmap_both_inside():
    params = {"w": stacked_kernel(0, 3, 64, 32), "b": normal(2, 3, 32)}
    return plain_and_packed(jax.vmap(affine), params, normal(1, 3, 64))


@trial
def vmap_of_quantize_then_lift():
    w = normal(0, 3, 64, 32)
    params = {"w": jax.vmap(lambda m: pack(m, 0))(w), "b": normal(2, 3, 32)}
    return jax.vmap(lift(affine))(params, normal(1, 3, 64)), jax.vmap(affine)(dense_params(params), normal(1, 3, 64))


# --- scan ----------------------------------------------------------------------------------------------------------


def layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p["w"])


def layer_params():
    return {"w": stacked_kernel(0, 3, 64, 64)}


@trial
def scan_inside():
    return plain_and_packed(layers, layer_params(), normal(1, 5, 64))


@trial
def scan_outside():
    params, x = layer_params(), normal(1, 5, 64)
    step = lift(lambda p, x: jnp.tanh(x @ p))
    got = lax.scan(lambda x, w: (step(w, x), x.sum()), x, params["w"])
    return got, layers(dense_params(params), x)


@trial
def scan_grad():
    params, x = layer_params(), normal(1, 5, 64)
    grad = functools.partial(jax.grad, argnums=1)

    def fn(run):
        return lambda p, x: run(p, x)[0].sum() + run(p, x)[1].sum()

    return grad(fn(lift(layers)))(params, x), grad(fn(layers))(dense_params(params), x)


@trial
def scan_of_shared_weight():
    def fn(p, xs):
        return lax.scan(lambda c, x: (jnp.tanh(c + x @ p["w"]), c), jnp.zeros((5, 64)), xs, reverse=True)

    return plain_and_packed(fn, {"w": kernel(0, 64, 64)}, normal(1, 3, 5, 64))


@trial
def scan_carries_weight_unchanged():
    def fn(p, x):
        (_, x), _ = lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (p["w"], x), None, length=3)
        return x

    return plain_and_packed(fn, {"w": kernel(0, 64, 64)}, normal(1, 5, 64))


@trial
def scan_carries_weight_changed():
    def fn(p, x):
        (_, x), _ = lax.scan(lambda c, _: ((c[0] * 0.5, jnp.tanh(c[1] @ c[0])), None), (p["w"], x), None, length=3)
        return x

    return needs_values(fn, {"w": kernel(0, 64, 64)}, normal(1, 5, 64), path="w", primitive="scan changes it")


@trial
def scan_unrolled_and_nested():
    def fn(p, x):
        def outer(x, w):
            return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0], None

        return lax.scan(outer, x, p["w"], unroll=2)[0]

    return plain_and_packed(fn, layer_params(), normal(1, 5, 64))


class Layers(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        def step(dense, x, _):
            return nn.tanh(dense(x)), None

        body = nn.remat(step, prevent_cse=False) if self.remat else step
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(64, name="dense"), x, None)[0]


def scanned_linen(**options):
    model, x = Layers(**options), normal(1, 5, 64)
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda w: pack(w) if w.ndim > 2 else w, params)
    return lambda p, x: model.apply({"params": p}, x), params, x


@trial
def linen_scan():
    return plain_and_packed(*scanned_linen())


@trial
def linen_scan_remat():
    return plain_and_packed(*scanned_linen(remat=True))


@trial
def linen_scan_grad():
    apply, params, x = scanned_linen(remat=True)
    grad = functools.partial(jax.grad, argnums=1)
    return grad(loss(lift(apply)))(params, x), grad(loss(apply))(dense_params(params), x)


# --- remat ---------------------------------------------------------------------------------------------------------


@trial
def checkpoint_inside():
    policy = jax.checkpoint_policies.dots_saveable
    fn = jax.checkpoint(affine, policy=policy)
    params, x = affine_params(), normal(1, 5, 64)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss(lift(fn)), argnums=1))(params, x))
    assert "remat" in jaxpr
    return plain_and_packed(fn, params, x)


@trial
def checkpoint_outside():
    params, x = affine_params(), normal(1, 5, 64)
    return jax.checkpoint(lift(affine))(params, x), affine(dense_params(params), x)


@trial
def checkpoint_grad():
    params, x = affine_params(), normal(1, 5, 64)
    grad = functools.partial(jax.grad, argnums=1)
    return grad(loss(lift(jax.checkpoint(affine))))(params, x), grad(loss(affine))(dense_params(params), x)


@trial
def linen_remat():
    return plain_and_packed(*mlp(remat=True))


# --- nnx -----------------------------------------------------------------------------------------------------------


def nnx_model():
    """(graph, packed state, x)."""
    graph, state = nnx.split(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    return graph, jax.tree.map(lambda w: pack(w) if w.ndim > 1 else w + 0.1, state), normal(1, 5, 64)


@trial
def nnx_split_merge():
    graph, state, x = nnx_model()
    return plain_and_packed(lambda s, x: nnx.merge(graph, s)(x), state, x)


@trial
def nnx_jit_inside():
    graph, state, x = nnx_model()
    return plain_and_packed(nnx.jit(lambda s, x: nnx.merge(graph, s)(x)), state, x)


@trial
def nnx_jit_outside():
    graph, state, x = nnx_model()
    got = nnx.jit(lift(lambda s, x: nnx.merge(graph, s)(x)))(state, x)
    return got, nnx.merge(graph, dense_params(state))(x)


@trial
def nnx_scan_inside():
    @nnx.vmap
    def build(key):
        return nnx.Linear(64, 64, rngs=nnx.Rngs(key))

    graph, state = nnx.split(build(jax.random.split(jax.random.key(0), 3)))
    state = jax.tree.map(lambda w: pack(w) if w.ndim > 2 else w, state)

    def fn(state, x):
        step = nnx.scan(lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, nnx.merge(graph, state))

    return plain_and_packed(fn, state, normal(1, 5, 64))


# --- custom derivatives --------------------------------------------------------------------------------------------


@jax.custom_vjp
def clip_gradient(x):
    return x * 1.0


clip_gradient.defvjp(lambda x: (clip_gradient(x), None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@trial
def custom_vjp_on_activations():
    """The user's backward rule stays in force."""
    params, x = affine_params(), normal(1, 5, 64)
    grad = functools.partial(jax.grad, argnums=1)

    def fn(p, x):
        return clip_gradient(affine(p, x)) * 3.0

    unclipped = grad(loss(lambda p, x: affine(p, x) * 3.0))(dense_params(params), x)
    got = grad(loss(lift(fn)))(params, x)
    assert not np.allclose(got, unclipped)
    return got, grad(loss(fn))(dense_params(params), x)


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@trial
def custom_vjp_around_weight():
    return plain_and_packed(lambda p, x: product(x, p["w"]), affine_params(), normal(1, 5, 64))


@trial
def custom_vjp_around_weight_grad():
    params, x = affine_params(), normal(1, 5, 64)
    grad = functools.partial(jax.grad, argnums=1)

    def fn(p, x):
        return product(x, p["w"])

    return grad(loss(lift(fn)))(params, x), grad(loss(fn))(dense_params(params), x)


@jax.custom_jvp
def softer(x):
    return jnp.tanh(x)


softer.defjvp(lambda p, t: (softer(*p), 2.0 * t[0]))


@trial
def custom_jvp_on_activations():
    params, x = affine_params(), normal(1, 5, 64)
    grad = functools.partial(jax.grad, argnums=1)

    def fn(p, x):
        return softer(x @ p["w"])

    return grad(loss(lift(fn)))(params, x), grad(loss(fn))(dense_params(params), x)


@trial
def custom_jvp_around_weight():
    fn = jax.custom_jvp(lambda w, x: x @ w)
    fn.defjvp(lambda p, t: (fn(*p), t[1] @ p[0]))
    return plain_and_packed(lambda p, x: fn(p["w"], x), affine_params(), normal(1, 5, 64))


# --- control flow --------------------------------------------------------------------------------------------------


@trial
def cond_on_activations():
    def fn(p, x):
        return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: -(x @ p["w"]), x)

    return plain_and_packed(fn, affine_params(), normal(1, 5, 64))


@trial
def switch_between_weights():
    def fn(p, x, i):
        return lax.switch(i, [lambda x: x @ p["w"], lambda x: x @ p["v"], lambda x: x[:, :32]], x)

    return plain_and_packed(fn, affine_params() | {"v": kernel(3, 64, 32)}, normal(1, 5, 64), jnp.int32(1))


@trial
def cond_returns_weight():
    def fn(p, x):
        return x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["w"] * 2.0)

    params, x = {"w": kernel(0, 64, 32)}, normal(1, 5, 64)
    with pytest.raises(UserError, match="'w'"):
        lift(fn)(params, x)
    with pytest.warns(UserWarning) as caught:
        got = lift(fn, strict=False)(params, x)
    assert {str(w.message) for w in caught} == {
        "'w' is decoded: cond returns it",
        "'w' is decoded: mul needs its values",
    }
    return got, fn(dense_params(params), x)


@trial
def fori_loop():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x)

    return plain_and_packed(fn, {"w": kernel(0, 64, 64)}, normal(1, 5, 64))


@trial
def while_loop():
    def fn(p, x):
        def body(c):
            return c[0] + 1, jnp.tanh(c[1] @ p["w"])

        return lax.while_loop(lambda c: (c[0] < 5) & ((c[1] @ p["w"]).sum() < 1e6), body, (0, x))

    return plain_and_packed(fn, {"w": kernel(0, 64, 64)}, normal(1, 5, 64))


@trial
def while_carries_weight():
    def fn(p, x):
        def body(c):
            return c[0] + 1, c[1], jnp.tanh(c[2] @ c[1])

        return lax.while_loop(lambda c: c[0] < 3, body, (0, p["w"], x))[2]

    return plain_and_packed(fn, {"w": kernel(0, 64, 64)}, normal(1, 5, 64))


@trial
def python_loop_over_stacked_layers():
    def fn(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i])
        return x

    return plain_and_packed(fn, layer_params(), normal(1, 5, 64))


@trial
def loop_over_unstacked_layers():
    def fn(p, x):
        for w, v in zip(jnp.unstack(p["w"]), jnp.split(p["w"], 3), strict=True):
            x = jnp.tanh(x @ w) + x @ v[0]
        return x

    return plain_and_packed(fn, layer_params(), normal(1, 5, 64))


@trial
def fori_loop_over_stacked_layers():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    return plain_and_packed(fn, layer_params(), normal(1, 5, 64))


# --- many devices --------------------------------------------------------------------------------------------------


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


@trial
def shard_map_inside_data_parallel():
    fn = jax.shard_map(affine, mesh=mesh(), in_specs=({"w": P(), "b": P()}, P("d")), out_specs=P("d"))
    return plain_and_packed(fn, affine_params(), normal(1, 16, 64))


@trial
def shard_map_inside_columns():
    fn = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh(), in_specs=(P(None, "d"), P()), out_specs=P(None, "d"), check_vma=False
    )
    return plain_and_packed(lambda p, x: fn(p["w"], x), affine_params(), normal(1, 16, 64))


@trial
def shard_map_inside_rows():
    """The contracted axis sharded: whole ggml blocks go to each device."""
    fn = jax.shard_map(lambda w, x: lax.psum(x @ w, "d"), mesh=mesh(), in_specs=(P("d"), P(None, "d")), out_specs=P())
    params = {"w": pack(normal(0, 256, 32), 0, "Q4_0")}
    return plain_and_packed(lambda p, x: fn(p["w"], x), params, normal(1, 16, 256))


@trial
def shard_map_outside():
    params, x = affine_params(), normal(1, 16, 64)
    fn = jax.shard_map(lift(affine), mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"))
    return fn(params, x), affine(dense_params(params), x)


@trial
def named_sharding_of_leaves():
    params, x = affine_params(), normal(1, 16, 64)
    placed = jax.device_put(params, NamedSharding(mesh(), P()))
    placed["w"] = jax.device_put(params["w"], NamedSharding(mesh(), P("d")))  # along `out`, the leaves' first axis
    return jax.jit(lift(affine))(placed, x), affine(dense_params(params), x)


@trial
def sharding_constraint_on_weight():
    def fn(p, x):
        return x @ lax.with_sharding_constraint(p["w"], NamedSharding(mesh(), P(None, "d")))

    params, x = affine_params(), normal(1, 16, 64)
    return jax.jit(lift(fn))(params, x), fn(dense_params(params), x)


@trial
def jit_with_out_shardings_inside():
    fn = jax.jit(affine, out_shardings=NamedSharding(mesh(), P("d")))
    got, want = plain_and_packed(fn, affine_params(), normal(1, 16, 64))
    assert got.sharding.is_equivalent_to(want.sharding, 2) and not got.sharding.is_fully_replicated
    return got, want


# --- arrangements --------------------------------------------------------------------------------------------------


@trial
def einsum_reordered():
    def fn(p, x):
        return jnp.einsum("oi,bti->obt", p["w"], x)

    return plain_and_packed(fn, {"w": pack(normal(0, 32, 64), -1)}, normal(1, 5, 3, 64))


@trial
def einsum_experts():
    """Batched weights [expert, in, out]."""
    params = {"w": stacked_kernel(0, 4, 64, 32)}
    return plain_and_packed(lambda p, x: jnp.einsum("eio,tei->teo", p["w"], x), params, normal(1, 5, 4, 64))


@trial
def einsum_experts_permuted():
    params = {"w": pack(normal(0, 64, 4, 32), 0)}
    return plain_and_packed(lambda p, x: jnp.einsum("tei,ieo->oet", x, p["w"]), params, normal(1, 5, 4, 64))


@trial
def transposed_weight():
    return plain_and_packed(lambda p, x: x @ p["w"].T, {"w": pack(normal(0, 32, 64), -1)}, normal(1, 5, 64))


@trial
def weight_on_the_left():
    return plain_and_packed(lambda p, x: p["w"] @ x, {"w": pack(normal(0, 32, 64), -1)}, normal(1, 64, 5))


@trial
def transposed_stack():
    params = {"w": pack(normal(0, 3, 32, 64), -1)}
    return plain_and_packed(
        lambda p, x: jnp.einsum("ti,iso->tso", x, p["w"].transpose(2, 0, 1)), params, normal(1, 5, 64)
    )


@trial
def reshaped_outputs():
    def fn(p, x):
        return jnp.einsum("ti,ihd->htd", x, p["w"].reshape(64, 4, 8))

    return plain_and_packed(fn, {"w": kernel(0, 64, 32)}, normal(1, 5, 64))


@trial
def merged_outputs_with_new_axes():
    def fn(p, x):
        return jnp.einsum("ti,io->to", x, p["w"].reshape(64, 32)[None, :, None, :].squeeze((0, 2)))

    return plain_and_packed(fn, {"w": kernel(0, 64, 4, 8)}, normal(1, 5, 64))


@trial
def split_of_quantized_axis():
    """Blocks of 32 over heads of 16: contracted together, the halves are one axis again."""
    params, x = {"w": kernel(0, 64, 32)}, normal(1, 5, 4, 16)
    return plain_and_packed(lambda p, x: jnp.einsum("thd,hdo->to", x, p["w"].reshape(4, 16, 32)), params, x)


@trial
def half_of_a_split_axis():
    params, x = {"w": kernel(0, 64, 32)}, normal(1, 5, 16)
    fn = lambda p, x: jnp.einsum("td,hdo->tho", x, p["w"].reshape(4, 16, 32))  # noqa: E731
    return needs_values(fn, params, x, path="w", primitive="axes -3, -2 together")


@trial
def merge_of_quantized_axis():
    params, x = {"w": kernel(0, 64, 32)}, normal(1, 64, 32)
    fn = lambda p, x: x.reshape(-1) @ p["w"].reshape(-1)  # noqa: E731
    return needs_values(fn, params, x, path="w", primitive="reshape to")


@trial
def linen_attention_merged():
    """Heads of 16 under blocks of 32: the output's blocks run along (heads, head_dim) as one."""
    model = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=64)
    x = normal(1, 2, 7, 64)
    params = model.init(jax.random.key(0), x)["params"]
    axes = {"query": 0, "key": 0, "value": 0, "out": (0, 1)}
    params = {k: {"kernel": pack(params[k]["kernel"], axis), "bias": params[k]["bias"]} for k, axis in axes.items()}
    assert params["out"]["kernel"].shape == (4, 16, 64)
    return plain_and_packed(lambda p, x: model.apply({"params": p}, x), params, x)


@trial
def merged_axes_scanned_sliced_and_moved():
    """A stack [layer, out, heads, head_dim] under a scan and by number, its axes in another order."""
    params = {"w": pack(normal(0, 3, 64, 4, 16) / 8, (2, 3))}

    def fn(p, x):
        x = lax.scan(lambda x, w: (jnp.tanh(jnp.einsum("thd,ohd->to", x, w)).reshape(x.shape), None), x, p["w"])[0]
        return jnp.einsum("thd,hdo->ot", x, p["w"][1].transpose(1, 2, 0)[..., :7])

    return plain_and_packed(fn, params, normal(1, 5, 4, 16))


@trial
def fused_qkv_split():
    def fn(p, x):
        q, k, v = jnp.split(p["w"], 3, axis=1)
        return x @ q + jnp.tanh(x @ k) * (x @ v)

    return plain_and_packed(fn, {"w": kernel(0, 64, 96)}, normal(1, 5, 64))


@trial
def slice_of_outputs():
    return plain_and_packed(lambda p, x: x @ p["w"][:, 4:20:2], {"w": kernel(0, 64, 32)}, normal(1, 5, 64))


@trial
def slice_of_blocks():
    """Half of the contracted axis, cut between ggml blocks."""
    params = {"w": pack(normal(0, 32, 128), -1, "Q8_0")}
    return plain_and_packed(lambda p, x: p["w"][:, 64:] @ x, params, normal(1, 64, 5))


@trial
def slice_inside_a_block():
    params, x = {"w": pack(normal(0, 32, 128), -1, "Q8_0")}, normal(1, 64, 5)
    return needs_values(lambda p, x: p["w"][:, 16:80] @ x, params, x, path="w", primitive="slice")


@trial
def dynamic_slice_of_outputs():
    def fn(p, x, i):
        return x @ lax.dynamic_slice_in_dim(p["w"], i, 8, axis=1)

    return plain_and_packed(fn, {"w": kernel(0, 64, 32)}, normal(1, 5, 64), jnp.int32(7))


@trial
def take_rows():
    params = {"e": pack(normal(0, 50, 64), -1)}
    return plain_and_packed(lambda p, i: jnp.take(p["e"], i, axis=0) * 2.0, params, jnp.array([[4, 0, -1]]))


@trial
def take_out_of_range():
    """jnp.take fills with NaN; so does the packed lookup."""
    params, i = {"e": pack(normal(0, 50, 64), -1)}, jnp.array([3, 50, -51, -50])
    got, want = plain_and_packed(lambda p, i: jnp.take(p["e"], i, axis=0), params, i)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(want).any(-1).sum() == 2
    return jnp.nan_to_num(got), jnp.nan_to_num(want)


@trial
def index_rows():
    params = {"e": pack(normal(0, 50, 64), -1)}
    return plain_and_packed(lambda p, i: p["e"][i].astype(jnp.bfloat16), params, jnp.array([[4, 0, -1]]))


@trial
def index_one_row():
    params = {"e": pack(normal(0, 50, 64), -1)}
    return plain_and_packed(lambda p, i: jnp.sin(p["e"][i]), params, jnp.int32(7))


@trial
def index_rows_under_vmap():
    params = {"e": pack(normal(0, 50, 64), -1)}
    fn = jax.vmap(lambda p, i: jnp.sin(lax.dynamic_index_in_dim(p["e"], i, 0, False)), (None, 0))
    return plain_and_packed(fn, params, jnp.array([7, 0, 49]))


@trial
def take_columns():
    """Embeddings stored as (dim, vocab)."""
    params = {"e": pack(normal(0, 64, 50), 0)}
    return plain_and_packed(lambda p, i: jnp.take(p["e"], i, axis=1, mode="clip"), params, jnp.array([4, 0, 49]))


@trial
def lookup_across_blocks():
    params, i = {"e": pack(normal(0, 64, 10), 0)}, jnp.array([4, 0])
    return needs_values(lambda p, i: p["e"][i], params, i, path="e", primitive="gather takes single weights")


@trial
def chosen_experts():
    """A gather of matrices picks weights, which stay packed."""
    params = {"w": stacked_kernel(0, 6, 64, 32)}

    def fn(p, x, i):
        return jnp.einsum("tki,tkio->tko", x, p["w"][i])

    return plain_and_packed(fn, params, normal(1, 3, 2, 64), jnp.array([[0, 5], [2, 2], [1, 0]]))


@trial
def barrier_name_and_stop_gradient():
    def fn(p, x):
        w, x = lax.optimization_barrier((p["w"], x))
        w = checkpoint_name(lax.stop_gradient(w), "w")
        return x @ jnp.copy(w)

    return plain_and_packed(fn, {"w": kernel(0, 64, 32)}, normal(1, 5, 64))


@trial
def bf16_preferred_f32():
    def fn(p, x):
        w = p["w"].astype(jnp.bfloat16)
        return lax.dot_general(
            x.astype(jnp.bfloat16), w, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    return plain_and_packed(fn, {"w": kernel(0, 64, 32)}, normal(1, 5, 64))


# --- operations that need the values -------------------------------------------------------------------------------


@trial
def sum_of_weight():
    params, x = {"a": {"w": kernel(0, 64, 32)}}, normal(1, 5, 64)
    fn = lambda p, x: x @ p["a"]["w"] + jnp.sum(p["a"]["w"])  # noqa: E731
    return needs_values(fn, params, x, path="a/w", primitive="reduce_sum needs its values")


@trial
def scaled_weight():
    params, x = {"w": kernel(0, 64, 32)}, normal(1, 5, 64)
    return needs_values(lambda p, x: x @ (p["w"] * 2.0), params, x, path="w", primitive="mul needs its values")


@trial
def wrong_axis():
    params, x = {"w": pack(normal(0, 64, 32), -1)}, normal(1, 5, 64)
    return needs_values(lambda p, x: x @ p["w"], params, x, path="w", primitive="dot_general contracts axis -2")


@trial
def weight_times_weight():
    params, x = {"w": kernel(0, 64, 32), "v": normal(3, 16, 64)}, normal(1, 5, 16)
    return plain_and_packed(lambda p, x: x @ (p["v"] @ p["w"]), params, x)


@trial
def body_not_looked_into():
    def fn(p, x):
        return lax.custom_linear_solve(lambda v: p["w"] @ v, x, lambda mv, b: jnp.linalg.solve(p["w"], b))

    params = {"w": pack(normal(0, 64, 64) + 32 * jnp.eye(64), -1)}
    return needs_values(fn, params, normal(1, 64), path="w", primitive="custom_linear_solve has a body")


@trial
def returned_weight():
    params, x = {"w": kernel(0, 64, 32)}, normal(1, 5, 64)
    return needs_values(lambda p, x: (x @ p["w"], p["w"]), params, x, path="w", primitive="the function returns it")


@trial
def convolution():
    def fn(p, x):
        return lax.conv(x, p["w"], (1, 1), "SAME")

    params, x = {"w": pack(normal(0, 4, 32, 3, 3), 1)}, normal(1, 2, 32, 6, 6)
    assert [use.kind for use in report(fn, params, x)] == ["conv"]
    return plain_and_packed(fn, params, x)


@trial
def fused_qkv_joined():
    def fn(p, x):
        y = jnp.tanh(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1))
        q, k, v = jnp.split(y, [32, 48], axis=-1)
        return q[:, :16] * k + v

    return plain_and_packed(
        fn, {"q": kernel(0, 64, 32), "k": kernel(1, 64, 16), "v": kernel(2, 64, 16)}, normal(3, 5, 64)
    )


@trial
def joined_rows_on_the_left():
    """(out, in) joined along out, converted and transposed, on the left of an activation, beside a dense one."""

    def fn(p, x):
        w = jnp.concatenate([p["a"].astype(jnp.float32), p["b"], jnp.concatenate([p["a"], p["b"]])])
        return w @ x + jnp.einsum("ti,io->ot", x.T, w.T)

    return plain_and_packed(fn, {"a": pack(normal(0, 32, 64), -1), "b": normal(1, 8, 64)}, normal(3, 64, 5))


@trial
def experts_stacked_from_a_list():
    def fn(p, x):
        w = jnp.stack([p["a"], p["b"]])
        return jnp.einsum("eti,eio->teo", x, w) + (x[0] @ w[1])[:, None]

    return plain_and_packed(fn, {"a": kernel(0, 64, 16), "b": kernel(1, 64, 16)}, normal(3, 2, 5, 64))


@trial
def joined_in_jit_scan_and_cond():
    def fn(p, x):
        both = jnp.concatenate([p["a"], p["b"]], axis=1)
        x = lax.scan(lambda x, _: (jnp.tanh(jax.jit(jnp.matmul)(x, both)), None), x, None, length=2)[0]
        return lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: jnp.sin(x @ w), both)

    return plain_and_packed(fn, {"a": kernel(0, 64, 32), "b": kernel(1, 64, 32)}, normal(3, 5, 64))


@trial
def joined_along_the_contracted_axis():
    params, x = {"a": kernel(0, 64, 32), "b": normal(1, 32, 32)}, normal(3, 5, 96)
    fn = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]])  # noqa: E731
    return needs_values(fn, params, x, path="a", primitive="dot_general contracts the axis along which 2 weights")


@trial
def layers_stacked_for_a_scan():
    params, x = {"a": kernel(0, 64, 64), "b": normal(1, 64, 64)}, normal(3, 5, 64)
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["a"], p["b"]]))[0]  # noqa: E731
    return needs_values(fn, params, x, path="a", primitive="scan steps over 2 weights that the program joins")


@trial
def ragged_experts():
    params = {"w": stacked_kernel(0, 3, 64, 32)}
    return plain_and_packed(
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes), params, normal(1, 9, 64), jnp.array([4, 0, 5])
    )


@trial
def linen_lstm():
    """Kernels joined gate by gate, under a scan over time."""
    model, x = nn.RNN(nn.OptimizedLSTMCell(32)), normal(1, 2, 6, 64)
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda w: pack(w, 0) if w.ndim > 1 else w, params)
    return plain_and_packed(lambda p, x: model.apply({"params": p}, x), params, x)


# --- the params as a tree ------------------------------------------------------------------------------------------


@trial
def orbax_save_restore(tmp_path):
    params, x = affine_params(), normal(1, 5, 64)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "q", params)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "q", jax.tree.map(ocp.utils.to_shape_dtype_struct, params))
    return lift(affine)(restored, x), affine(dense_params(params), x)


@trial
def eval_shape():
    params, x = affine_params(), normal(1, 5, 64)
    shape = jax.eval_shape(lift(affine), params, x)
    want = affine(dense_params(params), x)
    assert (shape.shape, shape.dtype) == (want.shape, want.dtype)
    abstract = jax.eval_shape(lambda: params)
    assert report(affine, abstract, shape_of(x)) == report(affine, params, x)
    return lift(affine)(params, x), want


def shape_of(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@trial
def optax_step_on_float_leaves():
    params, x = affine_params(), normal(1, 5, 64)
    is_float = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), params)

    def step(run):
        optimizer = optax.masked(optax.adam(1e-2), is_float)
        grads = jax.grad(loss(run), allow_int=True)(params, x)
        grads = jax.tree.map(lambda g, p: g if g.dtype != jax.dtypes.float0 else jnp.zeros_like(p), grads, params)
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            updates, _ = optimizer.update(grads, optimizer.init(params), params)
            return optax.apply_updates(params, updates)

    moved = step(lift(affine))
    assert not np.allclose(qjax.dequantize(moved["w"]), qjax.dequantize(params["w"]))
    return moved, step(lambda p, x: affine(dense_params(p), x))


@trial
def compiled_once():
    params, x = affine_params(), normal(1, 5, 64)
    fn = jax.jit(lift(affine))
    fn(params, x)
    got = fn(jax.tree.map(lambda leaf: leaf, params), x)
    assert fn._cache_size() == 1
    return got, affine(dense_params(params), x)


@trial
def random_keys_pass():
    def fn(p, x, key):
        return nn.Dropout(0.5).apply({}, x @ p["w"], deterministic=False, rngs={"dropout": key})

    return plain_and_packed(fn, affine_params(), normal(1, 5, 64), jax.random.key(3))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("run", TRIALS)
def test_trial(run, request):
    arguments = {"tmp_path": request.getfixturevalue("tmp_path")} if "orbax" in run.__name__ else {}
    got, want = run(**arguments)
    rounded = run.__name__.replace("_", "-") in ROUNDED
    assert_close(got, want, rtol=1e-2 if rounded else 2e-5)


def test_the_matrix_is_whole():
    assert len(TRIALS) >= 46
    assert len({p.values[0].__name__ for p in TRIALS}) == len(TRIALS)
    assert list(itertools.islice((p.id[:2] for p in TRIALS), 2)) == ["01", "02"]
