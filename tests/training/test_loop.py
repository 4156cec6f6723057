"""The loop: exact resume after kill -9, the same on several devices, errors that keep the last good checkpoint."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import train_tiny as tiny

import qjax
from qjax.errors import UserError
from qjax.models.stages import stages_of
from qjax.training.decoder import finetune as finetune_module
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.finetune import finetune, heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.program import Compute, Teacher, program, start_state
from qjax.training.decoder.quantization import Activations, Grid
from qjax.training.grid import weights
from qjax.training.losses.objectives import Losses
from qjax.training.optim.groups import Group, partitioned
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run import devices
from qjax.training.run.loop import Run, train
from qjax.training.run.state import init_state, make_step

pytestmark = pytest.mark.optimized  # the same bits as in a process of its own


def rows(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


def checkpoint(out):
    """The last saved state, whatever its shape: {path: array}."""
    with ocp.CheckpointManager((Path(out) / "checkpoints").absolute()) as manager:
        return manager.latest_step(), weights.leaves_by_path(manager.restore(manager.latest_step()))


def same(a, b):
    (step_a, tree_a), (step_b, tree_b) = checkpoint(a), checkpoint(b)
    assert step_a == step_b and set(tree_a) == set(tree_b)
    for path in tree_a:
        np.testing.assert_array_equal(tree_a[path], tree_b[path], err_msg=path)


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model, _, loss = tiny.run(whole)
    here = str(Path(__file__).parent)
    command = [sys.executable, str(Path(here) / "train_tiny.py"), str(broken), "10"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert [r["step"] for r in rows(broken)][-1] == 10 and checkpoint(broken)[0] in (4, 8)
    again, _, loss_again = tiny.run(broken)
    assert loss_again == loss
    assert rows(broken) == rows(whole) and [r["step"] for r in rows(whole)] == [2, 4, 6, 8, 10, 12]
    same(whole, broken)
    for path, leaf in weights.leaves_by_path(model.params).items():
        other = weights.leaves_by_path(again.params)[path]
        jax.tree.map(np.testing.assert_array_equal, leaf, other)
    assert {"loss", "ce", "fkl", "heldout", "quant_noise", "flip_rate", "saturated"} <= set(rows(whole)[-1])


@pytest.mark.slow
def test_an_interrupted_run_with_frozen_scales_resumes_too(tmp_path):
    seen = []

    def stops(step):
        seen.append(step)
        if step == 7 and len(seen) < 10:
            raise KeyboardInterrupt
        return tiny.windows().batch_at(step)

    whole = tiny.run(tmp_path / "whole", arm=tiny.FROZEN)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "broken", arm=tiny.FROZEN, batch_at=stops)
    broken = tiny.run(tmp_path / "broken", arm=tiny.FROZEN, batch_at=stops)
    assert seen == [*range(8), *range(4, 12)]  # the batches of the steps behind the checkpoint, again
    assert broken[2] == whole[2] and rows(tmp_path / "broken") == rows(tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_eight_devices_are_one(tmp_path):
    data = devices.data_on(tiny.windows(), tiny.heldout(), devices.Devices(data=2, fsdp=4))

    def batch_at(step):
        return data.batch_at(step)["tokens"]

    _, log, loss = tiny.run(tmp_path / "one")
    many, log_many, loss_many = tiny.run(tmp_path / "many", batch_at=batch_at, distribute=data.distribute)
    assert loss_many == pytest.approx(loss, abs=1e-5)
    for a, b in zip(log, log_many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    params = checkpoint(tmp_path / "many")[1]
    for path, leaf in checkpoint(tmp_path / "one")[1].items():
        if path.startswith("params/weights"):
            np.testing.assert_allclose(params[path], leaf, atol=1e-5, err_msg=path)
        elif path.startswith("params"):
            # A weight in the middle between two codes goes either way by the last bit of a sum, and the gradient of
            # its scale with it: that group may stray, by a hundredth of what the rate of 0.03 moves a scale in all.
            apart = np.abs(np.asarray(params[path]) - np.asarray(leaf))
            assert np.quantile(apart, 0.95) <= 1e-5 and apart.max() <= 1e-3, path
    # and one device goes on from what eight saved
    resumed, _, _ = tiny.run(tmp_path / "many")
    for path, leaf in weights.leaves_by_path(many.params).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, weights.leaves_by_path(resumed.params)[path])


@pytest.mark.slow
def test_accumulation_is_the_whole_batch():
    made = program(Arm("float", optimizer=Optimizer(1e-2)), tiny.CONFIG, 10, compute=tiny.FLOAT32)
    params, batch = tiny.model().params, {"tokens": tiny.windows().batch_at(0)}
    whole = made.step(start_state(made, params), batch)
    four = program(Arm("float", optimizer=Optimizer(1e-2)), tiny.CONFIG, 10, compute=Compute(False, 4))
    parts = four.step(start_state(four, params), batch)
    assert float(whole[1]["loss"]) == pytest.approx(float(parts[1]["loss"]), rel=1e-6)
    assert float(whole[1]["grad_norm/weights"]) == pytest.approx(float(parts[1]["grad_norm/weights"]), rel=1e-5)
    with pytest.raises(UserError, match="8 rows does not divide into 3"):
        three = program(Arm("float"), tiny.CONFIG, 10, compute=Compute(False, 3))
        three.step(start_state(three, params), batch)


@pytest.mark.slow
def test_who_trains_twice_with_a_program_compiles_once(tmp_path):
    made = tiny.program_of(tiny.FROZEN, 4)
    tiny.run(tmp_path / "a", 4, made=made)
    judged = finetune_module._mean_loss._cache_size()
    tiny.run(tmp_path / "b", 4, made=made)
    tiny.run(tmp_path / "c", 4, arm=dataclasses.replace(tiny.FROZEN))
    assert made.step._cache_size() == 1
    assert finetune_module._mean_loss._cache_size() == judged  # equal forwards are one function, of other programs too


@pytest.mark.slow
def test_export_is_recomputed(tmp_path):
    """The number a run reports is the loss of the file it exports."""
    arm = Arm("q8", Grid("Q4_0", outside="Q8_0"), Optimizer(3e-3))
    model, log, loss = tiny.run(tmp_path / "run", 4, arm=arm)
    assert log[-1]["heldout"] == loss
    qjax.save(model, tmp_path / "hf")
    back = qjax.load(tmp_path / "hf")
    assert heldout_loss(Forward(tiny.CONFIG), back.params, tiny.heldout()) == loss
    with ocp.StandardCheckpointer() as saver:
        saver.save((tmp_path / "orbax").absolute(), model.params)
        saver.wait_until_finished()
        restored = saver.restore((tmp_path / "orbax").absolute(), model.params)
    assert heldout_loss(Forward(tiny.CONFIG), restored, tiny.heldout()) == loss


@pytest.mark.slow
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(tmp_path):
    made = program(Arm("wild", optimizer=Optimizer(1e-3)), tiny.CONFIG, 8, compute=tiny.FLOAT32)

    def poisoned(state, batch):
        state, metrics = made.step(state, batch)
        return state, metrics | {"loss": jnp.where(state.step > 5, jnp.nan, metrics["loss"])}

    state = start_state(made, tiny.model().params)
    with pytest.raises(UserError, match=r"nan at step 6: lower .*; the checkpoint of step 4 is kept"):
        train(state, poisoned, tiny.data().batch_at, Run(tmp_path, 8, 2, 4, 4))
    assert checkpoint(tmp_path)[0] == 4


@pytest.mark.slow
def test_a_gradient_that_is_no_number_is_not_saved(tmp_path):
    """The loss of a step may be fine while its gradient spoils the state: that state never becomes a checkpoint."""
    made = program(Arm("wild", optimizer=Optimizer(1e-3)), tiny.CONFIG, 8, compute=tiny.FLOAT32)

    def poisoned(state, batch):
        state, metrics = made.step(state, batch)
        return state, metrics | {"grad_norm/weights": jnp.where(state.step == 4, jnp.nan, metrics["grad_norm/weights"])}

    with pytest.raises(UserError, match=r"nan at step 4: .*; no checkpoint was written yet"):
        train(start_state(made, tiny.model().params), poisoned, tiny.data().batch_at,
              Run(tmp_path, 8, 2, 4, 4))  # fmt: skip


@pytest.mark.parametrize(
    "record, keys, message",
    [
        (Optimizer, {"rate": -1.0}, "rate must be positive"),
        (Optimizer, {"ema": -0.5}, "ema is a decay"),
        (Optimizer, {"trains": ("wieghts",)}, "got 'wieghts'; did you mean weights"),
        (Optimizer, {"warmup": 1.0}, "warmup is a share"),
        (Optimizer, {"shape": "cooldwn"}, "must be cosine, constant, cooldown, got 'cooldwn'; did you mean cooldown"),
        (Activations, {"inputs": "int5"}, "inputs must be int8"),
        (Activations, {"cache": "hadamrd() >> Q4_0"}, "hadamrd"),
        (Losses, {"terms": "kl"}, "unknown term 'kl'"),
        (Grid, {"estimator": "stee"}, "unknown estimator"),
        (Grid, {"scales": "lerned"}, "got 'lerned'; did you mean learned"),
        (Grid, {"refresh_every": -1, "scales": "frozen"}, "refresh_every must not be negative"),
        (Grid, {"refresh_every": 5}, "refresh_every is for frozen scales, and these are refit"),
        (Grid, {"format": "int4_g32", "init": "gptq"}, "refit scales would not keep a recipe's grid"),
        (Grid, {"init": "gptq", "scales": "learned"}, "name one"),
        (Grid, {"format": "int4_g32", "init": "gptk", "scales": "learned"}, "did you mean gptq"),
        (Grid, {"format": "int4_g32", "rule": "absmaxx"}, "got 'absmaxx'; did you mean absmax"),
        (Grid, {"format": "int2_g32", "rule": "twn", "scales": "learned"}, "twn has a threshold of its own"),
        (Grid, {"format": "Q4_00"}, "Q4_00"),
        (Grid, {"format": "Q4_0", "rules": (("*", "Q4_00"),)}, "Q4_00"),
        (Arm, {"grid": Grid("Q4_0"), "optimizer": Optimizer(trains=("scales",))}, "nothing trains"),
    ],
)
def test_arms_are_checked(record, keys, message):
    """By the records themselves: without the types that are checked in front of them here and nowhere else."""
    made = object.__new__(record)
    for key, value in (vars(record("a") if record is Arm else record()) | keys).items():
        object.__setattr__(made, key, value)
    with pytest.raises(UserError, match=message):
        made.__post_init__()


@pytest.mark.slow
def test_a_teacher_that_is_missing_is_named(tmp_path):
    def go(arm, **options):
        made = program(arm, tiny.CONFIG, 4, compute=tiny.FLOAT32)
        finetune(made, start_state(made, tiny.model().params, **options), tiny.data(), Run(tmp_path, 4, 2, 4, 4))

    with pytest.raises(UserError, match="needs a teacher"):
        go(Arm("kd", losses=Losses("fkl")))
    with pytest.raises(UserError, match="cakld needs the teacher's confidence"):
        go(Arm("kd", losses=Losses("cakld")), teacher=tiny.model().params)
    with pytest.raises(UserError, match="no recipe's result"):
        go(Arm("init", Grid("int4_g32", scales="learned", init="gptq")))
    plan = Grid("int4_g32").plan(tiny.CONFIG)
    rounded = qjax.quantize_params(tiny.model().params, plan)[0]
    with pytest.raises(UserError, match="refit scales would not keep"):
        go(Arm("init", Grid("int4_g32")), rounded=rounded)
    with pytest.raises(UserError, match="embed/embedding: the start has it in Q8_0, here it trains in float"):
        go(Arm("keeps", Grid("int4_g32", outside="keep", scales="frozen")), rounded=rounded)
    with pytest.raises(UserError, match="no held-out window"):
        heldout_loss(Forward(tiny.CONFIG), tiny.model().params, tiny.heldout()[:0])


@pytest.mark.slow
def test_hidden_states_of_a_teacher_of_its_own(tmp_path):
    """The teacher's blocks are its own; one of another depth or width cannot teach them."""
    loss = tiny.run(tmp_path / "a", 2, arm=Arm("h", optimizer=Optimizer(1e-3), losses=Losses("ce + 0.1*hidden")))[1][-1]
    assert 0 < loss["hidden"] < 1
    deep = dataclasses.replace(tiny.CONFIG, layers=tiny.CONFIG.layers + 1)
    with pytest.raises(UserError, match="hidden"):
        program(Arm("h", losses=Losses("hidden")), tiny.CONFIG, 4, teacher=Teacher(deep), compute=tiny.FLOAT32)


