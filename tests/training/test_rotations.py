"""Learned rotations: the loss under rounding falls, the float model stays what it is; rounding goes on from there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.fuse import rotate_residual, rotate_values, rotated
from qjax.models.model import Model
from qjax.pipeline import Calibration
from qjax.reparam.hadamard import randomized
from qjax.reparam.orthogonal import orthogonal, turned
from qjax.training.grid.weights import leaves_by_path
from qjax.training.tuning.descent import Tuning
from qjax.training.tuning.rotations import RoundedTurned, learn_rotations, nearest_orthogonal, spinquant

CONFIG = DecoderConfig(
    vocab=64, dim=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, context=64, tied=True
)  # fmt: skip
PLAN, SEED = "uint3_g32", 3
TUNING = Tuning(12, rate=1.5, looks=4)


@pytest.fixture(scope="module")
def model():
    """Gains away from 1, which are to be folded first; and an outlier in the very coordinates where it starts."""
    params = Decoder(CONFIG).init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 1 + 0.3 * jnp.sin(jnp.arange(x.size)) if x.ndim == 1 else 2 * x, params)
    outlier = randomized(jnp.eye(CONFIG.dim)[:1], SEED, inverse=True)
    tokens = params["embed"]["embedding"]
    return Model(CONFIG, {**params, "embed": {"embedding": tokens + 6 * jnp.std(tokens) * outlier}})


@pytest.fixture(scope="module")
def calibration():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (24, 24)).astype(np.int32)
    return Calibration(tokens, heldout=8, batch=8)


@pytest.mark.slow
def test_the_loss_falls_and_the_float_model_stays(model, calibration):
    made, found = learn_rotations(model, PLAN, calibration, TUNING, inputs="int4", seed=SEED)
    assert found.loss < 0.9 * found.first_loss and found.kept > 0
    start = rotated(model, seed=SEED, untie=True)
    assert made.config == start.config and not made.config.tied
    np.testing.assert_allclose(made.logits(calibration.tokens), model.logits(calibration.tokens), rtol=1e-4, atol=2e-5)
    a, b = leaves_by_path(start.params), leaves_by_path(made.params)
    for path in ("embed/embedding", "head/kernel", "layers_0/attn/v/kernel", "layers_1/mlp/down/kernel"):
        assert float(jnp.abs(a[path] - b[path]).max()) > 0.01 * float(jnp.abs(a[path]).max()), path
    for path in ("embed/embedding", "layers_0/attn/q/kernel"):  # lengths along the stream are what they were
        along = -1 if path.startswith("embed") else 0
        np.testing.assert_allclose(
            jnp.linalg.norm(a[path], axis=along), jnp.linalg.norm(b[path], axis=along), rtol=1e-5
        )


def test_what_trains_is_what_is_folded(model):
    """Without rounding the turned weights are those that `fuse` makes, each layer with its own rotation of values."""
    base = rotated(model, 0, untie=True)
    R, each = orthogonal(5, 32), jnp.stack([orthogonal(6 + i, 16) for i in range(2)])
    matrices = {"residual": R, "values": each}
    found = RoundedTurned(base.config, ())(matrices, {"teacher": base.params})
    params, config = rotate_residual(base.params, base.config, lambda x: turned(x, R))
    params = rotate_values(params, config, [lambda x, Q=Q: turned(x, Q) for Q in each])
    for path, leaf in leaves_by_path(params).items():
        np.testing.assert_allclose(leaves_by_path(found)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    bent = np.asarray(R) + 1e-3 * np.random.default_rng(0).standard_normal((32, 32))
    near = np.asarray(nearest_orthogonal(bent), np.float64)
    assert np.abs(near.T @ near - np.eye(32)).max() < 1e-6 and np.abs(near - np.asarray(R)).max() < 5e-3


@pytest.mark.slow
def test_spinquant_rounds_what_it_turned(model, calibration):
    quantized, report = spinquant(model, PLAN, calibration, TUNING, seed=SEED)
    assert report.tuned is not None and report.tuned["loss"] < report.tuned["first_loss"]
    assert report.tuned["said"].startswith("rotations, step") and report.formats[PLAN] > 0
    difference = quantized.logits(calibration.tokens) - model.logits(calibration.tokens)
    assert 0 < float(jnp.mean(difference**2)) < float(jnp.var(model.logits(calibration.tokens)))


def test_bad_input(model, calibration):
    with pytest.raises(UserError, match="give a plan for weights, a kind for inputs, or both"):
        learn_rotations(model, None, calibration)
    with pytest.raises(UserError, match="window held out"):
        learn_rotations(model, PLAN, dataclasses.replace(calibration, heldout=0))
    fused = dataclasses.replace(model, config=dataclasses.replace(CONFIG, post_norms=True))
    with pytest.raises(UserError, match="cannot be rotated"):
        learn_rotations(fused, PLAN, calibration)
