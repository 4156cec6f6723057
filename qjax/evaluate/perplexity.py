"""Perplexity of a text, streamed through one compiled program, in the two protocols results are published in.

    PPL = exp( -1/N sum_i ln p(x_i | its window so far) )

* `llama.cpp`: windows of 512 tokens, each on its own, its first token replaced by BOS where the tokenizer adds one; the
  second half is scored: the logits at positions 256 .. 510 of 512 (llama.cpp, tools/perplexity).
* `gptq`: windows of 2048 tokens, no BOS, every position with a successor is scored (GPTQ, arXiv:2210.17323, and the
  papers that follow it).

Neither protocol overlaps its windows; a rest shorter than a window is dropped. Logits exist for a few thousand
positions at a time and only where they are scored; what is kept of a token is its few scalars.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block, Decoder
from qjax.models.model import Running
from qjax.typing import Array, Float, Int

Params = Any
Progress = Callable[[int, int], None]

PROTOCOLS = {"llama.cpp": 512, "gptq": 2048}  # and the context each is published with

MICRO_BATCH_TOKENS = 2048  # tokens in flight unless the caller gives a batch
HEAD_ELEMENTS = 1 << 23  # positions times vocabulary whose logits exist at once: 32 MiB in float32


@dataclasses.dataclass(frozen=True)
class Network:
    """A language model cut where the logits are made, so that they can be made for a few positions at a time.

    Attributes:
      trunk: (params, i32[b, t]) -> [b, t, d], anything the head reads.
      head: (params, [n, d]) -> logits [n, vocab].
    """

    trunk: Callable[[Params, Array], Array]
    head: Callable[[Params, Array], Array]


@lru_cache(maxsize=64)
def network_of_apply(apply: Callable[[Params, Array], Array]) -> Network:
    """Any function (params, tokens [b, t]) -> logits [b, t, vocab]. Its logits exist for a whole micro-batch."""
    return Network(apply, lambda params, logits: logits)


@lru_cache(maxsize=64)
def network_of_decoder(config: DecoderConfig) -> Network:
    """The decoder of a config in float32, cut behind its final norm. Equal configs give the same compiled program."""
    model = Decoder(config)

    def trunk(params, tokens):
        return Running(hidden)(params, tokens)

    def head(params, x):
        return Running(scores)(params, x)

    def hidden(params, tokens):
        with jax.default_matmul_precision("highest"):
            return Decoder(config, readout=False).apply({"params": params}, tokens)

    def scores(params, x):
        def replace(next_fun, args, kwargs, context):
            if isinstance(context.module, Block):
                return args[0], None
            return x[None] if context.module.path == ("final_norm",) else next_fun(*args, **kwargs)

        with jax.default_matmul_precision("highest"), nn.intercept_methods(replace):
            return model.apply({"params": params}, jnp.zeros((1, x.shape[0]), jnp.int32))[0]

    return Network(trunk, head)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A text cut into windows.

    Attributes:
      tokens: i32[windows, context], what the model reads.
      first: the first scored position; positions first .. context - 2 are scored.
      protocol: the name of the protocol that cut them.
    """

    tokens: np.ndarray
    first: int
    protocol: str

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    @property
    def scored(self) -> int:
        """Scored positions a window."""
        return self.context - 1 - self.first

    @property
    def targets(self) -> np.ndarray:
        """i32[windows, scored]: the token behind each scored position."""
        return self.tokens[:, self.first + 1 :]

    def __len__(self) -> int:
        return self.tokens.shape[0]


def cut_windows(
    tokens: Sequence[int] | np.ndarray,
    protocol: str = "llama.cpp",
    context: int | None = None,
    *,
    bos: int | None = None,
    limit: int | None = None,
) -> Windows:
    """Cut a token stream the way a protocol does.

    Args:
      tokens: the ids of the whole text.
      protocol: "llama.cpp" or "gptq".
      context: tokens a window; None: the protocol's own (512, 2048).
      bos: what replaces the first token of each window ("llama.cpp" only); None: nothing does.
      limit: keep only this many windows from the start.

    Raises:
      UserError: an unknown protocol, a window too short to score anything, a text too short for it.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; there are {' and '.join(PROTOCOLS)}")
    context = PROTOCOLS[protocol] if context is None else context
    if context < 4:
        raise UserError(f"a context of {context} tokens leaves nothing to score; it must be at least 4")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} windows leaves nothing to score; it must be at least 1")
    ids = np.asarray(tokens, np.int32).reshape(-1)
    need = 2 * context if protocol == "llama.cpp" else context
    if ids.size < need:
        raise UserError(
            f"the text has {ids.size} tokens; the {protocol} protocol with a context of {context} needs at least {need}"
        )
    cut = ids[: ids.size // context * context].reshape(-1, context)[:limit].copy()
    if protocol == "gptq":
        return Windows(cut, 0, protocol)
    if bos is not None:
        cut[:, 0] = bos
    return Windows(cut, context // 2, protocol)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text and how well it is known.

    `*_se` treats tokens as independent, as llama.cpp's +- does; `*_se_clustered` treats windows as independent,
    which is the honest one, since the tokens of a window share a topic (None where there is one window only).
    """

    protocol: str
    context: int
    windows: int
    tokens_scored: int
    nll: float  # mean, nats a token
    nll_se: float
    nll_se_clustered: float | None
    perplexity: float
    perplexity_se: float


