"""Train a small Llama from scratch, on the running Python's standard library or a text of your own.

    qjax run configs/pretrain_reference.toml

One pure state, one jitted step; the batch of a step is a function of (seed, step) alone, so a killed run continues from
its last checkpoint with the same batches and ends with the same bits. OUT/model is the model in Hugging Face's layout.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from qjax.io.checkpoint import save
from qjax.io.tokenizer_hf import read_tokenizer
from qjax.processes import by_chief, chief_first
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.finetune import finetune
from qjax.training.decoder.fresh import fresh_model
from qjax.training.decoder.program import Compute, program, start_state
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.corpus import corpus_in, texts_of, tokenizer_in
from qjax.training.run.curve import curve
from qjax.training.run.data import Batches
from qjax.training.run.devices import ONE_DEVICE, Devices, data_on
from qjax.training.run.loop import Run, tensorboard

SEVERAL_PROCESSES = True  # `qjax run --join`


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, for how long."""

    vocab: int = 4096  # byte-level BPE, trained on the same text
    dim: int = 256
    hidden: int = 768
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    steps: int = 3000
    batch: int = 8  # sequences of `context` tokens
    accumulate: int = 1  # parts a batch is cut into, one after the other
    peak_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    log_every: int = 20
    eval_every: int = 240
    checkpoint_every: int = 240
    eval_windows: int = 64
    text: Path | None = None  # UTF-8, to train on; none: the standard library
    heldout: Path | None = None  # UTF-8, to be judged by
    characters: int = 0  # of each text that are read; 0: all
    mixed: bool = True  # bfloat16 operands and float32 sums; else float32
    tensorboard: bool = False  # write OUT/tensorboard as well
    devices: Devices = ONE_DEVICE


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train, log, checkpoint under `out`; resumes when `out` holds checkpoints. Returns the final numbers."""
    texts, heldout = texts_of(config.text, config.heldout, config.characters)
    with chief_first("corpus"):
        tokenizer = tokenizer_in(out, texts, config.vocab)
        corpus = corpus_in(out, tokenizer, texts, heldout, config.context, config.eval_windows)
    model = fresh_model(config, tokenizer.get_vocab_size(), config.seed)
    count = sum(p.size for p in jax.tree.leaves(model.params))
    print(f"{count / 1e6:.2f} M parameters, {len(corpus.tokens.values) / 1e6:.2f} M training tokens")
    windows = Batches(corpus.tokens, config.context, config.batch, config.seed)
    rise = config.warmup / config.steps
    arm = Arm("pretrain", optimizer=Optimizer(config.peak_rate, weight_decay=config.weight_decay, warmup=rise))
    compute = Compute(config.mixed, config.accumulate, config.seed)
    trained = program(arm, model.config, config.steps, compute=compute)
    run = Run(
        out, config.steps, config.log_every, config.eval_every, config.checkpoint_every, identity=windows.identity,
        sinks=(tensorboard(out),) if config.tensorboard else (),
    )  # fmt: skip
    data = data_on(windows, corpus.heldout, config.devices)
    params, rows, loss, _ = finetune(trained, start_state(trained, model.params), data, run)
    model = dataclasses.replace(model, params=params, tokenizer=read_tokenizer(out))
    by_chief("model", lambda: save(model, out / "model", dtype="bfloat16"))
    return {
        "parameters": count, "training_tokens": len(corpus.tokens.values), "loss": rows[-1]["loss"],
        "heldout_loss": loss, "model": str(out / "model"), "curve": curve({"pretrain": [rows]}),
    }  # fmt: skip
