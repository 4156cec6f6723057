"""Distill from a cached teacher: its top k probabilities are written once, then any number of students learn from them.

    qjax run configs/training/distill.toml

The teacher reads each batch of the run once and leaves, for every position, its k most probable tokens and the mass of
the rest (OUT/teacher). The student never sees the teacher again: a step costs what it costs without one. A student that
starts from another model, in float or through a format, is the same run with other keys.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.io.checkpoint import load, save
from qjax.terminal import bar
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.export import read_back
from qjax.training.decoder.finetune import finetune, heldout_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.program import Compute, program, start_state
from qjax.training.decoder.quantization import Grid
from qjax.training.losses.objectives import Losses
from qjax.training.losses.topk import read_top_k, rows, top_k, write_top_k
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.corpus import corpus_for, texts_of
from qjax.training.run.curve import thinned
from qjax.training.run.data import Batches
from qjax.training.run.devices import Data
from qjax.training.run.loop import Run

STUDENT = Arm("student", Grid("int2_g64_mid_mse", scales="learned"), Optimizer(3e-4), Losses("fkl"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Who teaches whom, and for how long."""

    teacher: str = "reference"  # Hugging Face directory, .gguf, llama2.c .bin or built-in name
    student: str = ""  # where the student starts; "": the teacher
    arm: Arm = STUDENT
    k: int = 64  # probabilities kept of each position
    text: Path | None = None  # UTF-8, to train on; none: the standard library
    heldout: Path | None = None  # UTF-8, to be judged by
    characters: int = 0  # of each text that are read; 0: all
    context: int = 256
    batch: int = 8
    steps: int = 200
    seed: int = 0
    log_every: int = 10
    eval_every: int = 50
    checkpoint_every: int = 50
    eval_windows: int = 64


def run(config: Config, out: Path) -> dict[str, Any]:
    """Cache the teacher, train, export under `out`; resumes when `out` holds a cache or checkpoints."""
    teacher = load(config.teacher)
    student = load(config.student) if config.student else teacher
    if student.config.vocab != teacher.config.vocab:
        raise UserError(
            f"teacher and student must share a vocabulary; {config.teacher} has {teacher.config.vocab} tokens, "
            f"{config.student} {student.config.vocab}"
        )
    if config.arm.grid.init:
        raise UserError("arm.grid.init: this experiment starts from float weights")
    texts = texts_of(config.text, config.heldout, config.characters)
    corpus = corpus_for(teacher, config.teacher, texts, out, config.context, config.eval_windows)
    windows = Batches(corpus.tokens, config.context, config.batch, config.seed)
    folder = out / "teacher"
    if not folder.is_dir():
        cache_teacher(config, teacher, windows, folder)
    cache = read_top_k(folder)
    held, wanted = cache["indices"].shape, (config.steps * config.batch, config.context, config.k)
    if held != wanted:
        raise UserError(
            f"{folder} holds {held[0]} sequences of {held[1]} tokens with {held[2]} probabilities each, and this "
            f"config wants {wanted[0]} of {wanted[1]} with {wanted[2]}; give another directory"
        )

    def batch_at(step: int) -> dict[str, Any]:
        numbers = step * config.batch + np.arange(config.batch)
        return {"tokens": windows.batch_at(step), "cached": rows(cache, numbers)}

    losses = {
        "teacher": heldout_loss(Forward(teacher.config), teacher.params, corpus.heldout),
        "student before": heldout_loss(Forward(student.config), student.params, corpus.heldout),
    }
    trained = program(config.arm, student.config, config.steps, compute=Compute(seed=config.seed))
    run = Run(
        out, config.steps, config.log_every, config.eval_every, config.checkpoint_every,
        identity={**windows.identity, "teacher": config.teacher, "student": config.student, "k": config.k},
    )  # fmt: skip
    state = start_state(trained, student.params)
    params, log, losses["student"], _ = finetune(trained, state, Data(batch_at, corpus.heldout), run)
    save(dataclasses.replace(student, params=params, tokenizer=teacher.tokenizer), out / "model")
    read_back(out / "model", losses["student"], corpus.heldout, config.arm.activations)
    for name, value in losses.items():
        print(f"{name}: {value:.4f} nats per token, held out")
    return {"losses": losses, "rows": thinned(log), "model": str(out / "model")}


def cache_teacher(config: Config, teacher: Any, windows: Batches, folder: Path) -> None:
    """Write the teacher's top k for the sequences of all steps, in their order."""
    apply = Forward(teacher.config)
    seen = jax.jit(lambda params, tokens: top_k(apply(params, tokens), config.k, config.arm.losses.temperature))
    with bar("teacher", total=config.steps) as show:

        def batches() -> Any:
            for step in range(config.steps):
                yield seen(teacher.dense, jnp.asarray(windows.batch_at(step)[:, :-1]))
                show(step + 1, config.steps, "")

        write_top_k(folder, batches(), config.steps * config.batch, teacher.config.vocab)
