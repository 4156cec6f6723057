"""The one call: what it counts, which text it reads, how it reports."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.evaluate import sizes as sizes_module
from qjax.evaluate.judge import baseline_of, judge, window_divergences, windows_of
from qjax.evaluate.network import _tally
from qjax.evaluate.sizes import relative_rmse, sizes, tensor_rows
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.models.parts import run
from qjax.tensor import dequantize, quantize
from qjax.tokenizer import Tokenizer

CONFIG = DecoderConfig(vocab=64, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8, context=64)


@dataclasses.dataclass(frozen=True, eq=False)
class Letters(Tokenizer):
    """A tokenizer of characters, without what a file needs."""

    backend: Any = None
    kind: str = "bpe"
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    bos: int | None = 1
    eos: int | None = 2
    add_bos: bool = True

    def __post_init__(self):
        pass

    def encode(self, text, *, bos=False):
        return [1] * (bos and self.add_bos) + [ord(c) % 61 + 3 for c in text]


@pytest.fixture(scope="module")
def model():
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return Model(CONFIG, jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, params), Letters())


@pytest.fixture(scope="module")
def packed(model):
    def pack(path, w):
        return quantize(w, "Q8_0", axis=0) if path[-1].key == "kernel" else w

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(pack, model.params))


@pytest.fixture(scope="module")
def text():
    return "".join(chr(c) for c in np.random.default_rng(0).integers(32, 127, 200))


@pytest.mark.slow
def test_judging_against_a_baseline(model, packed, text):
    baseline = baseline_of(model, text, context=16)
    cached = judge(packed, baseline=baseline, name="Q8_0", encode_seconds=1.5)
    live = judge(packed, text, baseline=model, context=16, name="Q8_0", encode_seconds=1.5)
    alone = judge(packed, text, context=16)
    for key, value in live.to_json().items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-7)
        assert cached.to_json()[key] == same, key
    assert 0 < cached.divergence.kl_mean < 1e-2
    assert cached.divergence.base_perplexity == pytest.approx(judge(model, text, context=16).perplexity.perplexity)
    assert alone.perplexity == cached.perplexity
    assert alone.divergence is None
    assert judge(model, baseline=baseline).divergence.kl_max == 0.0
    each = window_divergences(packed, baseline)
    assert each.shape == (len(baseline.windows),) and each.mean() == pytest.approx(cached.divergence.kl_mean, rel=1e-6)


@pytest.mark.slow
def test_packed_weights_are_judged_at_their_decoded_values(packed, text):
    plain = dataclasses.replace(packed, params=packed.dense)
    assert judge(plain, text, context=16).perplexity == judge(packed, text, context=16).perplexity


@pytest.mark.slow
def test_formats_share_one_program(model, packed, text):
    baseline = baseline_of(model, text, context=16)
    judge(model, baseline=baseline)
    judge(model, text, context=16)
    before = run._cache_size(), _tally._cache_size()
    judge(packed, baseline=baseline)
    judge(packed, text, context=16)
    assert (run._cache_size(), _tally._cache_size()) == before


def test_json_is_flat_and_stable(model, packed, text):
    one = judge(packed, text, baseline=model, context=16, name="Q8_0")
    two = judge(packed, text, context=16)
    assert list(one.to_json()) == list(two.to_json()) == [
        "name", "parameters", "bytes", "whole_bits", "quantized_parameters", "quantized_bytes", "block_bits",
        "protocol", "context", "windows", "tokens_scored", "nll", "nll_se", "nll_se_clustered", "perplexity",
        "perplexity_se", "base_perplexity", "base_perplexity_se", "log_ratio", "log_ratio_se",
        "log_ratio_se_clustered", "kl_mean", "kl_mean_se", "kl_mean_se_clustered", "kl_median", "kl_p90", "kl_p95",
        "kl_p99", "kl_p999", "kl_max", "same_top_percent", "same_top_percent_se", "mean_dp_percent",
        "mean_dp_percent_se", "rms_dp_percent", "rms_dp_percent_se", "encode_seconds",
    ]  # fmt: skip
    assert json.loads(json.dumps(one.to_json())) == one.to_json() and two.to_json()["kl_mean"] is None


def test_where_bos_goes(model, text):
    plain = Letters().encode(text)
    shifted = [1, *plain]  # the text starts with BOS, which moves every window by one token
    windows = windows_of(model, text, context=16)
    assert windows.tokens[0].tolist() == shifted[:16]
    assert windows.tokens[1].tolist() == [1, *shifted[17:32]]
    assert windows_of(model, text, protocol="gptq", context=16).tokens[1].tolist() == plain[16:32]
    assert windows_of(model, plain, context=16).tokens[1].tolist() == [1, *plain[17:32]]
    without = dataclasses.replace(model, tokenizer=Letters(add_bos=False))
    assert windows_of(without, text, context=16).tokens[1].tolist() == plain[16:32]


def test_the_default_context_is_the_protocols_or_the_models(model, text):
    assert windows_of(model, text).context == 64
    wide = dataclasses.replace(model, config=dataclasses.replace(CONFIG, context=4096))
    assert windows_of(wide, [5] * 2048).context == 512
    assert windows_of(wide, [5] * 2048, protocol="gptq").context == 2048


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        ({}, {"context": 128}, "128 tokens is more than the model's 64"),
        ({}, {"text": "short"}, "6 tokens; the llama.cpp protocol with a context of 64 needs at least 128"),
        ({}, {"text": [64] * 200}, "token 64 is outside the model's vocabulary of 64"),
        ({}, {"text": [-1] * 200}, "token -1 is outside"),
        ({}, {"text": None}, "no text"),
        ({}, {"protocol": "lama"}, "unknown protocol 'lama'"),
        ({"tokenizer": None}, {}, "no tokenizer"),
    ],
)
def test_mistakes_are_named(model, text, change, options, match):
    with pytest.raises(UserError, match=match):
        judge(dataclasses.replace(model, **change), **({"text": text} | options))


def test_a_baseline_brings_its_text(model, text):
    with pytest.raises(UserError, match="brings its own text"):
        judge(model, text, baseline=baseline_of(model, text, context=16))


def test_sizes_count_every_leaf(model, packed):
    kernels = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    rest = 64 * 32 * 2 + 5 * 32 - 64 * 32  # the embedding, then five norms; the head is a kernel
    head = 32 * 64
    got = sizes(packed.params)
    assert got.parameters == kernels + head + rest
    assert got.quantized_parameters == kernels + head
    assert got.block_bits == 8.5
    assert got.bytes == (kernels + head) * 34 // 32 + 4 * rest
    assert got.whole_bits == 8 * got.bytes / got.parameters
    assert sizes(model.params).block_bits is None
    assert sizes(model.params).whole_bits == 32.0


def test_a_row_per_tensor(model, packed):
    rows = {row.path: row for row in tensor_rows(packed.params, model.params)}
    q = rows["layers_1/mlp/down/kernel"]
    assert (q.format, q.shape, q.bits, q.bytes) == ("Q8_0", (64, 32), 8.5, 64 * 32 * 34 // 32)
    w = np.asarray(model.params["layers_1"]["mlp"]["down"]["kernel"], np.float64)
    w_hat = np.asarray(dequantize(packed.params["layers_1"]["mlp"]["down"]["kernel"]), np.float64)
    error = np.linalg.norm(w_hat - w) / np.linalg.norm(w)
    assert q.relative_rmse == pytest.approx(error, rel=1e-4)
    assert q.sqnr_db == pytest.approx(-20 * np.log10(error), rel=1e-4)
    kept = rows["final_norm/scale"]
    assert (kept.format, kept.bits, kept.relative_rmse, kept.sqnr_db) == ("float32", 32.0, 0.0, np.inf)
    assert tensor_rows(packed.params)[0].relative_rmse is None
    assert sum(row.bytes for row in rows.values()) == sizes(packed.params).bytes
    with pytest.raises(UserError, match=r"final_norm/scale: expected .* it is missing"):
        tensor_rows(model.params, {k: v for k, v in model.params.items() if k != "final_norm"})


def test_relative_rmse_of_nothing():
    assert relative_rmse(jnp.zeros(3), jnp.zeros(3)) == 0.0
    assert relative_rmse(jnp.full(4, 2.0), jnp.zeros(4)) == np.inf


@pytest.mark.parametrize("axis", [-1, 0])
def test_relative_rmse_of_a_large_matrix_goes_by_rows(axis, rng, monkeypatch):
    w = jnp.asarray(rng.normal(size=(40, 64)) * np.linspace(1, 9, 40)[:, None], jnp.float32)
    w = w if axis == -1 else w.T
    q = quantize(w, "Q4_0", axis=axis)
    whole = relative_rmse(q, w)
    decoded = []
    monkeypatch.setattr(sizes_module, "_AT_ONCE", 64 * 16)
    monkeypatch.setattr(sizes_module, "dequantize", lambda q: decoded.append(q.size) or dequantize(q))
    assert relative_rmse(q, w) == pytest.approx(whole, rel=1e-6)
    assert decoded == [64 * 16, 64 * 16, 64 * 8]
