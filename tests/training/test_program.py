"""What an arm's keys make of the step: vocabularies in chunks, and weights drawn to their grid by the optimizer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny as tiny

import qjax
from qjax.errors import UserError
from qjax.training.adapters.adapted import Adapted
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.finetune import heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.program import Teacher, program, refresh, start_state
from qjax.training.decoder.quantization import Activations, Grid
from qjax.training.grid import weights
from qjax.training.losses.objectives import Losses, language_loss
from qjax.training.optim.optimizer import Optimizer
from qjax.training.optim.parq import latent
from qjax.training.run.state import init_state

PARQ = Arm("drawn", Grid("int3_g32"), Optimizer(3e-3, weight_decay=0.1, prox="parq", prox_span=(0.1, 0.8)))


def metrics_of(arm, config, **options):
    """Of the second step, whose loss depends on the first step's gradients."""
    params = tiny.Decoder(config).init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    made = program(arm, config, 4, teacher=Teacher(config, 0.3), compute=tiny.FLOAT32, **options)
    state = start_state(made, params, teacher=jax.tree.map(lambda x: 1.5 * x, params))
    for at in range(2):
        state, metrics = made.step(state, {"tokens": tiny.windows().batch_at(at)})
    return {k: float(v) for k, v in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("changes, chunk", [({}, 24), ({"tied": False, "logit_softcap": 4.0}, 1000)])
def test_a_vocabulary_in_chunks_is_the_same_step(changes, chunk):
    config = dataclasses.replace(tiny.CONFIG, **changes)
    arm = Arm(
        "all", Grid("int4_g32", scales="learned"), Optimizer(1e-2, warmup=0.0), Losses("ce + fkl + 0.1*cakld"),
        Activations("int8"),
    )  # fmt: skip
    whole = metrics_of(arm, config)
    parts = metrics_of(dataclasses.replace(arm, losses=dataclasses.replace(arm.losses, vocab_chunk=chunk)), config)
    assert whole.keys() == parts.keys() and whole["cakld"] > 1e-3
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=2e-3 if name.startswith("grad") else 1e-4), name


@pytest.mark.slow
def test_chunks_hold_no_logits():
    """The compiled step of a wide vocabulary wants less memory than its logits alone."""
    config = dataclasses.replace(tiny.CONFIG, vocab=16384)
    params = tiny.Decoder(config).init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    batch = {"tokens": jnp.zeros((64, 17), jnp.int32)}
    temporary = {}
    for chunk in (0, 512):
        made = program(
            Arm("wide", optimizer=Optimizer(1e-3), losses=Losses(vocab_chunk=chunk)), config, 4, compute=tiny.FLOAT32
        )
        compiled = made.step.lower(start_state(made, params), batch).compile()
        temporary[chunk] = compiled.memory_analysis().temp_size_in_bytes
    logits = 4 * 64 * 16 * config.vocab
    assert temporary[0] > logits and temporary[512] < logits / 3


def test_a_cached_teacher_needs_all_logits():
    with pytest.raises(UserError, match="vocab_chunk is for a teacher that runs in the same step"):
        program(Arm("kd", losses=Losses("fkl", vocab_chunk=8)), tiny.CONFIG, 4, compute=tiny.FLOAT32)


def test_adapters_want_all_logits():
    with pytest.raises(UserError, match="vocab_chunk is for quantized weights"):
        program(Arm("lora", losses=Losses(vocab_chunk=8)), tiny.CONFIG, 4, through=Adapted("lora"))


@pytest.mark.slow
@pytest.mark.parametrize("method, format", [("lora", ""), ("qlora", "int4_g32"), ("loraqat", "int4_g32")])
def test_adapters_train_by_the_same_program(method, format, tmp_path):
    """With a loss of any arm, a teacher in it; exact exports are checked by `finetune`, bit for bit."""
    adapted = Adapted(method, format or "NF4_dq", rank=4)
    arm = Arm(method, optimizer=Optimizer(3e-2), losses=Losses("ce + fkl"))
    made = tiny.program_of(arm, 12, through=adapted)
    params, kept = adapted.start(tiny.model().params, jax.random.key(0))
    state = init_state(params, made.optimizer, kept | {"teacher": tiny.model().params})
    model, rows, loss = tiny.run(tmp_path, 12, made=made, state=state)
    assert rows[-1]["ce"] < rows[0]["ce"] - 0.03 and rows[-1]["fkl"] > 0 and "rate/adapters" in rows[-1]
    assert heldout_loss(made.judge, model.params, tiny.heldout()) == loss


@pytest.mark.slow
@pytest.mark.parametrize("prox", ["parq", "relax"])
def test_drawn_weights_end_on_the_grid_that_is_exported(prox, tmp_path):
    arm = dataclasses.replace(PARQ, optimizer=dataclasses.replace(PARQ.optimizer, prox=prox))
    model, log, loss = tiny.run(tmp_path / "run", 20, arm=arm)
    off = [row["off_grid"] for row in log]
    assert off[0] > 0.1 and off[-1] < 1e-6 and off[4] > off[7]
    assert log[-1]["heldout"] == loss and log[-1]["quant_noise"] > 0.1  # of the latent weights
    rates = [name for name in log[0] if name.startswith("grad_norm")]
    assert rates == ["grad_norm/Q8_0 along -1", "grad_norm/int3_g32 along -2", "grad_norm/weights"]
    qjax.save(model, tmp_path / "hf")
    assert heldout_loss(Forward(tiny.CONFIG), qjax.load(tmp_path / "hf").params, tiny.heldout()) == loss


