"""Which columns the keys of experiments' results become: titles, units, digits, and what stands behind ±."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from qjax.report.schema import Column

# key: (title, unit, digits)
KNOWN: dict[str, tuple[str, str, int]] = {
    "kl": ("KL", "nats", 6),
    "kl_mean": ("KL", "nats", 6),
    "predicted": ("sum of parts", "nats", 6),
    "kl_se_judged": ("s.e. of KL over tokens", "nats", 7),
    "kl_se_clustered": ("s.e. of KL over windows", "nats", 7),
    "log_ratio": ("log of perplexity ratio", "nats", 5),
    "loss": ("loss", "nats", 4),
    "relative_loss": ("relative loss", "", 6),
    "difference": ("difference", "nats", 4),
    "over_control": ("over the control", "nats", 4),
    "gain_over_ptq": ("gain over PTQ", "nats", 4),
    "closed_percent": ("gap closed", "%", 0),
    "closed_of_tuned_percent": ("gap of tuned closed", "%", 0),
    "heldout_loss": ("held-out relative loss", "", 6),
    "first_loss": ("relative loss of the first stage", "", 6),
    "first_heldout_loss": ("held-out relative loss of the first stage", "", 6),
    "whole_bits": ("whole model", "bits", 3),
    "block_bits": ("block", "bits", 3),
    "at_most_bits": ("at most", "bits", 1),
    "layer_bits": ("layers", "bits", 3),
    "bits": ("size", "bits", 3),
    "perplexity": ("perplexity", "", 3),
    "base_perplexity": ("baseline perplexity", "", 3),
    "same_top_percent": ("same top token", "%", 2),
    "mean_dp_percent": ("mean Δp", "%", 3),
    "rms_dp_percent": ("RMS Δp", "%", 3),
    "ratio": ("ratio", "", 3),
    "seconds": ("time", "s", 2),
    "tokens_per_second": ("tokens/s", "", 1),
    "peak_mb": ("peak of memory", "MB", 0),
    "runs": ("time", "s", 2),
    "bytes": ("size", "bytes", 0),
    "ratio_quartiles.0": ("ratio, 25 %", "", 3),
    "ratio_quartiles.1": ("ratio, 75 %", "", 3),
    "p_value": ("p", "", 5),
    "rate": ("rate", "", 5),
    "weight_decay": ("weight decay", "", 2),
    "layer": ("layer", "", 0),
    "relative_rmse": ("relative error", "", 5),
    "sqnr_db": ("signal to noise", "dB", 2),
    "weight": ("weight, middle of a bin", "", 5),
    "position": ("position on the grid, middle of a bin", "", 4),
    "before": ("share before", "", 5),
    "after": ("share after", "", 5),
    "peak": ("largest over the median channel's", "", 2),
    "quantile": ("share of tokens", "", 5),
    "step": ("step", "", 0),
    "scale_drift": ("scale drift, rms of ln", "", 5),
    "flops": ("operations", "flop", 0),
    "peak_flops": ("roof", "flop/s", 0),
    "peak_bytes": ("bandwidth", "B/s", 0),
    "gb_per_second": ("moved", "GB/s", 2),
    "of_copy": ("of a copy's bandwidth", "", 2),
    "over_bfloat16": ("times as fast as bfloat16", "", 2),
    "error": ("error", "", 8),
    "first_token_seconds": ("first token", "s", 3),
}
INTERVALS = {
    "kl": "kl_half_interval", "difference": "half_interval", "gain_over_ptq": "gain_half_interval",
    "over_control": "over_control_half_interval",
    "closed_percent": "closed_half_interval", "closed_of_tuned_percent": "closed_of_tuned_half_interval",
    "ratio": "ratio_half_width",
}  # fmt: skip
NATS = {  # losses of language models under other names
    "start", "base", "adapted", "merged", "teacher", "teacher_loss", "student", "student before", "trained", "heldout",
    "ce", "fkl", "nll", "log_ratio", "block_ap_2bit", "ldlq_refit_2bit",
}  # fmt: skip
UNITS = {"seconds": "s", "percent": "%", "mb": "MB", "bytes": "bytes", "bits": "bits"}  # by the last word of a key


def columns(keys: Collection[str], rows: Iterable[dict[str, Any]], table: str = "") -> tuple[Column, ...]:
    """Columns of rows' keys, in their order; one that stands behind the ± of another gets none.

    Args:
      keys: of all rows.
      rows: their cells decide between text and numbers, and the digits of a key that is not known.
      table: its name: losses are nats, whatever they are called.
    """
    rows = list(rows)
    text = {key for key in keys if any(isinstance(row.get(key), str | bool) for row in rows)}
    numbers = [key for key in keys if key not in text]
    intervals = {key: found for key in numbers if (found := _interval(key, numbers))}
    return tuple(
        _column(key, [row.get(key) for row in rows], table, keys, intervals.get(key))
        for key in keys
        if key not in intervals.values()
    )


def _interval(key: str, keys: Collection[str]) -> str | None:
    asked = (INTERVALS.get(key, ""), f"{key}_se_clustered", f"{key}_se")
    return next((name for name in asked if name in keys), None)


def _column(key: str, values: list[Any], table: str, keys: Collection[str], interval: str | None) -> Column:
    there = [v for v in values if v is not None]
    if any(isinstance(v, str | bool) for v in there):
        return Column(key, key.replace("_", " "))
    if key == "loss" and "heldout_loss" in keys:  # of a matrix's outputs, not of a language model
        return Column(key, "relative loss", "", 6, interval)
    if key in KNOWN:
        title, unit, digits = KNOWN[key]
        return Column(key, title, unit, digits, interval)
    words = key.split("_")
    nats = key.removesuffix("_se") in NATS or key.startswith("kl_") or table == "losses"
    unit = "nats" if nats else _unit(key) or ("bytes" if table.endswith("_bytes") else "")
    title = " ".join({"kl": "KL", "se": "s.e."}.get(w, w) for w in words if not unit or UNITS.get(w) != unit) or key
    most = 0 if all(type(v) is int for v in there) else 2 if unit in ("s", "MB") else 6 if key.startswith("kl_") else 4
    return Column(key, title, unit, min(most, max(map(_decimals, there), default=0)), interval)


def _unit(key: str) -> str:
    return next((UNITS[word] for word in re.split(r"[_.]", key) if word in UNITS), "")


def _decimals(value: int | float) -> int:
    """Digits after the point that a number has; many for one that is written with an exponent."""
    text = repr(float(value))
    return 17 if "e" in text else len(text.partition(".")[2].rstrip("0"))
