"""Blocks trained on their own output: never worse, far better at 2 bits, one compiled program, exact export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.plan import Plan
from qjax.training.decoder import blockwise
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.blockwise import BlockTuning, tune_blocks
from qjax.training.decoder.finetune import finetune
from qjax.training.decoder.program import Compute, program, start_state
from qjax.training.decoder.quantization import Grid
from qjax.training.grid import weights
from qjax.training.grid.qat import Quantized
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.devices import Data
from qjax.training.run.loop import Run

CONFIG = DecoderConfig(
    vocab=64, dim=64, hidden=64, layers=3, heads=2, kv_heads=2, head_dim=32, context=64, tied=True
)  # fmt: skip
PLAN = Plan.from_dict({"rules": {"layers_*": "int2_g64_mid_mse", "*": "Q8_0"}})
TUNING = BlockTuning(steps=60, batch=4, rate=1e-3, scale_rate=5e-3)


@pytest.fixture(scope="module")
def model():
    params = Decoder(CONFIG).init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    return Model(CONFIG, params)


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(0), (16, 24), 0, CONFIG.vocab), np.int32)


def distance(params, model, tokens):
    return float(jnp.mean((Model(CONFIG, params).logits(tokens) - model.logits(tokens)) ** 2))


@pytest.mark.slow
def test_every_block_gets_better_and_all_run_one_program(model, tokens):
    quantizers = weights.quantizers_of(model.params, PLAN, scales="learned")
    blockwise._descend.clear_cache()
    params, report = tune_blocks(model, quantizers, tokens, TUNING)
    assert blockwise._descend._cache_size() == 1
    assert [r["block"] for r in report] == ["layers_0", "layers_1", "layers_2"]
    assert all(r["loss"] < 0.7 * r["loss_before"] and not r["kept_start"] for r in report)
    packed = weights.leaves_by_path(params)
    assert all(isinstance(packed[p], qjax.QTensor) for p in quantizers)
    rtn, _ = qjax.quantize_params(model.params, PLAN)
    assert distance(params, model, tokens) < 0.6 * distance(rtn, model, tokens)


@pytest.mark.slow
def test_autoround_on_the_blocks_output(model, tokens):
    quantizers = weights.quantizers_of(model.params, PLAN, scales="frozen")
    _, report = tune_blocks(model, quantizers, tokens, BlockTuning(steps=100, batch=4, how="sign"))
    assert all(r["loss"] < 0.9 * r["loss_before"] for r in report)


def test_signed_steps_stay_within_half_a_level(model, tokens):
    quantizers = {"layers_0/attn/q/kernel": weights.quantizers_of(model.params, PLAN, scales="frozen")[
        "layers_0/attn/q/kernel"]}  # fmt: skip
    own = {"attn/q/kernel": quantizers["layers_0/attn/q/kernel"]}
    layer = model.params["layers_0"]
    trained, kept = weights.init(layer, own)
    static = Quantized(tuple(own.items()))
    z = jax.random.normal(jax.random.key(3), (8, 24, 64))
    block = blockwise.stages_of(CONFIG).blocks[0]
    start, constant = {"weights": layer, "scales": trained}, {"scales": kept}
    tuning = BlockTuning(steps=40, how="sign")
    new = blockwise._descend(block, static, tuning, start, constant, (z, 2 * z), jax.random.key(0))["weights"]
    s = float(jnp.abs(kept["attn/q/kernel"]["scales"]["scale"]).max())
    moved = jnp.abs(new["attn"]["q"]["kernel"] - layer["attn"]["q"]["kernel"])
    assert 0.1 * s < float(moved.max()) <= 0.52 * s
    np.testing.assert_array_equal(new["mlp"]["up"]["kernel"], layer["mlp"]["up"]["kernel"])


@pytest.mark.slow
def test_training_that_does_not_help_is_undone(model, tokens):
    quantizers = weights.quantizers_of(model.params, PLAN, scales="learned")
    params, report = tune_blocks(model, quantizers, tokens, BlockTuning(steps=3, batch=4, rate=10.0, scale_rate=10.0))
    assert all(r["kept_start"] and r["loss"] == r["loss_before"] for r in report)
    start = weights.packed_params(model.params, quantizers, *weights.init(model.params, quantizers))
    for path, leaf in weights.leaves_by_path(params).items():
        if path in quantizers:
            np.testing.assert_array_equal(qjax.dequantize(leaf), qjax.dequantize(weights.leaves_by_path(start)[path]))


@pytest.mark.slow
def test_from_a_recipe_then_end_to_end_scales(model, tokens, tmp_path):
    """GPTQ's codes start Block-AP; then integers stay frozen and the scales train on the loss."""
    rounded = qjax.quantize_model(model, PLAN, "gptq", qjax.pipeline.Calibration(tokens))[0].params
    quantizers = weights.quantizers_of(model.params, PLAN, scales="learned")
    first = tune_blocks(
        model, quantizers, tokens, BlockTuning(steps=1, batch=4, rate=1e-12, scale_rate=1e-12), rounded=rounded
    )
    codes, stored = (weights.leaves_by_path(t) for t in (first[0], rounded))
    same = [np.mean(np.asarray(codes[p].leaves["codes"]) == np.asarray(stored[p].leaves["codes"])) for p in quantizers
            if p.startswith("layers_")]  # fmt: skip
    assert min(same) == 1.0  # the recipe's codes, which are not the nearest, are where it starts

    tuned, _ = tune_blocks(model, quantizers, tokens, TUNING, rounded=rounded)
    arm = Arm("e2e", Grid("int2_g64_mid_mse", scales="decoupled"), Optimizer(1e-3, trains=("scales",), warmup=0.0))
    rows = np.concatenate([tokens, tokens[:, :1]], 1)
    made = program(arm, CONFIG, 12, compute=Compute(mixed=False))
    state = start_state(made, model.params, rounded=tuned)
    data = Data(lambda s: {"tokens": rows[:8]}, rows[:8])
    done, log, _, _ = finetune(made, state, data, Run(tmp_path, 12, 4, 12, 12))
    after, before = weights.leaves_by_path(done), weights.leaves_by_path(tuned)
    inside = [p for p in quantizers if p.startswith("layers_")]
    for p in inside:
        np.testing.assert_array_equal(after[p].leaves["codes"], before[p].leaves["codes"])
    assert any(np.any(np.asarray(after[p].leaves["scale"]) != np.asarray(before[p].leaves["scale"])) for p in inside)
    trained_norm = before["layers_0/attn_norm/scale"]
    assert np.any(np.asarray(trained_norm) != np.asarray(model.params["layers_0"]["attn_norm"]["scale"]))
    np.testing.assert_array_equal(after["layers_0/attn_norm/scale"], trained_norm)  # what the blocks learned stays
    assert log[-1]["flip_rate"] == 0 and log[-1]["ce"] < log[0]["ce"]


def test_too_few_sequences(model, tokens):
    quantizers = weights.quantizers_of(model.params, PLAN)
    with pytest.raises(UserError, match="needs as many, got 2"):
        tune_blocks(model, quantizers, tokens[:2], TUNING)
