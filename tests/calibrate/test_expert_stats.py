"""What each expert saw: lift's statistics against tokens sorted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qjax.calibrate import observe
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.stats import Stats

CONFIG = DecoderConfig(
    vocab=64, dim=32, hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, family="mixtral", experts=5,
    experts_used=2, expert_hidden=48,
)  # fmt: skip


def apply(params, tokens):
    return Decoder(CONFIG).apply({"params": params}, tokens)


def rows_by_expert(params, tokens):
    """The rows that each expert's gate and up read, and those that its down reads, sorted in numpy."""
    seen = {}

    def record(call, args, kwargs, context):
        if context.module.name == "router":
            seen["x"], seen["scores"] = args[0], call(*args, **kwargs)
            return seen["scores"]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        apply(params, tokens)
    x, scores = (np.asarray(seen[k], np.float64).reshape(tokens.size, -1) for k in ("x", "scores"))
    first = np.argsort(-scores, axis=1)[:, : CONFIG.experts_used]
    inputs = [x[(first == e).any(axis=1)] for e in range(CONFIG.experts)]
    gate, up = (np.asarray(params["layers_0"]["mlp"]["experts"][k]["kernel"], np.float64) for k in ("gate", "up"))
    answers = [(g := rows @ gate[e]) / (1 + np.exp(-g)) * (rows @ up[e]) for e, rows in enumerate(inputs)]
    return inputs, answers


@pytest.fixture(scope="module")
def setup():
    tokens = jax.random.randint(jax.random.key(1), (3, 20), 0, CONFIG.vocab)
    return Decoder(CONFIG).init(jax.random.key(0), tokens)["params"], tokens


def test_statistics_are_each_experts_own(setup):
    params, tokens = setup
    kinds = ("H", "h", "absmean", "absmax")
    found = observe(apply, params, [tokens[:2], tokens[2:]], kinds)
    inputs, answers = rows_by_expert(params, tokens)
    assert len({len(rows) for rows in inputs}) > 1  # the router does choose
    for name, rows_of in (("gate", inputs), ("up", inputs), ("down", answers)):
        stats = found[f"layers_0/mlp/experts/{name}/kernel"]
        assert isinstance(stats, Stats) and stats.axis == -2
        np.testing.assert_array_equal(stats.count, [len(rows) for rows in rows_of])
        for e, rows in enumerate(rows_of):
            np.testing.assert_allclose(stats.H[e], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(stats.h[e], (rows**2).mean(axis=0), rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(stats.absmean[e], np.abs(rows).mean(axis=0), rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(stats.absmax[e], np.abs(rows).max(axis=0), rtol=1e-4, atol=1e-7)


def test_the_cross_term_is_of_tokens_that_both_models_send_there(setup):
    """Another model sends some tokens elsewhere: what they would have been is unknown, and no difference."""
    params, tokens = setup
    layer = params["layers_0"]
    router = layer["mlp"]["router"]["kernel"]
    moved = router + 0.3 * jax.random.normal(jax.random.key(2), router.shape)
    now = params | {"layers_0": layer | {"mlp": layer["mlp"] | {"router": {"kernel": moved}}}}
    found = observe(apply, now, [tokens], ("H", "cross"), float_params=params)
    gate, down = (found[f"layers_0/mlp/experts/{name}/kernel"] for name in ("gate", "down"))
    inputs, _ = rows_by_expert(now, tokens)
    before, _ = rows_by_expert(params, tokens)
    assert any(len(a) != len(b) or not np.array_equal(a, b) for a, b in zip(inputs, before, strict=True))
    np.testing.assert_allclose(gate.cross, 0, atol=1e-6)  # whoever sends it, a token is the same
    np.testing.assert_allclose(down.cross, 0, atol=1e-6)
    assert float(jnp.abs(gate.H).max()) > 0.1
