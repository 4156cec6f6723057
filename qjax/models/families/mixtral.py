"""Mixtral: a Mistral with experts for its MLPs. llama.cpp calls it `llama` too, and knows it by its expert_count."""

from qjax.models.config import DecoderConfig
from qjax.models.families.experts import OPTIONS, counts_from_gguf, counts_from_hf, everywhere_to_gguf
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.mistral import window_from_hf


def _from_hf(keys: Keys, common: Fields) -> Fields:
    return window_from_hf(keys, common) | counts_from_hf(keys, "intermediate_size")


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | {
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "intermediate_size": c.expert_hidden,
        "sliding_window": c.window,
    }


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    return counts_from_gguf(keys) | {"expert_hidden": common["hidden"]}


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    arch="llama",
    absent={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    options=OPTIONS,
    pairs=True,
    hf_names={
        "mlp/router": "block_sparse_moe.gate",
        "mlp/experts/gate": "block_sparse_moe.experts.*.w1",
        "mlp/experts/up": "block_sparse_moe.experts.*.w3",
        "mlp/experts/down": "block_sparse_moe.experts.*.w2",
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=everywhere_to_gguf,
)
