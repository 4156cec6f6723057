"""A rounded model tuned as a whole: its predictions are drawn to those of the float model.

    L = mean over tokens of KL(p_float || p_tuned)        over what is continuous behind fixed codes (continuous.py)

    tuned, found = tune(model, quantized, calibration)

The model of float weights runs in the same step as the teacher; logits exist a chunk of the vocabulary at a time. Both
models are in memory, and the activations of a batch of windows. Source: the last stage of QuIP# (arXiv:2402.04396,
section 5) and QTIP (arXiv:2406.11235, section 4.3), with the KL for the loss of labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.model import Model, check_tokens
from qjax.pipeline.windows import Calibration
from qjax.tensor import is_qtensor
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.quantization import Activations
from qjax.training.losses.distill import forward_kl
from qjax.training.losses.objectives import Losses, Readout, away, language_loss
from qjax.training.tuning.continuous import Parameters, start, stored, values
from qjax.training.tuning.descent import Descent, Tuning, descend, mean_over
from qjax.typing import Array

_CHUNK = 8192  # tokens of the vocabulary at a time


def tune(
    model: Model,
    quantized: Model,
    calibration: Calibration,
    tuning: Tuning | None = None,
    *,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Model, Descent]:
    """Tune what is continuous of a rounded model on the KL to the float one.

    Args:
      model: the float model.
      quantized: the same, rounded by any recipe onto any formats, behind any changes of variables.
      calibration: windows to train on; those held out decide which step is kept, and there must be one.
      tuning: see `Tuning`.
      progress: called as (step, the last KL looked at, held out).

    Returns: the model of the same codes and bytes, never worse on the windows held out, and how it was found.

    Raises:
      UserError: no window held out, or of one token; a model that is packed in place of the float one, or another
        architecture; what `start` and `descend` raise.
    """
    tuning = tuning or Tuning()
    if any(map(is_qtensor, jax.tree.leaves(model.params, is_leaf=is_qtensor))):
        raise UserError("tuning compares with the float model, and this one is packed; give its float weights first")
    if dataclasses.replace(model.config, tied=quantized.config.tied) != quantized.config:
        raise UserError("the float model and the quantized one are of two architectures; they must be one model")
    check_windows(model.config, calibration)
    tokens = np.asarray(calibration.tokens, np.int32)
    used, held = tokens[: calibration.used], tokens[calibration.used :]
    teacher, student = readout(model.config), readout(quantized.config)
    constants = {"model": quantized.params, "teacher": jax.tree.map(jnp.asarray, model.dense)}

    def judge(trained: Parameters) -> float:
        dense = dataclasses.replace(quantized, params=stored(quantized.params, trained)).dense
        return mean_over(len(held), tuning.batch, lambda at: kl_of(
            teacher, student, constants["teacher"], dense, held[at, :-1]))  # fmt: skip

    best, found = descend(
        language_loss(student, Losses("fkl"), _run_on, teacher=teacher), tuning, start(quantized.params), constants,
        lambda rows: {"tokens": used[rows]}, len(used), judge, "the quantized model", progress,
    )  # fmt: skip
    return dataclasses.replace(quantized, params=stored(quantized.params, best)), found


def check_windows(config: DecoderConfig, calibration: Calibration) -> None:
    """Raise UserError where no step could be judged, or a token is none of the model's."""
    if not calibration.heldout or calibration.tokens.shape[1] < 2:
        raise UserError("tuning needs a calibration window held out, to decide which step is kept, of two tokens")
    check_tokens(config, calibration.tokens)


def _run_on(trained: Parameters, constants: Any) -> Any:
    return values(constants["model"], trained)


def readout(config: DecoderConfig, activations: Activations | None = None) -> Readout:
    """A decoder's forward in float32, whose logits exist a chunk at a time."""
    return Readout(config, Forward(config, activations or Activations(), readout=False), min(_CHUNK, config.vocab))


@partial(jax.jit, static_argnums=(0, 1))
@full_float32
def kl_of(teacher: Readout, student: Readout, floats: Any, dense: Any, tokens: Array) -> Array:
    """The mean KL of tokens i32[b, t], nats."""
    return away(forward_kl, teacher(floats, tokens), student(dense, tokens), None, 1.0)
