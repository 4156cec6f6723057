"""Gemma: gains stored minus one; 2 and 3: norms in front and behind, windows in all but every second or sixth layer."""

from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.windows import every, windows_from_hf, windows_to_hf

_GEMMA1 = {"activation": "gelu_tanh", "norm_offset": 1.0, "embed_scale": True}
_TRAITS = _GEMMA1 | {"post_norms": True}
_WIDE_LAYERS = {"gemma2": 46, "gemma3": 62}  # llama.cpp knows the 27B models, whose query_dim is dim / heads, by these
NAMES = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _from_hf(keys: Keys, _: Fields) -> Fields:
    query_dim = keys.optional("query_pre_attn_scalar")
    fields = windows_from_hf(keys, lambda layers: every(keys.count("sliding_window_pattern"), layers))
    return fields | {
        "query_dim": None if query_dim == keys.get("head_dim") else query_dim,
        "attn_softcap": keys.optional("attn_logit_softcapping"),
        "logit_softcap": keys.optional("final_logit_softcapping"),
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    hf = hf | windows_to_hf(c)
    hf["hidden_activation"] = hf.pop("hidden_act")
    hf["query_pre_attn_scalar"] = c.head_dim if c.query_dim is None else _integral(c.query_dim)
    hf["attn_logit_softcapping"] = c.attn_softcap
    hf["final_logit_softcapping"] = c.logit_softcap
    if c.local_rope_theta is not None:
        hf["rope_local_base_freq"] = c.local_rope_theta
    return hf


def _integral(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _query_dim(keys: Keys, common: Fields, arch: str) -> float | None:
    over_heads = common["dim"] // common["heads"]
    wide = common["layers"] == _WIDE_LAYERS[arch] and over_heads != common["head_dim"]
    return float(over_heads) if wide else None


def _gemma2_from_gguf(keys: Keys, common: Fields) -> Fields:
    return {
        "query_dim": _query_dim(keys, common, "gemma2"),
        "attn_softcap": keys.optional("attn_logit_softcapping", 50.0),
        "logit_softcap": keys.optional("final_logit_softcapping", 30.0),
    }


def _gemma3_from_gguf(keys: Keys, common: Fields) -> Fields:
    windowed = common.get("window") is not None
    return {
        "query_dim": _query_dim(keys, common, "gemma3"),
        "local_rope_theta": keys.number("rope.freq_base_swa", 10000.0) if windowed else None,
        "logit_softcap": keys.optional("final_logit_softcapping"),
    }


def _to_gguf(c: DecoderConfig) -> Fields:
    said = {
        "rope.freq_base_swa": c.local_rope_theta,
        "attn_logit_softcapping": c.attn_softcap,
        "final_logit_softcapping": c.logit_softcap,
    }
    return {key: value for key, value in said.items() if value is not None}


GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    arch="gemma",
    traits=_GEMMA1,
    absent={
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
)
GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    arch="gemma2",
    traits=_TRAITS,
    absent={
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    absent_gguf={"attention.sliding_window": 4096},
    period=2,
    hf_names=NAMES,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_gemma2_from_gguf,
    to_gguf=_to_gguf,
)
GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    arch="gemma3",
    traits=_TRAITS | {"qk_norm": True},
    absent={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "tie_word_embeddings": True,
    },
    period=6,
    hf_names=NAMES,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_gemma3_from_gguf,
    to_gguf=_to_gguf,
)
