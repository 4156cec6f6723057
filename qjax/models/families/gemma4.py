"""Gemma 4's language models: layers that see everything have larger heads of their own, fewer of them for keys.

Values are divided by their rms, and in those layers may be the keys themselves; a part of each head is rotated there;
every layer's output is multiplied with one learned number. Gains are plain, scores are not divided. The smaller models,
which have an embedding for each layer and layers that share keys, are refused.
"""

from collections.abc import Mapping
from typing import Any

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import OPTIONS, counts_from_gguf, everywhere_to_gguf
from qjax.models.families.family import Family, Fields
from qjax.models.families.gemma import NAMES
from qjax.models.families.keys import Keys, same_in_all_layers
from qjax.models.families.windows import every, windows_from_hf, windows_to_hf

_PERIOD, _WIDTH = 6, "expert_feed_forward_length"
_CAP = "final_logit_softcapping"  # 0: none; llama.cpp has 30 where the key is missing
_PARTS = ("gate", "up", "down")
_SIZES = ("head_dim", "num_key_value_heads")
# What these ask for where they are neither 0 nor false.
_MISSING = {
    "hidden_size_per_layer_input": "embeddings by layer are missing",
    "num_kv_shared_layers": "keys and values of other layers are missing",
}


def _from_hf(keys: Keys, common: Fields) -> Fields:
    for key, lacks in _MISSING.items():
        if keys.get(key):
            raise UserError(f"config.json: {key} = {keys.get(key)!r} is not supported for gemma4_text: {lacks}")
    if (sees := keys.get("use_bidirectional_attention")) not in (None, False, "vision"):  # which is about images
        raise UserError(f"config.json: use_bidirectional_attention = {sees!r} is not supported for gemma4_text")
    last = common["layers"] - 1
    windows = windows_from_hf(keys, lambda layers: tuple({*every(_PERIOD, layers), last}))
    if windows and last not in windows["global_layers"]:
        raise UserError("config.json: layer_types ends with sliding_attention; a gemma4_text with full_attention")
    full = windows.get("global_layers", range(last + 1))
    k_eq_v = bool(keys.get("attention_k_eq_v"))
    sizes = _global_sizes(keys, tuple(full))
    kv_heads = sizes["num_key_value_heads"] if k_eq_v else common["kv_heads"]
    return windows | {
        "global_head_dim": _other(sizes["head_dim"], common["head_dim"]),
        "global_kv_heads": _other(kv_heads, common["kv_heads"]),
        "k_eq_v": k_eq_v,
        "logit_softcap": keys.optional(_CAP),
        **(_experts_from_hf(keys, common) if keys.get("enable_moe_block") else {}),
    }


def _experts_from_hf(keys: Keys, common: Fields) -> Fields:
    return {
        "experts": keys.count("num_experts"),
        "experts_used": keys.count("top_k_experts"),
        "expert_hidden": keys.count("moe_intermediate_size"),
        "shared_hidden": common["hidden"],
        "experts_beside": True,
    }


def _other(size: int, usual: int) -> int:
    return 0 if size == usual else size


