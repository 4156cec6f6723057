"""Reparametrizations: exact in floating point, fused or at run time; transparent to jit, vmap, scan; bits counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reparam_problems import EXACT, INPUTS, OUT, SPLITS, N, inputs, site, stats_of, weight

import qjax
from qjax.errors import UserError
from qjax.pipeline.rounded import round_leaf
from qjax.plan import Plan
from qjax.recipes import Recipe, recipe
from qjax.reparam import (
    act,
    awq_scale,
    columns,
    hadamard,
    low_rank,
    orthogonal,
    reparametrize,
    rescale,
    restore,
    smooth,
    sparse,
    through,
)
from qjax.reparam.inputs import RoundedInput
from qjax.reparam.orthogonal import _made
from qjax.rounding import clip, hqq, ldlq, nearest
from qjax.stats import Stats
from qjax.tensor import held

EVERY = EXACT | SPLITS


def product(w):
    return lambda x: jnp.matmul(x, w.T, precision="highest")


def changed(reparams, **options):
    s, applied, found = reparametrize(reparams, site(**options), frozenset({"H"}))
    return s, applied, found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", EVERY)
def test_the_layer_is_unchanged(name):
    s, applied, _ = changed([EVERY[name]])
    x = jnp.asarray(inputs(32, seed=5))
    y, expected = through(applied, x, product(s.w)), product(weight())(x)
    assert float(jnp.max(jnp.abs(y - expected)) / jnp.max(jnp.abs(expected))) < (1e-5 if name in EXACT else 1e-3)
    back = restore(applied, s.w)
    np.testing.assert_allclose(back, weight(), atol=1e-5 if name in EXACT else 5e-3)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", EXACT)
def test_statistics_move_with_the_input(name):
    """H behind the change is the H of the changed inputs."""
    s, applied, _ = changed([EXACT[name]])
    x = applied[0].input(jnp.asarray(inputs()))
    expected = np.float64(x).T @ np.float64(x) / len(x)
    np.testing.assert_allclose(s.stats.H, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", EXACT)
def test_losses_are_those_of_the_layer(name):
    """tr(E H E^T) is the same in both variables: no exact change touches the output's scale."""
    s, applied, _ = changed([EXACT[name]])
    e = 0.1 * jax.random.normal(jax.random.key(0), s.w.shape)
    E = restore(applied, s.w + e) - weight()

    def loss(e, H):
        e, H = np.float64(e), np.float64(H)
        return np.trace(e @ H @ e.T)

    assert loss(e, s.stats.H) == pytest.approx(loss(E, site().stats.H), rel=1e-3)


CHAINS = [
    (smooth(), hadamard("both")),
    (columns(share=0.05), hadamard("in", seed=1)),
    (sparse(0.02), hadamard("both")),
    (awq_scale(5), low_rank(2)),
    (sparse(0.01), smooth(), hadamard("in"), low_rank(2)),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: " >> ".join(r.name for r in c))
def test_chains_are_exact_too(chain):
    s, applied, _ = changed(chain)
    x = jnp.asarray(inputs(32, seed=5))
    y, expected = through(applied, x, product(s.w)), product(weight())(x)
    assert float(jnp.max(jnp.abs(y - expected)) / jnp.max(jnp.abs(expected))) < 1e-3


def rounded(reparams, format="uint4_g32", roundings=None, axis=-1, w=None):
    roundings = (nearest(), ldlq()) if roundings is None else roundings
    made = Recipe(tuple(roundings), reparams=tuple(reparams))
    w = weight() if w is None else w
    stats = stats_of(inputs())
    return round_leaf("w", jnp.swapaxes(w, -1, -2) if axis == -2 else w, axis, qjax.format(format), made, stats)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", EVERY)
