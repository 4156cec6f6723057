"""Judged models for people: the columns that say most, as a table in the terminal and as plain rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qjax.evaluate.judge import Judgement
from qjax.tables import size

if TYPE_CHECKING:
    from rich.table import Table

# Heading, key in `Judgement.to_json`, key of its standard error, how a number is written, what the heading means.
COLUMNS: tuple[tuple[str, str, str | None, str, str], ...] = (
    ("format", "name", None, "", "the format, mix or recipe"),
    ("block bits", "block_bits", None, ".3f", "bits per quantized weight, scales included"),
    ("model bits", "whole_bits", None, ".3f", "bits per weight of the whole model"),
    ("size", "bytes", None, "bytes", "bytes of all weights"),
    ("perplexity", "perplexity", "perplexity_se", ".3f", "± over tokens, as llama.cpp's"),
    ("KL mean", "kl_mean", "kl_mean_se_clustered", ".6f", "KL(baseline || model), nats per token; ± over windows"),
    ("KL 99 %", "kl_p99", None, ".5f", "99th percentile over tokens"),
    ("same top %", "same_top_percent", None, ".2f", "tokens where both find the same one most probable"),
    ("RMS Δp %", "rms_dp_percent", None, ".3f", "change of the true token's probability"),
    ("encode s", "encode_seconds", None, ".2f", "seconds to quantize"),
)


def table(rows: Sequence[Judgement], title: str = "") -> Table:
    """A rich table of judged models, in the order given; columns without a number anywhere are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    numbers = [row.to_json() for row in rows]
    shown = _shown(numbers)
    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for heading, key, *_ in shown:
        made.add_column(heading, justify="left" if key == "name" else "right", no_wrap=True)
    for n in numbers:
        made.add_row(*(_cell(n, column) for column in shown))
    return made


def timing_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of contestants on one problem: {shape, name, seconds, compile_seconds or None, relative_loss}."""
    from rich.table import Table

    made = Table()
    for column in ("shape", "what", "seconds", "compile, s", "relative loss"):
        made.add_column(column, justify="left" if column in ("shape", "what") else "right")
    for r in rows:
        first = "" if r["compile_seconds"] is None else f"{r['compile_seconds']:.1f}"
        shape = " x ".join(map(str, r["shape"]))
        made.add_row(shape, r["name"], f"{r['seconds']:.2f}", first, f"{r['relative_loss']:.6f}")
    return made


def summary(rows: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The same as plain rows, with the standard errors."""
    numbers = [row.to_json() for row in rows]
    keys = [key for _, *named, _, _ in _shown(numbers) for key in named if key is not None]
    return [{key: n[key] for key in keys} for n in numbers]


def protocol(rows: Sequence[Judgement]) -> str:
    """How models were judged, in a line."""
    said = {
        f"{p.protocol} protocol: {p.windows} windows of {p.context} tokens, {p.tokens_scored} tokens scored"
        for p in (row.perplexity for row in rows)
    }
    base = {f"; baseline perplexity {d.base_perplexity:.3f}" for d in (row.divergence for row in rows) if d is not None}
    return "; ".join(sorted(said)) + (next(iter(base)) if len(base) == 1 else "") + "."


def _shown(numbers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str | None, str, str]]:
    return [column for column in COLUMNS if any(n[column[1]] is not None for n in numbers)]


def _cell(numbers: Mapping[str, Any], column: tuple[str, str, str | None, str, str]) -> str:
    _, key, error_key, kind, _ = column
    value = numbers[key]
    if value is None:
        return "-"
    if not kind:
        return str(value)
    if kind == "bytes":
        return size(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    # Scientific where a KL would run out of digits, or a ruined model's perplexity out of the column.
    tiny = key.startswith("kl") and abs(value) < 100 * 10 ** -int(kind[1])
    style = ".2e" if tiny or abs(value) >= 1e6 else kind
    error = numbers[error_key] if error_key else None
    return f"{value:{style}}" + ("" if error is None else f" ± {error:{style.replace('.2e', '.1e')}}")
