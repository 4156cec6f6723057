"""Train a model through its quantization and export it: the file holds, bit for bit, the weights that were trained.

    qjax run configs/training/qat.toml

The model starts as it is or, with `arm.grid.init`, at a recipe's result ("gptq", "best_gguf") in the same format. Its
loss may have a teacher: the model itself as it was, or another (`teacher`). The table compares the float model, the
rounded one it could have been (`arm.grid.init` or to nearest) and the trained one, which is read back from the file it
became.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from qjax.errors import UserError
from qjax.evaluate.histograms import middle_histograms
from qjax.formats import BlockFormat
from qjax.io.checkpoint import load_float, save
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.windows import calibration_of
from qjax.plan import decoder_weights
from qjax.processes import by_chief, chief_first
from qjax.tensor import is_qtensor
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.export import read_back
from qjax.training.decoder.finetune import finetune, heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.program import Compute, Teacher, program, start_state
from qjax.training.decoder.quantization import Grid
from qjax.training.losses.distill import teacher_confidence
from qjax.training.losses.objectives import Losses
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.corpus import corpus_for, texts_of
from qjax.training.run.curve import thinned
from qjax.training.run.data import Batches
from qjax.training.run.devices import ONE_DEVICE, Devices, data_on
from qjax.training.run.loop import Run, tensorboard

TWO_BITS = Arm("qat", Grid("int2_g64_mid_mse", scales="learned"), Optimizer(3e-4), Losses("0.5*ce + 0.5*fkl"))
SEVERAL_PROCESSES = True  # `qjax run --join`


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, how, for how long."""

    model: str = "reference"  # Hugging Face directory, .gguf, llama2.c .bin or built-in name
    arm: Arm = TWO_BITS
    teacher: str = ""  # a model; "": the model itself as it was
    text: Path | None = None  # UTF-8, to train on; none: the standard library
    heldout: Path | None = None  # UTF-8, to be judged by
    characters: int = 0  # of each text that are read; 0: all
    context: int = 256
    batch: int = 8
    accumulate: int = 1
    steps: int = 200
    seed: int = 0
    log_every: int = 10
    eval_every: int = 50
    checkpoint_every: int = 50
    eval_windows: int = 64
    calibration_windows: int = 64  # of arm.grid.init
    export: Literal["gguf", "hf"] = "hf"  # gguf: ggml formats keep their bytes; hf: floats of the same values
    mixed: bool = True  # bfloat16 operands and float32 sums; else float32
    tensorboard: bool = False  # write OUT/tensorboard as well
    devices: Devices = ONE_DEVICE


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train, log, checkpoint and export under `out`; resumes when `out` holds checkpoints."""
    if not config.arm.grid.format:
        raise UserError('arm.grid.format: name what the weights become, as in format = "Q4_0"')
    model = load_float(config.model)
    if config.export == "gguf":  # before any work
        for assigned in config.arm.grid.plan(model.config).assign(decoder_weights(model.config)):
            if assigned.format is not None and not isinstance(assigned.format, BlockFormat):
                raise UserError(f'{assigned.weight}: GGUF has no type {assigned.format.name}; export = "hf" has')
    teacher = load_float(config.teacher) if config.teacher else model
    with chief_first("corpus"):
        texts = texts_of(config.text, config.heldout, config.characters)
        corpus = corpus_for(model, config.model, texts, out, config.context, config.eval_windows)
    windows = Batches(corpus.tokens, config.context, config.batch, config.seed)
    data = data_on(windows, corpus.heldout, config.devices)
    judge = Forward(model.config, config.arm.activations)
    losses = {"float": heldout_loss(Forward(model.config), model.params, corpus.heldout)}
    calibration = calibration_of(
        model.config.context, corpus.tokens.values[: config.calibration_windows * config.context],
        context=config.context,
    )  # fmt: skip
    rounded = quantize_model(model, config.arm.grid.plan(model.config), config.arm.grid.init or "rtn", calibration)[0]
    losses[config.arm.grid.init or "rtn"] = heldout_loss(judge, rounded.params, corpus.heldout)
    confidence = None
    if "cakld" in config.arm.losses.names:
        first = (windows.batch_at(step) for step in range(4))
        confidence = teacher_confidence(teacher.logits, ((b[:, :-1], b[:, 1:]) for b in first))
    trained = program(
        config.arm, model.config, config.steps, teacher=Teacher(teacher.config, confidence),
        compute=Compute(config.mixed, config.accumulate, config.seed),
    )  # fmt: skip
    start = rounded.params if config.arm.grid.init else None
    state = start_state(trained, model.params, rounded=start, teacher=teacher.dense)
    run = Run(
        out, config.steps, config.log_every, config.eval_every, config.checkpoint_every,
        identity={**windows.identity, "model": config.model, "teacher": config.teacher},
        sinks=(tensorboard(out),) if config.tensorboard else (),
    )  # fmt: skip
    params, rows, loss, _ = finetune(trained, state, data, run)
    quantized = dataclasses.replace(model, params=params)
    path = out / ("model.gguf" if config.export == "gguf" else "model")
    by_chief("model", lambda: save(quantized, path))
    read_back(path, loss, corpus.heldout, config.arm.activations)
    losses["trained"] = loss
    table = Table("model", "nats per token, held out")
    for name, value in losses.items():
        table.add_row(name, f"{value:.4f}")
    Console(highlight=False).print(table)
    print(f"exported: {path}, {bits(quantized):.3f} bits per quantized weight")
    weights = middle_histograms(model.params, quantized.params)  # before and after training
    return {"losses": losses, "rows": thinned(rows), **weights, "model": str(path)}


def bits(model: Model) -> float:
    """Bits per weight over the quantized weights."""
    packed = [q for q in jax.tree.leaves(model.params, is_leaf=is_qtensor) if is_qtensor(q)]
    return 8 * sum(q.nbytes for q in packed) / sum(q.size for q in packed)
