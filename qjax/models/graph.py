"""The decoder's declared graph: every place where a channel scaling fits between a producer and its consumers.

    y = W x = (W diag(d)) (x / d)             d > 0, one number a channel of x

The left factor is the consumers' weight and the right one the producer's, so that both are plain weights again and
nothing is computed at run time. It is exact where only a linear map lies between the two: behind a norm's gain, between
the two halves of an MLP that meet in a product, and between values and the attention's output, which mixes positions
but not channels (SmoothQuant, arXiv:2211.10438, section 4; AWQ, arXiv:2306.00978, section 3.2).

The map below is all there is: one rule an edge, with what a config must be to have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qjax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Edge:
    """Channels that one weight produces and others contract.

    Attributes:
      name: "layers_0/mlp: up -> down".
      source: path of the weight whose output channels they are: a norm's gain [channels] or a kernel [in, channels].
      sinks: paths of the kernels [channels, out] that contract them; nothing else reads them.
      channels: how many.
      bias: path of the source's bias [channels], or None.
      offset: the source is stored minus this (Gemma's gains: 1).
    """

    name: str
    source: str
    sinks: tuple[str, ...]
    channels: int
    bias: str | None = None
    offset: float = 0.0

    @property
    def is_norm(self) -> bool:
        """Whether the source is a norm's gain, which may be folded into the sinks altogether."""
        return self.source.endswith("/scale")

    @property
    def is_residual(self) -> bool:
        """Whether the sinks read the residual stream, behind a norm."""
        return self.is_norm and "/attn/" not in self.source


def _untied(c: DecoderConfig, _: int) -> bool:
    """A tied head is the embedding, and its channels are the residual stream's: it is no sink."""
    return not c.tied


def _ranked(c: DecoderConfig, _: int) -> bool:
    return c.kv_rank > 0


def _beside(c: DecoderConfig, layer: int) -> bool:
    return c.experts_beside and c.has_experts(layer)


def _softmax(c: DecoderConfig, layer: int) -> bool:
    return not c.is_linear(layer)


def _ranked_queries(c: DecoderConfig, _: int) -> bool:
    return c.kv_rank > 0 and c.query_rank > 0


def _heads_of_their_own(c: DecoderConfig, layer: int) -> bool:
    """Where query heads share a key/value head (GQA), one channel of v feeds several of o; a norm of values mixes."""
    return c.kv_heads == c.heads and not c.fused_qkv and not c.kv_rank and not c.v_norm and _softmax(c, layer)


def _is_there(c: DecoderConfig, sink: str) -> bool:
    """Whether a sink that not every family has is one of this config."""
    if sink == "attn/v/kernel":
        return not c.k_eq_v
    if c.linear and sink.startswith(("linear_attn/alpha", "linear_attn/beta", "linear_attn/ba/")):
        return c.linear.tiled != sink.startswith("linear_attn/ba/")
    if sink.startswith("mlp/shared/"):
        return bool(c.shared_hidden)
    if c.kv_rank and sink in ("attn/q/kernel", "attn/q_a/kernel"):
        return (sink == "attn/q_a/kernel") == (c.query_rank > 0)
    return c.shared_gate if sink.startswith("mlp/shared_gate") else True


@dataclasses.dataclass(frozen=True)
class _Rule:
    """One kind of edge: paths below the layer, its channels, and whether a layer of a config has it."""

    label: str
    source: str
    sinks: tuple[str, ...]
    channels: Callable[[DecoderConfig], int]
    stands: Callable[[DecoderConfig, int], bool] = lambda c, layer: True

    def edge(self, c: DecoderConfig, at: str) -> Edge:
        bias = f"{at}attn/v/bias" if c.qkv_bias and self.source == "attn/v/kernel" else None
        offset = c.norm_offset if self.source.endswith("/scale") else 0.0
        sinks = tuple(at + s for s in self.sinks if _is_there(c, s))
        return Edge(f"{at}{self.label}", at + self.source, sinks, self.channels(c), bias, offset)


_LAYER = (
    _Rule(
        "attn_norm -> q, k, v",
        "attn_norm/scale",
        ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"),
        lambda c: c.dim,
        lambda c, layer: c.pre_norms and not c.fused_qkv and not c.kv_rank and _softmax(c, layer),
    ),
    _Rule(
        "attn_norm -> qkv, gate, alpha, beta",
        "attn_norm/scale",
        tuple(f"linear_attn/{name}/kernel" for name in ("qkv", "gate", "alpha", "beta", "ba")),
        lambda c: c.dim,
        lambda c, layer: c.pre_norms and c.is_linear(layer),
    ),
    _Rule(
        "attn_norm -> qkv",
        "attn_norm/scale",
        ("attn/qkv/kernel",),
        lambda c: c.dim,
        lambda c, _: c.pre_norms and c.fused_qkv,
    ),
    _Rule(
        "attn_norm -> q, kv_a",
        "attn_norm/scale",
        ("attn/q/kernel", "attn/q_a/kernel", "attn/kv_a/kernel"),
        lambda c: c.dim,
        lambda c, _: c.kv_rank > 0,
    ),
    _Rule("q_a_norm -> q_b", "attn/q_a_norm/scale", ("attn/q_b/kernel",), lambda c: c.query_rank, _ranked_queries),
    _Rule("kv_a_norm -> kv_b", "attn/kv_a_norm/scale", ("attn/kv_b/kernel",), lambda c: c.kv_rank, _ranked),
    _Rule("v -> o", "attn/v/kernel", ("attn/o/kernel",), lambda c: c.heads * c.head_dim, _heads_of_their_own),
    _Rule(
        "mlp_norm -> gate, up",
        "mlp_norm/scale",
        ("mlp/gate/kernel", "mlp/up/kernel"),
        lambda c: c.dim,
        lambda c, layer: c.pre_norms and not c.fused_mlp and not c.has_experts(layer),
    ),
    _Rule(
        "mlp_norm -> gate_up",
        "mlp_norm/scale",
        ("mlp/gate_up/kernel",),
        lambda c: c.dim,
        lambda c, layer: c.pre_norms and c.fused_mlp and not c.has_experts(layer),
    ),
    _Rule(
        "mlp_norm -> router, experts",
        "mlp_norm/scale",
        (
            "mlp/router/kernel",  # the first: it sees every token
            *("mlp/experts/gate/kernel", "mlp/experts/up/kernel"),
            *("mlp/shared_gate/kernel", "mlp/shared/gate/kernel", "mlp/shared/up/kernel"),
        ),
        lambda c: c.dim,
        lambda c, layer: c.pre_norms and c.has_experts(layer) and not c.experts_beside,
    ),
    _Rule("router_norm -> router", "mlp/router_norm/scale", ("mlp/router/kernel",), lambda c: c.dim, _beside),
    _Rule(
        "experts_norm -> experts",
        "mlp/experts_norm/scale",
        ("mlp/experts/gate/kernel", "mlp/experts/up/kernel"),
        lambda c: c.dim,
        _beside,
    ),
    _Rule(
        "shared_norm -> shared gate, up",
        "mlp/shared_norm/scale",
        ("mlp/shared/gate/kernel", "mlp/shared/up/kernel"),
        lambda c: c.dim,
        _beside,
    ),
    # The other factor of down's input, act(gate), is no linear function of gate. A part of a fused weight is no source,
    # and a stack of experts none of one row of channels.
    _Rule(
        "up -> down",
        "mlp/up/kernel",
        ("mlp/down/kernel",),
        lambda c: c.hidden,
        lambda c, layer: not c.fused_mlp and not c.has_experts(layer),
    ),
    _Rule(
        "shared up -> down",
        "mlp/shared/up/kernel",
        ("mlp/shared/down/kernel",),
        lambda c: c.shared_hidden,
        lambda c, layer: c.has_experts(layer) and c.shared_hidden > 0,
    ),
)
_MODEL = (_Rule("final_norm -> head", "final_norm/scale", ("head/kernel",), lambda c: c.dim, _untied),)


def _placed(config: DecoderConfig) -> list[tuple[_Rule, DecoderConfig, str]]:
    """The rules that stand, with their layer's config and the prefix of their paths, in the order of a forward pass."""
    layers = [(i, config.of_layer(i)) for i in range(config.layers)]
    found = [(rule, c, f"layers_{i}/") for i, c in layers for rule in _LAYER if rule.stands(c, i)]
    return found + [(rule, config, "") for rule in _MODEL if rule.stands(config, -1)]


def edges(config: DecoderConfig) -> tuple[Edge, ...]:
    """Every edge of a decoder, in the order of a forward pass."""
    return tuple(rule.edge(c, at) for rule, c, at in _placed(config))
