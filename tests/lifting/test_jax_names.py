"""The semi-public names of JAX that `qjax.lift` relies on exist in the JAX that runs here, and mean what they did."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from qjax.lifting import control, jax_names, layout
from qjax.lifting.jax_names import BODIES, JOINS, LEAFWISE

X = jnp.ones((8, 8))


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def custom_jvp(x):
    fn = jax.custom_jvp(jnp.sin)
    fn.defjvp(lambda p, t: (fn(*p), t[0]))
    return fn(x)


def custom_vjp(x):
    fn = jax.custom_vjp(jnp.sin)
    fn.defvjp(lambda x: (fn(x), None), lambda _, g: (g,))
    return fn(x)


def layers(x):
    y, sums = lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, jnp.ones((3, 8, 8)))
    return y.sum() + sums.sum()


# A program for each name; closed_call became eval_jaxpr in 0.11, copy_p prints as "copy_p".
PROGRAMS = {
    "jit": jax.jit(jnp.sin),
    "closed_call": jax.grad(jax.checkpoint(layers)),
    "remat2": jax.checkpoint(jnp.sin),
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "shard_map": lambda x: jax.shard_map(jnp.sin, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))(x),
    "scan": lambda x: lax.scan(lambda c, v: (c + v, None), x[0], x)[0],
    "while": lambda x: lax.while_loop(lambda c: c.sum() < 3, jnp.sin, x),
    "cond": lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "copy": lambda x: lax.optimization_barrier(jnp.array(x, copy=True)),
    "name": lambda x: checkpoint_name(x, "x"),
    "optimization_barrier": lambda x: lax.optimization_barrier(x),
    "pvary": lambda x: jax.shard_map(lambda w, x: x @ w, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"))(x, x),
    "stop_gradient": lax.stop_gradient,
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "transpose": lambda x: x.T,
    "reshape": lambda x: x.reshape(4, 16),
    "squeeze": lambda x: x[:1].squeeze(0),
    "broadcast_in_dim": lambda x: x[None],
    "slice": lambda x: x[1:3],
    "split": lambda x: jnp.split(x, 2)[0],
    "dynamic_slice": lambda x: lax.dynamic_slice_in_dim(x, x.sum().astype(int), 2),
    "gather": lambda x: x[jnp.array([1, 2])],
    "sharding_constraint": lambda x: lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh(), P("d"))),
    "dot_general": lambda x: x @ x,
    "concatenate": lambda x: jnp.concatenate([x, x]),
    "stack": lambda x: jnp.stack([x, x]),
    "unstack": lambda x: jnp.unstack(x),
    "ragged_dot_general": lambda x: lax.ragged_dot(x, x[None], jnp.array([8])),
    "conv_general_dilated": lambda x: lax.conv(x[None, None], x[None, None], (1, 1), "SAME"),
}
RENAMED = {"eval_jaxpr": "closed_call", "copy_p": "copy"}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(getattr(sub, "jaxpr", sub))


USES = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
TABLE = sorted({*BODIES, *LEAFWISE, *JOINS, *layout._AXES, *USES})


@pytest.mark.parametrize("name", TABLE)
def test_every_name_in_the_tables_is_a_primitive_of_this_jax(name):
    """Traced by its program; a renamed primitive's program gives one name or the other."""
    jaxpr = jax.make_jaxpr(PROGRAMS[RENAMED.get(name, name)])(X)
    found = {eqn.primitive.name for eqn in equations(jaxpr.jaxpr)}
    same = {name, RENAMED.get(name, name), *(new for new, old in RENAMED.items() if old == name)}
    assert found & same, f"jax {jax.__version__} traces it as {sorted(found)}: edit qjax/lifting/jax_names.py"


def test_every_body_has_a_rule():
    assert set(control.RULES) == set(BODIES)
    assert set(layout._PACKED) <= set(layout._AXES)


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) & set(BODIES)))
def test_bodies_are_where_the_table_says(name):
    jaxpr = jax.make_jaxpr(PROGRAMS[name])(X).jaxpr
    eqn = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name in (name, *RENAMED))
    bodies = jax_names.body(eqn)
    for body in bodies if isinstance(bodies, tuple) else (bodies,):
        assert len(body.constvars) == len(jax_names.consts(body))
        assert body.eqns
    assert jax_names.has_body(eqn)


def test_scan_operands_are_split_right():
    def fn(c, init, xs):
        return lax.scan(lambda carry, x: ((carry[0] + c.sum(), carry[1] * x[0]), (x[1], carry[0])), init, xs)

    jaxpr = jax.make_jaxpr(fn)(X, (jnp.float32(1), X[0]), (X, X))
    (eqn,) = (eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan")
    n_consts, n_carry = jax_names.scan_parts(eqn)
    assert n_carry == 2 and [v.aval.shape for v in eqn.invars[n_consts : n_consts + 2]] == [(), (8,)]
    assert all(v.aval.shape == (8, 8) for v in eqn.invars[n_consts + 2 :])


def test_scan_of_a_gradient_is_split_right():
    """After differentiation 0.11 keeps a tree with holes."""
    scans = [eqn for eqn in equations(jax.make_jaxpr(jax.grad(layers))(X).jaxpr) if eqn.primitive.name == "scan"]
    assert len(scans) == 2
    for eqn in scans:
        n_consts, n_carry = jax_names.scan_parts(eqn)
        assert all(v.aval.shape[0] == 3 for v in eqn.invars[n_consts + n_carry :])
        assert [v.aval.shape for v in eqn.invars[n_consts : n_consts + n_carry]] == [(8, 8)]
