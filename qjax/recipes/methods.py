"""The named methods, each a few lines over the algebra: reparametrizations, a format, then roundings.

    rtn        nearest()
    imatrix    nearest(weight="h")                                                    llama.cpp's importance matrix
    gptq       nearest() >> ldlq(order="act")                                         arXiv:2210.17323
    gptaq      nearest() >> ldlq(order="act", cross=1.0)                              arXiv:2504.02692
    best_gguf  nearest(weight="h") >> ldlq(order="act", cross=1.0) >> refit(2, sweeps=2)
                   >> options(sensitive=0.5, shrink=True, two_sided=8)                ours
    gsq        best_gguf >> annealed(24)                                              arXiv:2604.18556
    yaqa       nearest(weight="h") >> ldlq(order="act") >> options(sensitive=True, two_sided=64)   arXiv:2505.22988
    guided     nearest(weight="h") >> ldlq(order="act") >> descend(4) >> options(guided=4)         arXiv:2505.07004
    awq        awq_scale() >> nearest() >> clip()                                     arXiv:2306.00978
    spqr       spqr(threshold=0.2)                                                    arXiv:2306.03078
    squeezellm sparse(0.0045) >> lut3 >> nearest(weight="h") >> options(sensitive=True)            arXiv:2306.07629
    lnq        lut3 >> nearest(weight="h") >> refit(3, sweeps=4)                      arXiv:2505.07004
    aqlm       aqlm_2x8_g8 >> nearest(weight="h") >> ldlq("act") >> codebooks(4)      arXiv:2401.06118
    quip       rescale() >> kronecker() >> nearest() >> ldlq("act") >> descend(9)     arXiv:2307.13304
    quip_sharp hadamard() >> E8P_2 >> nearest() >> ldlq("act") >> descend(10)         arXiv:2402.04396
    qtip       hadamard() >> trellis2_L12_3inst >> nearest() >> ldlq("act") >> descend(3)    arXiv:2406.11235

and smoothquant, llm_int8, w8a8, quarot, hqq, autoround, omniquant below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.formats.integer import affine
from qjax.formats.vectors.additive import additive
from qjax.formats.vectors.trellis import trellis
from qjax.recipes.composed import Recipe
from qjax.reparam import Reparam, act, awq_scale, hadamard, kronecker, rescale, smooth, sparse
from qjax.rounding import Rounding, annealed, clip, codebooks, descend, ldlq, learned, learned_clipping, nearest, refit
from qjax.rounding import hqq as hqq_stage
from qjax.rounding import spqr as spqr_stage


def rtn(format: str | Format | None = None) -> Recipe:
    """Round to nearest, scales of least squared error."""
    return _recipe("rtn", format, nearest())


def imatrix(format: str | Format | None = None) -> Recipe:
    """Nearest, scales of least error weighted by E[x^2] of the float model: what llama.cpp does with an imatrix."""
    return _recipe("imatrix", format, nearest("h"), sequential=False)


def gptq(bits: int = 4, group: int = 128, format: str | Format | None = None) -> Recipe:
    """GPTQ (arXiv:2210.17323): plain fit, error feedback in act-order with static groups, sequential statistics.

    >>> str(gptq(3, group=64))
    "uint3_g64 >> nearest(weight='none') >> ldlq(order='act', grid='static', cross=0.0)"
    """
    return _recipe("gptq", affine(bits, group) if format is None else format, nearest(), ldlq("act"))


def gptaq(bits: int = 4, group: int = 128, format: str | Format | None = None, alpha: float = 1.0) -> Recipe:
    """GPTQ with the cross term (GPTAQ, arXiv:2504.02692): targets make up for what the predecessors changed."""
    return _recipe("gptaq", affine(bits, group) if format is None else format, nearest(), ldlq("act", cross=alpha))


def best_gguf(format: str | Format | None = None) -> Recipe:
    """The best file of a GGUF type: importance-weighted fit, act-order feedback, then scales and codes in turn; the
    statistics are believed as far as held-out windows ask for (rounding/shrinkage.py), and rows make up for each other
    where that pays (rounding/two_sided.py)."""
    stages = nearest("h"), ldlq("act", cross=1.0), refit(2, 2)
    return _recipe("best_gguf", format, *stages, sensitive=0.5, shrink=True, two_sided=8)


def gsq(rounds: int = 24, format: str | Format | None = None) -> Recipe:
    """GSQ (arXiv:2604.18556) on each layer's output, its noise in closed form: best_gguf, then its codes and scales
    annealed together (rounding/annealed.py), never for a larger loss; `relaxed` has GSQ's own gradient steps."""
    best = best_gguf(format)
    return dataclasses.replace(best, roundings=(*best.roundings, annealed(rounds)), name="gsq")


