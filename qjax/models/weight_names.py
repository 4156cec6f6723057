"""One weight, three names: its path in the flax tree, its Hugging Face tensor, its GGUF tensor.

flax kernel (in, out)  =  file (out, in)^T          GGUF value  =  Hugging Face value + offset
"""

from __future__ import annotations

import dataclasses

from qjax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class WeightName:
    """Where one weight lives.

    Attributes:
      path: its keys in the flax params tree.
      hf: its name in a Hugging Face checkpoint.
      gguf: its name in a GGUF file.
      shape: its shape in the flax tree.
      transposed: both files hold (out, in) where flax holds (in, out).
      rope_heads: the number of heads whose rows are permuted between Hugging Face and GGUF, or None. llama.cpp's arch
        `llama` rotates neighbouring pairs where Hugging Face rotates halves.
      offset: what GGUF stores minus what Hugging Face and flax store (Gemma's norm gains: 1).
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    transposed: bool = False
    rope_heads: int | None = None
    offset: float = 0.0


def weight_names(config: DecoderConfig) -> tuple[WeightName, ...]:
    """Every weight of a decoder, in the order of a forward pass; a tied head is not listed."""
    c = config
    q_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim
    permuted = c.family in ("llama", "mistral")
    names = [WeightName(("embed", "embedding"), "model.embed_tokens.weight", "token_embd.weight", (c.vocab, c.dim))]

    def norm(path: tuple[str, ...], hf: str, gguf: str, size: int) -> None:
        names.append(WeightName((*path, "scale"), f"{hf}.weight", f"{gguf}.weight", (size,), offset=c.norm_offset))

    def dense(path: tuple[str, ...], hf: str, gguf: str, shape: tuple[int, int], heads=None, bias=False) -> None:
        heads = heads if permuted else None
        names.append(WeightName((*path, "kernel"), f"{hf}.weight", f"{gguf}.weight", shape, True, heads))
        if bias:
            names.append(WeightName((*path, "bias"), f"{hf}.bias", f"{gguf}.bias", shape[1:], False, heads))

    for i in range(c.layers):
        layer, hf, gguf = f"layers_{i}", f"model.layers.{i}", f"blk.{i}"
        norm((layer, "attn_norm"), f"{hf}.input_layernorm", f"{gguf}.attn_norm", c.dim)
        attn, hf_attn = (layer, "attn"), f"{hf}.self_attn"
        dense((*attn, "q"), f"{hf_attn}.q_proj", f"{gguf}.attn_q", (c.dim, q_dim), c.heads, c.qkv_bias)
        dense((*attn, "k"), f"{hf_attn}.k_proj", f"{gguf}.attn_k", (c.dim, kv_dim), c.kv_heads, c.qkv_bias)
        dense((*attn, "v"), f"{hf_attn}.v_proj", f"{gguf}.attn_v", (c.dim, kv_dim), None, c.qkv_bias)
        if c.qk_norm:
            norm((*attn, "q_norm"), f"{hf_attn}.q_norm", f"{gguf}.attn_q_norm", c.head_dim)
            norm((*attn, "k_norm"), f"{hf_attn}.k_norm", f"{gguf}.attn_k_norm", c.head_dim)
        dense((*attn, "o"), f"{hf_attn}.o_proj", f"{gguf}.attn_output", (q_dim, c.dim))
        if c.post_norms:
            post = f"{hf}.post_attention_layernorm"
            norm((layer, "attn_post_norm"), post, f"{gguf}.post_attention_norm", c.dim)
            norm((layer, "mlp_norm"), f"{hf}.pre_feedforward_layernorm", f"{gguf}.ffn_norm", c.dim)
        else:  # Llama calls the norm in front of its MLP by what lies behind it
            norm((layer, "mlp_norm"), f"{hf}.post_attention_layernorm", f"{gguf}.ffn_norm", c.dim)
        mlp, hf_mlp = (layer, "mlp"), f"{hf}.mlp"
        dense((*mlp, "gate"), f"{hf_mlp}.gate_proj", f"{gguf}.ffn_gate", (c.dim, c.hidden))
        dense((*mlp, "up"), f"{hf_mlp}.up_proj", f"{gguf}.ffn_up", (c.dim, c.hidden))
        dense((*mlp, "down"), f"{hf_mlp}.down_proj", f"{gguf}.ffn_down", (c.hidden, c.dim))
        if c.post_norms:
            post = f"{hf}.post_feedforward_layernorm"
            norm((layer, "mlp_post_norm"), post, f"{gguf}.post_ffw_norm", c.dim)
    norm(("final_norm",), "model.norm", "output_norm", c.dim)
    if not c.tied:
        dense(("head",), "lm_head", "output", (c.dim, c.vocab))
    return tuple(names)
