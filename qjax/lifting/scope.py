"""Where the interpreter stands, and what it keeps in mind: the ledger of uses, the names of activations.

A place is the path of equation numbers from the outermost jaxpr inwards, so tracing a loop body twice finds the same
uses again, and two traces of one program number them alike.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

from qjax.lifting import jax_names
from qjax.lifting.contract import Contraction
from qjax.lifting.joined import Joined
from qjax.lifting.picked import is_picked, of_stack
from qjax.lifting.weight import Use, Weight, refuse, whole_axes

Place = tuple[int, ...]
Stats = dict[int, Any]


@dataclasses.dataclass(frozen=True)
class Site:
    """What a visitor sees of one use.

    Attributes:
      use: the record of the use.
      place: where it stands; equal when the same equation is traced again.
      x: the activation, [*batch, *picked, *tokens, n] for a dot; the integer indices for a gather.
      y: the result, in the program's own order.
      contraction: how the dot's axes are arranged; None for a gather.
      entries: for each axis of `use.picked` which entry each token goes to; None where nobody knows.
      feed: the visitor's own arrays (taps, adapters), those of a scan cut to the present step.
      inside: "while" or "shard_map" if the use stands in one, else "".
    """

    use: Use
    place: Place
    x: Any
    y: Any
    contraction: Contraction | None
    feed: dict[str, Any]
    inside: str
    entries: tuple[Any, ...] | None = ()


# What a dot's activation [*batch, *tokens, n] is replaced by, of the same shape and type.
Replace = Callable[[Use, Any], Any]

# A visitor returns the result to go on with and statistics by source.
Visit = Callable[[Site], tuple[Any, Stats]]


@dataclasses.dataclass
class Interpretation:
    """One interpretation of one function.

    Attributes:
      visit: called at every dot and gather; None where nobody looks.
      replace_input: called with every dot's activation before the dot; None where activations stay.
      on_dense: what to do where a packed weight must be decoded: raise, warn, or only note it in the ledger.
      steps_over: (a scan's place, paths of the weights it steps over) -> keys of the feed that it steps over as well.
      uses, sources: the ledger.
    """

    visit: Visit | None = None
    replace_input: Replace | None = None
    on_dense: Literal["raise", "warn", "note"] = "raise"
    steps_over: Callable[[Place, set[str]], set[str]] = lambda place, paths: set()
    uses: dict[Place, Use] = dataclasses.field(default_factory=dict)
    sources: dict[Hashable, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Scope:
    """One jaxpr being interpreted: its place, the scans around it, and which outer variables its own stand for."""

    program: Interpretation
    jaxpr: Any
    place: Place = ()
    stacked: tuple[int, ...] = ()
    inside: str = ""
    feed: dict[str, Any] = dataclasses.field(default_factory=dict)
    alias: dict[Any, tuple[Scope, Any]] = dataclasses.field(default_factory=dict)
    definitions: dict[Any, Any] = dataclasses.field(default_factory=dict)
    readers: dict[Any, list[Any]] = dataclasses.field(default_factory=dict)

    def enter(self, jaxpr: Any, *at: int, **changes: Any) -> Scope:
        """The scope of a body whose activations are new ones: another at each step, or in each branch."""
        fields = {"stacked": self.stacked, "inside": self.inside, "feed": self.feed} | changes
        return Scope(self.program, jaxpr, (*self.place, *at), **fields)

    def call(self, eqn: Any, jaxpr: Any, at: int, **changes: Any) -> Scope:
        """The scope of a body that is called once: its activations are those outside."""
        inner = self.enter(jaxpr, at, **changes)
        inner.alias.update((v, (self, atom)) for v, atom in zip(jaxpr.invars, eqn.invars, strict=True))
        self.alias.update((v, (inner, atom)) for v, atom in zip(eqn.outvars, jaxpr.outvars, strict=True))
        return inner

    def name(self, atom: Any) -> Hashable:
        """What an activation is called: equal for the same variable seen through calls and equal conversions."""
        if isinstance(atom, jax_names.Literal):
            return self.place, id(atom)
        if atom in self.alias:
            scope, outer = self.alias[atom]
            return scope.name(outer)
        if not self.definitions:
            self.definitions.update((v, eqn) for eqn in self.jaxpr.eqns for v in eqn.outvars)
        eqn = self.definitions.get(atom)
        if eqn is None or eqn.primitive.name != "convert_element_type":
            return self.place, atom
        source = eqn.invars[0]
        return self.name(source) if source.aval.dtype == atom.aval.dtype else (atom.aval.dtype, self.name(source))

    def use(
        self,
        weight: Weight,
        at: Place,
        kind: Literal["dot", "gather"],
        axes: tuple[int, ...],
        key: Hashable,
        primitive: str,
        batch: Sequence[int] = (),
    ) -> Use:
        """Enter a dot or gather into the ledger.

        Args:
          weight, at, kind, axes: what is used, by which equation, how, along which stored axes.
          key: tells sources apart.
          primitive: the equation's.
          batch: the weight's present axes that the dot shares with the activation.
        """
        uses, place = self.program.uses, (*self.place, *at)
        if place not in uses:
            picks = of_stack(weight.picks, axes)
            picked = tuple(p.axis for p in picks if p.at is None)
            key = (kind, key, place) if picked else (kind, key)
            source = self.program.sources.setdefault(key, len(self.program.sources))
            nth = sum(u.path == weight.path and u.kind in ("dot", "gather") for u in uses.values())
            shared = [a for a in batch if not is_picked(weight.axes[a])]
            uses[place] = Use(
                weight.path, kind, axes[-1], source, weight.stored, self.stacked, axes, weight.scanned, weight.levels,
                nth, batch=len(shared), primitive=primitive, picked=picked,
                shared=tuple(label[0] for a in shared for label in weight.axes[a]),
                at=tuple((p.axis, p.at) for p in picks if p.at is not None),
            )  # fmt: skip
        return uses[place]

    def visit(
        self, use: Use, at: Place, x: Any, y: Any, c: Contraction | None, entries: tuple[Any, ...] | None = ()
    ) -> tuple[list[Any], Stats]:
        """Show a use to the visitor."""
        assert self.program.visit is not None
        y, stats = self.program.visit(Site(use, (*self.place, *at), x, y, c, self.feed, self.inside, entries))
        return [y], stats

    def other(
        self, weight: Weight, at: Place, primitive: str, note: str = "", kind: Literal["other", "conv"] = "other"
    ) -> None:
        """Enter a use that is neither dot nor gather into the ledger."""
        use = Use(
            weight.path, kind, None, -1, weight.stored, self.stacked, (), weight.scanned, weight.levels, note=note,
            primitive=primitive,
        )  # fmt: skip
        self.program.uses.setdefault((*self.place, *at), use)

    def users(self, eqn: Any) -> str:
        """The primitive that an equation's result goes into, where the equation only repeats or converts it."""
        if not self.readers:
            for reader in self.jaxpr.eqns:
                for v in reader.invars:
                    if not isinstance(v, jax_names.Literal):
                        self.readers.setdefault(v, []).append(reader)
        while eqn.primitive.name in ("broadcast_in_dim", "convert_element_type", "reshape"):
            readers = self.readers.get(eqn.outvars[0], [])
            if len(readers) != 1:
                break
            eqn = readers[0]
        return eqn.primitive.name

    def decode(
        self, weight: Weight | Joined, at: Place, primitive: str, reason: str, hidden: bool = False, user: str = ""
    ) -> Any:
        """Give up a weight to an operation that needs its values: a plain array, after raising or warning if asked to.

        Args:
          weight: the weight, or several joined: each is given up.
          at: the equation's number and the operand's.
          primitive, reason: why, as in "reduce_sum needs its values".
          hidden: the operation may multiply with it where nobody sees, so that dense weights count as well.
          user: the primitive that the ledger names, where `primitive` only repeats or converts the weight.
        """
        if isinstance(weight, Joined):
            parts = [
                self.decode(part, (*at, k), primitive, reason, hidden, user) if isinstance(part, Weight) else part
                for k, part in enumerate(weight.parts)
            ]
            return weight.array(parts)
        note = f"{primitive} {reason}" if weight.packed or hidden else ""
        self.other(weight, at, user or primitive, note)
        if note and self.program.on_dense != "note":
            error = refuse(weight, primitive, reason)
            if self.program.on_dense == "raise":
                raise error
            warnings.warn(f"{weight.path!r} is decoded: {note}", stacklevel=2)
        return weight.array()


def contracts_whole(weight: Weight, contraction: Contraction) -> tuple[int, ...] | None:
    """The stored axes a dot contracts, or None for a vector, a part of an axis, or nothing."""
    return whole_axes(weight, contraction.w_contract) if len(weight.stored) > 1 else None
