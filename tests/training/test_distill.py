"""Distillation losses against float64 numpy, their gradients, and the cached way to the same numbers."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergences import FOUR, NAMED, REFERENCES, differences, pair, probabilities, reference

from qjax.errors import UserError
from qjax.training.losses import distill, topk
from qjax.training.losses.distill import distill_loss, divergence, relative_mse, teacher_confidence
from qjax.training.losses.topk import read_top_k, rows, top_k, top_k_loss, write_top_k


@pytest.fixture(params=FOUR)
def name(request):
    return request.param


@partial(jax.jit, static_argnums=(2, 4))
def whole(teacher, student, f, mask=None, temperature=1.0):
    """The loss and its gradient by the student's logits."""
    return jax.value_and_grad(distill_loss, 1)(teacher, student, f, mask, temperature)


@partial(jax.jit, static_argnums=(0, 4))
def cached_way(f, cached, student, mask=None, temperature=1.0):
    return jax.value_and_grad(top_k_loss, 2)(f, cached, student, mask, temperature)


keep = jax.jit(top_k, static_argnums=(1, 2))


# --- the divergences -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(5)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", list(NAMED))
def test_values_and_gradients(name, temperature, rng):
    """Against the definitions in float64, and their central differences."""
    mask = jnp.array([True, False, True, True])
    for spread in (0.1, 2.0, 20.0):
        t, s = pair(rng, 4, 20, spread=spread)
        got, grad = whole(t, s, NAMED[name], mask, temperature)
        assert got.dtype == jnp.float32 and got.shape == ()
        np.testing.assert_allclose(got, reference(name, t, s, mask, temperature), rtol=2e-5, atol=1e-7)
        want = differences(lambda s: reference(name, t, s, mask, temperature), s)  # noqa: B023
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6 * max(1, spread))
        np.testing.assert_array_equal(grad[1], 0)


def test_the_default_is_forward_kl(rng):
    t, s = pair(rng, 4, 9)
    np.testing.assert_allclose(distill_loss(t, s), reference("fkl", t, s), rtol=1e-5)
    assert divergence() is distill.forward_kl


def test_half_precision_logits_are_read_in_float32(rng):
    t, s = (x.astype(jnp.bfloat16) for x in pair(rng, 4, 20))
    got, grad = whole(t, s, NAMED["jsd"])
    assert got.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    wide = [np.asarray(x.astype(jnp.float32)) for x in (t, s)]
    np.testing.assert_allclose(got, reference("jsd", *wide), rtol=1e-5)


@pytest.mark.parametrize("name", list(NAMED))
def test_equal_logits_cost_nothing_and_pull_nowhere(name, rng):
    z = pair(rng, 4, 20, spread=10.0)[0]
    loss, grad = whole(z, z, NAMED[name])
    assert abs(float(loss)) < 1e-7
    np.testing.assert_allclose(grad, 0, atol=1e-7)


def test_jsd_is_symmetric_and_bounded(rng):
    t, s = pair(rng, 4, 20, spread=30.0)
    a, b = (float(whole(x, y, NAMED["jsd"])[0]) for x, y in ((t, s), (s, t)))
    assert a == pytest.approx(b, rel=1e-6) and 0 < a <= np.log(2)
    # a share other than 1/2 swaps with its complement
    np.testing.assert_allclose(whole(t, s, NAMED["jsd3"])[0], whole(s, t, divergence("jsd", 0.7))[0], rtol=1e-5)


def test_cakld_runs_from_forward_to_reverse_kl(rng):
    t, s = pair(rng, 4, 20)
    forward, reverse = (distill_loss(t, s, NAMED[name]) for name in ("fkl", "rkl"))
    assert distill_loss(t, s, divergence("cakld", 0.0)) == forward
    assert distill_loss(t, s, divergence("cakld", 1.0)) == reverse
    assert reverse == distill_loss(s, t) != forward


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_forward_kl_is_the_difference_of_the_distributions(temperature, rng):
    t, s = pair(rng, 4, 20)
    want = temperature * (probabilities(s, temperature) - probabilities(t, temperature))
    np.testing.assert_allclose(4 * whole(t, s, NAMED["fkl"], None, temperature)[1], want, atol=1e-6)


