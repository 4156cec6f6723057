"""gpt-oss: experts with biases and a clamped activation, attention sinks, windows in every second layer, YaRN.

Source: the model card, arXiv:2508.10925, section 2. Its weights in MXFP4 are io/expert_stacks.py's.
"""

import dataclasses

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import OPTIONS, STACKED_NAMES, counts_from_gguf, counts_from_hf, counts_to_gguf
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.windows import windows_from_hf, windows_to_hf
from qjax.models.mlp import LIMIT

_WIDTH = "expert_feed_forward_length"


def _from_hf(keys: Keys, common: Fields) -> Fields:
    if not keys.get("attention_bias"):
        raise UserError("config.json: attention_bias = False is not supported for model_type 'gpt_oss'")
    if (limit := keys.get("swiglu_limit")) != LIMIT:
        raise UserError(f"config.json: swiglu_limit = {limit!r} is not supported for model_type 'gpt_oss'; {LIMIT} is")
    windows = windows_from_hf(keys, lambda layers: tuple(range(1, layers, 2)))
    return windows | counts_from_hf(keys, "intermediate_size")


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    windows = windows_to_hf(c) | ({"sliding_window": None} if c.window is None else {})
    return hf | windows | {
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "intermediate_size": c.expert_hidden,
        "attention_bias": True,
        "swiglu_limit": LIMIT,
        "rope_scaling": hf["rope_scaling"] or {"rope_type": "default"},
    }  # fmt: skip


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    fields = counts_from_gguf(keys) | {"expert_hidden": keys.count(_WIDTH)}
    if (scaling := common["rope_scaling"]) is None or scaling.kind != "yarn":
        return fields
    # As it was trained. llama.cpp, which cannot be told, has the ends of the blend at whole frequencies.
    return fields | {"rope_scaling": dataclasses.replace(scaling, truncate=False)}


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.window is None or c.global_layers != tuple(range(1, c.layers, 2)):
        raise UserError("llama.cpp's gpt-oss has a window in every second layer, the first among them")
    return counts_to_gguf(c) | {_WIDTH: c.expert_hidden}


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    arch="gpt-oss",
    traits={"qkv_bias": True, "o_bias": True, "sinks": True, "expert_bias": True, "activation": "clamped_swiglu"},
    absent={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "swiglu_limit": LIMIT,
    },
    options=OPTIONS | {"attention_bias"},
    period=2,
    expert_columns="even",
    hf_names={
        "mlp/router": "mlp.router",
    }
    | STACKED_NAMES,
    gguf_names={"mlp_norm": "post_attention_norm"},
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
