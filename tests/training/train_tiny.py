"""A tiny run in a process of its own, for tests that kill it: train_tiny.py OUT STEPS."""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.finetune import finetune
from qjax.training.decoder.program import Compute, Teacher, program, start_state
from qjax.training.decoder.quantization import Grid
from qjax.training.losses.objectives import Losses
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.data import Batches, Tokens
from qjax.training.run.devices import Data
from qjax.training.run.loop import Run

CONFIG = DecoderConfig(
    vocab=64, dim=32, hidden=64, layers=1, heads=2, kv_heads=1, head_dim=16, context=16, tied=True
)  # fmt: skip
ARM = Arm("tiny", Grid("int4_g32", scales="learned"), Optimizer(3e-3, ema=0.9, weight_decay=0.1), Losses("ce + fkl"))
FROZEN = Arm("frozen", Grid("int3_g32_mse", scales="frozen", refresh_every=4), Optimizer(3e-3))


def model():
    params = Decoder(CONFIG).init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    return Model(CONFIG, params)


def windows():
    """A text with something to learn: a walk over the tokens with short steps."""
    steps = np.random.default_rng(0).integers(1, 4, 4000)
    return Batches(Tokens((np.cumsum(steps) % CONFIG.vocab).astype(np.uint16), CONFIG.vocab, "walk"), 16, 8, 3)


def heldout():
    steps = np.random.default_rng(1).integers(1, 4, 17 * 8)
    return (np.cumsum(steps) % CONFIG.vocab).astype(np.int32).reshape(8, 17)


FLOAT32 = Compute(mixed=False)


def program_of(arm, steps, **options):
    """With the model itself as teacher."""
    return program(arm, CONFIG, steps, teacher=Teacher(CONFIG), compute=FLOAT32, **options)


def data(batch_at=None, **options):
    at = batch_at or windows().batch_at
    return Data(lambda step: {"tokens": at(step)}, heldout(), **options)


def run(out, steps=12, arm=ARM, made=None, state=None, **options):
    """The packed model, the log, and its loss."""
    made = made or program_of(arm, steps)
    state = state or start_state(made, model().params, teacher=model().params)
    done = finetune(made, state, data(**options), Run(Path(out), steps, 2, 4, 4, identity={"data": "walk"}))
    return Model(CONFIG, done.params), done.rows, done.loss


if __name__ == "__main__":
    kill_at = int(sys.argv[2])

    def batch_at(step):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return windows().batch_at(step)

    run(sys.argv[1], batch_at=batch_at)
