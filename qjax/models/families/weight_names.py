"""One weight, three names: its path in the flax tree, its Hugging Face tensor, its GGUF tensor.

flax kernel (in, out)  =  file (out, in)^T          GGUF value  =  Hugging Face value + offset, or -exp of it

Kernels of experts are stacks (experts, in, out), in a GGUF file too; a Hugging Face checkpoint has a tensor for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qjax.models.config import DecoderConfig, LinearAttention
from qjax.models.families.table import family_of

# Part of a layer -> (its name in Hugging Face's Llama, its name in GGUF files). Llama calls the norm in front of
# its MLP by what lies behind it.
_LAYER: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "attn_norm": ("input_layernorm", "attn_norm"),
        "attn/q": ("self_attn.q_proj", "attn_q"),
        "attn/k": ("self_attn.k_proj", "attn_k"),
        "attn/v": ("self_attn.v_proj", "attn_v"),
        "attn/qkv": ("self_attn.qkv_proj", "attn_qkv"),
        "attn/q_a": ("self_attn.q_a_proj", "attn_q_a"),
        "attn/q_a_norm": ("self_attn.q_a_layernorm", "attn_q_a_norm"),
        "attn/q_b": ("self_attn.q_b_proj", "attn_q_b"),
        "attn/kv_a": ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        "attn/kv_a_norm": ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
        "attn/kv_b": ("self_attn.kv_b_proj", "attn_kv_b"),
        "attn/q_norm": ("self_attn.q_norm", "attn_q_norm"),
        "attn/k_norm": ("self_attn.k_norm", "attn_k_norm"),
        "attn/sinks": ("self_attn.sinks", "attn_sinks.weight"),
        "attn/o": ("self_attn.o_proj", "attn_output"),
        "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
        "linear_attn/qkv": ("linear_attn.in_proj_qkv", "attn_qkv"),
        "linear_attn/gate": ("linear_attn.in_proj_z", "attn_gate"),
        "linear_attn/alpha": ("linear_attn.in_proj_a", "ssm_alpha"),
        "linear_attn/beta": ("linear_attn.in_proj_b", "ssm_beta"),
        "linear_attn/ba": ("linear_attn.in_proj_ba", "ssm_ba"),
        "linear_attn/conv": ("linear_attn.conv1d.weight", "ssm_conv1d.weight"),
        "linear_attn/A_log": ("linear_attn.A_log", "ssm_a"),
        "linear_attn/dt_bias": ("linear_attn.dt_bias", "ssm_dt.bias"),
        "linear_attn/norm": ("linear_attn.norm", "ssm_norm"),
        "linear_attn/o": ("linear_attn.out_proj", "ssm_out"),
        "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
        "mlp/gate": ("mlp.gate_proj", "ffn_gate"),
        "mlp/up": ("mlp.up_proj", "ffn_up"),
        "mlp/gate_up": ("mlp.gate_up_proj", "ffn_up"),
        "mlp/down": ("mlp.down_proj", "ffn_down"),
        "mlp/router_norm": ("router.scale", "ffn_gate_inp.scale"),
        "mlp/expert_scale": ("router.per_expert_scale", "ffn_down_exps.scale"),
        "mlp/experts_norm": ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
        "mlp/experts_post_norm": ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
        "mlp/shared_norm": ("pre_feedforward_layernorm", "ffn_norm"),
        "mlp/shared_post_norm": ("post_feedforward_layernorm_1", "post_ffw_norm_1"),
        "mlp/router": ("mlp.gate", "ffn_gate_inp"),
        "mlp/experts/gate": ("mlp.experts.*.gate_proj", "ffn_gate_exps"),
        "mlp/experts/up": ("mlp.experts.*.up_proj", "ffn_up_exps"),
        "mlp/experts/down": ("mlp.experts.*.down_proj", "ffn_down_exps"),
        "mlp/shared_gate": ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
        "mlp/shared/gate": ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
        "mlp/shared/up": ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
        "mlp/shared/down": ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
        "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
        "out_scale": ("layer_scalar", "layer_output_scale.weight"),
    }
)


_FLOATS = ("ffn_gate_inp.weight", "ssm_conv1d.weight", ".bias")


@dataclasses.dataclass(frozen=True)
class WeightName:
    """Where one weight lives.

    Attributes:
      path: its keys in the flax params tree.
      hf: its name in a Hugging Face checkpoint; of a stack, with * for the number of the expert.
      gguf: its name in a GGUF file.
      shape: its shape in the flax tree.
      transposed: both files hold (out, in) where flax holds (in, out); of a stack, each of its matrices.
      rope_heads: the number of heads whose rows are permuted between Hugging Face and GGUF, or None (`Family.pairs`).
      offset: what GGUF stores minus what Hugging Face and flax store (Gemma's norm gains: 1).
      decay: GGUF stores -exp of it (A_log of linear attention).
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    transposed: bool = False
    rope_heads: int | None = None
    offset: float = 0.0
    decay: bool = False

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Its shape in a file: (out, in) for kernels."""
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape

    @property
    def stays_float(self) -> bool:
        """Whether GGUF files hold it in F32 whatever the others' type: vectors, routers of experts, their biases,
        convolutions."""
        return all(n == 1 for n in self.file_shape[:-1]) or self.gguf.endswith(_FLOATS)

    def turned(self, array: Any) -> Any:
        """The same between flax's order of axes and the files', either way."""
        return array.swapaxes(-1, -2) if self.transposed else array

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The tensors of a Hugging Face checkpoint that it is made of: one, or those of a stack."""
        return tuple(self.hf.replace("*", str(i)) for i in range(self.shape[0])) if "*" in self.hf else (self.hf,)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each of them."""
        return self.file_shape[1:] if "*" in self.hf else self.file_shape


def weight_names(config: DecoderConfig) -> tuple[WeightName, ...]:
    """Every weight of a decoder, in the order of a forward pass; a tied head is not listed."""
    c, family = config, family_of(config)
    names = [WeightName(("embed", "embedding"), "model.embed_tokens.weight", "token_embd.weight", (c.vocab, c.dim))]

    def norm(path: tuple[str, ...], hf: str, gguf: str, size: int) -> None:
        names.append(WeightName((*path, "scale"), f"{hf}.weight", f"{gguf}.weight", (size,), offset=c.norm_offset))

    def dense(path: tuple[str, ...], hf: str, gguf: str, shape: tuple[int, ...], heads=None, bias=False) -> None:
        heads = heads if family.pairs else None
        names.append(WeightName((*path, "kernel"), f"{hf}.weight", f"{gguf}.weight", shape, True, heads))
        if bias:
            at = (*shape[:-2], shape[-1])
            names.append(WeightName((*path, "bias"), f"{hf}.bias", f"{gguf}.bias", at, False, heads))

    def at(layer: int, part: str) -> tuple[tuple[str, ...], str, str]:
        hf, gguf = _LAYER[part]
        hf, gguf = family.hf_names.get(part, hf), family.gguf_names.get(part, gguf)
        return (f"layers_{layer}", *part.split("/")), f"model.layers.{layer}.{hf}", f"blk.{layer}.{gguf}"

    def bare(layer: int, part: str, *shape: int, decay: bool = False) -> None:
        path, hf, gguf = at(layer, part)
        names.append(WeightName(path, hf, gguf, shape, decay=decay))

    def linear(layer: int, rule: LinearAttention) -> None:
        values = rule.value_heads * rule.value_dim
        dense(*at(layer, "linear_attn/qkv"), (c.dim, rule.channels))
        dense(*at(layer, "linear_attn/gate"), (c.dim, values))
        if rule.tiled:
            dense(*at(layer, "linear_attn/alpha"), (c.dim, rule.value_heads))
            dense(*at(layer, "linear_attn/beta"), (c.dim, rule.value_heads))
        else:
            dense(*at(layer, "linear_attn/ba"), (c.dim, 2 * rule.value_heads))
        bare(layer, "linear_attn/conv", rule.channels, rule.width)
        bare(layer, "linear_attn/A_log", rule.value_heads, decay=True)
        bare(layer, "linear_attn/dt_bias", rule.value_heads)
        path, hf, gguf = at(layer, "linear_attn/norm")
        names.append(WeightName((*path, "scale"), f"{hf}.weight", f"{gguf}.weight", (rule.value_dim,)))
        dense(*at(layer, "linear_attn/o"), (values, c.dim))

    def softmax(layer: int, c: DecoderConfig) -> None:
        q_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim
        if c.kv_rank:
            latent(layer)
        elif c.fused_qkv:
            dense(*at(layer, "attn/qkv"), (c.dim, q_dim + 2 * kv_dim), None, c.qkv_bias)
        else:
            dense(*at(layer, "attn/q"), (c.dim, 2 * q_dim if c.attn_gate else q_dim), c.heads, c.qkv_bias)
            dense(*at(layer, "attn/k"), (c.dim, kv_dim), c.kv_heads, c.qkv_bias)
            if not c.k_eq_v:
                dense(*at(layer, "attn/v"), (c.dim, kv_dim), None, c.qkv_bias)
        if c.qk_norm:
            norm(*at(layer, "attn/q_norm"), q_dim if c.qk_norm_whole else c.head_dim)
            norm(*at(layer, "attn/k_norm"), kv_dim if c.qk_norm_whole else c.head_dim)
        if c.sinks:
            bare(layer, "attn/sinks", c.heads)
        dense(*at(layer, "attn/o"), (c.heads * c.value_size, c.dim), bias=c.o_bias)

    def latent(layer: int) -> None:
        if c.query_rank:
            dense(*at(layer, "attn/q_a"), (c.dim, c.query_rank))
            norm(*at(layer, "attn/q_a_norm"), c.query_rank)
            dense(*at(layer, "attn/q_b"), (c.query_rank, c.heads * c.head_dim))
        else:
            dense(*at(layer, "attn/q"), (c.dim, c.heads * c.head_dim))
        dense(*at(layer, "attn/kv_a"), (c.dim, c.kv_rank + c.rotated))
        norm(*at(layer, "attn/kv_a_norm"), c.kv_rank)
        dense(*at(layer, "attn/kv_b"), (c.kv_rank, c.heads * (c.head_dim - c.rotated + c.value_size)))

    def mlp(layer: int, part: str, hidden: int, stack: tuple[int, ...] = ()) -> None:
        bias = bool(stack) and c.expert_bias
        dense(*at(layer, f"{part}/gate"), (*stack, c.dim, hidden), bias=bias)
        dense(*at(layer, f"{part}/up"), (*stack, c.dim, hidden), bias=bias)
        dense(*at(layer, f"{part}/down"), (*stack, hidden, c.dim), bias=bias)

    for i in range(config.layers):
        c = config.of_layer(i)
        if c.pre_norms:
            norm(*at(i, "attn_norm"), c.dim)
        if c.linear is not None and c.is_linear(i):
            linear(i, c.linear)
        else:
            softmax(i, c)
        if c.post_norms:
            norm(*at(i, "attn_post_norm"), c.dim)
        if c.has_experts(i) and c.experts_beside:
            path, hf, gguf = at(i, "mlp/router_norm")
            names.append(WeightName((*path, "scale"), hf, gguf, (c.dim,), offset=c.norm_offset))
            bare(i, "mlp/expert_scale", c.experts)
            for part in ("experts_norm", "experts_post_norm", "shared_norm", "shared_post_norm"):
                norm(*at(i, f"mlp/{part}"), c.dim)
        elif c.pre_norms:
            norm(*at(i, "mlp_norm"), c.dim)
        if c.has_experts(i):
            dense(*at(i, "mlp/router"), (c.dim, c.experts), bias=c.expert_bias)
            if c.router_bias:
                hf = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
                path = (f"layers_{i}", "mlp", "router_bias")
                names.append(WeightName(path, hf, f"blk.{i}.exp_probs_b.bias", (c.experts,)))
            mlp(i, "mlp/experts", c.expert_hidden, (c.experts,))
            if c.shared_hidden:
                mlp(i, "mlp/shared", c.shared_hidden)
                if c.shared_gate:
                    dense(*at(i, "mlp/shared_gate"), (c.dim, 1))
        elif c.fused_mlp:
            dense(*at(i, "mlp/gate_up"), (c.dim, 2 * c.hidden))
            dense(*at(i, "mlp/down"), (c.hidden, c.dim))
        else:
            mlp(i, "mlp", c.hidden)
        if c.post_norms:
            norm(*at(i, "mlp_post_norm"), c.dim)
        if c.out_scale:
            bare(i, "out_scale", 1)
    norm(("final_norm",), "model.norm", "output_norm", c.dim)
    if not c.tied:
        dense(("head",), "lm_head", "output", (c.dim, c.vocab))
    return tuple(names)
