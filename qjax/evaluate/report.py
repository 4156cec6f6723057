"""The results of a run for people: a table in the terminal, and one HTML file with table, plots, config and manifest.

The HTML stands alone: pictures are inlined, nothing is fetched, and it reads well on light and on dark screens.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.evaluate.judge import Judgement
from qjax.evaluate.sizes import TensorRow
from qjax.html_page import standalone
from qjax.io.atomic import atomic_file, write_text
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


def html_report(
    rows: Sequence[Judgement],
    *,
    title: str = "qjax",
    plots: Mapping[str, bytes] | None = None,
    tensors: Mapping[str, Sequence[TensorRow]] | None = None,
    config: str | Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    notes: str = "",
) -> str:
    """A self-contained page.

    Args:
      rows: judged models, in the order shown at first; a click on a heading sorts.
      title: heading and window title.
      plots: caption -> PNG bytes.
      tensors: name of a model -> its `tensor_rows`.
      config: the resolved config, as its file's text or a mapping.
      manifest: versions, device, hashes, seeds, times.
      notes: a line below the title.
    """
    numbers = [row.to_json() for row in rows]
    body = [f"<h1>{_e(title)}</h1>"]
    if notes:
        body.append(f"<p>{_e(notes)}</p>")
    if rows:
        shown = _shown(numbers)
        heads = [(heading, why) for heading, _, _, _, why in shown]
        cells = [[(_cell(n, c), n[c[1]]) for c in shown] for n in numbers]
        body += [_html_table(heads, cells), f"<p class=note>{_e(_protocol(rows))}</p>"]
    for caption, png in (plots or {}).items():
        data = base64.b64encode(png).decode()
        body.append(
            f'<figure><img alt="{_e(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_e(caption)}</figcaption></figure>"
        )
    for name, tensor in (tensors or {}).items():
        body.append(f"<details><summary>Tensors of {_e(name)}</summary>{_tensor_table(tensor)}</details>")
    if config is not None:
        body.append(f"<details open><summary>Config</summary><pre>{_e(_text(config))}</pre></details>")
    if manifest is not None:
        body.append(f"<details><summary>Manifest</summary><pre>{_e(_text(manifest))}</pre></details>")
    return standalone(title, "\n".join(body))


def write_report(
    out: Path, rows: Sequence[Judgement], *, plots: Mapping[str, bytes] | None = None, **options: Any
) -> Path:
    """Write out/report.html and beside it every plot as a PNG named by its caption; returns the page's path.

    Args:
      out: a folder that exists.
      rows, plots, options: as `html_report` takes them.
    """
    for caption, png in (plots or {}).items():
        with atomic_file(out / f"{re.sub(r'[^a-z0-9]+', '_', caption.lower()).strip('_')}.png") as file:
            file.write(png)
    write_text(out / "report.html", html_report(rows, plots=plots, **options))
    return out / "report.html"


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


def _protocol(rows: Sequence[Judgement]) -> str:
    said = {
        f"{p.protocol} protocol: {p.windows} windows of {p.context} tokens, {p.tokens_scored} tokens scored"
        for p in (row.perplexity for row in rows)
    }
    base = {f"; baseline perplexity {d.base_perplexity:.3f}" for d in (row.divergence for row in rows) if d is not None}
    return "; ".join(sorted(said)) + (next(iter(base)) if len(base) == 1 else "") + "."


def _tensor_table(rows: Sequence[TensorRow]) -> str:
    heads = [(name, "") for name in ("tensor", "format", "shape", "bits", "bytes", "relative RMSE", "SQNR dB")]
    cells: list[list[tuple[str, Any]]] = []
    for row in rows:
        rmse = "-" if row.relative_rmse is None else f"{row.relative_rmse:.5f}"
        sqnr = "-" if row.sqnr_db is None else f"{row.sqnr_db:.2f}"
        shape = " x ".join(map(str, row.shape))
        cells.append([
            (row.path, row.path), (row.format, row.format), (shape, math.prod(row.shape)),
            (f"{row.bits:.3f}", row.bits), (str(row.bytes), row.bytes), (rmse, row.relative_rmse), (sqnr, row.sqnr_db),
        ])  # fmt: skip
    return _html_table(heads, cells)


def _html_table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[tuple[str, Any]]]) -> str:
    """A sortable table: each cell is (what it shows, what it sorts by)."""
    head = "".join(f'<th title="{_e(why)}"><button>{_e(name)}</button></th>' for name, why in heads)

    def cell(shown: str, key: Any) -> str:
        if isinstance(key, str):
            return f'<td class=text data-key="{_e(key)}">{_e(shown)}</td>'
        return f'<td data-key="{"" if key is None else _e(repr(key))}">{_e(shown)}</td>'

    body = "".join(f"<tr>{''.join(cell(*c) for c in row)}</tr>\n" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _text(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _e(text: str) -> str:
    return html.escape(str(text))
