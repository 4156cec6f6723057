"""The named methods, each a few lines over the algebra: reparametrizations, a format, then roundings.

    rtn        nearest()
    imatrix    nearest(weight="h")                                                    llama.cpp's importance matrix
    gptq       nearest() >> ldlq(order="act")                                         arXiv:2210.17323
    gptaq      nearest() >> ldlq(order="act", cross=1.0)                              arXiv:2504.02692
    best_gguf  nearest(weight="h") >> ldlq(order="act", cross=1.0) >> refit(2, sweeps=2)     ours
    awq        awq_scale() >> nearest() >> clip()                                     arXiv:2306.00978
    spqr       spqr(threshold=0.2)                                                    arXiv:2306.03078
    quip       rescale() >> kronecker() >> nearest() >> ldlq("act") >> descend(9)     arXiv:2307.13304

and smoothquant, llm_int8, w8a8, quarot, hqq, autoround, omniquant below.

A recipe prints as such a line and is read back from it; `recipe("best_gguf:Q3_K")` is a name and a format,
`recipe("Q3_K >> nearest(weight='h') >> ldlq() >> descend(2)")` one of your own.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import find as find_format
from qjax.formats import format as get_format
from qjax.formats.integer import affine
from qjax.reparam import (
    Reparam,
    act,
    awq_scale,
    columns,
    hadamard,
    kronecker,
    low_rank,
    orthogonal,
    permute,
    rescale,
    smooth,
    sparse,
)
from qjax.reparam.inputs import Act
from qjax.rounding import Rounding, clip, descend, ldlq, learned, learned_clipping, nearest, refit
from qjax.rounding import hqq as hqq_stage
from qjax.rounding import spqr as spqr_stage
from qjax.rounding.protocol import DAMPING, requires

STAGES: dict[str, Callable[..., Rounding]] = {
    f.__name__: f for f in (nearest, ldlq, descend, refit, spqr_stage, hqq_stage, learned, learned_clipping, clip)
}
REPARAMS: dict[str, Callable[..., Reparam]] = {
    f.__name__: f
    for f in (
        permute, smooth, awq_scale, rescale, hadamard, kronecker, orthogonal, columns, sparse, low_rank, act,
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """reparam >> ... >> format >> rounding >> rounding ...

    Attributes:
      roundings: the stages, in order; the first fits the scales.
      format: the grid, or None where a plan decides it weight by weight.
      damping: lambda of H + lambda diag(H), at least.
      sequential: statistics are gathered behind the already quantized predecessors; otherwise in the float model.
      sensitive: tokens count in H by the size of the loss gradient at the weight's output; otherwise all alike.
      reparams: changes of variables, made in this order before anything is rounded.
      name: for tables; equality does not look at it.
    """

    roundings: tuple[Rounding, ...]
    format: Format | None = None
    damping: float = DAMPING
    sequential: bool = True
    sensitive: bool = False
    reparams: tuple[Reparam, ...] = ()
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.roundings:
            raise UserError("a recipe needs at least one rounding, as in nearest()")
        if not self.damping > 0:
            raise UserError(f"damping must be positive, got {self.damping}")
        if any(isinstance(r, Act) for r in self.reparams[:-1]):
            raise UserError(
                "act rounds the input that meets the codes: it is the last reparametrization, and the only act"
            )

    @property
    def requires(self) -> frozenset[str]:
        """The statistics its stages cannot do without."""
        return requires(self.roundings).union(*(r.requires for r in self.reparams))

    def on(self, format: str | Format) -> Recipe:
        """The same roundings on a format."""
        return dataclasses.replace(self, format=get_format(format))

    def __rshift__(self, rounding: Rounding) -> Recipe:
        return dataclasses.replace(self, roundings=(*self.roundings, rounding), name="")

    def __str__(self) -> str:
        """The line `recipe` reads back."""
        head = [_call(r) for r in self.reparams]
        head += [] if self.format is None else [self.format.name]
        options = []
        for field in ("damping", "sequential", "sensitive"):
            value = getattr(self, field)
            if value != getattr(Recipe, field):
                options.append(f"{field}={value!r}")
        tail = [f"options({', '.join(options)})"] if options else []
        return " >> ".join([*head, *(_call(r) for r in self.roundings), *tail])


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
    """The best file of a GGUF type: importance-weighted fit, act-order feedback, then scales and codes in turn."""
    return _recipe("best_gguf", format, nearest("h"), ldlq("act", cross=1.0), refit(2, 2), sensitive=True)


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


def quip(bits: int = 2, seed: int = 0, best_of: int = 1, format: str | Format | None = None) -> Recipe:
    """QuIP (arXiv:2307.13304): incoherence by rescaling and two Kronecker rotations, LDLQ, greedy descent."""
    made = f"int{bits}_row_mid_mse" if format is None else format
    reparams = (rescale(), kronecker(seed=seed, best_of=best_of))
    return _recipe("quip", made, nearest(), ldlq("act"), descend(9), reparams=reparams)


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
        rtn, imatrix, gptq, gptaq, best_gguf, awq, smoothquant, llm_int8, w8a8, spqr, quip, quarot, hqq, autoround,
        omniquant,
    )
}  # fmt: skip


def recipe(text: str | Recipe) -> Recipe:
    """The recipe of a line: "name", "name:format", or stages joined by ">>".

    >>> recipe("best_gguf:Q3_K").format.name
    'Q3_K'
    >>> recipe(str(gptq())) == gptq()
    True

    Raises:
      UserError: no such recipe, stage, format or option.
    """
    if isinstance(text, Recipe):
        return text
    if ">>" in text or "(" in text:
        return _composed(text)
    name, colon, format = text.partition(":")
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}"
        raise UserError(f"unknown recipe {name!r}; {hint}")
    made = RECIPES[name](format=format if colon else None)
    return made if colon else dataclasses.replace(made, format=None)


def reparam(text: str) -> Reparam:
    """One reparametrization of a line such as "smooth(0.8)".

    Raises:
      UserError: no such reparametrization, or a wrong argument.
    """
    made = _composed(f"{text} >> nearest()")
    if len(made.reparams) != 1 or made.format is not None or len(made.roundings) != 1:
        raise UserError(f"{text!r} is not one reparametrization; there are {', '.join(REPARAMS)}")
    return made.reparams[0]


def _recipe(name: str, format: str | Format | None, *roundings: Rounding, **options: Any) -> Recipe:
    return Recipe(roundings, None if format is None else get_format(format), name=name, **options)


def _call(stage: Any) -> str:
    """The call that makes a stage; of a reparametrization's arguments those that are not its defaults."""
    fields = {f.name: (getattr(stage, f.name), f.default) for f in dataclasses.fields(stage)}
    kind = type(stage).__name__.lower()
    name = next((n for n in STAGES if n.replace("_", "") == kind), kind)
    if isinstance(stage, Reparam):
        name = stage.name
        fields = {k: v for k, v in fields.items() if v[0] != v[1] and v[0] != name}
    # A literal that reads back: repr(inf) is a name.
    shown = {k: "1e999" if v == float("inf") else repr(v) for k, (v, _) in fields.items()}
    return f"{name}({', '.join(f'{k}={v}' for k, v in shown.items())})"


