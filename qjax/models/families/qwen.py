"""Qwen 2 and 3: biases of q, k and v, or norms over their heads; windows, where asked for, behind the first layers."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.windows import windows_from_hf, windows_to_hf


def _windows(keys: Keys, _: Fields) -> Fields:
    if not keys.get("use_sliding_window", False):
        return {}
    return windows_from_hf(keys, lambda layers: tuple(range(min(keys.get("max_window_layers", 28), layers))))


def windows_to_qwen(c: DecoderConfig, hf: Fields) -> Fields:
    """A config.json with its windows as Qwen spells them."""
    leading = next((i for i in range(c.layers) if c.layer_window(i) is not None), c.layers)
    return hf | windows_to_hf(c) | {"use_sliding_window": c.window is not None, "max_window_layers": leading}


def check_heads(c: DecoderConfig) -> Fields:
    """No keys of its own, or a UserError where llama.cpp would not load the file."""
    if c.heads * c.head_dim != c.dim:
        raise UserError(
            f"llama.cpp's {c.family} wants heads x head_dim = embedding_length, "
            f"got {c.heads} x {c.head_dim} and {c.dim}"
        )
    return {}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    arch="qwen2",
    traits={"qkv_bias": True},
    absent={"max_position_embeddings": 32768, "sliding_window": 4096},
    from_hf=_windows,
    to_hf=windows_to_qwen,
    to_gguf=check_heads,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    arch="qwen3",
    traits={"qk_norm": True},
    absent={"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
    from_hf=_windows,
    to_hf=windows_to_qwen,
)
