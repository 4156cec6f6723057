"""The weights of one piece of a decoder, rounded in the order in which they run: those of one input together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.lifting import Piece, Use, cut
from qjax.models.stages import Apply, Stages
from qjax.pipeline.activations import Streams
from qjax.pipeline.inputs import Sent
from qjax.pipeline.passes import Checked, Here, groups_of
from qjax.pipeline.rounded import of_embedding
from qjax.pipeline.survey import Survey
from qjax.pipeline.token_weights import effective, tempered
from qjax.pipeline.tuned import get, put
from qjax.recipes import Recipe
from qjax.rounding.ldlq import LDLQ
from qjax.rounding.shrinkage import Split
from qjax.stats import Stats
from qjax.tensor import QTensor
from qjax.typing import Array

EMBEDDING = "embed/embedding"

Weights = tuple[np.ndarray, np.ndarray | None, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]
"""What the survey says of a piece: sensitivity, alike, G of its weights' outputs, sensitivity of groups of rows."""

Formats = Mapping[str, tuple[Format, Recipe]]
Round = Callable[[str, Any, int, "Seen"], Array]  # path, weight, axis, its input -> the rounded weight, dense


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of an input.

    Attributes:
      stats, heldout: of the windows that are used, and of those held out; None where nothing was wanted.
      effective: tokens and windows behind them, see `effective`; None where tokens count alike.
      sent: the tokens of each expert, where some have too few and are filled up.
      shared: what the weights of this input make of it together.
    """

    stats: Stats | None = None
    heldout: Stats | None = None
    effective: tuple[float, float] | None = None
    sent: Sent | None = None
    shared: dict[Any, Split] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class How:
    """What is the same for every piece: see `walk`.

    Attributes:
      counted: the windows over which tokens weigh 1 on average; those that are used, not held out.
      makes_codes: the windows whose tokens make codes in the end: where a recipe shrinks, all.
      at_once: a piece is looked at in one pass: nothing is put in place before its end, and statistics are vectors.
      observe: takes what `observe_inputs` takes behind the kinds.
      advance: takes what `advanced` takes behind the folder.
      settle: (the piece as it is, the weights still to be rounded) -> the same tuned, behind the weights of each input;
        all inputs are looked at from the piece's beginning then. None: nothing moves.
    """

    formats: Formats
    earlier: Mapping[str, QTensor]
    counted: int
    makes_codes: int
    sequential: bool
    at_once: bool
    observe: Callable[..., list[tuple[Stats, Stats | None, Sent | None]]]
    advance: Callable[..., Here]
    round_one: Round
    settle: Callable[[Any, tuple[str, ...]], Any] | None = None


def rounded_embedding(
    stages: Stages, parts: Checked, formats: Formats, seen: Survey | None, round_one: Round
) -> np.ndarray | None:
    """The embedding, rounded in the curvature of its output; a tied one in that of both its uses. None: it is kept."""
    if EMBEDDING not in formats:
        return None
    stats = None
    if seen is not None and "H" in formats[EMBEDDING][1].requires:
        C = seen.embedding + seen.head if stages.tied else seen.embedding
        stats = Stats(H=jnp.asarray(C), count=jnp.float32(seen.tokens))
    return np.asarray(round_one(EMBEDDING, parts.part("embed")["embedding"], -1, Seen(stats)))


def rounded_piece(
    prefix: str,
    applies: tuple[Apply, Apply],
    floats: Any,
    streams: Streams,
    weights: Weights | None,
    how: How,
) -> tuple[Any, Here]:
    """Round a piece's weights in the order they run.

    Between two inputs that are looked at both streams advance to the second, so that each equation runs once a stream.

    Returns: the weights to go on with, dense: sequential, the rounded; and the place of the last input looked at.
    """
    apply, to_all = applies
    now = floats
    example = jax.ShapeDtypeStruct((1, *streams.x.array.shape[1:]), jnp.float32)
    groups = [
        (g, {_join(prefix, u.path): u for u in group if _join(prefix, u.path) in how.formats})
        for g, group in enumerate(groups_of(apply, floats, example))
    ]
    wanted = [(g, todo) for g, todo in groups if _asks(todo, how)]
    x, x_float = (streams.x.array,), None if streams.x_float is None else (streams.x_float.array,)
    here, whole = Here(apply, x, x_float), Here(to_all, x, x_float)
    cuts = len(wanted) > 1 and not how.at_once and how.settle is None
    pieces = cut(apply, floats, example) if cuts else ()
    at = 0

    def look(some: list[tuple[int, dict[str, Use]]]) -> dict[int | str, Seen]:
        """What is known of the inputs of some groups behind the weights as they are now; of a weight whose groups of
        rows have an H each, by its name."""
        nonlocal here, at
        while pieces and some[0][0] not in pieces[at].groups:
            here, at = how.advance(pieces[at], pieces[at + 1], now, floats, here), at + 1
        asked = [wish for g, todo in some for wish in wishes(g, todo, weights, how)]
        uses, names, counts = [w.use for w in asked], [w.name for w in asked], [w.weight for w in asked]
        seen = [_use_there(pieces[at], floats, w.group, w.use) for w in asked] if at else uses
        found = how.observe(here, seen, whole, uses, now, floats, counts, names)
        known: dict[int | str, list[Seen]] = {}
        for wish, (stats, heldout, sent) in zip(asked, found, strict=True):
            tokens = None if wish.weight is None else effective(wish.weight[: how.makes_codes])
            known.setdefault(wish.key, []).append(Seen(stats, heldout, tokens, sent))
        return {key: together(of) if isinstance(key, str) else of[0] for key, of in known.items()}

    ahead: dict[int | str, Seen] = look(wanted) if how.at_once and wanted else {}
    left = [tuple(use.path for _, later in groups[g + 1 :] for use in later.values()) for g, _ in groups]
    for g, todo in groups:
        found = ahead if how.at_once or (g, todo) not in wanted else look([(g, todo)])
        for name, use in todo.items():
            seen = found.get(name, found.get(g, Seen()))
            own = seen if weights is None else _with_curvature(seen, weights[2].get(use.path))
            w_hat = how.round_one(name, get(now, use.path), _axis(use), own)
            now = put(now, use.path, w_hat) if how.sequential else now
        now = how.settle(now, left[g]) if how.settle is not None and todo and left[g] else now
    return now, here


def _use_there(piece: Piece, floats: Any, g: int, use: Use) -> Use:
    """A use of the group g as the function behind a cut has it."""
    group = groups_of(piece.rest, floats, *piece.live)[piece.groups.index(g)]
    return next(u for u in group if u.path == use.path)


def _asks(todo: Mapping[str, Use], how: How) -> bool:
    """Whether a weight of a group is still to be rounded by a recipe that looks at inputs."""
    return any(how.formats[name][1].requires for name in todo if name not in how.earlier)


@dataclasses.dataclass(frozen=True, eq=False)
class Wish:
    """Statistics that are wanted at the input of a group: for all its weights (key: the group), or for one group of the
    rows of one of them (key: its name)."""

    key: int | str
    group: int
    name: str
    use: Use
    weight: np.ndarray | None


def wishes(g: int, todo: Mapping[str, Use], weights: Weights | None, how: How) -> list[Wish]:
    """What the weights of an input ask for, and how much each token counts in it; None: alike."""
    sensitivity, alike, _, by_rows = weights or (np.zeros(0), None, {}, {})
    apart = {name: use for name, use in todo.items() if how.formats[name][1].guided and use.path in by_rows}
    rest = {name: use for name, use in todo.items() if name not in apart}
    made: list[Wish] = []
    for name, use in apart.items():
        power = float(how.formats[name][1].sensitive or 1)
        each = (tempered(s, power, how.counted, alike) for s in by_rows[use.path])
        made += [Wish(name, g, name, use, weight) for weight in each]
    if rest:
        power = float(max(how.formats[name][1].sensitive for name in rest))
        weight = tempered(sensitivity[g], power, how.counted, alike) if weights is not None and power else None
        made.append(Wish(g, g, *next(iter(rest.items())), weight))
    return made


def together(seen: list[Seen]) -> Seen:
    """Of the groups of rows of a weight: their statistics stacked, and the fewest tokens that one of them stands on."""

    def stacked(of: list[Stats | None]) -> Any:
        return jax.tree.map(lambda *a: jnp.stack(a), *of)

    fewest = min(s.effective for s in seen if s.effective is not None)
    return Seen(stacked([s.stats for s in seen]), stacked([s.heldout for s in seen]), fewest)


def _with_curvature(seen: Seen, G: np.ndarray | None) -> Seen:
    """With G of a weight's own output."""
    if G is None or seen.stats is None:
        return seen
    used, heldout = map(jnp.asarray, G)
    there = None if seen.heldout is None else dataclasses.replace(seen.heldout, G=heldout)
    return dataclasses.replace(seen, stats=dataclasses.replace(seen.stats, G=used), heldout=there)


def for_embedding(recipe: Recipe) -> Recipe:
    """Without a cross term, for it has no input that could have changed; not shrunk, for no tokens are held out of its
    curvature; rows alone, for they are tokens; as it is, for it is looked up."""
    roundings = tuple(dataclasses.replace(r, cross=0.0) if isinstance(r, LDLQ) else r for r in recipe.roundings)
    return of_embedding(dataclasses.replace(recipe, roundings=roundings, shrink=False, two_sided=0, guided=0))


def _axis(use: Use) -> int:
    if use.axis not in (-1, -2) or len(use.axes) != 1:
        raise UserError(f"{use.path}: a block's weight must be contracted along one of its last two axes")
    return use.axis


def _join(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path
