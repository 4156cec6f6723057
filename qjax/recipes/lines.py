"""A recipe as a line of text, which says what `>>` says in Python.

    recipe("best_gguf:Q3_K")                                              a name and a format
    recipe("gptq(bits=3)")                                                gptq(bits=3)
    recipe("hadamard() >> best_gguf:Q3_K")                                hadamard() >> best_gguf("Q3_K")
    recipe("Q3_K >> nearest(weight='h') >> ldlq()")                       format("Q3_K") >> nearest("h") >> ldlq()

A recipe prints as such a line and is read back from it. No code of a line is run: arguments are plain values.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any

from qjax.chain import Chain, Link
from qjax.errors import UserError
from qjax.formats import find as find_format
from qjax.formats import format as get_format
from qjax.recipes.composed import Recipe, joined
from qjax.recipes.methods import RECIPES
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
from qjax.rounding import (
    Rounding,
    annealed,
    clip,
    codebooks,
    descend,
    hqq,
    ldlq,
    learned,
    learned_clipping,
    nearest,
    neighbours,
    refit,
    relaxed,
    spqr,
)

STAGES: dict[str, Callable[..., Rounding]] = {
    f.__name__: f for f in (
        nearest, ldlq, descend, refit, neighbours, relaxed, annealed, codebooks, spqr, hqq, learned, learned_clipping,
        clip,
    )
}  # fmt: skip
REPARAMS: dict[str, Callable[..., Reparam]] = {
    f.__name__: f
    for f in (
        permute, smooth, awq_scale, rescale, hadamard, kronecker, orthogonal, columns, sparse, low_rank, act,
    )
}  # fmt: skip


def recipe(text: str | Recipe | Chain | Link) -> Recipe:
    """The recipe of a line, or of links joined in Python.

    A part of a line is a format, a reparametrization or a rounding ("ldlq", "ldlq(order='act')"), a recipe, or options
    ("options(damping=0.1)"). A recipe by its bare name leaves the format to a plan; "name:format" says it, and
    "name(arguments)" takes that of the Python function. spqr and hqq are roundings too: alone and bare, or with a
    format, they mean the recipe, else the rounding.

    >>> recipe("best_gguf:Q3_K").format.name
    'Q3_K'
    >>> recipe("gptq(bits=3)").format.name, recipe("gptq").format
    ('uint3_g128', None)
    >>> str(recipe("hadamard() >> gptq >> descend(2)"))
    "hadamard() >> nearest(weight='none') >> ldlq(order='act', grid='static', cross=0.0) >> descend(sweeps=2)"

    Raises:
      UserError: no such recipe, stage, format or option; parts in an order that means nothing.
    """
    if isinstance(text, Recipe):
        return text
    if not isinstance(text, str):
        return joined(text)
    if text.strip() in RECIPES:
        return _named(text.strip(), text)
    alone = re.fullmatch(r"(\w*)(:[\w.]*)?", text.strip())
    if alone and alone[1] not in RECIPES | STAGES | REPARAMS and (alone[2] or find_format(alone[1]) is None):
        near = difflib.get_close_matches(alone[1], RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}"
        raise UserError(f"unknown recipe {alone[1]!r}; {hint}")
    parts = [_part(part.strip(), text) for part in text.split(">>")]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], Recipe) else joined(*parts, line=text)


def reparam(text: str) -> Reparam:
    """One reparametrization of a line such as "smooth(0.8)".

    Raises:
      UserError: no such reparametrization, or a wrong argument.
    """
    made = _part(text.strip(), text) if ">>" not in text else None
    if not isinstance(made, Reparam):
        raise UserError(f"{text!r} is not one reparametrization; there are {', '.join(REPARAMS)}")
    return made


def _named(part: str, line: str) -> Recipe:
    """What "name", "name:format", "name(arguments)" or "name(arguments):format" of a recipe means."""
    call, colon, format = part.rpartition(":") if re.search(r":[\w.]*$", part) else (part, "", "")
    if "(" not in call:
        made = RECIPES[call.strip()](format=format if colon else None)
        return made if colon else dataclasses.replace(made, format=None)
    name, args, kwargs = _literal_call(_parsed(call, line), call, line)
    made = _made(RECIPES[name], args, kwargs, part, line)
    return made.on(format) if colon else made


def _part(part: str, line: str) -> Any:
    """What one part of a line stands for."""
    name = re.split(r"[(:]", part)[0].strip()
    if name in RECIPES and (name not in STAGES or ":" in part):
        return _named(part, line)
    node = _parsed(part, line)
    if isinstance(node, ast.Name) and part not in STAGES | REPARAMS:
        words = STAGES | REPARAMS | RECIPES
        near: list[str] = difflib.get_close_matches(part, words, n=1)
        if near and find_format(part) is None:
            raise UserError(f"recipe {line!r}: {part!r} is neither a stage nor a format; did you mean {near[0]}?")
        return get_format(part)
    name, args, kwargs = _literal_call(node, part, line)
    if name == "options":
        if args:
            raise UserError(f"recipe {line!r}: {part!r}: name each option, as in options(damping=0.01)")
        return kwargs
    if name not in STAGES | REPARAMS:
        near = difflib.get_close_matches(name, STAGES | REPARAMS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"recipe {line!r}: unknown stage {name!r}; there are {', '.join(STAGES | REPARAMS)}{hint}")
    return _made((STAGES | REPARAMS)[name], args, kwargs, part, line)


def _made(make: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], part: str, line: str) -> Any:
    try:
        return make(*args, **kwargs)
    except TypeError as e:
        raise UserError(f"recipe {line!r}: {part}: {e}") from None


def _parsed(part: str, line: str) -> ast.AST:
    try:
        return ast.parse(part, mode="eval").body
    except SyntaxError:
        raise UserError(f"recipe {line!r}: {part!r} is neither a format nor a stage like ldlq(order='act')") from None


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