@pytest.mark.slow
def test_drawn_weights_are_stepped_on_as_they_are():
    """The forward does not quantize: before the drawing it is the float model's, and the export is the latents'."""
    late = Arm("late", PARQ.grid, dataclasses.replace(PARQ.optimizer, prox_span=(0.2, 0.9)))
    made = program(late, tiny.CONFIG, 20, compute=tiny.FLOAT32)
    plain = program(Arm("float", optimizer=Optimizer(3e-3, weight_decay=0.1)), tiny.CONFIG, 20, compute=tiny.FLOAT32)
    state, float_state = (start_state(m, tiny.model().params) for m in (made, plain))
    judge = jax.jit(language_loss(Forward(tiny.CONFIG), Losses("ce")))
    for at in range(10):
        batch = {"tokens": jnp.asarray(tiny.windows().batch_at(at), jnp.int32)}
        float_state, in_float = plain.step(float_state, batch)
        wanted = in_float["loss"] if at < 2 else judge(state.params, {}, batch, jax.random.key(0))[0]
        state, metrics = made.step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(float(wanted), rel=1e-5)
    latents = weights.leaves_by_path(latent(state.optimizer, state.params)["weights"])
    now, exported = (weights.leaves_by_path(tree) for tree in (state.params["weights"], made.export(state)))
    for path in made.through.quantizers:
        q = exported[path]
        wanted = qjax.dequantize(qjax.quantize(latents[path], q.format, axis=q.axis))
        np.testing.assert_array_equal(qjax.dequantize(q), wanted)
        assert not np.array_equal(now[path], latents[path])


@pytest.mark.slow
def test_a_drawn_run_resumes_with_the_same_bits(tmp_path):
    def stops(step):
        if step == 6 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return tiny.windows().batch_at(step)

    whole = tiny.run(tmp_path / "whole", 10, arm=PARQ)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "broken", 10, arm=PARQ, batch_at=stops)
    again = tiny.run(tmp_path / "broken", 10, arm=PARQ, batch_at=stops)
    assert again[2] == whole[2]
    for a, b in zip(jax.tree.leaves(again[0].params), jax.tree.leaves(whole[0].params), strict=True):
        np.testing.assert_array_equal(a, b)
    names = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in names] == [2, 4, 6, 8, 10]


@pytest.mark.slow
def test_importance_decides_frozen_scales_at_the_start_and_at_a_refresh():
    made = program(tiny.FROZEN, tiny.CONFIG, 4, compute=tiny.FLOAT32)
    path, params = "layers_0/attn/q/kernel", tiny.model().params
    h = jnp.linspace(0.01, 9, tiny.CONFIG.dim)
    plain, weighted = (start_state(made, params, importance=i) for i in (None, {path: h}))
    for kept in (lambda state: state.constants, lambda state: refresh(state, made).constants):
        a, b = (kept(state)["scales"][path]["scales"]["scale"] for state in (plain, weighted))
        assert np.any(a != b)
    np.testing.assert_array_equal(kept(weighted)["scales"][path]["importance"], h)


@pytest.mark.parametrize(
    "shape, wanted",
    [
        ("cosine", [0.0, 1.0, (1 + np.cos(np.pi * 9 / 18)) / 2, (1 + np.cos(np.pi * 16 / 18)) / 2]),
        ("constant", [0.0, 1.0, 1.0, 1.0]),
        ("cooldown", [0.0, 1.0, 1.0, 1 - np.sqrt(3 / 5)]),
    ],
)
def test_shapes_of_the_rate(shape, wanted):
    rate = Optimizer(shape=shape, warmup=0.1, cooldown=0.25).schedule(20)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 2, 11, 18)], wanted, atol=1e-6)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"optimizer": {"prox": "parq"}}, "name one"),
        ({"optimizer": {"prox": "parq"}, "grid": {"format": "Q4_0", "scales": "learned"}}, "refit scales"),
        ({"optimizer": {"prox": "parq", "ema": 0.9}, "grid": {"format": "Q4_0"}}, "without ema"),
        ({"optimizer": {"prox": "parq", "trains": ("scales",)}, "grid": {"format": "Q4_0"}}, "add weights"),
        ({"optimizer": {"prox": "parq", "prox_span": (0.5, 0.5)}, "grid": {"format": "Q4_0"}}, "two rising shares"),
        ({"optimizer": {"shape": "cooldown", "cooldown": 1.0}}, "cooldown is a share"),
        ({"losses": {"vocab_chunk": -1}}, "vocab_chunk must not be negative"),
    ],
)
def test_keys_are_checked(keys, message):
    records = {"grid": Grid, "optimizer": Optimizer, "losses": Losses}
    with pytest.raises(UserError, match=message):
        Arm("a", **{name: records[name](**values) for name, values in keys.items()})
