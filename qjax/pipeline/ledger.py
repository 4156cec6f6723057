"""What the table of formats does not say of a quantized model: a line each for bits, kept tensors, tokens and damping.

bits per weight: 4.5 of what was quantized, 5.07 of the whole
kept: 13 tensors, 16,640 weights (a vector): blk.0.attn_norm.weight, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.pipeline.report import Report

_SHOWN = 4  # names of tensors that were kept for one reason


def ledger(report: Report) -> dict[str, Any]:
    """What became of a model, for JSON: every tensor is in `quantized_bits` or in `kept`.

    Returns: {"quantized_bits": 8 bytes / weights of the quantized tensors, None where there are none;
      "whole_bits": of all; "kept": {reason: names}; "tokens", "damping": least and most of any calibrated weight,
      None where none was; "notes": {note: names}; "tuned": what gradients on the whole model did, None where
      there were none}.
    """
    quantized = [t for t in report.tensors if t.kept is None]
    lines = [t.calibration for t in quantized if t.calibration is not None]
    weights = sum(t.size for t in quantized)
    seen = [c.tokens for c in lines if c.tokens]
    return {
        "quantized_bits": 8 * sum(t.nbytes for t in quantized) / weights if weights else None,
        "whole_bits": report.bits_per_weight,
        "kept": _grouped((t, t.kept) for t in report.tensors),
        "tokens": [min(seen), max(seen)] if seen else None,
        "damping": [min(c.damping for c in lines), max(c.damping for c in lines)] if lines else None,
        "notes": _grouped((t, t.calibration.note if t.calibration is not None else None) for t in quantized),
        "tuned": None if report.tuned is None else dict(report.tuned),
    }


def said(report: Report) -> list[str]:
    """The same as lines for people."""
    found = ledger(report)
    bits = found["quantized_bits"]
    lines = [f"bits per weight: {'-' if bits is None else f'{bits:.4g}'} of what was quantized, "
             f"{found['whole_bits']:.4g} of the whole"]  # fmt: skip
    for key in ("kept", "notes"):
        head = {"kept": "kept", "notes": "note"}[key]
        lines += [f"{head}: {_names(names)}: {why}" for why, names in found[key].items()]
    if found["tokens"]:
        lines.append(f"tokens at a weight's input: {_range(found['tokens'])}; damping: {_range(found['damping'])}")
    if found["tuned"]:
        lines.append(f"tuned: {found['tuned']['said']}")
    return lines


def _grouped(pairs: Any) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for tensor, why in pairs:
        if why:
            groups.setdefault(why, []).append(tensor.name)
    return groups


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _range(ends: Sequence[int] | Sequence[float]) -> str:
    low, high = (f"{v:,}" if isinstance(v, int) else f"{v:.3g}" for v in ends)
    return low if low == high else f"{low} to {high}"
