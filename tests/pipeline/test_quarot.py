"""QuaRot whole: fused rotations, one in front of `down` as it runs, one in the cache; 4 bits of everything."""

import numpy as np
import pytest

import qjax
from qjax.models import stdlib_text
from qjax.models.fuse import rotated
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.windows import calibration_of
from qjax.plan import Plan
from qjax.training.decoder.finetune import heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.quantization import Activations

LINE = "act('int4') >> int4_g128 >> nearest() >> ldlq()"  # weights and inputs of 4 bits, GPTQ


@pytest.mark.slow
def test_it_loses_less_than_without_rotations():
    model = qjax.load("reference")
    turned = rotated(model, seed=3, untie=True)
    ids = np.array(model.tokenizer.encode(stdlib_text.heldout_text()[:60_000], bos=True)[: 16 * 257]).reshape(16, 257)
    train = np.array(model.tokenizer.encode(stdlib_text.train_text()[0][:40_000], bos=True))
    calibration = calibration_of(model.config.context, train, context=256)

    def over_float(model, down: str, cache: str) -> float:
        plan = Plan.from_dict({"rules": {"*down*": down, "layers_*": LINE, "*": "rtn:Q8_0"}})
        q, _ = quantize_model(model, plan, "rtn", calibration)
        return heldout_loss(Forward(model.config, Activations(cache=cache)), q.params, ids) - exact

    exact = heldout_loss(Forward(model.config), model.params, ids)
    plain = over_float(model, LINE, "int4_row")
    quarot = over_float(turned, f"hadamard('in') >> {LINE}", "hadamard() >> int4_row")
    assert quarot < 0.75 * plain
    assert (quarot, plain) == pytest.approx((0.053, 0.088), rel=0.2)  # what docs/reparam.md says