def test_nothing_flows_to_the_teacher(rng):
    t, s = pair(rng, 4, 20)
    f, cached = NAMED["cakld"], keep(t, 4)
    for loss, teacher in (
        (lambda t: distill_loss(t, s, f), t),
        (lambda c: top_k_loss(f, cached | c, s), {"logp": cached["logp"], "tail": cached["tail"]}),
        (lambda h: relative_mse(h, s), t),
    ):
        value, grads = jax.jit(jax.value_and_grad(loss))(teacher)
        assert value > 0 and all(not np.any(g) for g in jax.tree.leaves(grads))


def test_masks_and_weights(rng):
    t, s = pair(rng, 2, 6, 20)
    f, name = NAMED["rkl"], "rkl"
    mask = jnp.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
    want = reference(name, t, s, mask)
    for m in (mask, mask.astype(jnp.int32), mask.astype(jnp.bfloat16)):
        np.testing.assert_allclose(whole(t, s, f, m)[0], want, rtol=1e-5)
    elsewhere = jnp.where(mask[..., None], s, 100 * s)
    np.testing.assert_allclose(whole(t, elsewhere, f, mask)[0], want, rtol=1e-5)
    weights = jnp.asarray(rng.random((2, 6)), jnp.float32)
    np.testing.assert_allclose(whole(t, s, f, weights)[0], reference(name, t, s, weights), rtol=1e-5)
    loss, grad = whole(t, s, f, jnp.zeros((2, 6), bool))
    assert loss == 0 and not np.any(grad)


@pytest.mark.sampled(2)
def test_impossible_tokens_and_huge_spreads(name, rng):
    t, s = pair(rng, 4, 20)
    f, late = NAMED[name], (jnp.arange(20) >= 16)[None]
    for low in (-1e30, -np.inf, float(jnp.finfo(jnp.float32).min)):
        t_cut, s_cut = (jnp.where(late, low, x) for x in (t, s))
        want = reference(name, t[:, :16], s[:, :16], temperature=0.5)
        cached = keep(t_cut, 18, 0.5)
        for loss, grad in (whole(t_cut, s_cut, f, None, 0.5), cached_way(f, cached, s_cut, None, 0.5)):
            np.testing.assert_allclose(loss, want, rtol=1e-5)
            assert np.isfinite(grad).all() and not np.any(grad[:, 16:])
        # only one of them excludes a token: finite, and where the divergence is finite, right
        for a, b in ((t_cut, s), (t, s_cut), (t_cut, jnp.where(late, s, low))):
            loss, grad = whole(a, b, f, None, 0.5)
            assert np.isfinite(loss) and np.isfinite(grad).all()
            want = reference(name, a, b, temperature=0.5)
            if np.isfinite(want):
                np.testing.assert_allclose(loss, want, rtol=1e-5)
            else:
                assert loss > 1e25
    t, s = 1e5 * t, 1e5 * s
    for loss, grad in (whole(t, s, f, None, 0.5), cached_way(f, keep(t, 18, 0.5), s, None, 0.5)):
        assert 0 < loss < np.inf and np.isfinite(grad).all()


def test_names_and_shares():
    assert divergence("cakld", 0.7) == NAMED["cakld"] and hash(divergence("jsd")) == hash(divergence("jsd", 0.5))
    with pytest.raises(UserError, match="'kl'; there are fkl, rkl, jsd and cakld"):
        divergence("kl")
    with pytest.raises(UserError, match="cakld needs b"):
        divergence("cakld")
    for name, b in (("cakld", 1.2), ("cakld", float("nan")), ("jsd", 0.0), ("jsd", 1.0), ("fkl", 0.5), ("rkl", 0.5)):
        with pytest.raises(UserError, match=name):
            divergence(name, b)


def test_mistakes_are_named(rng):
    t, s = pair(rng, 4, 20)
    with pytest.raises(UserError, match="teacher has 20 tokens and the student 19"):
        distill_loss(t, s[:, :19])
    with pytest.raises(UserError, match="temperature must be positive"):
        distill_loss(t, s, temperature=0.0)
    for k in (0, 21):
        with pytest.raises(UserError, match=f"1 to 20 tokens of this vocabulary, got k = {k}"):
            top_k(t, k)


