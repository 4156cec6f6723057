"""A recipe: reparametrizations, a format, roundings, in a row, and `>>`, which makes one of its parts.

hadamard() >> affine(4, group=128) >> nearest() >> ldlq("act")        recipes.gptq() >> descend(2)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax.chain import Chain, Link
from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.reparam import Reparam
from qjax.reparam.inputs import Act
from qjax.rounding import Rounding
from qjax.rounding.nearest import Nearest
from qjax.rounding.protocol import DAMPING, requires
from qjax.tables import html_table


@dataclasses.dataclass(frozen=True)
class Recipe:
    """reparam >> ... >> format >> rounding >> rounding ...

    Attributes:
      roundings: the stages, in order; the first fits the scales.
      format: the grid, or None where a plan decides it weight by weight.
      damping: lambda of H + lambda diag(H), at least.
      sequential: statistics are gathered behind the already quantized predecessors; otherwise in the float model.
      sensitive: tokens count in H by the squared size of the loss gradient at the weight's output, to this power: True,
        which is 1, or less, as few tokens carry that sum (the first of a window then counts as the mean); False: alike.
      shrink: H, in the codes' variables, is shrunk toward its diagonal, and the cross term by a share, as far as
        held-out windows ask for; then all windows are used, and where the result is worse there than the fit weighted
        by E[x^2], the fit is taken.
      two_sided: rows of a weight make up for each other's errors too, in at most so many turns, in the metric of
        G = E[g g^T] of its output (rounding/two_sided.py), where that is known, as in a decoder; 0: rows stand alone.
      guided: so many groups of a weight's rows have an H of their own, in which tokens count by the gradient there
        (calibrate/guided.py), where that was collected; 0: one H for all rows.
      reparams: changes of variables, made in this order before anything is rounded.
      name: for tables; equality does not look at it.
    """

    roundings: tuple[Rounding, ...]
    format: Format | None = None
    damping: float = DAMPING
    sequential: bool = True
    sensitive: bool | float = False
    shrink: bool = False
    two_sided: int = 0
    guided: int = 0
    reparams: tuple[Reparam, ...] = ()
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.roundings:
            raise UserError("a recipe needs at least one rounding, as in nearest()")
        if not self.damping > 0:
            raise UserError(f"damping must be positive, got {self.damping}")
        if not 0 <= self.sensitive <= 1:
            raise UserError(f"sensitive is a power of the gradient's square, from 0 to 1; got {self.sensitive}")
        if type(self.two_sided) is not int or self.two_sided < 0:
            raise UserError(f"two_sided is a number of turns, 8 as a rule, or 0; got {self.two_sided!r}")
        if type(self.guided) is not int or self.guided < 0:
            raise UserError(f"guided is a number of groups of rows, 4 as a rule, or 0; got {self.guided!r}")
        if self.guided and (self.two_sided or self.reparams):
            what = f"two_sided={self.two_sided}" if self.two_sided else self.reparams[0].name
            raise UserError(f"guided={self.guided} rounds groups of rows apart, and {what} is of the whole weight")
        if any(isinstance(r, Act) for r in self.reparams[:-1]):
            raise UserError(
                "act rounds the input that meets the codes: it is the last reparametrization, and the only act"
            )

    @property
    def requires(self) -> frozenset[str]:
        """The statistics its stages cannot do without."""
        return requires(self.roundings).union(*(r.requires for r in self.reparams))

    @property
    def is_plain(self) -> bool:
        """Whether a format's own `encode` is all it says: scales fitted, with importance if there is one, nearest."""
        return not self.reparams and len(self.roundings) == 1 and isinstance(self.roundings[0], Nearest)

    def on(self, format: str | Format) -> Recipe:
        """The same roundings on a format."""
        return dataclasses.replace(self, format=get_format(format))

    def __rshift__(self, other: Link | Chain | Recipe) -> Recipe:
        return joined(self, other)

    def __rrshift__(self, other: Link | Chain) -> Recipe:
        return joined(other, self)

    def __str__(self) -> str:
        """The line `recipe` reads back."""
        head = [_call(r) for r in self.reparams]
        head += [] if self.format is None else [self.format.name]
        options = ", ".join(f"{field}={value!r}" for field, value in self._chosen)
        tail = [f"options({options})"] if options else []
        return " >> ".join([*head, *(_call(r) for r in self.roundings), *tail])

    @property
    def _chosen(self) -> list[tuple[str, Any]]:
        """The options that are not as they are by default."""
        return [(k, getattr(self, k)) for k in _OPTIONS if getattr(self, k) != getattr(Recipe, k)]

    def _repr_html_(self) -> str:
        """A row a step, in their order."""
        rows = [("reparametrize", _call(r)) for r in self.reparams]
        rows += [("represent", "as the plan says" if self.format is None else self.format.name)]
        rows += [("round", _call(r)) for r in self.roundings]
        rows += [(field, repr(value)) for field, value in self._chosen]
        title = f"Recipe {self.name}" if self.name else "Recipe"
        needs = ", ".join(sorted(self.requires)) or "no statistics"
        return html_table(f"{title}: needs {needs}", ("step", "by"), rows)


