"""Train a small Llama from scratch on the running Python's standard library.

    qjax run configs/pretrain_reference.toml

One pure train state, one jitted step: batch `s` is a function of (seed, s) alone, so a killed run continues from its
last checkpoint with the same batches and ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.io.checkpoint import save
from qjax.io.tokenizer_hf import read_tokenizer
from qjax.models import stdlib_text
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.training.precision import mixed_dot_general


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
    peak_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    log_every: int = 20
    eval_every: int = 250
    checkpoint_every: int = 250
    eval_windows: int = 64


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """GPT-2's byte-level BPE with its pre-tokenizer, which llama.cpp knows as `gpt-2`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents, each behind a BOS (id 0), as one int32 array."""
    ids = [np.array([0, *e.ids], np.int32) for e in tokenizer.encode_batch(texts)]
    return np.concatenate(ids)


def batch_at(tokens: np.ndarray, config: Config, step: int) -> np.ndarray:
    """The batch of one step: windows at random places, a function of (seed, step) alone. i32[batch, context + 1]."""
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(0, len(tokens) - config.context - 1, config.batch)
    return tokens[starts[:, None] + np.arange(config.context + 1)]


def mean_loss(model: Decoder, params, batch: jax.Array) -> jax.Array:
    """Mean negative log-likelihood per token, nats. batch: i32[b, t + 1]."""
    logits = model.apply({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW under warmup and cosine decay to zero; matrices decay, gains do not."""
    rate = optax.warmup_cosine_decay_schedule(0.0, config.peak_rate, config.warmup, config.steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=config.weight_decay,
                    mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )  # fmt: skip


def run(config: Config, out: Path) -> dict:
    """Train, log, checkpoint under `out`; resumes when `out` holds checkpoints. Returns the final numbers."""
    out.mkdir(parents=True, exist_ok=True)
    texts = stdlib_text.train_text()
    if (out / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts, config.vocab)
        tokenizer.save(str(out / "tokenizer.json"))
    tokens = token_stream(tokenizer, texts)
    heldout = token_stream(tokenizer, [stdlib_text.heldout_text()])
    width = config.context + 1
    windows = heldout[: min(config.eval_windows, len(heldout) // width) * width].reshape(-1, width)

    architecture = DecoderConfig(
        vocab=tokenizer.get_vocab_size(), dim=config.dim, hidden=config.hidden, layers=config.layers,
        heads=config.heads, kv_heads=config.kv_heads, head_dim=config.dim // config.heads,
        context=config.context, tied=True,
    )  # fmt: skip
    model = Decoder(architecture, dtype=jnp.bfloat16, dot_general=mixed_dot_general)
    optimizer = make_optimizer(config)

    def fresh_state():
        params = model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
        return {"params": params, "optimizer": optimizer.init(params), "step": jnp.int32(0)}

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        loss, grads = jax.value_and_grad(partial(mean_loss, model))(state["params"], batch)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state,
               "step": state["step"] + 1}  # fmt: skip
        return new, {"loss": loss, "grad_norm": optax.global_norm(grads)}

    eval_step = jax.jit(partial(mean_loss, model))

    def evaluate(params) -> float:
        losses = [eval_step(params, b) for b in np.array_split(windows, max(1, len(windows) // config.batch))]
        return float(np.mean([float(x) for x in losses]))

    state = jax.jit(fresh_state)()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=1)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as manager:
        first = 0
        if manager.latest_step() is not None:
            first = manager.latest_step()
            state = manager.restore(first, args=ocp.args.StandardRestore(state))
        count = sum(p.size for p in jax.tree.leaves(state["params"]))
        print(f"{count / 1e6:.2f} M parameters, {len(tokens) / 1e6:.2f} M training tokens, from step {first}")
        result: dict = {"parameters": count, "training_tokens": len(tokens)}
        progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with progress, (out / "metrics.jsonl").open("a") as log:
            task = progress.add_task("train", total=config.steps, completed=first)
            clock = time.perf_counter()
            for step in range(first, config.steps):
                state, metrics = train_step(state, batch_at(tokens, config, step))
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    row = {
                        "step": done,
                        "loss": float(metrics["loss"]),
                        "grad_norm": float(metrics["grad_norm"]),
                    }
                    if not np.isfinite(row["loss"]):
                        raise FloatingPointError(f"loss is {row['loss']} at step {done}; last checkpoint kept")
                    if done % config.eval_every == 0 or done == config.steps:
                        row["heldout_loss"] = result["heldout_loss"] = evaluate(state["params"])
                    row["seconds"] = round(time.perf_counter() - clock, 2)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    progress.update(task, completed=done, description=f"train loss {row['loss']:.3f}")
                if done % config.checkpoint_every == 0 or done == config.steps:
                    manager.save(done, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    params = jax.tree.map(np.asarray, state["params"])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    save(Model(architecture, params, read_tokenizer(out)), out / "model", dtype="bfloat16")
    return result | {"model": str(out / "model")}
