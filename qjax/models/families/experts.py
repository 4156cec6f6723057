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


SIGMOID = 2
"""llama.cpp's expert_gating_func."""


def routed_from_hf(keys: Keys, layers: int) -> dict[str, Any]:
    """DeepSeek's experts, of which GLM has the same: groups, one expert for every token, first layers without."""
    width, groups = keys.count("moe_intermediate_size"), keys.get("n_group") or 1
    return {
        "experts": keys.count("n_routed_experts"),
        "experts_used": keys.count("num_experts_per_tok"),
        "expert_hidden": width,
        "expert_scale": keys.number("routed_scaling_factor"),
        "expert_groups": groups if groups > 1 else 0,
        "expert_groups_used": keys.count("topk_group") if groups > 1 else 0,
        "dense_layers": tuple(range(min(keys.get("first_k_dense_replace", 0), layers))),
        "shared_hidden": width * keys.count("n_shared_experts"),
    }


def routed_to_hf(c: DecoderConfig) -> dict[str, Any]:
    """The keys that `routed_from_hf` reads, and whether shares are divided by their sum."""
    return {
        "n_routed_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "moe_intermediate_size": c.expert_hidden,
        "routed_scaling_factor": c.expert_scale,
        "norm_topk_prob": c.expert_norm,
        "n_group": c.expert_groups or 1,
        "topk_group": c.expert_groups_used or 1,
        "first_k_dense_replace": len(c.dense_layers),
        "n_shared_experts": c.shared_hidden // c.expert_hidden,
    }


def routed_from_gguf(keys: Keys) -> dict[str, Any]:
    """The same experts in a GGUF file; groups are deepseek2's alone."""
    width = keys.count("expert_feed_forward_length")
    return counts_from_gguf(keys) | {
        "expert_hidden": width,
        "expert_norm": bool(keys.get("expert_weights_norm", False)),
        "expert_scale": keys.number("expert_weights_scale", 1.0),
        "dense_layers": tuple(range(keys.get("leading_dense_block_count", 0))),
        "shared_hidden": width * keys.count("expert_shared_count"),
    }


def routed_to_gguf(c: DecoderConfig) -> dict[str, Any]:
    """The keys that `routed_from_gguf` reads, and how scores become shares."""
    return counts_to_gguf(c) | {
        "leading_dense_block_count": len(c.dense_layers),
        "expert_feed_forward_length": c.expert_hidden,
        "expert_shared_count": c.shared_hidden // c.expert_hidden,
        "expert_weights_scale": c.expert_scale,
        "expert_weights_norm": c.expert_norm,
        "expert_gating_func": SIGMOID if c.router == "sigmoid" else 1,
    }


SHARED_NAMES = {f"mlp/shared/{part}": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
"""Of the expert for every token, in their checkpoints."""

STACKED_NAMES = {f"mlp/experts/{part}": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")}
"""Of experts in a folder that has all of a layer's in one tensor."""


def widths_from_gguf(keys: Keys) -> dict[str, Any]:
    """The counts, the width of experts and of the one that sees every token: Qwens with linear attention."""
    return counts_from_gguf(keys) | {
        "expert_hidden": keys.count("expert_feed_forward_length"),
        "shared_hidden": keys.count("expert_shared_feed_forward_length"),
    }


def widths_to_gguf(c: DecoderConfig) -> dict[str, Any]:
    """The keys that `widths_from_gguf` reads, of a family that llama.cpp knows with experts in every layer alone."""
    return everywhere_to_gguf(c) | {
        "expert_feed_forward_length": c.expert_hidden,
        "expert_shared_feed_forward_length": c.shared_hidden,
    }