def _composed(text: str) -> Recipe:
    format, options = None, {}
    reparams: list[Reparam] = []
    roundings: list[Rounding] = []
    for part in (p.strip() for p in text.split(">>")):
        try:
            node = ast.parse(part, mode="eval").body
        except SyntaxError:
            raise UserError(
                f"recipe {text!r}: {part!r} is neither a format nor a stage like ldlq(order='act')"
            ) from None
        if isinstance(node, ast.Name) and not roundings and part not in STAGES | REPARAMS:
            if format is not None:
                raise UserError(f"recipe {text!r}: two formats, {format.name} and {part}")
            near = difflib.get_close_matches(part, STAGES | REPARAMS, n=1)
            if near and find_format(part) is None:
                raise UserError(f"recipe {text!r}: {part!r} is neither a stage nor a format; did you mean {near[0]}?")
            format = get_format(part)
            continue
        name, args, kwargs = _literal_call(node, part, text)
        if name == "options":
            if args:
                raise UserError(f"recipe {text!r}: {part!r}: name each option, as in options(damping=0.01)")
            options = kwargs
            continue
        if name not in STAGES | REPARAMS:
            near = difflib.get_close_matches(name, STAGES | REPARAMS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"recipe {text!r}: unknown stage {name!r}; there are {', '.join(STAGES | REPARAMS)}{hint}")
        if name in REPARAMS and (roundings or format is not None):
            raise UserError(
                f"recipe {text!r}: {name} is a reparametrization and belongs in front of format and roundings"
            )
        try:
            if name in REPARAMS:
                reparams.append(REPARAMS[name](*args, **kwargs))
            else:
                roundings.append(STAGES[name](*args, **kwargs))
        except TypeError as e:
            raise UserError(f"recipe {text!r}: {part}: {e}") from None
    try:
        return Recipe(tuple(roundings), format, reparams=tuple(reparams), **options)
    except TypeError as e:
        raise UserError(f"recipe {text!r}: {e}") from None


def _literal_call(node: ast.AST, part: str, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, arguments and options of a call whose arguments are plain values; a bare name is a call without any."""
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise UserError(f"recipe {text!r}: {part!r} is no stage like ldlq(order='act')")
    try:
        args = [ast.literal_eval(a) for a in node.args]
        return node.func.id, args, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except ValueError:
        raise UserError(f"recipe {text!r}: {part!r}: arguments must be plain values") from None