def _global_sizes(keys: Keys, full: tuple[int, ...]) -> dict[str, int]:
    """Size and number of key-value heads in layers without window: global_* or, as transformers 5 has it, by layer."""
    by_layer = keys.get("per_layer_config")
    if by_layer is None:
        kv_heads = keys.count("num_global_key_value_heads", keys.count("num_key_value_heads"))
        return {"head_dim": keys.count("global_head_dim"), "num_key_value_heads": kv_heads}
    if not isinstance(by_layer, Mapping) or {str(i) for i in full} != {str(i) for i in by_layer}:
        raise UserError("config.json: per_layer_config is not supported but for the layers with full_attention")
    said = [*by_layer.values()]
    if any(not isinstance(layer, Mapping) or layer != said[0] or layer.keys() - {*_SIZES} for layer in said):
        raise UserError(f"config.json: per_layer_config must say the same of all layers, and only {', '.join(_SIZES)}")
    inside = Keys(said[0], {}, where="config.json: per_layer_config.")
    return {name: inside.count(name, keys.count(name)) for name in _SIZES}


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    hf = hf | windows_to_hf(c)
    hf["hidden_activation"] = hf.pop("hidden_act")
    theta, scaling = hf.pop("rope_theta"), hf.pop("rope_scaling")
    local = {} if c.local_rope_theta is None else {
        "sliding_attention": {"rope_type": "default", "rope_theta": c.local_rope_theta}
    }  # fmt: skip
    return hf | {
        "rope_parameters": {"full_attention": (scaling or {"rope_type": "default"}) | {"rope_theta": theta}} | local,
        "global_head_dim": c.global_head_dim or c.head_dim,
        "num_global_key_value_heads": c.global_kv_heads or c.kv_heads,
        "attention_k_eq_v": c.k_eq_v,
        "final_logit_softcapping": c.logit_softcap,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": c.experts > 0,
        **(
            {"num_experts": c.experts, "top_k_experts": c.experts_used, "moe_intermediate_size": c.expert_hidden}
            if c.experts
            else {}
        ),
    }


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    for key in ("embedding_length_per_layer_input", "attention.shared_kv_layers"):
        if keys.get(key, 0):
            raise UserError(f"{keys.where}{key} = {keys.get(key)!r} is not supported; expected 0")
    layers, full = common["layers"], common.get("global_layers", range(common["layers"]))
    said: Any = keys.get("attention.head_count_kv", common["heads"])
    said = [said] * layers if isinstance(said, int) else list(said)
    if len(said) != layers:
        raise UserError(f"{keys.where}attention.head_count_kv has {len(said)} entries for {layers} layers")
    name = f"{keys.where}attention.head_count_kv"
    wide = same_in_all_layers(name, [int(n) for i, n in enumerate(said) if i in full])
    narrow = same_in_all_layers(name, [int(n) for i, n in enumerate(said) if i not in full] or [wide])
    size, windowed = common["head_dim"], common.get("window") is not None
    usual = keys.count("attention.key_length_swa", size)
    return {
        "head_dim": usual,
        "global_head_dim": _other(size, usual),
        "kv_heads": narrow,
        "global_kv_heads": _other(wide, narrow),
        "local_rope_theta": keys.number("rope.freq_base_swa", 10000.0) if windowed else None,
        "logit_softcap": None if keys.get(_CAP) == 0 else keys.number(_CAP, 30.0),
        **(_experts_from_gguf(keys, common) if keys.get("expert_count", 0) else {}),
    }


def _experts_from_gguf(keys: Keys, common: Fields) -> Fields:
    beside = {"shared_hidden": common["hidden"], "experts_beside": True}
    return counts_from_gguf(keys) | beside | {"expert_hidden": keys.count(_WIDTH)}


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.window is None:
        raise UserError("llama.cpp's gemma4 has windows in some layers")
    if c.rope_scaling is None or c.rope_scaling.kind != "proportional":
        raise UserError("llama.cpp's gemma4 rotates a proportional part of the larger heads: rope_type proportional")
    size = c.global_head_dim or c.head_dim
    counts = [c.of_layer(i).kv_heads for i in range(c.layers)]
    return {
        "attention.head_count_kv": counts if c.global_kv_heads else c.kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.key_length_swa": c.head_dim,
        "attention.value_length_swa": c.head_dim,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope.dimension_count": size,
        "rope.dimension_count_swa": c.head_dim,
        "rope.freq_base_swa": c.local_rope_theta,
        _CAP: c.logit_softcap or 0.0,
    } | ({_WIDTH: c.expert_hidden} | everywhere_to_gguf(c) if c.experts else {})


GEMMA4 = Family(
    name="gemma4_text",
    architecture="Gemma4ForCausalLM",
    arch="gemma4",
    traits={
        "activation": "gelu_tanh",
        "embed_scale": True,
        "post_norms": True,
        "qk_norm": True,
        "v_norm": True,
        "attn_multiplier": 1.0,
        "out_scale": True,
    },
    absent={
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "hidden_size_per_layer_input": 256,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    options=OPTIONS | {"proportional", "head_count_kv", "k_eq_v", "use_bidirectional_attention", "either"},
    expert_columns="rows",
    hf_names=NAMES
    | {f"mlp/experts/{part}": f"experts.{part}_proj" for part in _PARTS}
    | {f"mlp/shared/{part}": f"mlp.{part}_proj" for part in _PARTS}
    | {"mlp/router": "router.proj"},
    gguf_names={f"mlp/shared/{part}": f"ffn_{part}" for part in _PARTS},
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
