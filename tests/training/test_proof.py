"""The proof that training through the grid pays: 2-bit QAT beats rounding the float model that trained as long."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.pipeline import Calibration
from qjax.plan import Plan
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.finetune import finetune, heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.program import Teacher, program, start_state
from qjax.training.decoder.quantization import Grid
from qjax.training.losses.objectives import Losses
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.data import Batches, Tokens
from qjax.training.run.devices import data_on
from qjax.training.run.loop import Run

pytestmark = pytest.mark.optimized  # it trains for longer than it compiles

VOCAB, CONTEXT, BATCH = 128, 64, 16
CONFIG = DecoderConfig(
    vocab=VOCAB, dim=128, hidden=256, layers=3, heads=4, kv_heads=2, head_dim=32, context=CONTEXT, tied=True
)  # fmt: skip
FORMAT = "int2_row_mid_mse"


def text(seed: int, count: int) -> np.ndarray:
    """A chain of order 2 whose table is a fixed random one: 4 likely successors of each pair."""
    table = np.random.default_rng(7).integers(0, VOCAB, (VOCAB, VOCAB, 4))
    draw = np.random.default_rng(seed)
    pick = draw.choice(4, count, p=[0.6, 0.2, 0.15, 0.05])
    out = [1, 2]
    for k in pick:
        out.append(table[out[-2] % 16, out[-1], k])
    return np.array(out[:count], np.uint16)


@pytest.mark.slow
def test_two_bit_qat_beats_rounding_by_a_tenth_of_a_nat(tmp_path):
    train_text, heldout = text(0, 400_000), text(1, 128 * (CONTEXT + 1)).astype(np.int32).reshape(-1, CONTEXT + 1)
    judge, gains = Forward(CONFIG), []
    for seed in (0, 1):

        def go(arm, params, windows, run, teacher=None):
            made = program(arm, CONFIG, run.steps, teacher=Teacher(CONFIG))
            return finetune(made, start_state(made, params, teacher=teacher), data_on(windows, heldout), run)

        windows = Batches(Tokens(train_text, VOCAB, "chain"), CONTEXT, BATCH, seed)
        params = jax.jit(Decoder(CONFIG).init)(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]
        out = tmp_path / str(seed)
        float_arm = Arm("float", optimizer=Optimizer(3e-3))
        start, _, loss, _ = go(float_arm, params, windows, Run(out / "float", 400, 100, 400, 400))
        later = dataclasses.replace(windows, seed=100 + seed)
        continued_arm = Arm("continued", optimizer=Optimizer(1e-3))
        again, _, continued, _ = go(continued_arm, start, later, Run(out / "continued", 100, 50, 100, 100))
        arm = Arm("qat", Grid(FORMAT), Optimizer(2e-3), Losses("0.5*ce + 0.5*fkl"))
        trained, rows, qat, _ = go(arm, start, later, Run(out / "qat", 100, 50, 100, 100), teacher=start)
        plan = Plan.from_dict({"rules": {"layers_*": FORMAT, "*": "rtn:Q8_0"}})
        seen = Calibration(later.batch_at(0)[:, :-1])
        ptq = {r: heldout_loss(judge, qjax.quantize_model(Model(CONFIG, again), plan, r, seen)[0].params, heldout)
               for r in ("rtn", "gptq")}  # fmt: skip
        print(seed, loss, continued, qat, ptq)
        assert all(row["quant_noise"] > 0.1 for row in rows)
        assert heldout_loss(judge, trained, heldout) == qat
        gains.append(min(ptq.values()) - qat)
    assert min(gains) >= 0.1, gains
