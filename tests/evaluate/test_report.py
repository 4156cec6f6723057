"""Reports stand alone and carry the numbers; plots are pictures of them."""

import html.parser
import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from qjax.errors import UserError
from qjax.evaluate import plots
from qjax.evaluate.divergence import Divergence
from qjax.evaluate.judge import Judgement
from qjax.evaluate.perplexity import Perplexity
from qjax.evaluate.report import html_report, table, write_report
from qjax.evaluate.sizes import Sizes, TensorRow


def divergence(kl):
    values = dict.fromkeys(Divergence.__dataclass_fields__, kl)
    return Divergence(**values | {"base_perplexity": 10.0, "same_top_percent": 91.234})


@pytest.fixture
def rows():
    def row(name, bits, kl, ppl, seconds=1.0):
        return Judgement(
            name,
            Sizes(1000, int(125 * bits), bits, 900, 500, bits - 0.25),
            Perplexity("llama.cpp", 512, 4, 1020, 2.3, 0.01, 0.02, ppl, 0.1),
            None if kl is None else divergence(kl),
            seconds,
        )

    return [
        row("F32", 32.0, 0.0, 10.0, None),
        row("Q8_0", 8.5, 2e-5, 10.01),
        row("Q4_0", 4.5, 0.031, 10.5),
        row("<b>&x", 4.75, 0.06, 11.0),
        row("Q2_K", 2.6, 0.5, 14.0),
    ]


@pytest.fixture
def tensors():
    kinds = ("attn/q", "attn/o", "mlp/up")
    rows = [
        TensorRow(f"layers_{i}/{kind}/kernel", "Q4_0", (64, 64), 4.5, 2304, 0.08 + 0.01 * i, 21.9)
        for i in range(3)
        for kind in kinds
    ]
    norm = TensorRow("layers_0/attn_norm/scale", "float32", (64,), 32.0, 256, 0.0, np.inf)
    return [*rows, norm, TensorRow("embed/embedding", "Q8_0", (99, 64), 8.5, 6732, 0.005, 46.0)]


class Tags(html.parser.HTMLParser):
    """Every tag's attributes, and proof that tags close."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_everything(rows, tensors):
    page = html_report(
        rows,
        title="A & B",
        plots={"KL": b"\x89PNG"},
        tensors={"Q4_0": tensors},
        config='x = "<y>"',
        manifest={"seed": 3},
    )
    tags = Tags(page).found
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page
    assert [a["src"] for tag, a in tags if tag == "img"] == ["data:image/png;base64,iVBORw=="]
    for said in ("A &amp; B", "&lt;b&gt;&amp;x", "x = &quot;&lt;y&gt;&quot;", "&quot;seed&quot;: 3", "91.23"):
        assert said in page
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page
    assert "4 windows of 512 tokens, 1020 tokens scored; baseline perplexity 10.000" in page
    keys = [a["data-key"] for tag, a in tags if tag == "td"][: 10 * len(rows)]
    assert keys[:3] == ["F32", "31.75", "32.0"] and keys[9] == ""  # what sorting reads: no encode time
    assert keys[10 + 5] == "2e-05"
    assert "layers_2/mlp/up/kernel" in page and "64 x 64" in page


def test_the_terminal_table_has_the_same_rows(rows):
    out = io.StringIO()
    Console(file=out, width=200).print(table(rows, title="results"))
    lines = out.getvalue().splitlines()
    assert "KL mean" in lines[2] and "RMS Δp %" in lines[2]
    q4 = next(line for line in lines if "Q4_0" in line)
    assert re.search(r"Q4_0 +4\.250 +4\.500 +562 B +10\.500 ± 0\.100 +0\.031000 ± 0\.031000 +0\.03100 +91\.23", q4)
    assert "-" in next(line for line in lines if "F32" in line)


def test_columns_without_numbers_are_left_out(rows):
    import dataclasses

    alone = [dataclasses.replace(row, divergence=None, encode_seconds=None) for row in rows]
    assert [c.header for c in table(alone).columns] == ["format", "block bits", "model bits", "size", "perplexity"]
    assert "KL mean" not in html_report(alone)


def test_writing_puts_the_pictures_beside_the_page(rows, tmp_path):
    page = write_report(tmp_path, rows, plots={"KL against size": b"png"}, title="t")
    assert page == tmp_path / "report.html" and page.read_text().startswith("<!doctype html>")
    assert (tmp_path / "kl_against_size.png").read_bytes() == b"png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kl_against_size.png", "report.html"]


def pixels(png):
    return pytest.importorskip("matplotlib.image").imread(io.BytesIO(png))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_pareto_plot_is_a_picture_of_the_rows(rows, metric):
    drawn = plots.pareto_plot(rows, metric)
    assert drawn == plots.pareto_plot(rows, metric)
    picture = pixels(drawn)
    assert picture.shape[0] > 500 and picture.std() > 0.02
    assert (picture != pixels(plots.pareto_plot(rows[:-1], metric))[: picture.shape[0], : picture.shape[1]]).any()
    with pytest.raises(UserError, match="no judged model"):
        plots.pareto_plot([], metric)


def test_the_front_holds_what_nothing_beats(rng):
    bits, loss = rng.random(40), rng.random(40)
    front = plots.pareto_front(bits, loss)
    for i in range(40):
        beaten = any((bits[j] <= bits[i]) and (loss[j] <= loss[i]) and j != i for j in range(40))
        assert (i in front) == (not beaten)
    assert sorted(front, key=lambda i: bits[i]) == front


def test_heat_map_needs_errors(tensors):
    assert pixels(plots.error_heatmap(tensors)).shape[2] == 4
    with pytest.raises(UserError, match="reference"):
        plots.error_heatmap([TensorRow("layers_0/attn/q/kernel", "Q4_0", (4, 4), 4.5, 9)])


@pytest.mark.parametrize("name", ["Q8_0", "F16"])
def test_histogram_of_any_format(rng, name):
    w = rng.normal(size=(64, 48)).astype(np.float32)
    assert pixels(plots.weight_histogram(w, name, axis=0)).std() > 0.02


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "MXFP4", "Q4_K", "IQ4_NL", "NF4_dq", "uint4_g64", "int3_g64"])
def test_levels_lie_where_the_weights_went(rng, name):
    """On its block's grid every decoded weight is one of the drawn levels."""
    from qjax.formats import format
    from qjax.tensor import dequantize, quantize

    try:
        format(name)
    except UserError:
        pytest.skip(f"{name} is not built in")
    w = rng.normal(size=(4, 512)).astype(np.float32)
    q = quantize(w, name)
    place, levels = plots._grid_positions(q, np.asarray(dequantize(q)).ravel())
    distance = np.abs(place[:, None] - levels[None, :]).min(axis=1)
    assert distance.max() < 2e-3
    assert (np.diff(levels) > 0).all() and (levels[0], levels[-1]) == (0.0, 1.0)


def test_without_matplotlib_the_message_names_the_extra(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "qjax\[report\]"'):
        plots.pareto_plot(rows)