def test_one_compilation_for_equal_divergences(rng):
    compiled = []

    @partial(jax.jit, static_argnums=0)
    def step(f, t, s, mask):
        compiled.append(f)
        return jax.value_and_grad(lambda s: distill_loss(t, s, f, mask))(s)

    mask = jnp.ones(4, bool)
    for _ in range(3):
        for name, b in (("fkl", None), ("jsd", 0.25), ("cakld", 0.7)):
            eager = distill_loss(*(tensors := pair(rng, 4, 20)), divergence(name, b), mask)
            np.testing.assert_allclose(step(divergence(name, b), *tensors, mask)[0], eager, rtol=1e-5)
    assert len(compiled) == 3 and step._cache_size() == 3


def test_vmap_and_abstract_shapes(rng):
    t, s = pair(rng, 3, 5, 20)
    loss = partial(distill_loss, divergence=NAMED["jsd"])
    each = jax.vmap(loss)(t, s)
    np.testing.assert_allclose(each, [reference("jsd", a, b) for a, b in zip(t, s, strict=True)], rtol=1e-5)
    assert jax.eval_shape(loss, *(jax.ShapeDtypeStruct((7, 9), jnp.bfloat16),) * 2).dtype == jnp.float32


# --- the teacher's confidence ----------------------------------------------------------------------------------------


def test_confidence_is_the_mean_probability_of_the_labels(rng):
    z = jnp.asarray(rng.standard_normal((11, 11)), jnp.float32)
    batches = [rng.integers(0, 11, (b, 7)) for b in (2, 3)]
    got = teacher_confidence(lambda tokens: z[tokens], [(b[:, :-1], b[:, 1:]) for b in batches])
    p = probabilities(z)
    every = np.concatenate([p[b[:, :-1], b[:, 1:]].ravel() for b in batches])
    assert isinstance(got, float) and got == pytest.approx(every.mean(), rel=1e-5)
    assert divergence("cakld", got)(jnp.zeros(1), jnp.zeros(1)) == 0


def test_confidence_weighs_sequences_alike_and_skips_padding(rng):
    z = jnp.asarray(rng.standard_normal((11, 11)), jnp.float32)
    tokens, labels = rng.integers(0, 11, (2, 4, 6))
    mask = np.arange(6) < np.array([6, 2, 0, 1])[:, None]
    p = probabilities(z)[tokens, labels]
    want = np.mean([p[0].mean(), p[1, :2].mean(), p[3, 0]])
    assert teacher_confidence(lambda x: z[x], [(tokens, labels, mask)]) == pytest.approx(want, rel=1e-5)
    with pytest.raises(UserError, match="at least one batch"):
        teacher_confidence(lambda x: z[x], [(tokens, labels, np.zeros_like(mask))])


# --- the cached teacher ----------------------------------------------------------------------------------------------


