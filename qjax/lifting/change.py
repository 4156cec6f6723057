"""Change what a function computes at its weights: fake quantization, low-rank adapters, taps for gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.lifting.run import Traced, matrices, packed_only, run, survey, trace
from qjax.lifting.scope import Interpretation, Place, Site, Stats
from qjax.lifting.weight import Use, Weight, as_weight
from qjax.tensor import is_qtensor

Function = Callable[..., Any]


def substitute(fn: Function, transform: Callable[[Use, Any], Any]) -> Function:
    """Replace each weight by a function of it, e.g. its fake-quantized self.

    Args:
      fn: a pure function of (params, *inputs).
      transform: (use, w) -> w' of the same shape and type; called once for each (path, axis) of dense leaves with a dot
        or gather, with the first such use and the leaf as stored. Gradients flow through it.

    Returns: a function of (params, *inputs). Other uses of a leaf see the same w', but w where it has several axes.

    Raises:
      UserError: (when called) transform returns another shape or type.
    """

    def substituted(params: Any, *args: Any, **kwargs: Any) -> Any:
        traced = trace(fn, params, args, kwargs)
        leaves = dict(zip(traced.paths, traced.leaves, strict=True))
        changed: dict[str, dict[int, Any]] = {}
        for use in survey(traced).uses.values():
            w = leaves[use.path]
            if use.axis is None or is_qtensor(w) or use.axis in changed.get(use.path, {}):
                continue
            new = changed.setdefault(use.path, {})[use.axis] = transform(use, w)
            if (new.shape, new.dtype) != (w.shape, w.dtype):
                raise UserError(
                    f"transform made {new.dtype}{list(new.shape)} of {use.path!r}, which is {w.dtype}{list(w.shape)}"
                )

        def tag(path: str, leaf: Any) -> Weight | None:
            if len(changed.get(path, {})) > 1:
                return dataclasses.replace(as_weight(path, leaf), value={0: leaf, **changed[path]})
            return packed_only(path, leaf)

        def only(path: str | None, leaf: Any) -> Any:
            values = changed.get(path or "", {})
            return next(iter(values.values())) if path is not None and len(values) == 1 else leaf

        single = [only(path, leaf) for path, leaf in zip(traced.paths, traced.leaves, strict=True)]
        return run(dataclasses.replace(traced, leaves=single), Interpretation(), tag)[0]

    return substituted


def replace_inputs(fn: Function, transform: Callable[[Use, Any], Any]) -> Function:
    """Replace the activation of each dot by a function of it, e.g. its fake-quantized self.

    Args:
      fn: a pure function of (params, *inputs); params dense or packed.
      transform: (use, x) -> x' of the same shape and type, x [*batch, *tokens, n] with its contracted axes last and
        merged; called for every dot with a weight, once for each weight that reads an activation. Gradients flow
        through it. Lookups are left alone.

    Returns: a function of (params, *inputs).

    Raises:
      UserError: (when called) transform returns another shape or type.
    """

    def checked(use: Use, x: Any) -> Any:
        new = transform(use, x)
        if (new.shape, new.dtype) != (x.shape, x.dtype):
            raise UserError(
                f"transform made {new.dtype}{list(new.shape)} of the input of {use.path!r}, which is "
                f"{x.dtype}{list(x.shape)}"
            )
        return new

    def replaced(params: Any, *args: Any, **kwargs: Any) -> Any:
        return run(trace(fn, params, args, kwargs), Interpretation(replace_input=checked), matrices)[0]

    return replaced


def adapt(fn: Function) -> Function:
    """Add low-rank adapters to weights: y = x . W + scale (x . A) . B, as if W were W + scale A . B.

    Args:
      fn: a pure function of (params, *inputs); params dense or packed.

    Returns: a function of (params, adapters, *inputs). `adapters` is {path: record with a [n, r], b [r, *out] and
      scale}, n the merged contracted axes and `out` the weight's other axes as the dot has them. Under a scan over
      weights, and for batched weights, a and b are stacked on leading axes like them.

    Raises:
      UserError: (when called) an adapter's weight is unknown, looked up or used in another way than in dots, or
        a and b do not fit it.
    """

    def adapted(params: Any, adapters: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # A scan cuts the arrays of the feed into steps; a scale that all steps share stays out of it.
        scales = {path: jnp.asarray(m.scale) for path, m in adapters.items()}
        feed = {path: (m.a, m.b, scales[path] if scales[path].ndim else None) for path, m in adapters.items()}

        def visit(site: Site) -> tuple[Any, Stats]:
            path = site.use.path
            if path not in adapters or site.contraction is None:
                return site.y, {}
            a, b, own = site.feed[path]
            return site.y + _low_rank(site, a, b, scales[path] if own is None else own), {}

        program = Interpretation(visit=visit, steps_over=lambda place, paths: paths)
        out, _ = run(trace(fn, params, args, kwargs), program, matrices, feed)
        for path in adapters:
            kinds = {use.kind for use in program.uses.values() if use.path == path}
            if kinds != {"dot"}:
                how = f"is used as {sorted(kinds)}" if kinds else "is no weight that this function uses"
                raise UserError(f"no adapter fits {path!r}: it {how}, and only dots can be adapted")
        return out

    return adapted


def _low_rank(site: Site, a: Any, b: Any, scale: Any) -> Any:
    """scale (x . A) . B in the order and type of the dot's result."""
    c, x = site.contraction, site.x
    assert c is not None
    if site.inside == "shard_map":
        raise UserError(f"{site.use.path!r} is used in a shard_map, where no adapter can be added")
    if site.use.picked:
        raise UserError(f"{site.use.path!r} is picked from its stack by an index, where no adapter can be added")
    product = partial(jnp.tensordot, axes=1)
    for _ in c.x_batch:
        product = jax.vmap(product)
    try:
        delta = c.restore(product(product(x, a.astype(x.dtype)), b.astype(x.dtype)))
    except (TypeError, ValueError):
        delta = None
    if delta is None or delta.shape != site.y.shape:
        raise UserError(
            f"the adapter of {site.use.path!r} has a {a.shape} and b {b.shape}; an input of {x.shape} and a result of "
            f"{site.y.shape} want a [n, r] and b [r, *out]"
        )
    return (delta * scale.astype(x.dtype)).astype(site.y.dtype)


