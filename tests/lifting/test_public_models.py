"""Models of public libraries, none of which knows qjax: every leaf has a role, and they run packed after calibration.

flax linen's attention is in test_merged_axes, its LSTM in tests/calibrate/test_joined_weights.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from lift_programs import assert_close, dense_params, normal

import qjax
from qjax.lifting import lift, roles

X = normal(1, 7, 64)


def peer(name):
    """A library, or a skip where it is not at hand or does not know this JAX."""
    try:
        return pytest.importorskip(name)
    except AttributeError as e:
        pytest.skip(f"{name} does not import beside this JAX: {e}")


def nnx_attention():
    model = nnx.MultiHeadAttention(num_heads=4, in_features=64, decode=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    kernels = {f"{name}/kernel/value": -3 for name in ("key", "query", "value")}
    return lambda s, x: nnx.merge(graph, s)(x), state, kernels | {"out/kernel/value": (-3, -2)}


def equinox_attention():
    eqx = peer("equinox")
    keys = jax.random.split(jax.random.key(0), 2)
    norm, attention = eqx.nn.LayerNorm(64), eqx.nn.MultiheadAttention(4, 64, use_query_bias=True, key=keys[0])
    params, static = eqx.partition([norm, attention, eqx.nn.Linear(64, 32, key=keys[1])], eqx.is_array)

    def apply(params, x):
        norm, attention, linear = eqx.combine(params, static)
        x = jax.vmap(norm)(x)
        return jax.vmap(linear)(x + attention(x, x, x))

    names = [f"1/{name}_proj/weight" for name in ("query", "key", "value", "output")]
    return apply, params, dict.fromkeys([*names, "2/weight"], -1)  # (out, in), square, which no name says


def haiku_attention_and_lstm():
    hk = peer("haiku")

    def net(x):
        x = hk.MultiHeadAttention(4, 16, w_init_scale=1.0)(x, x, x) + hk.Linear(64)(x)
        zero = jnp.zeros((1, 32))
        return hk.dynamic_unroll(hk.LSTM(32), hk.LayerNorm(-1, True, True)(x)[:, None], hk.LSTMState(zero, zero))[0]

    model = hk.without_apply_rng(hk.transform(net))
    with jax.numpy_dtype_promotion("standard"):
        params = model.init(jax.random.key(0), X)
    names = [f"multi_head_attention/{name}/w" for name in ("query", "key", "value", "linear")]
    return model.apply, params, dict.fromkeys([*names, "linear/w", "lstm/linear/w"], -2)


BIASES_KEPT = qjax.Plan((qjax.Rule("*/bias/value", "keep"), qjax.Rule("*", "Q8_0")))  # those of heads have two axes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "plan"),
    [(nnx_attention, BIASES_KEPT), (equinox_attention, "Q8_0"), (haiku_attention_and_lstm, "Q8_0")],
    ids=["nnx", "equinox", "haiku"],
)
def test_a_public_model_is_calibrated_and_runs_packed(make, plan):
    apply, params, axes = make()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        table = roles(apply, params, X)
        assert {r.path for r in table.rows if r.role == "matrix"} == set(axes)
        assert {r.role for r in table.rows} <= {"matrix", "bias", "gain", "no floats"}
        stats = qjax.observe(apply, params, [X])
        assert {path: s.axis for path, s in stats.items()} == axes
        q, report = qjax.quantize_params(params, plan, stats, recipe="gptq")
        assert {t.name for t in report.tensors if t.kept is None} == set(axes)
        got, want, y = lift(apply)(q, X), apply(dense_params(q), X), apply(params, X)
    assert_close(got, want, rtol=1e-4)
    assert 0 < float(jnp.linalg.norm(got - y)) < 0.03 * float(jnp.linalg.norm(y))