@pytest.mark.slow
def test_hidden_states_see_rounded_inputs_and_cache():
    """The states of the term "hidden" are the student's own: their head gives its logits."""
    params, tokens = tiny.model().params, tiny.windows().batch_at(0)
    rounded = (tiny.CONFIG, Activations("int4", "int4_g16"))
    last = Forward(*rounded).hidden(params, tokens[:2, :-1])[-1]
    logits = Forward(*rounded)(params, tokens[:2, :-1])
    np.testing.assert_allclose(stages_of(tiny.CONFIG).head(params, last), logits, rtol=1e-4, atol=1e-5)
    arm = Arm("h", losses=Losses("hidden"), activations=rounded[1])
    made = tiny.program_of(arm, 4)
    _, metrics = made.step(start_state(made, params, teacher=params), {"tokens": tokens})
    assert float(metrics["hidden"]) > 1e-3  # of a teacher that differs by its inputs and its cache alone


@pytest.mark.slow
def test_another_run_is_not_continued(tmp_path):
    tiny.run(tmp_path, 4, arm=tiny.FROZEN)
    with pytest.raises(UserError, match=r"arm\.optimizer\.rate was 0.003, now it is 0.1"):
        tiny.run(tmp_path, 4, arm=dataclasses.replace(tiny.FROZEN, optimizer=Optimizer(0.1)))
    with pytest.raises(UserError, match="steps was 4, now it is 8"):
        tiny.run(tmp_path, 8, arm=tiny.FROZEN)
    wide = dataclasses.replace(tiny.CONFIG, hidden=96)
    params = tiny.Decoder(wide).init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    with pytest.raises(UserError, match=r"parameters.weights/layers_0/mlp/down/kernel was float32\[64, 32\]"):
        made = program(tiny.FROZEN, wide, 4, teacher=Teacher(wide), compute=tiny.FLOAT32)
        tiny.run(tmp_path, 4, made=made, state=start_state(made, params))


