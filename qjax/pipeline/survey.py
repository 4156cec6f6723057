"""One pass through the float model and back, before anything is rounded: how much the loss minds a token's error.

    L = -log p(y), y drawn from the model's own p          g = dL/d(output)          E[g g^T] = the curvature of KL

Backwards block by block from the stored inputs of every block, so only one block's weights are needed at a time.

    C = E[g g^T], g at the embedded token: an error e in a row of the embedding costs e C e^T
    head = E[(1 - sum_v p_v^2) x x^T]: the same for a row of the head, on the mean row; a tied row pays C + head
    sensitivity = |g|^2 at the output of a weight, token by token: how much each token should count in its H

Sources: Fisher information with labels sampled from the model, as in YAQA (arXiv:2505.22988); token weights:
GuidedQuant (arXiv:2505.07004) with one group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.compiled import full_float32
from qjax.lifting import Use, report, tap, tap_shapes, watch
from qjax.models.stages import Apply, Stages
from qjax.pipeline.activations import Activations, Writer
from qjax.pipeline.encode import check_finite
from qjax.typing import Array

Load = Callable[[str], Any]  # a name of the params tree ("embed", "layers_3", "final_norm", "head") -> its weights
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """What the float model said.

    Attributes:
      embedding: C, f32[dim, dim].
      head: f32[dim, dim], see the module's docstring.
      tokens: how many the two are means over.
      sensitivity: f32[groups of the block, windows, context] for every block, each group's mean 1.
      head_sensitivity: f32[windows, context].
    """

    embedding: np.ndarray
    head: np.ndarray
    tokens: int
    sensitivity: tuple[np.ndarray, ...]
    head_sensitivity: np.ndarray


def checked(load: Load) -> Load:
    """The same weights, each part looked through for NaN and Inf when it is first asked for: what is broken is named
    before it has spread into activations and gradients."""
    seen: set[str] = set()

    def look(name: str) -> Any:
        part = load(name)
        if name not in seen:
            check_finite(part, f"{name}/")
            seen.add(name)
        return part

    return look


def groups_of(apply: Apply, params: Any, x: Any) -> tuple[tuple[Use, ...], ...]:
    """The contractions of a piece in the order of execution, those with the same input together."""
    found: dict[int, list[Use]] = {}
    for use in report(apply, params, x):
        if use.kind == "dot":
            found.setdefault(use.source, []).append(use)
    return tuple(tuple(uses) for uses in found.values())


def survey(
    stages: Stages, load: Load, tokens: np.ndarray, steps: list[slice], counted: int, seed: int = 0,
    folder: Path | None = None, progress: Progress = lambda what: None,
) -> Survey:  # fmt: skip
    """Run the float model forwards and backwards over the calibration windows.

    Args:
      stages: its pieces.
      load: their weights, asked for one piece at a time.
      tokens: i32[windows, context].
      steps: batches of windows, none on both sides of `counted`.
      counted: the first so many windows make `embedding` and `head`; the rest are held out.
      seed: of the labels; a window's labels do not depend on the batch it is in.
      folder: where the inputs of all blocks are kept meanwhile; None: in memory.
      progress: told the name of each piece.
    """
    inputs, head_params = _forward(stages, load, tokens, steps, folder, progress)
    dim = inputs[0].array.shape[-1]
    gradient = np.empty((len(tokens), tokens.shape[1], dim), np.float32)
    head = np.zeros((dim, dim), np.float32)
    head_sensitivity = np.empty(tokens.shape, np.float32)
    progress("head, backwards")
    for at in steps:
        windows = jnp.arange(at.start, at.stop)
        g, gram, mass = _head_step(stages.head, head_params, jnp.asarray(inputs[-1].array[at]), windows, seed)
        gradient[at], head_sensitivity[at] = np.asarray(g), np.asarray(mass)
        if at.start < counted:
            head += np.asarray(gram)
    del head_params
    inputs[-1].drop()
    sensitivity: list[np.ndarray] = []
    for i in reversed(range(len(stages.blocks))):
        progress(f"layers_{i}, backwards")
        params, apply = load(f"layers_{i}"), stages.blocks[i]
        example = jax.ShapeDtypeStruct((1, tokens.shape[1], dim), jnp.float32)
        keys = tuple(tuple(use.key for use in group) for group in groups_of(apply, params, example))
        seen = np.empty((len(keys), *tokens.shape), np.float32)
        for at in steps:
            x, g = jnp.asarray(inputs[i].array[at]), jnp.asarray(gradient[at])
            back, sizes = _block_step(apply, keys, params, x, g)
            gradient[at], seen[:, at] = np.asarray(back), np.asarray(sizes)
        inputs[i].drop()
        sensitivity.append(seen / np.maximum(seen[:, :counted].mean(axis=(1, 2), keepdims=True), 1e-30))
    embed = load("embed")
    C = np.zeros((dim, dim), np.float32)
    for at in steps:
        if at.start < counted:
            C += np.asarray(
                _embed_step(stages.embed, {"embed": embed}, jnp.asarray(tokens[at]), jnp.asarray(gradient[at]))
            )
    count = counted * tokens.shape[1]
    mean = max(float(head_sensitivity[:counted].mean()), 1e-30)
    return Survey(C / count, head / count, count, tuple(reversed(sensitivity)), head_sensitivity / mean)


def _forward(
    stages: Stages, load: Load, tokens: np.ndarray, steps: list[slice], folder: Path | None, progress: Progress
) -> tuple[list[Activations], Any]:
    """The inputs of all blocks and of the head, and the head's weights."""
    embed = {"embed": load("embed")}
    dim = embed["embed"]["embedding"].shape[-1]
    shape = (*tokens.shape, dim)
    inputs = [run_piece(stages.embed, embed, tokens, shape, steps, folder, "float_0")]
    for i, apply in enumerate(stages.blocks):
        progress(f"layers_{i}, float")
        inputs.append(run_piece(apply, load(f"layers_{i}"), inputs[-1].array, shape, steps, folder, f"float_{i + 1}"))
    return inputs, head_weights(stages, load)


