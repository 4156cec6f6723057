"""`a >> b`: reparametrizations, a format and roundings in a row, before a recipe is made of them.

    hadamard() >> affine(4, group=128) >> nearest() >> ldlq("act")            a Chain
    qjax.recipe(chain)                                                        the Recipe of it, checked

Whatever stands in a recipe is a `Link`; where a recipe takes part (`hadamard() >> recipes.gptq()`) the result is one.
"""

from __future__ import annotations

import dataclasses
from typing import Any


class Link:
    """What may stand in a chain."""

    @property
    def about(self) -> str:
        """One line on it, for lists."""
        return ""

    def __rshift__(self, other: Any) -> Any:
        return Chain((self,)) >> other


@dataclasses.dataclass(frozen=True)
class Chain:
    """Links in their order; what they mean together is said by `qjax.recipe`."""

    links: tuple[Link, ...]

    def __rshift__(self, other: Any) -> Any:
        if not isinstance(other, Link | Chain):
            return NotImplemented  # a recipe, which knows
        return Chain((*self.links, *(other.links if isinstance(other, Chain) else (other,))))
