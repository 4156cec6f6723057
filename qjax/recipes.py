"""The named methods, each a few lines over the algebra: a format, then roundings.

    rtn        nearest()
    imatrix    nearest(weight="h")                                                    llama.cpp's importance matrix
    gptq       nearest() >> ldlq(order="act")                                         arXiv:2210.17323
    gptaq      nearest() >> ldlq(order="act", cross=1.0)                              arXiv:2504.02692
    best_gguf  nearest(weight="h") >> ldlq(order="act", cross=1.0) >> refit(2, sweeps=2)     ours

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
from qjax.formats import format as get_format
from qjax.formats.integer import affine
from qjax.rounding import Rounding, descend, ldlq, nearest, refit
from qjax.rounding.protocol import DAMPING, requires

STAGES: dict[str, Callable[..., Rounding]] = {f.__name__: f for f in (nearest, ldlq, descend, refit)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """format >> rounding >> rounding ...

    Attributes:
      roundings: the stages, in order; the first fits the scales.
      format: the grid, or None where a plan decides it weight by weight.
      damping: lambda of H + lambda diag(H), at least.
      sequential: statistics are gathered behind the already quantized predecessors; otherwise in the float model.
      sensitive: tokens count in H by the size of the loss gradient at the weight's output; otherwise all alike.
      name: for tables; equality does not look at it.
    """

    roundings: tuple[Rounding, ...]
    format: Format | None = None
    damping: float = DAMPING
    sequential: bool = True
    sensitive: bool = False
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.roundings:
            raise UserError("a recipe needs at least one rounding, as in nearest()")
        if not self.damping > 0:
            raise UserError(f"damping must be positive, got {self.damping}")

    @property
    def requires(self) -> frozenset[str]:
        """The statistics its roundings cannot do without."""
        return requires(self.roundings)

    def on(self, format: str | Format) -> Recipe:
        """The same roundings on a format."""
        return dataclasses.replace(self, format=get_format(format))

    def __rshift__(self, rounding: Rounding) -> Recipe:
        return dataclasses.replace(self, roundings=(*self.roundings, rounding), name="")

    def __str__(self) -> str:
        """The line `recipe` reads back."""
        head = [] if self.format is None else [self.format.name]
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


RECIPES: dict[str, Callable[..., Recipe]] = {f.__name__: f for f in (rtn, imatrix, gptq, gptaq, best_gguf)}


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


def _recipe(name: str, format: str | Format | None, *roundings: Rounding, **options: Any) -> Recipe:
    return Recipe(roundings, None if format is None else get_format(format), name=name, **options)


def _call(rounding: Any) -> str:
    name = next((n for n in STAGES if n == type(rounding).__name__.lower()), type(rounding).__name__)
    fields = dataclasses.fields(rounding)
    return f"{name}({', '.join(f'{f.name}={getattr(rounding, f.name)!r}' for f in fields)})"


def _composed(text: str) -> Recipe:
    format, options = None, {}
    roundings: list[Rounding] = []
    for i, part in enumerate(p.strip() for p in text.split(">>")):
        try:
            node = ast.parse(part, mode="eval").body
        except SyntaxError:
            raise UserError(
                f"recipe {text!r}: {part!r} is neither a format nor a stage like ldlq(order='act')"
            ) from None
        if isinstance(node, ast.Name) and i == 0 and part not in STAGES:
            format = get_format(part)
            continue
        name, args, kwargs = _literal_call(node, part, text)
        if name == "options":
            if args:
                raise UserError(f"recipe {text!r}: {part!r}: name each option, as in options(damping=0.01)")
            options = kwargs
            continue
        if name not in STAGES:
            raise UserError(f"recipe {text!r}: unknown stage {name!r}; there are {', '.join(STAGES)}")
        try:
            roundings.append(STAGES[name](*args, **kwargs))
        except TypeError as e:
            raise UserError(f"recipe {text!r}: {part}: {e}") from None
    try:
        return Recipe(tuple(roundings), format, **options)
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
