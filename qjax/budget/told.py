"""What a search came to, as rows of tables."""

from __future__ import annotations

import math
from typing import Any

from qjax.budget.groups import stored_size
from qjax.budget.search import Found
from qjax.models.config import DecoderConfig
from qjax.plan import Plan, decoder_weights

Rows = list[dict[str, Any]]


def rows_of(config: DecoderConfig, plan: Plan, found: Found) -> dict[str, Rows]:
    """Tables of a plan.

    Returns: "plans": all that were run, whole_bits and bytes with the weights that plans keep; "tensors": the best
      one's, by layer and kind; "formats": how many it has of each; "costs": every format of every group.
    """
    assigned = plan.assign(decoder_weights(config))
    sizes = {a.weight.path: (stored_size(a.format, a.weight.shape), math.prod(a.weight.shape)) for a in assigned}
    kept = sum(nbytes for path, (nbytes, _) in sizes.items() if path not in found.best.formats)
    every = sum(weights for _, weights in sizes.values())
    plans = [
        {
            "name": c.name, "whole_bits": 8 * (c.nbytes + kept) / every, "bytes": c.nbytes + kept,
            "predicted": c.predicted, "kl": c.kl, "kl_se": c.kl_se,
        }
        for c in found.candidates
    ]  # fmt: skip
    tensors = []
    for a in assigned:
        nbytes, weights = sizes[a.weight.path]
        name = "F32" if a.format is None else a.format.name
        tensors.append({**_place(a.weight.path), "format": name, "bits": 8 * nbytes / weights, "bytes": nbytes})
    held: dict[str, list[int]] = {}
    for a in assigned:
        if a.format is not None:
            held.setdefault(a.format.name, []).append(sizes[a.weight.path][1])
    most = sorted(held.items(), key=lambda item: -sum(item[1]))
    formats = [{"format": name, "tensors": len(each), "weights": sum(each)} for name, each in most]
    costs = [
        {
            "group": s.group.name, "format": c.format.name, "bytes": c.nbytes, "error": c.error, "predicted": c.cost,
            "measured": c.measured,
        }
        for s in found.sensitivities
        for c in s.choices
    ]  # fmt: skip
    return {"plans": plans, "tensors": tensors, "formats": formats, "costs": costs}


def _place(path: str) -> dict[str, Any]:
    """Layer and kind of a weight: {"layer": 3, "kind": "mlp/down"}."""
    part, _, rest = path.partition("/")
    kind = (rest or part).removesuffix("/kernel").removesuffix("/scale")
    inside = part.startswith("layers_")
    return {"layer": int(part.removeprefix("layers_")) if inside else None, "kind": kind if inside else part}
