"""SmolLM3: a Llama whose every fourth layer rotates nothing."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.windows import every


def _from_hf(keys: Keys, common: Fields) -> Fields:
    if keys.get("use_sliding_window", False):
        raise UserError("config.json: use_sliding_window = True is not supported for model_type 'smollm3'")
    rotated = keys.get("no_rope_layers")  # 1 where a layer does rotate
    if rotated is None:
        return {"nope_layers": every(keys.count("no_rope_layer_interval"), common["layers"])}
    if not isinstance(rotated, list | tuple) or len(rotated) < common["layers"] or set(rotated) - {0, 1}:
        raise UserError(f"config.json: no_rope_layers = {str(rotated)[:40]}; expected 0 or 1 for each layer")
    return {"nope_layers": tuple(i for i in range(common["layers"]) if not rotated[i])}


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | {"no_rope_layers": [int(i not in c.nope_layers) for i in range(c.layers)]}


SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    arch="smollm3",
    absent={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    pairs=True,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=lambda _, common: {"nope_layers": every(4, common["layers"])},  # llama.cpp's own number
)
