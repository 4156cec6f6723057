"""How config.json and GGUF metadata say which layers have experts, how many, how wide, and how a token's are chosen."""

from __future__ import annotations

from typing import Any

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.keys import Keys

OPTIONS = frozenset({"experts", "num_experts", "num_local_experts"})
"""What a family of experts reads; the others refuse it."""


def counts_from_hf(keys: Keys, hidden: str) -> dict[str, Any]:
    """How many experts there are and are used, and how wide each is.

    Args:
      keys: of config.json; transformers 5 calls the first num_local_experts in every family.
      hidden: the key of their width.
    """
    name = "num_experts" if keys.get("num_local_experts") is None else "num_local_experts"
    return {
        "experts": keys.count(name),
        "experts_used": keys.count("num_experts_per_tok"),
        "expert_hidden": keys.count(hidden),
    }


def dense_layers_from_hf(keys: Keys, layers: int) -> tuple[int, ...]:
    """The layers without experts: mlp_only_layers, and those that decoder_sparse_step leaves out."""
    named, step = keys.get("mlp_only_layers", []), keys.count("decoder_sparse_step", 1)
    if not isinstance(named, list | tuple) or any(type(i) is not int or not 0 <= i < layers for i in named):
        raise UserError(f"config.json: mlp_only_layers = {named!r}; expected a list of layers below {layers}")
    return tuple(i for i in range(layers) if i in named or (i + 1) % step)


def counts_from_gguf(keys: Keys) -> dict[str, Any]:
    """The two counts; the width has another key in every family."""
    return {"experts": keys.count("expert_count"), "experts_used": keys.count("expert_used_count")}


def counts_to_gguf(c: DecoderConfig) -> dict[str, Any]:
    """The keys that `counts_from_gguf` reads."""
    return {"expert_count": c.experts, "expert_used_count": c.experts_used}


def everywhere_to_gguf(c: DecoderConfig) -> dict[str, Any]:
    """The same of a family that llama.cpp knows with experts in every layer alone.

    Raises:
      UserError: a layer without experts.
    """
    if c.dense_layers:
        raise UserError(
            f"llama.cpp wants experts in every layer of a {c.family}; layer {c.dense_layers[0]} of this model has none"
        )
    return counts_to_gguf(c)
