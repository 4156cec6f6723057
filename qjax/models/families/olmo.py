"""OLMo 2 and 3: norms only behind attention and MLP, one norm over all of q and of k; 3 has windows, whose layers are
never rope-scaled. llama.cpp calls both `olmo2`."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.scaling import scaling_to_hf
from qjax.models.families.windows import every, windows_from_hf, windows_to_hf

_TRAITS = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}
_PERIOD = 4
_NAMES = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_ABSENT = {"num_key_value_heads": "num_attention_heads", "rms_norm_eps": 1e-5}


def _olmo3_from_hf(keys: Keys, common: Fields) -> Fields:
    local = common["local_rope_theta"] or common["rope_theta"]
    plain = common["rope_scaling"] is None and local == common["rope_theta"]
    windows = windows_from_hf(keys, lambda layers: every(_PERIOD, layers))
    return windows | {"local_rope_theta": None if plain else local}


def _olmo3_to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    # transformers 5 gives rope_theta to the global layers only, so the theta of both is spelled out.
    full = (scaling_to_hf(c.rope_scaling) or {"rope_type": "default"}) | {"rope_theta": c.rope_theta}
    local = {"rope_type": "default", "rope_theta": c.local_rope_theta or c.rope_theta}
    return hf | windows_to_hf(c) | {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def _from_gguf(_: Keys, common: Fields) -> Fields:
    local = common["rope_scaling"] is not None and "window" in common
    return {"local_rope_theta": common["rope_theta"] if local else None}


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.tied or c.heads * c.head_dim != c.dim:
        what = "a head of its own (tie_word_embeddings = false)" if c.tied else "heads x head_dim = embedding_length"
        raise UserError(f"llama.cpp's olmo2 wants {what}")
    return {}


OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    arch="olmo2",
    traits=_TRAITS,
    absent={"max_position_embeddings": 2048} | _ABSENT,
    period=_PERIOD,
    hf_names=_NAMES,
    to_gguf=_to_gguf,
)
OLMO3 = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    arch="olmo2",
    traits=_TRAITS,
    absent={"max_position_embeddings": 2048, "sliding_window": 4096, "rope_theta": 500_000.0} | _ABSENT,
    period=_PERIOD,
    hf_names=_NAMES,
    from_hf=_olmo3_from_hf,
    to_hf=_olmo3_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