_OPTIONS = ("damping", "sequential", "sensitive", "shrink", "two_sided", "guided")


def joined(*parts: Link | Chain | Recipe | dict[str, Any], line: str = "") -> Recipe:
    """The recipe of parts in a row, what `>>` does.

    Args:
      parts: links, chains and recipes; a dict is options of the recipe (damping, sequential, sensitive, shrink,
        two_sided, guided).
      line: how they were written, for messages.

    Raises:
      UserError: a reparametrization behind a format or a rounding, a second format, a rounding that fits
        scales behind another, options that contradict each other.
    """
    line = line or " >> ".join(_shown(p) for p in parts)
    reparams: list[Reparam] = []
    roundings: list[Rounding] = []
    format: Format | None = None
    options: dict[str, Any] = {}

    def add(part: Any) -> None:
        nonlocal format
        if isinstance(part, Chain):
            for link in part.links:
                add(link)
        elif isinstance(part, Recipe):
            for piece in (*part.reparams, *([part.format] if part.format else []), *part.roundings):
                add(piece)
            add(dict(part._chosen))
        elif isinstance(part, dict):
            for key, value in part.items():
                if options.setdefault(key, value) != value:
                    raise UserError(f"recipe {line!r}: {key} is {options[key]} and {value}")
        elif isinstance(part, Reparam):
            if roundings or format is not None:
                raise UserError(
                    f"recipe {line!r}: {part.name} is a reparametrization and belongs in front of format and roundings"
                )
            reparams.append(part)
        elif isinstance(part, Rounding):
            if roundings and part.fits:
                raise UserError(f"recipe {line!r}: {_call(part)} fits the scales, which only the first rounding may do")
            roundings.append(part)
        elif isinstance(part, Format):
            if format is not None:
                raise UserError(f"recipe {line!r}: two formats, {format.name} and {part.name}")
            if roundings:
                raise UserError(f"recipe {line!r}: the format {part.name} belongs in front of the roundings")
            format = part
        else:
            raise UserError(f"recipe {line!r}: {part!r} is no format, reparametrization, rounding or recipe")

    for part in parts:
        add(part)
    try:
        return Recipe(tuple(roundings), format, reparams=tuple(reparams), **options)
    except TypeError as e:
        raise UserError(f"recipe {line!r}: {e}") from None


def _call(stage: Any) -> str:
    """The call that makes a stage; of a reparametrization's arguments those that are not its defaults."""
    fields = {f.name: (getattr(stage, f.name), f.default) for f in dataclasses.fields(stage)}
    if isinstance(stage, Reparam):
        fields = {k: v for k, v in fields.items() if v[0] != v[1] and v[0] != stage.name}
    # A literal that reads back: repr(inf) is a name.
    shown = {k: "1e999" if v == float("inf") else repr(v) for k, (v, _) in fields.items()}
    return f"{stage.name}({', '.join(f'{k}={v}' for k, v in shown.items())})"


def _shown(part: Any) -> str:
    if isinstance(part, Chain):
        return " >> ".join(map(_shown, part.links))
    return _call(part) if isinstance(part, Reparam | Rounding) else str(getattr(part, "name", part) or part)
