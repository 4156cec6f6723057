"""What a decoder is: one frozen, hashable record that covers the Llama family and its cousins."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a long-context checkpoint differ from `theta^(-2i/d)`.

    `kind="linear"` divides every frequency by `factor`; `kind="llama3"` divides the low ones, keeps the high ones
    and blends between (Llama 3.1 model card; `transformers.modeling_rope_utils`); `kind="table"` divides frequency i
    by `divisors[i]`, which is what a GGUF file stores of the second. `kind="yarn"` keeps those that turn more than
    `beta_fast` times within `original_max_position`, divides those that turn less than `beta_slow` times and blends
    between (arXiv:2309.00071), from a whole frequency to a whole one where `truncate`; `kind="longrope"` divides by
    `divisors` where the text is longer than `original_max_position`, else by `short_divisors` (arXiv:2402.13753). These
    two make what is rotated longer by `attention_factor`. `kind="proportional"` divides the first `part` of them and
    does without the rest (Gemma 4): the halves of a head stay whole, a part of either does not turn.
    """

    kind: Literal["linear", "llama3", "table", "yarn", "longrope", "proportional"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()
    short_divisors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True  # gpt-oss: not
    mscale: float = 0.0  # DeepSeek: scores times (1 + 0.1 mscale ln factor)^2
    part: float = 1.0


@dataclasses.dataclass(frozen=True)
class LinearAttention:
    """The gated delta rule (linear_attention.py) that some layers have in place of softmax attention.

    Attributes:
      layers: those that have it.
      key_heads, key_dim: of queries and keys, and the size of each.
      value_heads, value_dim: of values; a multiple of key_heads.
      width: tokens that the convolution sees.
      tiled: value head j has key head j mod key_heads (Qwen3.5 in llama.cpp's order), else the value heads of a key
        head are neighbours, and alpha and beta one matrix, key head by key head (Qwen3-Next).
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int = 4
    tiled: bool = False

    @property
    def keys(self) -> int:
        """Numbers of all keys of a token."""
        return self.key_heads * self.key_dim

    @property
    def channels(self) -> int:
        """Numbers that the convolution goes over: queries, keys and values."""
        return 2 * self.keys + self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer: RMSNorm, rotary attention with grouped queries, gated MLP.

    The defaults are Llama's. The fields below the line are what its cousins change (the right-hand side names
    them); `qjax.models.families` maps a Hugging Face or GGUF config onto this record.
    """

    vocab: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    # --- cousins -------------------------------------------------------------------------------
    family: str = "llama"  # the Hugging Face model_type this record was read from
    qkv_bias: bool = False  # Qwen2
    o_bias: bool = False  # gpt-oss: of attention's output
    sinks: bool = False  # gpt-oss: a logit a head beside the scores, for what attends to nothing
    qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm over each head of q and k, before the rotation
    window: int | None = None  # Mistral, Gemma, Qwen: a token sees itself and the window-1 tokens before it
    global_layers: tuple[int, ...] = ()  # Gemma, Qwen: the layers that ignore `window`
    local_rope_theta: float | None = None  # Gemma 3: theta of the windowed layers, which are never rope-scaled
    activation: Literal["silu", "gelu_tanh", "clamped_swiglu"] = "silu"  # Gemma: gelu_tanh; gpt-oss: the last
    norm_offset: float = 0.0  # Gemma stores its norm gains minus one
    post_norms: bool = False  # Gemma 2/3: a second norm behind attention and MLP
    embed_scale: bool = False  # Gemma: embeddings times sqrt(dim)
    query_dim: float | None = None  # Gemma: attention scores over sqrt(query_dim); None: head_dim
    attn_softcap: float | None = None  # Gemma 2: s -> cap tanh(s / cap)
    logit_softcap: float | None = None  # Gemma 2
    pre_norms: bool = True  # OLMo 2/3 have none, only those behind attention and MLP
    qk_norm_whole: bool = False  # OLMo 2/3: the norm of q and k is one over all heads
    nope_layers: tuple[int, ...] = ()  # SmolLM3, Llama 4: layers that rotate nothing
    chunk: int | None = None  # Llama 4: in layers that rotate a token sees those before it in its chunk of so many
    qk_unit: bool = False  # Llama 4: in layers that rotate q and k are divided by their rms, behind the rotation
    growth: float = 0.0  # Llama 4: in layers that do not q grows by 1 + growth ln(1 + floor(i / growth_every)),
    growth_every: int = 8192  # i the number of tokens up to q's own
    rotary_dim: int | None = None  # Phi-4, GLM-4: only the first so many numbers of a head are rotated; None: all
    rope_pairs: bool = False  # GLM-4: neighbours are rotated with each other, not the halves of a head
    fused_qkv: bool = False  # Phi-3: q, k and v are one weight
    fused_mlp: bool = False  # Phi-3, GLM-4: gate and up are one weight
    embed_multiplier: float = 1.0  # Granite
    residual_multiplier: float = 1.0  # Granite: of what attention and MLP add
    attn_multiplier: float | None = None  # Granite: of attention scores, in place of 1 / sqrt(head_dim)
    logit_divisor: float = 1.0  # Granite
    experts: int = 0  # Mixtral, Qwen-MoE: experts a layer; 0: an MLP
    experts_used: int = 0  # of them, those that a token goes to
    experts_beside: bool = False  # Gemma 4: beside the one that sees every token, each behind a norm of its own
    expert_hidden: int = 0  # width of each
    expert_norm: bool = True  # their shares are divided by their sum
    dense_layers: tuple[int, ...] = ()  # the layers that have an MLP all the same
    shared_hidden: int = 0  # Qwen2-MoE: width of one more expert, which sees every token; 0: there is none
    shared_gate: bool = False  # Qwen2-MoE: a sigmoid of the token decides how much of it
    router: Literal["softmax", "sigmoid"] = "softmax"  # DeepSeek-V3: sigmoid
    router_bias: bool = False  # DeepSeek-V3: added where experts are chosen, and not to their shares
    expert_bias: bool = False  # gpt-oss: experts and router have biases
    expert_inputs: bool = False  # Llama 4: shares multiply what experts read, not what they make of it
    expert_scale: float = 1.0  # DeepSeek: shares times this
    expert_groups: int = 0  # DeepSeek: experts are chosen among those of the best groups only; 0: among all
    expert_groups_used: int = 0  # how many groups these are
    expert_group_best: int = 1  # a group is as good as the sum of so many of its best experts
    kv_rank: int = 0  # DeepSeek: keys and values come out of so many numbers a token; 0: of the token itself
    query_rank: int = 0  # DeepSeek: and queries; 0: of the token itself
    value_dim: int = 0  # DeepSeek: numbers of a head's values; 0: head_dim
    global_head_dim: int = 0  # Gemma 4: head_dim of the layers without window; 0: as of all
    global_kv_heads: int = 0  # Gemma 4: kv_heads of the layers without window; 0: as of all
    k_eq_v: bool = False  # Gemma 4: values of the layers without window are their keys, in front of norm and rotation
    v_norm: bool = False  # Gemma 4: each head's values are divided by their rms
    out_scale: bool = False  # Gemma 4: what leaves a layer is multiplied with one learned number
    linear: LinearAttention | None = None  # Qwen3.5: the layers whose attention is linear, and what it is
    attn_gate: bool = False  # Qwen3.5: a second half of each of q's heads decides how much of attention is let through
    rope_sections: tuple[int, ...] = ()  # Qwen3.5: of an image's positions; a text has no use for them

    def of_layer(self, layer: int) -> DecoderConfig:
        """The decoder as one layer has it: `head_dim`, `kv_heads` and `k_eq_v` are that layer's."""
        if self.layer_window(layer) is not None:
            return dataclasses.replace(self, k_eq_v=False) if self.k_eq_v else self
        head_dim, kv_heads = self.global_head_dim or self.head_dim, self.global_kv_heads or self.kv_heads
        if (head_dim, kv_heads) == (self.head_dim, self.kv_heads):
            return self
        return dataclasses.replace(self, head_dim=head_dim, kv_heads=kv_heads)

    def is_linear(self, layer: int) -> bool:
        """Whether a layer's attention is linear."""
        return self.linear is not None and layer in self.linear.layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of an MLP."""
        return self.experts > 0 and layer not in self.dense_layers

    def layer_window(self, layer: int) -> int | None:
        """The attention window of one layer, or None where it sees everything."""
        return None if layer in self.global_layers else self.window

    def layer_chunk(self, layer: int) -> int | None:
        """The chunk of one layer, or None where it sees everything."""
        return None if layer in self.nope_layers else self.chunk

    def layer_theta(self, layer: int) -> tuple[float, RopeScaling | None] | None:
        """The rotary base of one layer and its scaling, or None where nothing is rotated."""
        if layer in self.nope_layers:
            return None
        if self.local_rope_theta is not None and self.layer_window(layer) is not None:
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling

    @property
    def rotated(self) -> int:
        """How many numbers of each head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def value_size(self) -> int:
        """How many numbers each head's values have."""
        return self.value_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied with."""
        if self.attn_multiplier is not None:
            return self.attn_multiplier
        s = self.rope_scaling
        grown = 1.0 if s is None or s.factor <= 1 else 1.0 + 0.1 * s.mscale * math.log(s.factor)
        return (self.head_dim if self.query_dim is None else self.query_dim) ** -0.5 * grown**2
