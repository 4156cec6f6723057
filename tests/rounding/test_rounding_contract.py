"""The contract: every format x every rounding x {eager, jit, vmap, scan, map}; one test a row of the table.

Every entry is a compilation of seconds. All formats go through every stage once, in one program each; orders,
transformations and the files beside this one take formats whose grids differ in kind, for the stages know nothing of a
format but its grid.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rounding_problems import damped64, losses, marked, problem

import qjax
from qjax.errors import UserError
from qjax.rounding import Rounding, check_chain, descend, ldlq, nearest, refit, round_weight
from qjax.rounding.curvature import proxy
from qjax.rounding.learned import learned, learned_clipping
from qjax.rounding.protocol import DAMPING, State
from qjax.stats import Stats

ROWS, N = 8, 512
BEST = (nearest("h"), ldlq("act"), descend(), refit())
STAGES = {  # what stands before it, and the stage
    **{key: (behind, stage) for key, behind, stage in zip(
        ("nearest", "ldlq", "descend", "refit"), ("", "nearest", "ldlq", "descend"), BEST, strict=True)},
    "learned": ("ldlq", learned(20)),
    "V alone": ("ldlq", learned(20, ranges=False)),
    "clipping": ("ldlq", learned_clipping(20)),
}  # fmt: skip
ORDERS = {
    "nearest": (nearest(),),
    "natural": (nearest("h"), ldlq("natural")),
    "group": (nearest("h"), ldlq("group")),
    "dynamic": (nearest("h"), ldlq("group", "dynamic")),
}
ALL = qjax.format_names()
KINDS = {  # formats whose grids differ in kind
    "F16": "no scales, a block of one weight",
    "Q4_1": "an offset",
    "Q3_K": "scales of either sign under a super-scale",
    "NVFP4": "float levels, four scales a block",
    "int8_row": "one scale a row",
    "uint4_g64_zf16": "an offset of its own type",
    "NF4_dq": "scales of all rows on one grid",
    "FP8_E5M2_b128": "levels without an even step",
}


def relative_loss(w, w_hat, H):
    """tr(E H E^T) / tr(W H W^T), differentiable."""
    return jnp.sum(proxy(w - w_hat, H)) / jnp.sum(proxy(w, H))


@pytest.fixture(scope="module")
def w_H():
    return problem(ROWS, N)


@cache
def stack():
    """Three weights, each with its H."""
    pairs = [problem(ROWS, N, seed) for seed in range(3)]
    return jnp.stack([w for w, _ in pairs]), jnp.stack([H for _, H in pairs])


@cache
def one_by_one(name: str):
    """`round_weight` on each weight of the stack: losses [3] and codes [3, rows, n]."""
    found = [round_weight(w, qjax.format(name), BEST, Stats(H=H)) for w, H in zip(*stack(), strict=True)]
    return np.array([r.loss for r in found]), np.stack([r.codes for r in found])


@pytest.mark.parametrize("stage", [nearest(), ldlq(), descend(), refit()], ids=str)
def test_stages_are_records(stage):
    assert isinstance(stage, Rounding) and dataclasses.is_dataclass(stage)
    assert hash(stage) == hash(dataclasses.replace(stage))


def stored(fmt, state):
    """(scales, codes), what comes back of them from the packed leaves, and the weights that they mean."""
    pair = state.scales, state.codes
    return pair, fmt.unpack(fmt.pack(*pair)), fmt.decode(*pair)


def assert_stored_exactly(pair, again, w_hat):
    for a, b in zip(jax.tree.leaves(pair), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(np.asarray(w_hat)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(ALL, tuple(KINDS)))
def test_every_stage(name, w_H):
    """Storable, and none that improves makes the damped loss of a row larger: all stages in one program."""
    fmt = qjax.format(name)
    w, H = w_H if fmt.rows <= 1 else problem(2 * fmt.rows, N)

    @jax.jit
    def staged(w, H):
        stats = Stats(H=H)
        states = {"": State(None, None, w, jnp.float32(DAMPING))}
        for key, (behind, stage) in STAGES.items():
            states[key] = stage(states[behind], fmt, stats)
        return {key: stored(fmt, states[key]) for key in STAGES}

    found = staged(w, H)
    loss, damped_loss = {}, {}
    for key, (pair, again, w_hat) in found.items():
        assert_stored_exactly(pair, again, w_hat)
        damped_loss[key] = losses(w, w_hat, damped64(H, DAMPING))
        loss[key] = losses(w, w_hat, H).sum()
    for a, b in zip(jax.tree.leaves(found["V alone"][0][0]), jax.tree.leaves(found["ldlq"][0][0]), strict=True):
        np.testing.assert_array_equal(a, b)  # without ranges the scales stay
    if name == "F32":
        assert not any(loss.values())
        return
    assert loss["ldlq"] < 0.95 * loss["nearest"]  # every other format gains, down to ternary
    assert max(loss["descend"], loss["refit"]) <= loss["ldlq"] * 1.01  # they see the damped loss, this is without
    for key, (behind, _) in tuple(STAGES.items())[2:]:
        before, after = damped_loss[behind], damped_loss[key]
        if fmt.rows != 1:
            before, after = before.sum(), after.sum()
        assert (after <= before * (1 + 1e-5) + 1e-12).all()


ORDERS_FAST = [("uint4_g64_zf16", kind) for kind in ORDERS] + [("NF4_dq", "group"), ("NF4_dq", "dynamic")]
ORDERS_ALL = [*ORDERS_FAST, *((name, "dynamic") for name in KINDS if name not in ("uint4_g64_zf16", "NF4_dq"))]
ORDERS_ALL += [("Q3_K", "group"), ("int8_row", "group"), ("FP8_E5M2_b128", "natural")]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", marked(ORDERS_ALL, ORDERS_FAST))
def test_every_order(name, kind, w_H):
    w, H = w_H
    fmt, stats = qjax.format(name), Stats(H=H)
    if kind == "dynamic" and (fmt.block < 2 or fmt.rows != 1):
        with pytest.raises(UserError, match=name):
            check_chain(ORDERS[kind], fmt, stats)
        return
    check_chain(ORDERS[kind], fmt, stats)
    r = round_weight(w, fmt, ORDERS[kind], stats)
    assert_stored_exactly(*stored(fmt, r))
    w_hat = fmt.decode(r.scales, r.codes)
    whole = losses(w, 0 * w, H).sum()
    assert float(r.loss) == pytest.approx(losses(w, w_hat, H).sum() / whole, rel=1e-3, abs=1e-12)
    assert float(r.damping) == pytest.approx(DAMPING)
    assert float(r.loss) <= float(r.first_loss) * 1.02


# transformations


def vmapped(f, *args):
    return jax.jit(jax.vmap(f))(*args)


def scanned(f, *args):
    return jax.jit(lambda *a: lax.scan(lambda c, x: (c, f(*x)), 0, a)[1])(*args)


def mapped(f, *args):
    return jax.jit(lambda *a: lax.map(lambda x: f(*x), a))(*args)


def eagerly(f, *args):
    """Stage by stage without a jit around them."""
    return jax.tree.map(lambda *x: jnp.stack(x), *(f(*x) for x in zip(*args, strict=True)))


WAYS = {f.__name__: f for f in (vmapped, scanned, mapped, eagerly)}
WAYS_FAST = [("Q3_K", "vmapped"), ("uint4_g64_zf16", "scanned")]
WAYS_ALL = [*WAYS_FAST, ("uint4_g64_zf16", "eagerly"), ("Q3_K", "mapped"), ("int8_row", "vmapped"),
            ("NF4_dq", "vmapped"), ("FP8_E5M2_b128", "scanned")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, way", marked(WAYS_ALL, WAYS_FAST))
def test_a_stack_is_its_members(name, way):
    fmt = qjax.format(name)

    def one(w, H):
        if way != "eagerly":
            r = round_weight(w, fmt, BEST, Stats(H=H))
            return r.loss, r.codes
        state = State(None, None, w, jnp.float32(DAMPING))
        for stage in BEST:
            state = stage(state, fmt, Stats(H=H))
        return relative_loss(w, fmt.decode(state.scales, state.codes), H), state.codes

    loss, codes = WAYS[way](one, *stack())
    loss_alone, codes_alone = one_by_one(name)
    different = np.asarray(codes) != codes_alone
    assert different.mean() < 1e-3
    tipped = different.any(axis=(1, 2))  # one weight between two levels, and what followed from it
    np.testing.assert_allclose(np.asarray(loss)[~tipped], loss_alone[~tipped], rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(loss, loss_alone, rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize("name", ("Q3_K", "uint4_g64_zf16"))
def test_no_second_compilation(name):
    one_by_one(name)
    before = round_weight._cache_size()
    w, H = stack()
    round_weight(2 * w[1], qjax.format(name), BEST, Stats(H=H[2]))
    assert round_weight._cache_size() == before


def test_the_loss_has_a_finite_gradient_by_H_and_by_the_weights(w_H):
    w, H = w_H
    fmt = qjax.format("Q3_K")
    w_hat = fmt.decode(*fmt.encode(w))
    by_w, by_H = jax.grad(lambda w, H: relative_loss(w, w_hat, H), argnums=(0, 1))(w, H)
    assert np.isfinite(by_w).all() and np.isfinite(by_H).all() and np.abs(by_H).max() > 0


def test_the_loss_on_other_tokens_is_that_in_their_H(w_H):
    w, H = w_H
    other = problem(ROWS, N, 1)[1]
    fmt = qjax.format("int4_g128")
    r = round_weight(w, fmt, (nearest("h"), ldlq("natural")), Stats(H=H), DAMPING, other)
    expected = losses(w, fmt.decode(r.scales, r.codes), other).sum() / losses(w, 0 * w, other).sum()
    assert float(r.heldout_loss) == pytest.approx(expected, rel=1e-4)
    assert float(r.first_heldout_loss) < float(r.heldout_loss)  # the wrong H leads astray