def yaqa(format: str | Format | None = None) -> Recipe:
    """YAQA (arXiv:2505.22988): error feedback along rows and columns, in H_O (x) H_I. Its sketches are
    `calibrate.kronecker`'s, for `quantize_params`; a walk takes tokens weighted by gradients for H_I and G for H_O."""
    return _recipe("yaqa", format, nearest("h"), ldlq("act"), sensitive=True, two_sided=64)


def guided(format: str | Format | None = None) -> Recipe:
    """GuidedQuant (arXiv:2505.07004): each of four groups of rows in an H of its own, `calibrate.guided`'s."""
    return _recipe("guided", format, nearest("h"), ldlq("act"), descend(4), guided=4)


def awq(bits: int = 4, group: int = 128, format: str | Format | None = None) -> Recipe:
    """AWQ (arXiv:2306.00978): salient channels scaled up, ranges clipped, nearest."""
    made = affine(bits, group) if format is None else format
    return _recipe("awq", made, nearest(), clip(), reparams=(awq_scale(),))


def smoothquant(alpha: float = 0.5, format: str | Format | None = None) -> Recipe:
    """SmoothQuant (arXiv:2211.10438): outliers move from inputs to weights; both int8, per token and per row."""
    made = "int8_row" if format is None else format
    return _recipe("smoothquant", made, nearest(), reparams=(smooth(alpha), act("int8")))


def llm_int8(threshold: float = 6.0, format: str | Format | None = None) -> Recipe:
    """LLM.int8() (arXiv:2208.07339): inputs and weights int8, channels with an |x| >= 6 in floating point."""
    made = "int8_row" if format is None else format
    return _recipe("llm_int8", made, nearest(), reparams=(act("int8", threshold=threshold),))


def w8a8(format: str | Format | None = None) -> Recipe:
    """Weights per row and inputs per token in int8, accumulated in int32."""
    return _recipe("w8a8", "int8_row" if format is None else format, nearest(), reparams=(act("int8"),))


def spqr(threshold: float = 0.2, format: str | Format | None = None) -> Recipe:
    """SpQR (arXiv:2306.03078): error feedback with outliers in CSR, groups of 16 with 3-bit scales and zeros."""
    made = "uint3_g16_bilevel3x16" if format is None else format
    return _recipe("spqr", made, spqr_stage(threshold))


def squeezellm(bits: int = 3, share: float = 0.0045, format: str | Format | None = None) -> Recipe:
    """SqueezeLLM (arXiv:2306.07629): a table of levels a row by k-means weighted with sensitivity, the most sensitive
    weights in CSR. Tokens count by their gradient; all rows of a weight share the result, where the paper has a Fisher
    diagonal for each weight."""
    reparams = (sparse(share),) if share else ()
    made = f"lut{bits}" if format is None else format
    return _recipe("squeezellm", made, nearest("h"), reparams=reparams, sequential=False, sensitive=True)


def lnq(bits: int = 3, format: str | Format | None = None) -> Recipe:
    """LNQ (GuidedQuant, arXiv:2505.07004, section 4): tables by least squares in the metric of H and codes by descent,
    in turns, from weighted k-means. Tables are solved for before every pass of descent, three rounds of four."""
    return _recipe("lnq", f"lut{bits}" if format is None else format, nearest("h"), refit(3, 4))


