"""What llama-quantize's file types give to each role of a tensor, where that is not the type of most.

Rows of llama.cpp's `llama_tensor_get_type` (ggml 0.25), by role and file type; a rule looks at the tensor's place among
those of its role and at the model (`Site`). `mixes.py` asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Site:
    """What the rules of one tensor look at: its place `i` among the tensors of its role, and the model."""

    i: int
    layers: int
    gqa: int
    imatrix: bool
    experts: int

    @property
    def first(self) -> bool:
        return self.i < self.layers // 8

    @property
    def more(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        eighth = self.layers // 8
        return self.first or self.i >= 7 * self.layers // 8 or (self.i - eighth) % 3 == 2


# The smallest mixes, by llama.cpp's groups of them.
_ONE_BIT, _TWO_BITS, _TWO_AND_MORE = ("IQ1_S", "IQ1_M"), ("IQ2_XXS", "IQ2_XS"), ("IQ2_S", "IQ2_M")
SMALLEST = (*_ONE_BIT, *_TWO_BITS, *_TWO_AND_MORE)

# None: the base type.
Choice = Callable[[Site], str | None]
_ATTN_V: dict[str, Choice] = {
    **dict.fromkeys((*_ONE_BIT, *_TWO_BITS), lambda s: "Q4_K" if s.gqa >= 4 or s.experts >= 4 else "Q2_K"),
    **dict.fromkeys(_TWO_AND_MORE, lambda s: "Q4_K" if s.gqa >= 4 or s.experts >= 4 else "IQ3_S"),
    "IQ3_XXS": lambda s: "Q4_K" if s.gqa >= 4 else None if s.imatrix else "IQ3_S",
    "IQ3_XS": lambda s: "Q4_K" if s.gqa >= 4 else None,
    "IQ3_S": lambda s: "Q4_K" if s.gqa >= 4 else None,
    "IQ3_M": lambda s: "Q4_K",
    "Q2_K": lambda s: "Q4_K" if s.gqa >= 4 else "Q3_K",
    "Q2_K_S": lambda s: "Q4_K" if s.gqa >= 4 else None,
    "Q3_K_M": lambda s: "Q5_K" if s.i < 2 else "Q4_K",
    "Q3_K_L": lambda s: "Q5_K",
    "IQ4_NL": lambda s: "Q5_K" if s.gqa >= 4 else None,
    "IQ4_XS": lambda s: "Q5_K" if s.gqa >= 4 else None,
    "Q4_K_S": lambda s: "Q5_K" if s.i < 4 else None,
    "Q4_K_M": lambda s: "Q6_K" if s.more else None,
    "Q5_K_M": lambda s: "Q6_K" if s.more else None,
}
_FFN_DOWN: dict[str, Choice] = {
    **dict.fromkeys((*_ONE_BIT, *_TWO_BITS), lambda s: "Q2_K" if s.first else None),
    **dict.fromkeys(_TWO_AND_MORE, lambda s: "IQ3_S" if s.first else None),
    "IQ3_XXS": lambda s: None if s.imatrix else "Q4_K" if s.first else "Q3_K",
    "IQ3_M": lambda s: "Q4_K" if s.first or (s.experts == 8 and s.more) else None,
    "Q2_K": lambda s: "Q3_K",
    "Q2_K_S": lambda s: "Q4_K" if s.first else None,
    "Q3_K_M": lambda s: "Q5_K" if s.i < s.layers // 16 else "Q4_K",
    "Q3_K_L": lambda s: "Q5_K",
    "IQ4_NL": lambda s: "Q5_K" if s.first and not s.imatrix else None,
    "IQ4_XS": lambda s: "Q5_K" if s.first and not s.imatrix else None,
    "Q4_K_S": lambda s: "Q5_K" if s.first else None,
    "Q4_K_M": lambda s: "Q6_K" if s.more else None,
    "Q5_K_M": lambda s: "Q6_K" if s.more else None,
    "Q4_0": lambda s: "Q4_1" if s.first and s.imatrix else None,
    "Q5_0": lambda s: "Q5_1" if s.first and s.imatrix else None,
}
_ATTN_OUTPUT: dict[str, Choice] = {
    **dict.fromkeys(_ONE_BIT, lambda s: "IQ2_XXS"),
    **dict.fromkeys(_TWO_AND_MORE, lambda s: "IQ3_S"),
    "IQ3_XXS": lambda s: "IQ3_S",
    "IQ3_M": lambda s: "Q4_K",
    "Q2_K": lambda s: "Q3_K",
    "Q3_K_M": lambda s: "Q4_K",
    "Q3_K_L": lambda s: "Q5_K",
}
_ATTN_QK: dict[str, Choice] = {"IQ3_XXS": lambda s: "IQ2_S", "IQ3_XS": lambda s: "IQ3_XXS"}
_FFN_IN: dict[str, Choice] = {"IQ3_XS": lambda s: "IQ3_XXS" if s.layers // 8 <= s.i < 7 * s.layers // 8 else None}
# Beside eight experts attention is small.
_ATTN_OUTPUT_OF_8 = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
)
_MIX = {
    "attn_v.weight": _ATTN_V, "attn_q.weight": _ATTN_QK, "attn_k.weight": _ATTN_QK, "attn_output.weight": _ATTN_OUTPUT,
    "ffn_gate": _FFN_IN, "ffn_up": _FFN_IN, "ffn_down": _FFN_DOWN,
}  # fmt: skip
EMBEDDING = {
    **dict.fromkeys((*_ONE_BIT, *_TWO_BITS), "Q2_K"),
    **dict.fromkeys((*_TWO_AND_MORE, "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "Q4_K"),
}


def choice(mix: str, role: str, site: Site) -> str | None:
    """What the rules say of a tensor; None: the base type."""
    if site.experts == 8 and mix in SMALLEST:
        if role in ("attn_k.weight", "attn_output.weight"):
            return "Q4_K" if role == "attn_k.weight" else "Q5_K"
    elif site.experts == 8:
        if role in ("attn_v.weight", "attn_k.weight"):
            return "Q8_0"
        if role == "attn_output.weight":
            return "Q5_K" if mix in _ATTN_OUTPUT_OF_8 else None
    return _MIX.get(role, {}).get(mix, lambda _: None)(site)