def test_a_packed_weight_runs_behind_it(name, axis):
    q, report = rounded([EVERY[name]], axis=axis)
    w_hat = qjax.dequantize(q)
    w_hat = w_hat if axis == -1 else w_hat.T
    x = jnp.asarray(inputs(16, seed=7))
    expected = product(w_hat)(x)
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(qjax.dot(x, q), expected, atol=1e-3 * scale)
    np.testing.assert_allclose(jax.jit(qjax.dot)(x, q), expected, atol=1e-3 * scale)
    e = np.float64(weight()) - np.float64(w_hat)
    H = np.float64(site().stats.H)
    w = np.float64(weight())
    assert report.loss == pytest.approx(np.trace(e @ H @ e.T) / np.trace(w @ H @ w.T), rel=1e-3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", EVERY)
def test_through_lift(name):
    """A kernel of an unmodified function, packed behind a change of variables; strict: never densified."""
    q, _ = rounded([EVERY[name]], axis=-2)

    def apply(params, x):
        return jnp.tanh(x @ params["kernel"])

    x = jnp.asarray(inputs(8, seed=9)) * 0.01
    expected = jnp.tanh(jnp.matmul(x, qjax.dequantize(q), precision="highest"))
    for run in (qjax.lift(apply), jax.jit(qjax.lift(apply))):
        np.testing.assert_allclose(run({"kernel": q}, x), expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_stack_is_its_members(name):
    """Stacked weights under vmap and scan, and decoded at once."""
    w = jnp.stack([weight(seed=k) for k in (1, 2)])
    q, _ = rounded([EVERY[name]], w=w)
    x = jnp.asarray(inputs(8, seed=3))
    w_hat = qjax.dequantize(q)
    assert w_hat.shape == q.shape == w.shape
    scale = float(jnp.max(jnp.abs(x)) * 64)
    vmapped = jax.vmap(qjax.dot, (None, 0))(x, q)
    scanned = jax.lax.scan(lambda c, one: (c, qjax.dot(x, one)), 0, q)[1]
    for i in range(2):
        one, _ = rounded([EVERY[name]], w=w[i])
        np.testing.assert_allclose(qjax.dequantize(one), w_hat[i], atol=1e-5)
        for y in (vmapped, scanned):
            np.testing.assert_allclose(y[i], product(w_hat[i])(x), atol=1e-4 * scale)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", EVERY)
def test_no_second_compilation(name):
    q, _ = rounded([EVERY[name]])
    run = jax.jit(lambda x, q: qjax.dot(x, q))
    x = jnp.asarray(inputs(8))
    run(x, q)
    other, _ = rounded([EVERY[name]], w=weight(seed=1) * 1.5)
    run(x + 1, other)
    assert run._cache_size() == 1


EXTRA_BYTES = {
    "hadamard": 4, "kronecker": 4, "orthogonal": 4, "permute": 4 * N, "smooth": 4 * N,
    "columns": 3 * (4 + 2 * OUT), "low rank": 2 * 4 * (N + OUT),
    "sparse": round(0.02 * N * OUT) * 4 + 4 * (OUT + 1),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", EXTRA_BYTES)
def test_bits_are_counted(name, tmp_path):
    """Seeds, scales, indices: from the leaves, and from the bytes of a saved file."""
    plain, _ = rounded([])
    q, _ = rounded([EVERY[name]])
    assert q.nbytes - plain.nbytes == EXTRA_BYTES[name]
    assert q.bits_per_weight == 8 * q.nbytes / (OUT * N)
    for i, leaf in enumerate(jax.tree.leaves((q.leaves, q.applied))):
        np.asarray(leaf).tofile(tmp_path / f"{i}.bin")
    assert 8 * sum(f.stat().st_size for f in tmp_path.iterdir()) / q.size == q.bits_per_weight


@pytest.mark.sampled(3)
@pytest.mark.parametrize("top", [None, 4.0], ids=["token", "tensor"])
@pytest.mark.parametrize("kind", INPUTS)
def test_a_broken_input_stays_broken(kind, top):
    """NaN and Inf are seen behind rounded inputs, in their own tokens alone."""
    top = None if top is None else jnp.float32(top)
    x = jnp.ones((3, 32)).at[0, 2].set(jnp.nan).at[1, 3].set(jnp.inf)
    applied = RoundedInput(top, kind)
    w = jnp.ones((4, 32))
    q = dataclasses.replace(qjax.quantize(w, "int8_row"), applied=(applied,))
    for y in (applied.input(x), qjax.dot(x, q), jax.jit(qjax.dot)(x, q)):
        assert np.isnan(y[:2]).any(axis=1).all() and np.isfinite(y[2]).all()


@pytest.mark.parametrize("threshold", [None, 6.0])
def test_no_tokens_are_fine(threshold):
    q = qjax.quantize(jnp.ones((4, 32)), "int8_row")
    q = dataclasses.replace(q, applied=(RoundedInput(None, "int8", threshold),))
    assert qjax.dot(jnp.zeros((0, 32)), q).shape == (0, 4)


def test_a_dense_rotation_is_made_once():
    """Eagerly and where its seed is known; `held` keeps it for programs that take it, and it counts as what it is."""
    q, _ = rounded([orthogonal(seed=2)])
    x = jnp.asarray(inputs(4))
    y, before = qjax.dot(x, q), _made.cache_info().misses
    np.testing.assert_array_equal(qjax.dot(x, q), y)
    assert _made.cache_info().misses == before
    kept = held(q)
    assert kept.nbytes - q.nbytes == 4 * (N * N + OUT * OUT)
    programs = {"argument": (qjax.dot, x, q), "known": (lambda x: qjax.dot(x, q), x), "held": (qjax.dot, x, kept)}
    assert [k for k, (f, *a) in programs.items() if " qr[" in str(jax.make_jaxpr(f)(*a))] == ["argument"]
    np.testing.assert_array_equal(qjax.dot(x, kept), y)
    stack, _ = rounded([orthogonal("in", seed=2)], w=jnp.stack([weight(), weight(seed=2)]))
    np.testing.assert_allclose(qjax.dequantize(held(stack)), qjax.dequantize(stack), atol=1e-5)
    assert held(rounded([hadamard()])[0]).nbytes == rounded([hadamard()])[0].nbytes


def test_low_rank_looks_at_h():
    """In the metric of h the split leaves less of what matters; without h it is the plain one."""
    _, by_h = rounded([low_rank(4)], "uint2_g64", [nearest()])
    _, plain = rounded([low_rank(4, by="none")], "uint2_g64", [nearest()])
    assert by_h.loss < 0.8 * plain.loss


@pytest.mark.slow
def test_an_embedding_is_rounded_as_it_is():
    """Looked up, not multiplied: no change of variables, so the model runs."""
    model = qjax.load("reference")
    plan = Plan.from_dict({"rules": {"embed/*": "int8_row", "layers_0/attn/q/*": "int8_row", "*": "keep"}})
    params, _ = qjax.quantize_params(model.params, plan, recipe="w8a8")
    assert params["embed"]["embedding"].applied == ()
    assert params["layers_0"]["attn"]["q"]["kernel"].rounds_inputs
    assert np.isfinite(dataclasses.replace(model, params=params).logits(np.zeros((1, 4), np.int32))).all()


def test_orbax_keeps_it(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    q, _ = rounded([columns(share=0.05), hadamard(seed=5)])
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "q", {"w": q})
        saver.wait_until_finished()
        again = saver.restore(tmp_path / "q", jax.tree.map(jnp.zeros_like, {"w": q}))["w"]
    np.testing.assert_array_equal(qjax.dequantize(q), qjax.dequantize(again))


def test_alpha_zero_without_clipping_is_rtn():
    """AWQ with alpha = 0 is plain rounding, and the search is never worse than it."""
    plain, base = rounded([], roundings=[nearest()])
    zero, _ = rounded([awq_scale(grid=1)], roundings=[nearest()])
    np.testing.assert_allclose(qjax.dequantize(zero), qjax.dequantize(plain), atol=1e-6)
    _, found = rounded([awq_scale()], roundings=[nearest()])
    assert found.loss < 0.8 * base.loss  # two channels see 12 and 25 times the others' inputs


@pytest.mark.parametrize("reparam", [rescale(), smooth(), awq_scale(5), awq_scale(5, duo=True)], ids=lambda r: str(r))
def test_scales_do_not_hang_on_the_unit_of_the_inputs(reparam):
    """A dead channel takes the middle of the others' scales, however small the inputs are."""
    x = inputs()
    x[:, 5] = 0.0
    s, small = (
        np.asarray(reparam(dataclasses.replace(site(), stats=stats_of(unit * x)))[1].s) for unit in (1.0, 2.0**-14)
    )
    np.testing.assert_allclose(small, s, rtol=1e-4)
    live = np.delete(s, 5)
    assert s.max() > 1.5 * s.min()
    if reparam != awq_scale(5, duo=True):  # its scale is |W|'s too
        assert s[5] == pytest.approx(np.exp(np.log(live).mean()), rel=0.1)


def test_rotation_and_feedback_at_two_bits():
    """What rotation is for: few levels, outliers, error feedback."""
    _, rtn = rounded([], "uint2_g64", [nearest()])
    _, fed = rounded([], "uint2_g64")
    _, turned = rounded([hadamard()], "uint2_g64")
    assert turned.loss < 0.2 * rtn.loss
    assert turned.loss < fed.loss


@pytest.mark.slow
def test_best_of_seeds_is_the_best():
    losses = [rounded([hadamard(seed=s)], "uint3_g32")[1].loss for s in range(4)]
    q, report = rounded([hadamard(seed=0, best_of=4)], "uint3_g32")
    assert int(q.applied[0].seed) == int(np.argmin(losses))
    assert report.loss == pytest.approx(min(losses), rel=1e-4)


def test_outliers_are_stored_exactly():
    q, _ = rounded([sparse(0.03)], "uint2_g64")
    w, w_hat = np.asarray(weight()), np.asarray(qjax.dequantize(q))
    part = q.applied[0]
    kept = (np.asarray(part.rows), np.asarray(part.at).astype(int))
    np.testing.assert_allclose(w_hat[kept], w[kept], rtol=2e-3)
    H = np.asarray(site().stats.H)
    size = w * w * np.diagonal(H)[None, :]
    assert set(np.flatnonzero(size.reshape(-1) >= np.sort(size.reshape(-1))[-len(kept[0])])) == set(
        kept[0] * N + kept[1]
    )


# rounded inputs


def quantized(x, kind, top=None):
    """Float64 reference: per token, or with one scale."""
    x = np.float64(x)
    largest = {"int8": 127, "int4": 7, "e4m3": 448, "e5m2": 57344}[kind]
    s = (np.abs(x).max(-1, keepdims=True) if top is None else top) / largest
    u = np.clip(x / s, -largest, largest)
    if kind in ("int8", "int4"):
        return np.round(u) * s
    import ml_dtypes

    return (
        np.float64(u.astype(np.float32).astype({"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[kind]))
        * s
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("format", ["int8_row", "uint8_g32", "int4_g32", "uint4_g32", "FP8_E4M3", "Q4_0"])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_rounded(kind, format):
    if format not in qjax.format_names() and format[0] not in "ui":
        pytest.skip(f"no format {format}")
    q, _ = rounded([act(kind)], format, [nearest()])
    x = inputs(16, seed=4)
    expected = quantized(x, kind) @ np.float64(qjax.dequantize(q)).T
    y = np.asarray(qjax.dot(jnp.asarray(x), q))
    np.testing.assert_allclose(y, expected, atol=2e-3 * np.abs(expected).max())
    static, _ = rounded([act(kind, "tensor")], format, [nearest()])
    top = np.abs(inputs()).max()
    expected = quantized(np.clip(x, -top, top), kind, top) @ np.float64(qjax.dequantize(q)).T
    y = np.asarray(qjax.dot(jnp.asarray(x), static))
    np.testing.assert_allclose(y, expected, atol=4e-3 * np.abs(expected).max())


def test_integers_meet_in_int32():
    """The program multiplies int8 by int8 and accumulates in int32."""
    q, _ = rounded([act("int8")], "int8_row", [nearest()])
    text = jax.jit(qjax.dot).lower(jnp.ones((4, N)), q).as_text()
    assert "tensor<1x4x24xi32>" in text or "xi32>" in text.split("dot_general")[1].split("\n")[0]


def test_an_infinite_threshold_is_plain_w8a8():
    x = jnp.asarray(inputs(16))
    plain, _ = rounded([act("int8")], "int8_row", [nearest()])
    mixed, _ = rounded([act("int8", threshold=float("inf"))], "int8_row", [nearest()])
    np.testing.assert_array_equal(qjax.dot(x, plain), qjax.dot(x, mixed))


def test_outliers_in_the_inputs():
    """Where a few channels dwarf the rest, LLM.int8() and SmoothQuant beat plain W8A8 clearly."""
    x = jnp.asarray(inputs(64, seed=8)).at[:, 3].multiply(8.0)
    y = product(weight())(x)

    def error(reparams, format="int8_row"):
        made = Recipe((nearest(),), reparams=reparams)
        q, _ = round_leaf("w", weight(), -1, qjax.format(format), made, stats_of(x))
        return float(jnp.linalg.norm(qjax.dot(x, q) - y) / jnp.linalg.norm(y))

    plain = error((act("int8"),))
    assert error((act("int8", threshold=100.0),)) < 0.5 * plain
    assert error((smooth(0.5), act("int8"))) < 0.7 * plain
    assert error((columns(share=0.05), act("int8"))) < 0.5 * plain


# bad input

WRONG = [
    (lambda: columns(), "share=0.01 or threshold"),
    (lambda: columns(share=0.7), "share lies between"),
    (lambda: sparse(0.6), "share lies between"),
    (lambda: changed([columns(threshold=0.0)]), "more than half"),
    (lambda: changed([low_rank(40)]), "more than half"),
    (lambda: smooth(1.5), "alpha lies between"),
    (lambda: changed([hadamard(best_of=2)]), "needs roundings"),
    (lambda: reparametrize([hadamard(), awq_scale()], site()), "absmean does not survive"),
    (lambda: reparametrize([smooth()], dataclasses.replace(site(), stats=Stats())), "needs the statistic 'absmax'"),
    (lambda: recipe("nearest() >> hadamard()"), "in front of format"),
    (lambda: recipe("hadamard(size=3) >> Q4_0 >> nearest()"), "size"),
    (lambda: recipe("Q4_0 >> Q4_1 >> nearest()"), "two formats"),
    (lambda: recipe("act() >> hadamard() >> nearest()"), "the last reparametrization"),
    (lambda: rounded([], roundings=[nearest(), ldlq(), clip()]), "would undo error feedback"),
    (lambda: rounded([], "uint4_g32_zf16", [nearest(), hqq()]), "only the first stage may"),
]


@pytest.mark.parametrize(("act_", "message"), WRONG, ids=[m for _, m in WRONG])
def test_errors(act_, message):
    with pytest.raises(UserError, match=message):
        act_()


def test_a_channel_that_is_zero_or_nan():
    made = Recipe((nearest(),), reparams=(awq_scale(),))
    w, x = weight().at[:, 5].set(0.0), inputs()
    x[:, 7] = 0.0
    q, _ = round_leaf("w", w, -1, qjax.format("uint4_g32"), made, stats_of(x))
    assert np.isfinite(qjax.dequantize(q)).all()
    s = stats_of(x)
    with pytest.raises(UserError, match="'absmean' has 1 values that are NaN"):
        broken = dataclasses.replace(s, absmean=s.absmean.at[2].set(jnp.nan))
        round_leaf("w", w, -1, qjax.format("uint4_g32"), made, broken)


def test_a_gguf_file_has_no_place_for_it():
    q, _ = rounded([hadamard()], "Q4_0", [nearest()])
    with pytest.raises(UserError, match="no place for a reparametrization"):
        qjax.to_bytes(q)


def test_files_refuse_what_they_cannot_say(tmp_path):
    """Neither a GGUF file nor a folder may drop a change of variables, or rounded inputs, silently."""
    model = qjax.load("reference")
    for reparams, suffix, message in (
        ([hadamard("in")], "a.gguf", "no place"),
        ([act()], "folder", "rounds its inputs"),
    ):
        kernel = model.params["layers_0"]["attn"]["q"]["kernel"]
        q, _ = round_leaf("w", kernel, -2, qjax.format("Q8_0"), Recipe((nearest(),), reparams=tuple(reparams)), Stats())
        attn = model.params["layers_0"]["attn"] | {"q": {"kernel": q}}
        params = model.params | {"layers_0": model.params["layers_0"] | {"attn": attn}}
        with pytest.raises(UserError, match=message):
            qjax.save(dataclasses.replace(model, params=params), tmp_path / suffix)
        assert not (tmp_path / suffix).exists()


LINES = [
    "hadamard(side='in', seed=3) >> Q3_K >> nearest(weight='none') >> ldlq(order='act', grid='static', cross=0.0)",
    "columns(share=0.01) >> act(threshold=6.0) >> int8_row >> nearest(weight='none')",
    "sparse(share=0.01) >> kronecker(seed=2) >> smooth(alpha=0.8) >> nearest(weight='none')",
    "awq_scale(duo=True) >> rescale() >> low_rank(rank=3) >> permute(by='norm') >> orthogonal() >> nearest(weight='h')",
]


@pytest.mark.parametrize("line", LINES)
def test_recipes_print_and_read_back(line):
    made = recipe(line)
    assert str(made) == line
    assert recipe(str(made)) == made