def aqlm(books: int = 2, bits: int = 8, rounds: int = 4, format: str | Format | None = None) -> Recipe:
    """AQLM (arXiv:2401.06118): weighted residual k-means, feedback, then codebooks by least squares in the metric of H
    and codes by beam search, in turns. Its tuning of blocks is `TuneBlocks`, behind any recipe."""
    made = additive(books, bits) if format is None else format
    return _recipe("aqlm", made, nearest("h"), ldlq("act"), codebooks(rounds))


def quip(bits: int = 2, seed: int = 0, best_of: int = 1, format: str | Format | None = None) -> Recipe:
    """QuIP (arXiv:2307.13304): incoherence by rescaling and two Kronecker rotations, LDLQ, greedy descent."""
    made = f"int{bits}_row_mid_mse" if format is None else format
    reparams = (rescale(), kronecker(seed=seed, best_of=best_of))
    return _recipe("quip", made, nearest(), ldlq("act"), descend(9), reparams=reparams)


def quip_sharp(bits: int = 2, seed: int = 0, best_of: int = 1, format: str | Format | None = None) -> Recipe:
    """QuIP# (arXiv:2402.04396) without its fine-tuning: both sides rotated, block LDLQ onto E8P, descent."""
    made = f"E8P_{bits}" if format is None else format
    return _recipe("quip_sharp", made, nearest(), ldlq("act"), descend(10), reparams=(_rotation(seed, best_of),))


def qtip(
    bits: int = 2, L: int = 12, code: str = "3inst", seed: int = 0, best_of: int = 1,
    format: str | Format | None = None,
) -> Recipe:  # fmt: skip
    """QTIP (arXiv:2406.11235) without its fine-tuning: both sides rotated, block LDLQ onto a trellis; and descent."""
    made = trellis(bits, L, code) if format is None else format
    return _recipe("qtip", made, nearest(), ldlq("act"), descend(3), reparams=(_rotation(seed, best_of),))


def quarot(bits: int = 4, group: int = 128, seed: int = 0, format: str | Format | None = None) -> Recipe:
    """Rotated inputs, then GPTQ: QuaRot's (arXiv:2404.00456) at run time; `qjax.models.fuse.rotated` folds it away."""
    made = affine(bits, group) if format is None else format
    return _recipe("quarot", made, nearest(), ldlq("act"), reparams=(hadamard("in", seed=seed),))


def hqq(bits: int = 4, group: int = 64, format: str | Format | None = None) -> Recipe:
    """HQQ: data-free, a zero point that is robust to outliers."""
    return _recipe("hqq", affine(bits, group, zero="f16") if format is None else format, hqq_stage())


def autoround(bits: int = 4, group: int = 128, steps: int = 200, format: str | Format | None = None) -> Recipe:
    """AutoRound (arXiv:2309.05516): rounding offsets and ranges by signed gradients, on each layer's output."""
    made = affine(bits, group) if format is None else format
    return _recipe("autoround", made, nearest(), learned(steps))


def omniquant(bits: int = 4, group: int = 128, steps: int = 200, format: str | Format | None = None) -> Recipe:
    """OmniQuant's learned clipping (arXiv:2308.13137), on each layer's output."""
    made = affine(bits, group) if format is None else format
    return _recipe("omniquant", made, nearest(), learned_clipping(steps))


RECIPES: dict[str, Callable[..., Recipe]] = {
    f.__name__: f
    for f in (
        rtn, imatrix, gptq, gptaq, best_gguf, gsq, yaqa, guided, awq, smoothquant, llm_int8, w8a8, spqr, squeezellm,
        lnq, aqlm, quip, quip_sharp, qtip, quarot, hqq, autoround, omniquant,
    )
}  # fmt: skip


def _rotation(seed: int, best_of: int) -> Reparam:
    return hadamard(seed=seed, best_of=best_of)


def _recipe(name: str, format: str | Format | None, *roundings: Rounding, **options: Any) -> Recipe:
    return Recipe(roundings, None if format is None else get_format(format), name=name, **options)
