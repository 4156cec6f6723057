"""Mistral: a Llama whose layers may all have a window. llama.cpp calls it `llama` too."""

from qjax.models.families.family import Family
from qjax.models.families.keys import Keys


def _window(keys: Keys):
    if "sliding_window" in keys.values and keys.values["sliding_window"] is None:
        return {}
    return {"window": keys.count("sliding_window")}


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    arch="llama",
    absent={"max_position_embeddings": 131072, "sliding_window": 4096},
    pairs=True,
    from_hf=_window,
    to_hf=lambda c, hf: hf | {"sliding_window": c.window},
)
