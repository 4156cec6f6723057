"""Mistral: a Llama whose layers may all have a window. llama.cpp calls it `llama` too."""

from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys


def window_from_hf(keys: Keys, _: Fields) -> Fields:
    """The window that all layers have; none where sliding_window is null, or missing and not in `absent`."""
    return {} if keys.get("sliding_window") is None else {"window": keys.count("sliding_window")}


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    arch="llama",
    absent={"max_position_embeddings": 131072, "sliding_window": 4096},
    pairs=True,
    from_hf=window_from_hf,
    to_hf=lambda c, hf: hf | {"sliding_window": c.window},
)