def head_weights(stages: Stages, load: Load) -> dict[str, Any]:
    """What `stages.head` needs."""
    name = "embed" if stages.tied else "head"
    return {"final_norm": load("final_norm"), name: load(name)}


def run_piece(
    apply: Apply, params: Any, x: np.ndarray, shape: tuple[int, ...], steps: list[slice], folder: Path | None, name: str
) -> Activations:
    """apply(params, x) of all windows, stored."""
    out = Writer(folder, name, shape)
    for at in steps:
        out.array[at] = np.asarray(_apply(apply, params, jnp.asarray(x[at])))
    return out.done()


@partial(jax.jit, static_argnums=0)
@full_float32
def _apply(apply: Apply, params: Any, x: Array) -> Array:
    return apply(params, x)


@partial(jax.jit, static_argnums=0)
@full_float32
def _head_step(apply: Apply, params: Any, x: Array, windows: Array, seed: Array | int) -> tuple[Array, Array, Array]:
    """dL/dx; sum (1 - sum p^2) n n^T with n the head's input; and 1 - sum p^2 token by token."""

    def loss(x: Array) -> tuple[Array, tuple[Array, Array]]:
        logits, inputs = watch(apply, lambda use, n: n if use.kind == "dot" else None)(params, x)
        keys = jax.vmap(lambda w: jax.random.fold_in(jax.random.key(seed), w))(windows)
        labels = jax.vmap(jax.random.categorical)(keys, lax.stop_gradient(logits))
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)
        (n,) = (v for v in inputs.values() if v is not None)
        return jnp.sum(nll), (n, 1.0 - jnp.sum(jnp.exp(2 * log_p), axis=-1))

    g, (n, mass) = jax.grad(loss, has_aux=True)(x)
    n = n.reshape(-1, n.shape[-1])
    gram = lax.dot_general(n * mass.reshape(-1, 1), n, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return g, gram, mass


@partial(jax.jit, static_argnums=(0, 1))
@full_float32
def _block_step(
    apply: Apply, keys: tuple[tuple[str, ...], ...], params: Any, x: Array, g: Array
) -> tuple[Array, Array]:
    """dL/dx, and |dL/dy|^2 of each group of weights, token by token: f32[groups, b, t]."""
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, x).items()}
    _, back = jax.vjp(lambda taps, x: tap(apply)(params, taps, x), taps, x)
    by_output, by_input = back(g)
    sizes = [sum(jnp.sum(jnp.square(by_output[k]), axis=-1) for k in group) for group in keys]
    return by_input, jnp.stack(sizes)


@partial(jax.jit, static_argnums=0)
@full_float32
def _embed_step(apply: Apply, params: Any, tokens: Array, g: Array) -> Array:
    """sum of c c^T, c the gradient at the looked-up row."""
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, tokens).items()}
    _, back = jax.vjp(lambda taps: tap(apply)(params, taps, tokens), taps)
    (c,) = (c.reshape(-1, c.shape[-1]) for c in back(g)[0].values())
    return lax.dot_general(c, c, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