def merged_probabilities(z, indices, temperature=1.0):
    p = probabilities(z, temperature)
    kept = np.take_along_axis(p, np.asarray(indices), -1)
    rest = p.copy()
    np.put_along_axis(rest, np.asarray(indices), 0.0, -1)
    return np.concatenate([kept, rest.sum(-1, keepdims=True)], -1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(temperature, rng):
    z = pair(rng, 2, 3, 30)[0]
    cached = top_k(z, 5, temperature)
    assert {k: (a.shape, a.dtype.name) for k, a in cached.items()} == {
        "indices": ((2, 3, 5), "int32"), "logp": ((2, 3, 5), "float32"), "tail": ((2, 3), "float32"),
    }  # fmt: skip
    np.testing.assert_array_equal(cached["indices"], np.argsort(-np.asarray(z), axis=-1)[..., :5])
    want = merged_probabilities(z, cached["indices"], temperature)
    np.testing.assert_allclose(np.exp(cached["logp"]), want[..., :-1], rtol=1e-5)
    np.testing.assert_allclose(np.exp(cached["tail"]), want[..., -1], rtol=1e-5)


@pytest.mark.slow
def test_top_k_loss_is_the_divergence_of_the_merged_outcomes(name, rng):
    """Right at each k, equal to the full loss where nothing is merged, and a lower bound elsewhere."""
    mask = jnp.arange(12) % 4 != 2
    for spread in (0.3, 2.0, 8.0):
        t, s = pair(rng, 12, 20, spread=spread)
        full, full_grad = whole(t, s, NAMED[name], mask, 1.5)
        bounds = []
        for k in (2, 19, 20):
            cached = keep(t, k, 1.5)
            loss, grad = cached_way(NAMED[name], cached, s, mask, 1.5)
            p, q = (merged_probabilities(z, cached["indices"], 1.5) for z in (t, s))
            want = 1.5**2 * np.average(REFERENCES[name](p, q), weights=np.asarray(mask))
            np.testing.assert_allclose(loss, want, rtol=2e-5, atol=1e-7)
            if k >= 19:  # one token in the rest, or none
                np.testing.assert_allclose(loss, full, rtol=1e-5)
                np.testing.assert_allclose(grad, full_grad, atol=1e-6)
            bounds.append(float(loss))
        assert 0 < bounds[0] < 0.98 * full
        assert all(a <= b * (1 + 1e-5) for a, b in itertools.pairwise([*bounds, float(full)]))


def test_gradient_of_the_cached_loss(name, rng):
    t, s = pair(rng, 4, 20)
    cached = keep(t, 4)
    p = merged_probabilities(t, cached["indices"])
    want = differences(lambda s: REFERENCES[name](p, merged_probabilities(s, cached["indices"])).mean(), s)
    np.testing.assert_allclose(cached_way(NAMED[name], cached, s)[1], want, rtol=1e-4, atol=1e-6)


def test_a_rest_of_almost_nothing_and_almost_everything(name, rng):
    """The masses of the rest keep their digits where 1 - sum p has none left."""
    k, v = 4, 20
    small, large = pair(rng, 4, v, spread=1.0)
    top = (jnp.arange(v) < k)[None]
    indices = jnp.broadcast_to(jnp.arange(k), (4, k))
    for gap_t, gap_s in ((40.0, 30.0), (30.0, 2.0), (2.0, 40.0), (-30.0, -40.0), (60.0, 60.0)):
        t, s = (jnp.where(top, z + gap, z) for z, gap in ((small, gap_t), (large, gap_s)))
        logs = topk.merged(t, indices)
        cached = {"indices": indices, "logp": logs[:, :k], "tail": logs[:, k]}
        p, q = (merged_probabilities(z, indices) for z in (t, s))
        np.testing.assert_allclose(cached["tail"], np.log(p[:, -1]), rtol=1e-5, atol=2e-7)
        loss, grad = cached_way(NAMED[name], cached, s)
        np.testing.assert_allclose(loss, REFERENCES[name](p, q).mean(), rtol=1e-4, atol=3e-7)
        assert np.isfinite(grad).all()


# --- the cache on disk -----------------------------------------------------------------------------------------------


def token_set(rng):
    return jnp.asarray(3 * rng.standard_normal((7, 5, 60)), jnp.float32)


def in_batches(cached, *sizes):
    ends = np.cumsum(sizes)
    return [{key: a[end - b : end] for key, a in cached.items()} for b, end in zip(sizes, ends, strict=True)]


def test_the_cache_comes_back_by_sequence_number(tmp_path, rng):
    cached = keep(token_set(rng), 8)
    write_top_k(tmp_path / "cache", iter(in_batches(cached, 3, 2, 2)), 7, 60, np.float32)
    cache = read_top_k(tmp_path / "cache")
    assert all(isinstance(a, np.memmap) and not a.flags.writeable for a in cache.values())
    assert [cache[key].dtype.name for key in ("indices", "logp", "tail")] == ["uint16", "float32", "float32"]
    order = np.array([6, 0, 3, 3])
    got = rows(cache, order)
    for key, a in cached.items():
        np.testing.assert_array_equal(got[key], a[order])
        assert got[key].dtype == a.dtype and not isinstance(got[key], np.memmap)
    for wrong in (7, -1):
        with pytest.raises(UserError, match=f"sequences 0 to 6, not {wrong}"):
            rows(cache, [0, wrong])


def test_sixteen_bits_are_close_and_sum_to_one_again(name, tmp_path, rng):
    teacher, student = token_set(rng), token_set(rng)
    exact = keep(teacher, 8)
    write_top_k(tmp_path / "cache", in_batches(exact, 3, 4), 7, 60)
    cache = read_top_k(tmp_path / "cache")
    assert cache["logp"].dtype == cache["tail"].dtype == np.float16
    cached = jax.tree.map(jnp.asarray, rows(cache, np.arange(7)))
    loss, want = (cached_way(NAMED[name], c, student)[0] for c in (cached, exact))
    assert loss != want
    np.testing.assert_allclose(loss, want, rtol=1e-3)
    # a student that agrees with the cache costs next to nothing, and no less
    assert -1e-7 < cached_way(NAMED[name], cached, teacher)[0] < 1e-5


def test_impossible_tokens_survive_sixteen_bits(name, tmp_path, rng):
    z = jnp.where(jnp.arange(60)[None, None] < 4, token_set(rng), -jnp.inf)
    write_top_k(tmp_path / "cache", [keep(z, 8)], 7, 60)
    cache = read_top_k(tmp_path / "cache")
    assert np.isfinite(cache["logp"]).all()
    loss, grad = cached_way(NAMED[name], jax.tree.map(jnp.asarray, rows(cache, np.arange(7))), z)
    assert abs(float(loss)) < 1e-3 and np.isfinite(grad).all()


def test_large_vocabularies_take_wide_indices(tmp_path):
    for vocab, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        last = {"indices": np.full((1, 1, 1), vocab - 1), "logp": np.zeros((1, 1, 1)), "tail": np.zeros((1, 1))}
        write_top_k(tmp_path / str(vocab), [last], 1, vocab)
        cache = read_top_k(tmp_path / str(vocab))
        assert cache["indices"].dtype == dtype and rows(cache, [0])["indices"].item() == vocab - 1


def test_a_cache_appears_whole_or_not_at_all(tmp_path, rng):
    cached = keep(token_set(rng), 8)
    good = in_batches(cached, 3, 2, 2)
    nan = good[0] | {"logp": good[0]["logp"] * jnp.nan}
    narrow = {key: a[..., :7] if key != "tail" else a for key, a in good[1].items()}
    for batches, sequences, vocab, message in (
        (good, 8, 60, "8 sequences were announced and 7 came"),
        (good, 6, 60, "6 sequences were announced and 7 came"),
        ([], 0, 60, "0 came"),
        (good, 7, 20, "outside a vocabulary of 20"),
        ([good[0], narrow], 5, 60, r"indices are \[b, 5, 8\], got \[2, 5, 7\]"),
        ([nan], 3, 60, "logp is NaN"),
    ):
        with pytest.raises(UserError, match=message):
            write_top_k(tmp_path / "cache", batches, sequences, vocab)
        assert not list(tmp_path.iterdir())

    def interrupted():
        yield good[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_top_k(tmp_path / "cache", interrupted(), 7, 60)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="float16 or float32"):
        write_top_k(tmp_path / "cache", good, 7, 60, np.int8)


def test_a_damaged_cache_is_named(tmp_path, rng):
    with pytest.raises(UserError, match=r"indices\.npy cannot be read"):
        read_top_k(tmp_path / "nothing")
    write_top_k(tmp_path / "cache", [keep(token_set(rng), 8)], 7, 60)
    path = tmp_path / "cache" / "logp.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"logp\.npy cannot be read"):
        read_top_k(tmp_path / "cache")
    for kind in (b"|V0", b"|S0", b">f2", b"<f8", b"M8[", b"|O'"):  # the first kills numpy's own reader
        path.write_bytes(whole.replace(b"<f2", kind))
        with pytest.raises(UserError, match=r"logp\.npy cannot be read"):
            read_top_k(tmp_path / "cache")
    np.save(path, np.zeros((7, 5, 4), np.float16))
    with pytest.raises(UserError, match="no cache of one teacher"):
        read_top_k(tmp_path / "cache")


# --- hidden states ---------------------------------------------------------------------------------------------------


def test_relative_mse(rng):
    t, s = pair(rng, 3, 4, 16)
    t = 5.0 + 3.0 * t
    wide = [np.asarray(x, np.float64) for x in (t, s)]
    got, grad = jax.value_and_grad(relative_mse, argnums=1)(t, s)
    np.testing.assert_allclose(got, ((wide[0] - wide[1]) ** 2).mean() / wide[0].var(), rtol=1e-5)
    np.testing.assert_allclose(grad, 2 * (wide[1] - wide[0]) / wide[0].var() / t.size, rtol=1e-4, atol=1e-7)
    assert relative_mse(t, t) == 0
    np.testing.assert_allclose(relative_mse(t, jnp.full_like(t, t.mean())), 1, rtol=1e-5)
    np.testing.assert_allclose(relative_mse(100 * t, 100 * s), got, rtol=1e-5)
    assert relative_mse(t.astype(jnp.bfloat16), s.astype(jnp.bfloat16)).dtype == jnp.float32
    flat = jnp.ones((2, 4))
    assert relative_mse(flat, flat) == 0
