"""Llama 4's language model: attention in chunks, every fourth layer rotates nothing, shares multiply what experts read.

llama.cpp has chunks of 8192, and the growth of queries in layers that do not rotate, as numbers of its own.
"""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import OPTIONS, SIGMOID, counts_from_gguf, counts_from_hf, counts_to_gguf
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.windows import every

_STEP, _WIDTH = "interleave_moe_layer_step", "expert_feed_forward_length"
_LLAMA_CPP = {"chunk": 8192, "growth": 0.1, "growth_every": 8192}
_PERIOD, _MAVERICK = 4, 128  # llama.cpp knows the model whose q and k are not divided by the number of its experts


def _sparse(step: int, layers: int) -> tuple[int, ...]:
    return tuple(range(step - 1, layers, step))


def _dense(sparse: tuple[int, ...], layers: int) -> tuple[int, ...]:
    return tuple(i for i in range(layers) if i not in sparse)


def _listed(keys: Keys, key: str, layers: int, most: int) -> list[int] | None:
    """A list of small integers, or None."""
    value = keys.get(key)
    if value is None or value == []:
        return None
    if not isinstance(value, list | tuple) or any(type(i) is not int or not 0 <= i < most for i in value):
        raise UserError(f"config.json: {key} = {str(value)[:40]}; expected a list of integers from 0 to {most - 1}")
    if key == "no_rope_layers" and len(value) < layers:
        raise UserError(f"config.json: no_rope_layers has {len(value)} entries for {layers} layers")
    return list(value)


def _from_hf(keys: Keys, common: Fields) -> Fields:
    layers = common["layers"]
    rotated = _listed(keys, "no_rope_layers", layers, 2)  # 1 where a layer does rotate
    still = every(keys.count("no_rope_layer_interval"), layers)
    still = still if rotated is None else tuple(i for i in range(layers) if not rotated[i])
    kinds = ["full_attention" if i in still else "chunked_attention" for i in range(layers)]
    if (said := keys.get("layer_types")) is not None and said not in (kinds, tuple(kinds)):
        raise UserError(f"config.json: layer_types = {str(said)[:60]} is not supported; expected {str(kinds)[:60]}")
    listed = _listed(keys, "moe_layers", layers, layers)
    sparse = _sparse(keys.count(_STEP), layers) if listed is None else tuple(listed)
    chunked = "attention_chunk_size" not in keys.values or keys.values["attention_chunk_size"] is not None
    grows = bool(keys.get("attn_temperature_tuning"))
    return counts_from_hf(keys, "intermediate_size") | {
        "hidden": keys.count("intermediate_size_mlp"),
        "shared_hidden": keys.count("intermediate_size"),
        "dense_layers": _dense(sparse, layers),
        "nope_layers": still,
        "chunk": keys.count("attention_chunk_size") if chunked else None,
        "qk_unit": bool(keys.get("use_qk_norm")),
        "growth": keys.number("attn_scale") if grows else 0.0,
        "growth_every": keys.count("floor_scale") if grows else 8192,
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    growth = {"attn_scale": c.growth, "floor_scale": c.growth_every} if c.growth else {}
    return hf | growth | {
        "intermediate_size": c.expert_hidden,
        "intermediate_size_mlp": c.hidden,
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "moe_layers": [i for i in range(c.layers) if c.has_experts(i)],
        "no_rope_layers": [int(i not in c.nope_layers) for i in range(c.layers)],
        "attention_chunk_size": c.chunk,
        "use_qk_norm": c.qk_unit,
        "attn_temperature_tuning": c.growth > 0,
    }  # fmt: skip


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    layers, counts, width = common["layers"], counts_from_gguf(keys), keys.count(_WIDTH)
    return counts | _LLAMA_CPP | {
        "expert_hidden": width,
        "shared_hidden": width,
        "dense_layers": _dense(_sparse(keys.count(_STEP), layers), layers),
        "nope_layers": every(_PERIOD, layers),
        "qk_unit": counts["experts"] != _MAVERICK,
    }  # fmt: skip


def _to_gguf(c: DecoderConfig) -> Fields:
    sparse = tuple(i for i in range(c.layers) if c.has_experts(i))
    step = sparse[0] + 1 if sparse else c.layers + 1
    if sparse != _sparse(step, c.layers):
        raise UserError("llama.cpp wants experts in every n-th layer of a Llama 4, the same n throughout")
    return counts_to_gguf(c) | {_STEP: step, _WIDTH: c.expert_hidden, "expert_gating_func": SIGMOID}


LLAMA4 = Family(
    name="llama4_text",
    architecture="Llama4ForCausalLM",
    arch="llama4",
    traits={"router": "sigmoid", "expert_norm": False, "expert_inputs": True, "rope_pairs": True},
    absent={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        _STEP: 1,
        "no_rope_layer_interval": _PERIOD,
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
    },
    options=OPTIONS,
    expert_columns="first",
    hf_names={
        "mlp/gate": "feed_forward.gate_proj",
        "mlp/up": "feed_forward.up_proj",
        "mlp/down": "feed_forward.down_proj",
        "mlp/router": "feed_forward.router",
        "mlp/experts/gate": "feed_forward.experts.gate_proj",
        "mlp/experts/up": "feed_forward.experts.up_proj",
        "mlp/experts/down": "feed_forward.experts.down_proj",
        "mlp/shared/gate": "feed_forward.shared_expert.gate_proj",
        "mlp/shared/up": "feed_forward.shared_expert.up_proj",
        "mlp/shared/down": "feed_forward.shared_expert.down_proj",
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
