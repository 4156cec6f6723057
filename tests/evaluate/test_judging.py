"""Perplexity and divergence against a plain float64 re-implementation, on a tiny random decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.evaluate import divergence as kl
from qjax.evaluate import network as network_module
from qjax.evaluate import perplexity as pp
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder

CONFIG = DecoderConfig(vocab=61, dim=32, hidden=48, layers=1, heads=4, kv_heads=2, head_dim=8, context=64)


def random_params(config=CONFIG, seed=0):
    params = Decoder(config).init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    # Logits spread far enough for the distributions to differ from uniform.
    return jax.tree.map(lambda p: p * 3.0 if p.ndim > 1 else p, params)


def nudged(params, size, seed=1):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [p + size * jnp.std(p) * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@jax.jit
def apply(params, tokens):
    return Decoder(CONFIG).apply({"params": params}, tokens)


def log_softmax64(logits):
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(tokens, context, first, bos, *trees):
    """Per tree: log-probabilities [n, vocab] at every scored position, window by window, and the true tokens [n]."""
    logs, truth = [[] for _ in trees], []
    for start in range(0, len(tokens) - context + 1, context):
        window = list(tokens[start : start + context])
        if bos is not None:
            window[0] = bos
        for position in range(first, context - 1):
            truth.append(window[position + 1])
        for log, tree in zip(logs, trees, strict=True):
            log.append(log_softmax64(apply(tree, jnp.array([window], jnp.int32))[0])[first : context - 1])
    return [np.concatenate(log) for log in logs], np.array(truth)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, CONFIG.vocab, 16 * 9 + 7)


@pytest.fixture(scope="module")
def params():
    return random_params()


def test_windows_of_llama_cpp():
    windows = pp.cut_windows(range(100, 100 + 23), "llama.cpp", 8, bos=1)
    assert windows.tokens.tolist() == [
        [1, *range(101, 108)],
        [1, *range(109, 116)],
    ]
    assert (windows.first, windows.scored) == (4, 3)  # logits at 4, 5, 6 of 8 ...
    assert windows.targets.tolist() == [[105, 106, 107], [113, 114, 115]]  # ... predict 5, 6, 7
    assert pp.cut_windows(range(1024), "llama.cpp").scored == 255
    assert pp.cut_windows(range(1024), "llama.cpp").tokens[1, 0] == 512  # no BOS: the text's own token


def test_windows_of_gptq():
    windows = pp.cut_windows(range(100, 100 + 17), "gptq", 8, bos=1)
    assert windows.tokens.tolist() == [list(range(100, 108)), list(range(108, 116))]
    assert windows.targets.tolist() == [list(range(101, 108)), list(range(109, 116))]
    assert pp.cut_windows(range(5000), "gptq").tokens.shape == (2, 2048)
    assert pp.cut_windows(range(100), "gptq", 8, limit=3).tokens.shape == (3, 8)


@pytest.mark.parametrize(
    ("count", "options", "match"),
    [
        (1023, {}, "1023 tokens; the llama.cpp protocol with a context of 512 needs at least 1024"),
        (2047, {"protocol": "gptq"}, "needs at least 2048"),
        (100, {"protocol": "mine"}, "unknown protocol 'mine'"),
        (100, {"context": 3}, "at least 4"),
        (100, {"context": 8, "limit": 0}, "limit of 0"),
    ],
)
def test_bad_windows_are_named(count, options, match):
    with pytest.raises(UserError, match=match):
        pp.cut_windows(range(count), **options)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("protocol", "first", "bos"), [("llama.cpp", 8, 2), ("gptq", 0, None)])
def test_perplexity_is_the_definition(params, tokens, protocol, first, bos):
    windows = pp.cut_windows(tokens, protocol, 16, bos=bos)
    (log,), truth = reference(tokens, 16, first, bos, params)
    nll = -log[np.arange(len(truth)), truth]
    got = pp.perplexity(apply, params, windows)
    assert (got.windows, got.tokens_scored, got.context) == (9, 9 * (15 - first), 16)
    n = len(nll)
    se = np.sqrt((np.mean(nll**2) - nll.mean() ** 2) / (n - 1))
    np.testing.assert_allclose(got.nll, nll.mean(), rtol=2e-6)
    np.testing.assert_allclose(got.perplexity, np.exp(nll.mean()), rtol=1e-5)
    np.testing.assert_allclose(got.nll_se, se, rtol=1e-5)
    np.testing.assert_allclose(got.perplexity_se, se * np.exp(nll.mean()), rtol=1e-5)
    means = nll.reshape(9, -1).mean(1)
    np.testing.assert_allclose(got.nll_se_clustered, np.sqrt(means.var(ddof=1) / 9), rtol=1e-5)


def percentile(values, fraction):
    """llama.cpp's: linear between the neighbours of fraction * (n - 1)."""
    values = np.sort(values)
    p = fraction * (len(values) - 1)
    i = int(p)
    return (1 - (p - i)) * values[i] + (p - i) * values[min(i + 1, len(values) - 1)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_divergence_is_the_definition(params, tokens, size):
    other = nudged(params, size)
    windows = pp.cut_windows(tokens, "llama.cpp", 16, bos=0)
    (log_p, log_q), truth = reference(tokens, 16, 8, 0, params, other)
    i = np.arange(len(truth))
    each = (np.exp(log_p) * (log_p - log_q)).sum(1)
    dp = np.exp(log_q[i, truth]) - np.exp(log_p[i, truth])
    n = len(each)

    ppl, got = kl.divergence(apply, other, kl.make_baseline(apply, params, windows))

    # Two float32 forward passes differ from each other by their rounding; at a nudge of 0.001 that is what limits.
    close = {"rtol": 2e-3 if size < 0.01 else 3e-5, "atol": 1e-9}
    np.testing.assert_allclose(got.kl_mean, each.mean(), **close)
    np.testing.assert_allclose(got.kl_mean_se, each.std() / np.sqrt(n - 1), **close)
    np.testing.assert_allclose(got.kl_mean_se_clustered, each.reshape(9, -1).mean(1).std(ddof=1) / 3, **close)
    for name, q in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p95", 0.95), ("kl_p99", 0.99), ("kl_p999", 0.999)):
        np.testing.assert_allclose(getattr(got, name), percentile(each, q), **close, err_msg=name)
    np.testing.assert_allclose(got.kl_max, each.max(), **close)
    np.testing.assert_allclose(got.same_top_percent, 100 * np.mean(log_p.argmax(1) == log_q.argmax(1)), rtol=1e-6)
    np.testing.assert_allclose(got.rms_dp_percent, 100 * np.sqrt(np.mean(dp**2)), rtol=1e-3)
    np.testing.assert_allclose(got.mean_dp_percent, 100 * dp.mean(), rtol=1e-3, atol=1e-6)
    se_square = np.sqrt((np.mean(dp**4) - np.mean(dp**2) ** 2) / (n - 1))
    np.testing.assert_allclose(got.rms_dp_percent_se, 100 * 0.5 / np.sqrt(np.mean(dp**2)) * se_square, rtol=1e-3)
    a, b = -log_q[i, truth], -log_p[i, truth]
    var = a.var() / (n - 1) + b.var() / (n - 1) - 2 * (np.mean(a * b) - a.mean() * b.mean()) / (n - 1)
    np.testing.assert_allclose(got.log_ratio, a.mean() - b.mean(), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(got.log_ratio_se, np.sqrt(var), rtol=1e-3)
    np.testing.assert_allclose(got.base_perplexity, np.exp(b.mean()), rtol=1e-5)
    np.testing.assert_allclose(ppl.perplexity, np.exp(a.mean()), rtol=1e-5)


def test_kl_keeps_its_digits_where_it_is_tiny(rng):
    z = rng.normal(size=(7, 500)) * 4
    for size in (1e-4, 1e-2, 1.0, 8.0):
        other = (z + size * rng.normal(size=z.shape)).astype(np.float32)
        base = z.astype(np.float32)
        p, q = log_softmax64(base), log_softmax64(other)
        want = (np.exp(p) * (p - q)).sum(1)
        np.testing.assert_allclose(kl.kl_of(jnp.asarray(base), jnp.asarray(other)), want, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_a_vocabulary_in_chunks_says_the_same(rng, size):
    """Chunks of 16, the last of which begins early; the masses lie in different chunks for different positions."""
    base = (rng.normal(size=(6, 53)) * 4 + np.linspace(-20, 20, 6)[:, None] * (np.arange(53) > 30)).astype(np.float32)
    z, target = (base + size * rng.normal(size=base.shape)).astype(np.float32), np.arange(6) * 9
    seen, apart = (network_module.nothing_seen(6),) * 2, network_module.nothing_apart(6)
    readers, weights, x = (Table("z"), Table("base")), ({"z": z}, {"base": base}), (jnp.zeros((6, 1)),) * 2
    for c, start in enumerate((0, 16, 32, 37)):
        seen, apart = network_module._tally(readers, 16, weights, x, target, start, 16 * c, (seen, apart))
    got = network_module._settled((seen, apart), target)
    p, q = log_softmax64(base), log_softmax64(z)
    np.testing.assert_allclose(got["nll"], -q[np.arange(6), target], rtol=1e-5)
    np.testing.assert_allclose(got["nll_base"], -p[np.arange(6), target], rtol=1e-5)
    np.testing.assert_allclose(got["kl"], (np.exp(p) * (p - q)).sum(1), rtol=2e-4)
    np.testing.assert_array_equal(got["top"], z.argmax(1) == target)
    np.testing.assert_array_equal(got["same_top"], base.argmax(1) == z.argmax(1))


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores that are given."""

    name: str

    def scores(self, weights, n, start, count):
        return jax.lax.dynamic_slice_in_dim(weights[self.name], start, count, axis=1)


def test_kl_of_distributions_far_apart_is_finite():
    z = jnp.array([[0.0, 200.0, -300.0]])
    np.testing.assert_allclose(kl.kl_of(z, z[:, ::-1]), 0.0, atol=1e-6)  # the same top token, with certainty
    np.testing.assert_allclose(kl.kl_of(z, jnp.array([[200.0, 0.0, 0.0]])), 200.0, rtol=1e-6)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_model_does_not_diverge_from_itself(params, tokens, cache_bytes):
    network = pp.network_of_decoder(CONFIG)
    baseline = kl.make_baseline(network, params, pp.cut_windows(tokens, context=16), cache_bytes=cache_bytes, batch=4)
    assert (baseline.hidden is None) == (cache_bytes == 0)
    _, got = kl.divergence(network, params, baseline, batch=4)
    assert got.kl_mean == got.kl_max == got.log_ratio == got.rms_dp_percent == 0.0
    assert got.same_top_percent == 100.0


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_in_parts_is_the_decoder(tokens, tied):
    """Its hidden states through its head, a chunk of the vocabulary at a time, are the logits."""
    config = dataclasses.replace(CONFIG, tied=tied, logit_softcap=5.0, embed_scale=True)
    tree = random_params(config)
    network = pp.network_of_decoder(config)
    ids = tokens[:32].reshape(2, 16).astype(np.int32)
    whole = jax.jit(Decoder(config).apply)({"params": tree}, ids)
    hidden = network.read(tree, ids, 0, 2, lambda *at: None)
    end = network.scoring(tree, hidden.shape[-1])
    cut = np.concatenate(
        [network.scores(end.weights(s, n), jnp.asarray(hidden), s, n) for s, n in ((0, 40), (40, 21))], axis=-1
    )
    np.testing.assert_allclose(cut, whole[:, :-1], atol=1e-5 * np.abs(whole).max())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("cached", [True, False])
def test_batches_and_chunks_do_not_change_the_result(params, tokens, cached, monkeypatch):
    other = nudged(params, 0.3)
    windows = pp.cut_windows(tokens, context=16, bos=0)

    def results(network, batch):
        baseline = kl.make_baseline(network, params, windows, batch=batch, cache_bytes=cached << 20)
        return kl.divergence(network, other, baseline, batch=batch)

    first = results(apply, 1)
    again = [results(apply, 4), results(apply, 100), results(pp.network_of_decoder(CONFIG), 2)]
    monkeypatch.setattr(network_module, "HEAD_ELEMENTS", 5 * CONFIG.vocab)  # 5 positions at a time, in ragged chunks
    again.append(results(lambda p, t: apply(p, t), 4))
    for result in again:
        for one, two in zip(first, result, strict=True):
            for name, value in vars(one).items():
                if isinstance(value, float):
                    atol = 1e-4 if "percent" in name else 1e-6
                    np.testing.assert_allclose(value, getattr(two, name), rtol=1e-5, atol=atol, err_msg=name)


def test_one_program_serves_all_batches_and_all_trees(params, tokens):
    traces = []

    def traced(p, t):
        traces.append(t.shape)
        return apply(p, t)

    windows = pp.cut_windows(tokens, context=16)
    pp.perplexity(traced, params, windows, batch=4)  # 4 + 4 + 1
    assert traces == [(4, 16)]
    pp.perplexity(traced, nudged(params, 0.1), windows, batch=4)
    assert traces == [(4, 16)]
    baseline = kl.make_baseline(traced, params, windows, batch=4)
    once = len(traces)
    for size in (0.1, 0.2):
        kl.divergence(traced, nudged(params, size), baseline, batch=4)
    assert len(traces) == once


def test_progress_counts_windows(params, tokens):
    seen = []
    pp.perplexity(apply, params, pp.cut_windows(tokens, context=16), batch=4, progress=lambda *at: seen.append(at))
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_logits_that_are_not_finite_are_an_error(params, tokens):
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    windows = pp.cut_windows(tokens, context=16)
    with pytest.raises(UserError, match=r"window 0 are NaN or infinite"):
        pp.perplexity(apply, bad, windows)


def test_vocabularies_must_agree(params, tokens):
    windows = pp.cut_windows(tokens, context=16)
    baseline = kl.make_baseline(lambda p, t: apply(p, t)[..., :60], params, windows)
    with pytest.raises(UserError, match="61 tokens and its baseline 60"):
        kl.divergence(apply, params, baseline)


def test_the_numbers_llama_cpp_prints():
    """Fixed logits through the statistics code of llama-perplexity --kl-divergence itself: what it printed."""
    rng = np.random.default_rng(7)
    n, vocab = 1020, 300
    base = (1.5 * rng.normal(size=(n, vocab))).astype(np.float32)
    q = (base + 0.3 * np.exp(rng.normal(size=(n, 1))) * rng.normal(size=(n, vocab))).astype(np.float32)
    tokens = rng.integers(0, vocab, n + 1)
    tokens[1:] = np.where(rng.random(n) < 0.5, base.argmax(1), tokens[1:])

    def given(logits, tokens):  # the params are the logits; the last position has no successor
        return jnp.pad(logits, ((0, 1), (0, 0)))[None]

    windows = pp.cut_windows(tokens, "gptq", n + 1)
    ppl, got = kl.divergence(given, jnp.asarray(q), kl.make_baseline(given, jnp.asarray(base), windows))
    printed = {
        "base_perplexity": 109.168236, "base_perplexity_se": 8.224199, "log_ratio": 0.257503,
        "log_ratio_se": 0.035392, "kl_mean": 0.252766, "kl_mean_se": 0.026490, "kl_median": 0.043435,
        "kl_p90": 0.541728, "kl_p95": 1.084532, "kl_p99": 2.967103, "kl_p999": 12.340386, "kl_max": 12.581979,
        "same_top_percent": 67.059, "same_top_percent_se": 1.472, "mean_dp_percent": -0.279,
        "mean_dp_percent_se": 0.099, "rms_dp_percent": 3.173, "rms_dp_percent_se": 0.327,
    }  # fmt: skip
    for name, value in printed.items():  # it stores the baseline in 16 bits and rounds to three digits
        np.testing.assert_allclose(getattr(got, name), value, rtol=3e-4, atol=6e-4, err_msg=name)
    np.testing.assert_allclose([ppl.perplexity, ppl.perplexity_se], [141.230427, 11.575203], rtol=1e-5)
