"""What a decoder is: one frozen, hashable record that covers the Llama family and its cousins."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a long-context checkpoint differ from `theta^(-2i/d)`.

    `kind="linear"` divides every frequency by `factor`; `kind="llama3"` divides the low ones, keeps the high ones
    and blends between (Llama 3.1 model card; `transformers.modeling_rope_utils`); `kind="table"` divides frequency i
    by `divisors[i]`, which is what a GGUF file stores of the second.
    """

    kind: Literal["linear", "llama3", "table"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()


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
    qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm over each head of q and k, before the rotation
    window: int | None = None  # Mistral, Gemma, Qwen: a token sees itself and the window-1 tokens before it
    global_layers: tuple[int, ...] = ()  # Gemma, Qwen: the layers that ignore `window`
    local_rope_theta: float | None = None  # Gemma 3: theta of the windowed layers, which are never rope-scaled
    activation: Literal["silu", "gelu_tanh"] = "silu"  # Gemma: gelu_tanh
    norm_offset: float = 0.0  # Gemma stores its norm gains minus one
    post_norms: bool = False  # Gemma 2/3: a second norm behind attention and MLP
    embed_scale: bool = False  # Gemma: embeddings times sqrt(dim)
    query_dim: float | None = None  # Gemma: attention scores over sqrt(query_dim); None: head_dim
    attn_softcap: float | None = None  # Gemma 2: s -> cap tanh(s / cap)
    logit_softcap: float | None = None  # Gemma 2

    def layer_window(self, layer: int) -> int | None:
        """The attention window of one layer, or None where it sees everything."""
        return None if layer in self.global_layers else self.window

    def layer_theta(self, layer: int) -> tuple[float, RopeScaling | None]:
        """The rotary base of one layer and its scaling."""
        if self.local_rope_theta is not None and self.layer_window(layer) is not None:
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling
