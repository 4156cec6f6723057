"""The file that a trained or rounded model becomes, and the proof that it is the model: its loss, to the last bit."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from qjax.formats import BlockFormat
from qjax.io.checkpoint import load, save
from qjax.models.model import Model
from qjax.tensor import is_qtensor
from qjax.training.decoder.finetune import heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.quantization import Activations
from qjax.typing import Int


def export(model: Model, folder: Path) -> Path:
    """Write a model into a folder; returns where.

    "model.gguf" where all formats are ggml's, whose bytes it keeps; else "model", a Hugging Face folder of the decoded
    values.
    """
    packed = [x for x in jax.tree.leaves(model.params, is_leaf=is_qtensor) if is_qtensor(x)]
    ggml = bool(packed) and all(isinstance(q.format, BlockFormat) for q in packed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("model.gguf" if ggml else "model")
    save(model, path)
    return path


def read_back(path: Path, loss: float, heldout: Int[np.ndarray, "n t"], activations: Activations | None = None) -> None:
    """Raise RuntimeError unless a file gives the loss that its model gave.

    Args:
      path: what `export` or `qjax.save` wrote.
      loss: from `finetune` or `heldout_loss`.
      heldout: the windows of that loss.
      activations: as in the `Arm`.
    """
    model = load(path)
    again = heldout_loss(Forward(model.config, activations or Activations()), model.params, heldout)
    if again != loss:
        raise RuntimeError(f"{path} gives {again} nats, the model that it was written from {loss}")


def exported_loss(model: Model, folder: Path, heldout: Int[np.ndarray, "n t"]) -> float:
    """The held-out loss of a rounded model, and of the file it is exported to.

    Weights that round their inputs are judged in memory alone: no file carries that.
    """
    loss = heldout_loss(Forward(model.config), model.params, heldout)
    leaves = jax.tree.leaves(model.params, is_leaf=is_qtensor)
    if not any(is_qtensor(leaf) and leaf.rounds_inputs for leaf in leaves):
        read_back(export(model, folder), loss, heldout)
    return loss
