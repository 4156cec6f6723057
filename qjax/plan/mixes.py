"""llama-quantize's file types: for every tensor of a model the type it would pick.

    type(tensor) = fallback(override or mix(file type, role, layer, heads / kv heads, importance known?), row length)

A restatement of the rules of llama.cpp's `llama_tensor_get_type` (ggml 0.25); tests compare every decision with the
real `llama_model_quantize`. L = layers; a role's tensors are visited by layer number, and layer i counts among those
visited: a tensor taken by an override does not advance the count, as in llama.cpp. In a model of experts i of an MLP's
tensors is the number in the name, but in the mixes of one and two bits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import UserError
from qjax.formats import unknown
from qjax.io.gguf_model import FILE_TYPES as FILE_TYPE_NUMBERS
from qjax.io.gguf_types import TENSOR_TYPES
from qjax.io.gguf_write import tensor_order
from qjax.models.config import DecoderConfig
from qjax.models.families import family_of, weight_names
from qjax.plan.mix_rules import EMBEDDING, SMALLEST, Site, choice
from qjax.plan.rules import KEEP, Plan, Rule, Weight

# File type -> (number in general.file_type, type of most tensors). MXFP4 is qjax's own: every layer in that type; it
# shares its number with llama.cpp's MXFP4_MOE, which is Q8_0 but for experts.
FILE_TYPES: dict[str, tuple[int, str]] = {
    name: (FILE_TYPE_NUMBERS["MXFP4_MOE" if name == "MXFP4" else name], base)
    for name, base in {
        "F32": "F32",
        "F16": "F16",
        "BF16": "BF16",
        "Q8_0": "Q8_0",
        "Q6_K": "Q6_K",
        "Q5_K_M": "Q5_K",
        "Q5_K_S": "Q5_K",
        "Q5_1": "Q5_1",
        "Q5_0": "Q5_0",
        "Q4_K_M": "Q4_K",
        "Q4_K_S": "Q4_K",
        "Q4_1": "Q4_1",
        "Q4_0": "Q4_0",
        "IQ4_NL": "IQ4_NL",
        "IQ4_XS": "IQ4_XS",
        "IQ3_M": "IQ3_S",
        "IQ3_S": "IQ3_S",
        "IQ3_XS": "IQ3_S",
        "IQ3_XXS": "IQ3_XXS",
        "IQ2_M": "IQ2_S",
        "IQ2_S": "IQ2_XS",
        "IQ2_XS": "IQ2_XS",
        "IQ2_XXS": "IQ2_XXS",
        "IQ1_M": "IQ1_M",
        "IQ1_S": "IQ1_S",
        "MXFP4": "MXFP4",
        "MXFP4_MOE": "MXFP4",
        "Q3_K_L": "Q3_K",
        "Q3_K_M": "Q3_K",
        "Q3_K_S": "Q3_K",
        "Q2_K": "Q2_K",
        "Q2_K_S": "Q2_K",
        "TQ2_0": "TQ2_0",
        "TQ1_0": "TQ1_0",
    }.items()
}
ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}

# What a type becomes where the row is no multiple of its block.
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# Roles by the name's part, in the order llama.cpp asks.
ROLES = ("attn_v.weight", "attn_k.weight", "attn_q.weight", "attn_output.weight", "ffn_up", "ffn_gate", "ffn_down")
NEVER = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d", "altup", "laurel", "per_layer_model_proj")


# Where q, k and v are one weight, or k and v, its rules are those of v.
SAME_ROLE = {"attn_qkv.weight": "attn_v.weight", "attn_kv_b.weight": "attn_v.weight"}


def file_type(name: str) -> str:
    """The canonical name of a file type (any case, llama-quantize's aliases). Raises UserError for others."""
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper not in FILE_TYPES:
        raise UserError(f"{unknown('file type', name, FILE_TYPES)} (known are {' '.join(FILE_TYPES)})")
    return upper


def block_of(ggml_type: str) -> int:
    """Weights a block of a ggml type; raises UserError for a name ggml does not have."""
    if ggml_type not in TENSOR_TYPES:
        raise UserError(f"unknown ggml type {ggml_type!r}")
    return TENSOR_TYPES[ggml_type].block


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether llama-quantize touches a tensor (shape: contracted axis last)."""
    if all(n == 1 for n in shape[:-1]) or not name.endswith("weight"):
        return False
    return not any(part in name for part in NEVER)


def decoder_weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Every weight of a decoder as a plan sees it: shapes (out, in), both names."""
    return tuple(Weight("/".join(n.path), n.file_shape, n.gguf) for n in weight_names(config))


def mix(
    name: str,
    config: DecoderConfig,
    has_imatrix: bool = False,
    pure: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
) -> Plan:
    """llama-quantize's file type as a plan for one decoder: one rule a weight.

    Args:
      name: a file type, e.g. "Q4_K_M" (`FILE_TYPES`), any case.
      config: the decoder.
      has_imatrix, pure, overrides: see `tensor_types`.

    >>> tiny = DecoderConfig(vocab=256, dim=256, hidden=512, layers=2, heads=4, kv_heads=2, head_dim=64, tied=True)
    >>> print(mix("Q4_K_M", tiny))
    embed/embedding -> Q6_K
    layers_{0-1}/attn/q/kernel -> Q4_K
    layers_{0-1}/attn/k/kernel -> Q4_K
    layers_0/attn/v/kernel -> Q4_K
    layers_{0-1}/attn/o/kernel -> Q4_K
    layers_{0-1}/mlp/gate/kernel -> Q4_K
    layers_{0-1}/mlp/up/kernel -> Q4_K
    layers_0/mlp/down/kernel -> Q4_K
    layers_1/attn/v/kernel -> Q6_K
    layers_1/mlp/down/kernel -> Q6_K
    """
    return mix_of(
        name,
        decoder_weights(config),
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        experts=config.experts,
        arch=family_of(config).arch,
        has_imatrix=has_imatrix,
        pure=pure,
        overrides=overrides,
    )


def mix_of(name: str, weights: Sequence[Weight], **model: Any) -> Plan:
    """`mix` for any list of weights that have GGUF names; `model` as in `tensor_types`."""
    shapes = {w.gguf: w.shape for w in weights if w.gguf is not None}
    types = tensor_types(name, shapes, **model)
    rules = []
    for w in weights:
        if w.gguf in types:
            rules.append(Rule(w.path, types[w.gguf]))
        elif not w.is_vector:
            rules.append(Rule(w.path, KEEP))
    return Plan(tuple(rules), file_type(name), fallbacks(name, shapes, **model))


def file_type_number(plan: Plan, types: Mapping[str, int]) -> int:
    """What general.file_type should say of a plan's file: a mix's own number, else that of the type most weights have.

    Args:
      plan: the plan.
      types: ggml type name -> weights of that type in the file.
    """
    if plan.name in FILE_TYPES:
        return FILE_TYPES[plan.name][0]
    most = max(types, key=lambda t: types[t]) if types else "F32"
    return next((n for n, base in FILE_TYPES.values() if base == most), 0)


def tensor_types(
    mix: str,
    tensors: Mapping[str, Sequence[int]],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    arch: str = "llama",
    has_imatrix: bool = False,
    pure: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """The ggml type of every tensor llama-quantize would convert, by GGUF name.

    Args:
      mix: a file type's name, e.g. "Q4_K_M".
      tensors: GGUF name -> shape (out, in) of every tensor of the file.
      layers, heads, kv_heads, experts, arch: the model.
      has_imatrix: whether importance is known; some rules ask.
      pure: the base type everywhere (llama-quantize's --pure).
      overrides: (regular expression, type); the first whose pattern is found in the name wins (--tensor-type).

    Returns: {name: type}; tensors not named are kept. A row that no block divides is F16, as llama.cpp does.

    Raises:
      UserError: an unknown mix or type.
    """
    mix = file_type(mix)
    base = FILE_TYPES[mix][1]
    compiled = [(_compile(p), t.upper()) for p, t in overrides]
    names = sorted((n for n, s in tensors.items() if is_quantizable(n, s)), key=tensor_order)
    if base in ("F32", "F16", "BF16"):
        return dict.fromkeys(names, base)
    tied = "output.weight" not in tensors
    n_attn_v = sum(any(role in n for role in ("attn_v.weight", *SAME_ROLE)) for n in tensors)
    gqa = heads // kv_heads if kv_heads else 0
    big = layers == 80 and (arch in ("qwen2", "olmo", "deci") or (arch == "llama" and heads != kv_heads))
    seen = dict.fromkeys(ROLES, 0)
    out = {}
    for name in names:
        row = tensors[name][-1]
        kind = next((t for p, t in compiled if p.search(name)), None)
        if kind is None and pure:
            kind = base
        if kind is None:
            role = next((SAME_ROLE.get(r, r) for r in (*ROLES, *SAME_ROLE) if r in name), "")
            if mix == "MXFP4_MOE":
                kind = base if len(tensors[name]) > 2 else "Q8_0"
            elif name == "output.weight" or (tied and name == "token_embd.weight"):
                kind = _output_type(mix, base, row)
            elif name == "token_embd.weight":
                kind = EMBEDDING.get(mix, base)
            else:
                total = n_attn_v if role == "attn_v.weight" else layers
                numbered = experts > 1 and role.startswith("ffn_") and mix not in SMALLEST
                i = tensor_order(name)[0] if numbered else seen.get(role, 0)
                site = Site(i, total, gqa, has_imatrix, experts)
                kind = choice(mix, role, site) or base
                if big and role == "attn_v.weight" and kind in ("Q3_K", "Q4_K") and mix not in SMALLEST:
                    kind = "Q5_K"  # a 70B shares each value head among 8 queries, so its attn_v is small
                if role:
                    seen[role] += 1
        out[name] = _fit_row(kind, row)
    return out


def fallbacks(mix: str, tensors: Mapping[str, Sequence[int]], **options: Any) -> str:
    """One line that says how many tensors get another type than the mix wants, because no block of it divides their
    rows; "" where none does. Arguments as for `tensor_types`."""
    got = tensor_types(mix, tensors, **options)
    whole = {name: (*rows, -(-n // 256) * 256) for name, (*rows, n) in tensors.items()}  # rows that every block divides
    wanted = tensor_types(mix, whole, **options)
    changed = {name: (wanted[name], kind) for name, kind in got.items() if kind != wanted[name]}
    if not changed:
        return ""
    rows = " or ".join(str(n) for n in sorted({tensors[name][-1] for name in changed}))
    kinds = ", ".join(f"{new} for {old} in {n}" for (old, new), n in Counter(changed.values()).most_common())
    return (
        f"{file_type(mix)}: {len(changed)} of {len(got)} tensors have rows of {rows} weights, which their types' "
        f"blocks do not divide, and get another type: {kinds}"
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"override {pattern!r} is no regular expression: {e}") from None


def _output_type(mix: str, base: str, row: int) -> str:
    if row % block_of(base):
        return "Q8_0"
    if mix in (*SMALLEST, "IQ3_XXS"):
        return "Q5_K"
    return base if base == "Q8_0" else "Q6_K"


def _fit_row(kind: str, row: int) -> str:
    """The type itself where its block divides the row, else its fallback, else F16."""
    if row % block_of(kind) == 0:
        return kind
    kind = FALLBACK.get(kind, kind)
    return kind if row % block_of(kind) == 0 else "F16"