def perplexity(
    network: Network | Callable[[Params, Array], Array],
    params: Params,
    windows: Windows,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens.

    Args:
      network: a Network, or a function (params, tokens [b, t]) -> logits [b, t, vocab].
      params: what the network reads; arrays, so that another tree of the same shapes reuses the compiled program.
      windows: from `cut_windows`.
      batch: windows a step; None: about 2048 tokens. It does not change the result.
      progress: called with (windows done, windows).

    Raises:
      UserError: logits that are NaN or infinite.
    """
    network = as_network(network)
    nll = np.empty((len(windows), windows.scored), np.float32)
    for rows, tokens in batches(windows, batch, progress):
        hidden = run_trunk(network, params, tokens, windows.first)
        nll[rows] = np.asarray(_token_nll(network, params, hidden, tokens[:, windows.first + 1 :]))[
            : rows.stop - rows.start
        ]
    return perplexity_of_tokens(nll, windows)


def perplexity_of_tokens(nll: np.ndarray, windows: Windows) -> Perplexity:
    """The statistics of per-token negative log-likelihoods f[windows, scored]."""
    if not np.isfinite(nll).all():
        at = int(np.argwhere(~np.isfinite(nll))[0, 0])
        raise UserError(f"the model's log-probabilities in window {at} are NaN or infinite; check its weights")
    mean, se, clustered = mean_and_errors(nll)
    ppl = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(windows.protocol, windows.context, len(windows), nll.size, mean, se, clustered, ppl, ppl * se)


def mean_and_errors(x: np.ndarray) -> tuple[float, float, float | None]:
    """Mean of x [windows, tokens]; its standard errors: over tokens, sqrt(var / (n - 1)), and over windows."""
    x = x.astype(np.float64)
    se = float(x.std() / math.sqrt(max(x.size - 1, 1)))
    clustered = None if len(x) < 2 else float(x.mean(axis=1).std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()), se, clustered


def as_network(network: Network | Callable[[Params, Array], Array]) -> Network:
    """A Network passes through; a function (params, tokens) -> logits becomes one."""
    return network if isinstance(network, Network) else network_of_apply(network)


def batches(
    windows: Windows, batch: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """(which windows, their tokens i32[batch, context]); the last batch is padded, so that one program serves all."""
    if batch is None:
        batch = max(1, MICRO_BATCH_TOKENS // windows.context)
    if batch < 1:
        raise UserError(f"a batch of {batch} windows; it must be at least 1")
    batch, total = min(batch, len(windows)), len(windows)
    for start in range(0, total, batch):
        tokens = windows.tokens[start : start + batch]
        yield slice(start, start + len(tokens)), np.pad(tokens, ((0, batch - len(tokens)), (0, 0)))
        if progress is not None:
            progress(start + len(tokens), total)


@partial(jax.jit, static_argnums=(0, 3))
def run_trunk(network: Network, params: Params, tokens: Int[Array, "b t"], first: int) -> Array:
    """What the head needs of the scored positions: [b, t - 1 - first, d]."""
    return network.trunk(params, tokens)[:, first:-1]


@partial(jax.jit, static_argnums=0)
def _token_nll(network: Network, params: Params, hidden: Array, targets: Int[Array, "b s"]) -> Array:
    def score(x, target):
        logits = network.head(params, x).astype(jnp.float32)
        return nll_of(logits, target)

    return over_positions(score, vocab_of(network, params, hidden), (hidden, targets))


def nll_of(logits: Float[Array, "n v"], target: Int[Array, "n"]) -> Float[Array, "n"]:
    """-ln softmax(logits)[target]."""
    chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def vocab_of(network: Network, params: Params, hidden: Array) -> int:
    """The vocabulary's size, from shapes alone."""
    one = jax.ShapeDtypeStruct((1, hidden.shape[-1]), hidden.dtype)
    return jax.eval_shape(network.head, params, one).shape[-1]


def over_positions(f: Callable, vocab: int, arrays: tuple[Array, ...]) -> Any:
    """f over the [b, s] positions of `arrays`, a bounded number of logits at a time. Returns f's outputs [b, s]."""
    b, s = arrays[0].shape[:2]
    chunk = min(b * s, max(1, HEAD_ELEMENTS // vocab))
    steps = -(-b * s // chunk)

    def split(x):
        flat = x.reshape(b * s, *x.shape[2:])
        flat = jnp.pad(flat, ((0, steps * chunk - b * s), *((0, 0),) * (flat.ndim - 1)))
        return flat.reshape(steps, chunk, *flat.shape[1:])

    out = lax.map(lambda xs: f(*xs), tuple(map(split, arrays)))
    return jax.tree.map(lambda y: y.reshape(steps * chunk)[: b * s].reshape(b, s), out)