def test_quantization_that_does_nothing_is_found(tmp_path):
    with pytest.raises(UserError, match="quantization changes no weight"):
        tiny.run(tmp_path, 4, arm=Arm("dense", Grid("F32", outside="keep")))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 9, "log_every": 2, "eval_every": 3}, "multiple of log_every"),
    ],
)
def test_bad_intervals(keys, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Run(tmp_path, **keys)


@pytest.mark.slow
def test_gradients_reach_what_trains_and_nothing_else():
    arm = Arm("l", Grid("int4_g32", scales="learned"), Optimizer(1e-2, warmup=0.0))
    made = program(arm, tiny.CONFIG, 10, compute=tiny.FLOAT32)
    state = start_state(made, tiny.model().params)
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = made.step(state, {"tokens": tiny.windows().batch_at(0)})
    assert {"grad_norm/weights", "grad_norm/scales"} <= set(metrics)
    still = [p for p, leaf in weights.leaves_by_path(after.params).items()
             if np.array_equal(leaf, weights.leaves_by_path(before)[p])]  # fmt: skip
    assert still == []

    scales = Arm("s", Grid("int4_g32", scales="learned"), Optimizer(1e-2, warmup=0.0, trains=("scales",)))
    made = program(scales, tiny.CONFIG, 10, compute=tiny.FLOAT32)
    state = start_state(made, tiny.model().params)
    after, _ = made.step(state, {"tokens": tiny.windows().batch_at(0)})
    for path, leaf in weights.leaves_by_path(after.constants["weights"]).items():
        np.testing.assert_array_equal(leaf, weights.leaves_by_path(tiny.model().params)[path])


def test_a_key_of_its_own_for_every_step():
    """Randomness is a function of (seed, step): the same draws whether or not the steps before were taken here."""

    def loss(params, kept, batch, key):
        draw = jax.random.normal(key, ())
        return params["w"] * draw, {"draw": draw}

    optimizer = partitioned((Group("all", "*"),), 0.1, optax.identity())
    step = make_step(loss, optimizer, seed=5, donate=False)
    state = init_state({"w": jnp.float32(1)}, optimizer)
    draws = []
    for _ in range(3):
        state, metrics = step(state, {})
        draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 3
    late = init_state({"w": jnp.float32(1)}, optimizer, step=2)
    assert float(step(late, {})[1]["draw"]) == draws[2]


@pytest.mark.parametrize(
    "name, optimizer",
    [
        ("lion", optax.lion(1e-3)),
        ("adafactor", optax.adafactor(1e-2, min_dim_size_to_factor=16)),
        (
            "by part",
            optax.multi_transform({"w": optax.sgd(0.3), "s": optax.adam(1e-2)}, {"weights": "w", "scales": "s"}),
        ),
    ],
)
def test_a_users_own_optimizer(name, optimizer, tmp_path):
    """Any of optax, complete with its rate: the arm's own rate, which would move nothing, means nothing."""
    arm = Arm(name, Grid("int4_g32", scales="learned"), Optimizer(1e-12), Losses("ce"))
    made = program(arm, tiny.CONFIG, 40, compute=tiny.FLOAT32, optimizer=optimizer)
    done = finetune(made, start_state(made, tiny.model().params), tiny.data(), Run(tmp_path, 40, 4, 40, 40))
    losses = [row["loss"] for row in done.rows]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1 and done.loss < losses[0]
    assert {"grad_norm/weights", "grad_norm/scales"} <= set(done.rows[-1])
    assert not any(key.startswith("rate/") for key in done.rows[-1])  # which nobody but the user knows


def test_a_users_own_optimizer_moves_what_trains_alone(tmp_path):
    arm = Arm("w", Grid("int4_g32", scales="learned"), Optimizer(trains=("weights",)))
    made = program(arm, tiny.CONFIG, 4, compute=tiny.FLOAT32, optimizer=optax.sgd(0.1))
    state = start_state(made, tiny.model().params)
    before = jax.tree.map(np.asarray, state.params)
    after, _ = made.step(state, tiny.data().batch_at(0))
    for path, leaf in weights.leaves_by_path(after.params).items():
        still = np.array_equal(leaf, weights.leaves_by_path(before)[path])
        assert still == path.startswith("scales/"), path


def test_a_run_of_another_length_is_refused(tmp_path):
    made = tiny.program_of(tiny.FROZEN, 4)
    with pytest.raises(UserError, match="compiled for 4 steps, and the run has 8"):
        tiny.run(tmp_path, 8, made=made)
