"""Recipes: the named methods (`methods`), `>>` (`composed`), and lines of text (`lines`)."""

from qjax.recipes.composed import Recipe, joined
from qjax.recipes.lines import REPARAMS, STAGES, recipe, reparam
from qjax.recipes.methods import (
    RECIPES,
    aqlm,
    autoround,
    awq,
    best_gguf,
    gptaq,
    gptq,
    gsq,
    guided,
    hqq,
    imatrix,
    llm_int8,
    lnq,
    omniquant,
    qtip,
    quarot,
    quip,
    quip_sharp,
    rtn,
    smoothquant,
    spqr,
    squeezellm,
    w8a8,
    yaqa,
)

__all__ = [
    "RECIPES", "REPARAMS", "STAGES", "Recipe", "aqlm", "autoround", "awq", "best_gguf", "gptaq", "gptq", "gsq",
    "guided", "hqq", "imatrix", "joined", "llm_int8", "lnq", "omniquant", "qtip", "quarot", "quip",
    "quip_sharp", "recipe", "reparam", "rtn", "smoothquant", "spqr", "squeezellm", "w8a8", "yaqa",
]  # fmt: skip