def tap(fn: Function) -> Function:
    """Add arrays to the results of dots and gathers, so that the gradient by a tap is the gradient by that result.

    Args:
      fn: a pure function of (params, *inputs); params dense or packed.

    Returns: a function of (params, taps, *inputs); `taps` is {key: array or None}, keys and shapes from `tap_shapes`.

    Raises:
      UserError: (when called) an unknown key, a wrong shape, or a use inside a shard_map or while loop.
    """

    def tapped(params: Any, taps: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        traced = trace(fn, params, args, kwargs)
        places = {site.use.key: site.place for site in _sites(traced).values()}
        _check_taps(taps, places)

        def visit(site: Site) -> tuple[Any, Stats]:
            t = site.feed.get(site.use.key)
            if t is None:
                return site.y, {}
            if t.shape != site.y.shape:
                raise UserError(f"the tap of {site.use.key!r} has shape {t.shape}, its result {site.y.shape}")
            return site.y + t.astype(site.y.dtype), {}

        def steps_over(scan: Place, paths: set[str]) -> set[str]:
            return {key for key in taps if places[key][: len(scan)] == scan}

        return run(traced, Interpretation(visit=visit, steps_over=steps_over), matrices, taps)[0]

    return tapped


def tap_shapes(fn: Function, params: Any, *args: Any, **kwargs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The taps that a function has: shape and type of the result of each dot and gather.

    Keys are paths; a leaf's second use is path#1. In a scan, shapes are stacked on a leading axis. Uses inside a while
    loop or shard_map have no tap.
    """
    sites = _sites(trace(fn, params, args, kwargs)).values()
    return {s.use.key: jax.ShapeDtypeStruct((*s.use.stacked, *s.y.shape), s.y.dtype) for s in sites}


def _sites(traced: Traced) -> dict[Place, Site]:
    """The dots and gathers of a function that a tap can reach."""
    sites: dict[Place, Site] = {}

    def visit(site: Site) -> tuple[Any, Stats]:
        if not site.inside:
            sites[site.place] = site
        return site.y, {}

    survey(traced, visit, matrices)
    return sites


def _check_taps(taps: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    unknown = sorted(set(taps) - set(places))
    if unknown:
        raise UserError(f"no use is called {unknown[0]!r}; the taps are {', '.join(sorted(places))}")
