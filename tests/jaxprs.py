"""Reading jaxprs in tests."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

FULL = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def equations(jaxpr: Any, but: tuple[str, ...] = ()) -> Iterator[Any]:
    """All equations of a jaxpr and of those within it; not those of jitted functions called one of `but`."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        if eqn.params.get("name") not in but:
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from equations(inner, but)


def products(jaxpr: Any) -> tuple[int, list[Any]]:
    """How many products of float32 arrays there are, and those of them that are not at HIGHEST."""
    found = [e for e in equations(jaxpr) if e.primitive.name == "dot_general" and e.invars[0].aval.dtype == jnp.float32]
    return len(found), [e for e in found if e.params["precision"] != FULL]
