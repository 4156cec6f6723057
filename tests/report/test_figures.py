"""Figures: a table's columns choose them, numbers stand at their places, labels lie apart, a file stands alone."""

import dataclasses
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from figure_tables import found, result

from qjax.cli import main
from qjax.cli.report import FIGURE_HELP
from qjax.report.build import build
from qjax.report.figures import by_layer, curve, histogram, pareto, roofline, scatter
from qjax.report.figures.axes import linear, linear_ticks, log_ticks, logarithmic, plane, slots
from qjax.report.figures.drawing import SLIM, WIDE, alone
from qjax.report.figures.front import Point, drawn, front, points
from qjax.report.figures.heat import number
from qjax.report.figures.kinds import KINDS, figures, one_figure
from qjax.report.figures.labels import Box, place, shortened, width_of
from qjax.report.page import page
from qjax.report.result import read, write
from qjax.report.schema import Column, Table

TABLE_OF = {
    "kl": "rows", "perplexity": "rows", "bits": "tensors", "errors": "tensors", "weights": "weights", "grid": "grid",
    "outliers": "outliers", "tokens": "tokens", "training": "curve", "drift": "curve", "roofline": "roofline",
    "amount": "amount", "sum": "parts", "rates": "rates",
}  # fmt: skip


def table_of(rows):
    (table,) = build({"rows": rows}, title="t", command="c").tables
    return table


def some(count, seed=0):
    rng = np.random.default_rng(seed)
    bits, loss = rng.integers(20, 60, count) / 10, np.exp(rng.integers(-40, 0, count) / 10)
    return [
        Point(float(b), float(k), float(k) / 4, f"method{n}:uint{n}_g128")
        for n, (b, k) in enumerate(zip(bits, loss, strict=True))
    ]


def pareto_table(found, key="kl"):
    columns = (Column("name", "name"), Column("whole_bits", "bits", "bits", 3), Column(key, key, "", 6, "half"))
    rows = tuple({"name": p.name, "whole_bits": p.bits, key: p.loss, "half": p.half} for p in found)
    return Table("rows", columns, rows)


def picture(drawing):
    return "".join(drawing.parts)


@pytest.mark.parametrize("name", KINDS)
def test_columns_choose_the_figure(name):
    """The table alone makes it, for a desk and a phone; no other kind's table does, nor one that lacks a column."""
    whole = found()
    (table,) = build({"t": whole[TABLE_OF[name]]}, title="t", command="c").tables
    single = dataclasses.replace(result(), tables=(table,))
    for width in (WIDE, SLIM):
        drawing = one_figure([single], name, width)
        ElementTree.fromstring(alone(drawing))
        assert drawing.width == width and drawing.title and not re.search(r"nan|inf\b", picture(drawing))
    made = figures(single)
    same = [kind for kind, its in TABLE_OF.items() if its == TABLE_OF[name]]
    assert len(made) == 2 * len(same) and sum('figure class="slim"' in html for html in made) == len(same)
    for need in KINDS[name].needs:
        columns = tuple(c for c in table.columns if c.key not in need.split("|"))
        assert not any(
            f'aria-label="{drawing.title}"' in html
            for html in figures(dataclasses.replace(single, tables=(dataclasses.replace(table, columns=columns),)))
        )
    assert name in FIGURE_HELP.split(": ")[1].split(", ")


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed):
    found = some(60, seed)
    beaten = [
        any(q.bits <= p.bits and q.loss <= p.loss and (q.bits, q.loss) != (p.bits, p.loss) for q in found)
        for p in found
    ]
    assert front(found) == [not b for b in beaten]


def test_rows_become_points():
    table = table_of(
        [{"name": "float32", "kl_mean": 0.0, "kl_mean_se": 0.0, "whole_bits": 32.0},
         {"name": "Q4_K", "kl_mean": 0.01, "kl_mean_se": 0.001, "whole_bits": 4.5},
         {"name": "unjudged", "kl_mean": None, "whole_bits": 4.5}],
    )  # fmt: skip
    found = points([table], "kl")
    assert found == [Point(32.0, 0.0, 0.0, "float32"), Point(4.5, 0.01, 0.001, "Q4_K")]
    assert drawn(found) == ([found[1]], [found[0]]) and points([table], "perplexity") == []
    assert pareto.draw(table, WIDE, "kl") is None and drawn([Point(32.0, 1e-6, 0.0, "bf16")])[0] == []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("width", [WIDE, SLIM])
def test_labels_of_the_figure_lie_apart(seed, width):
    found = [*some(40, seed), Point(32.0, 0.0, 0.0, "float32")]
    drawing = pareto.draw(pareto_table(found), width, "kl")
    text = picture(drawing)
    boxes = [Box(*map(float, box.split())) for box in re.findall(r'data-box="([^"]*)"', text)]
    on_line = sum(front(found[:-1]))
    assert text.count("<circle") == 40 and 3 <= on_line < len(boxes) + 1 <= 41
    assert len(boxes) == (40 if width == WIDE else on_line), "a phone has room for the names on the line"
    apart = [Box(box.x - 3.9, box.y, box.width + 7.8, box.height) for box in boxes]
    assert not any(a.meets(b) for n, a in enumerate(apart) for b in boxes[:n])
    x, y, wide, high = (
        float(v) for v in re.search(r'"frame" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', text).groups()
    )
    assert all(box.within(Box(x - 0.1, y - 0.1, wide + 0.2, high + 0.2)) for box in boxes)
    marks = re.findall('<circle class="(best|other)', text)
    assert marks == sorted(marks), "the front takes its places first"
    assert "Not on the axes: float32 (32 bits, 0)." in drawing.caption
    assert text.count('class="whisker"') == 40 and "KL to the float model, nats a token" in text


def test_an_interval_that_reaches_zero_ends_at_a_tenth():
    found = [Point(2.0, 0.5, 1.0, "a"), Point(3.0, 0.1, 0.0, "b<")]
    text = picture(pareto.draw(pareto_table(found, "perplexity"), WIDE, "perplexity"))
    assert text.count('class="whisker"') == 1 and "a: 2.000 bits, 0.5 ± 1" in text and "b&lt;" in text


def test_several_results_share_one_figure(tmp_path):
    """Models of both stand on the same axes; a name that both have says whose it is."""
    for title, shift in (("A", 1.0), ("B", 2.0)):
        rows = [
            {"name": f"{title} best", "whole_bits": 2.0, "kl": 0.5},
            {"name": "both", "whole_bits": 4.0, "kl": 0.01 * shift},
        ]
        write(build({"rows": rows}, title=title, command="qjax", note="n"), tmp_path / f"{title}.json")
    paths = [str(tmp_path / "A.json"), str(tmp_path / "B.json")]
    assert main(["report", *paths, "--figure", "kl", "-o", str(tmp_path / "all.svg")]) == 0
    text = (tmp_path / "all.svg").read_text()
    root = ElementTree.fromstring(text)
    said = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"A best", "B best", "both (A)", "both (B)"} <= set(said)
    assert "prefers-color-scheme: dark" in text and "--best:" in text and root.attrib["width"] == "900"
    assert main(["report", *paths, "--figure", "kl", "-o", str(tmp_path / "all.html")]) == 0
    html = (tmp_path / "all.html").read_text()
    assert html.index("both (A)") < html.index("<section") and html.count("<figure") == 2 * 3
    assert page([read(paths[0])]).count("<figure") == 2


def test_ticks_are_round():
    assert linear_ticks(1.9, 5.2) == [2.0, 3.0, 4.0, 5.0]
    assert linear_ticks(-0.01, 0.1) == [0.0, 0.05, 0.1]
    assert linear_ticks(0.0, 4e-12, 4) == pytest.approx([0.0, 1e-12, 2e-12, 3e-12, 4e-12])
    assert log_ticks(-2.1, -0.9) == pytest.approx([0.01, 0.02, 0.05, 0.1])
    assert log_ticks(math.log10(23.84), math.log10(23.99), 4) == pytest.approx([23.85, 23.9, 23.95])
    assert log_ticks(-9.0, 1.0, 4) == pytest.approx([1e-9, 1e-6, 1e-3, 1.0]), "powers alone, and few of them"


def test_values_stand_at_their_pixels():
    axes = plane(linear("a", [0.0, 10.0], 0.0), logarithmic("b", [1.0, 100.0], 0.0), 400.0, 300.0)
    assert axes.x.at(0.0) == axes.frame.x and axes.x.at(5.0) == axes.frame.x + axes.frame.width / 2
    assert axes.y.at(10.0) == pytest.approx(axes.frame.y + axes.frame.height / 2) and axes.y.at(100.0) == axes.frame.y
    one = plane(linear("a", [3.0, 3.0]), slots("b", ["x"]), 400.0, 300.0)
    assert one.x.at(3.0) == pytest.approx(one.frame.x + one.frame.width / 2)


def test_labels_keep_off_points_and_give_up_where_it_is_full():
    labels = place([(50.0, 10.0)] * 9, ["name"] * 9, Box(0.0, 0.0, 100.0, 30.0))
    placed = [label.box for label in labels if label is not None]
    assert 0 < len(placed) < 9 and not any(box.meets(Box(46.0, 6.0, 8.0, 8.0)) for box in placed)
    assert shortened("name", 100.0) == "name" and width_of(shortened("m" * 40, 100.0)) <= 100.0
    assert shortened("m" * 40, 100.0).endswith("m…")


def test_bits_of_a_layer_are_those_of_all_its_weights():
    rows = [
        {"layer": 0, "kind": "q", "bits": 4.0, "bytes": 500}, {"layer": 0, "kind": "v", "bits": 8.0, "bytes": 1000},
        {"layer": 0, "kind": "norm", "bits": 32.0, "bytes": 4}, {"layer": 1, "kind": "q", "bits": 2.0, "bytes": 250},
        {"layer": None, "kind": "embed", "bits": 6.0, "bytes": 750},
        {"layer": None, "kind": "norm", "bits": 32.0, "bytes": 4},
    ]  # fmt: skip
    text = picture(by_layer.draw_bits(table_of(rows), WIDE))
    assert re.findall(r"<title>(.*?)</title>", text) == ["0: 6.013 bits", "1: 2.000 bits", "embed: 6.000 bits"]


def test_a_heat_map_has_a_cell_for_every_kind_of_weight():
    rows = [
        {"layer": n, "kind": kind, "relative_rmse": 0.01 * (n + 1)}
        for n in range(3)
        for kind in ("q", "up")
        if (n, kind) != (1, "up")
    ]
    drawing = by_layer.draw_errors(table_of([*rows, {"layer": None, "kind": "embed", "relative_rmse": 0.005}]), WIDE)
    text = picture(drawing)
    assert re.findall(r'class="heat"[^>]*><title>(.*?)</title>', text) == [
        "q, 0: 1",
        "q, 1: 2",
        "q, 2: 3",
        "up, 0: 1",
        "up, 2: 3",
    ]
    assert text.count('class="hole"') == 1 and drawing.caption == "Outside of the layers: embed 0.5 %."
    strength = [float(v) for v in re.findall(r'class="heat"[^>]*fill-opacity="(\S+)"><title>', text)]
    assert strength == [0.04, 0.52, 0.04], "colour grows with the error; full colour says nothing of opacity"
    assert [number(v) for v in (0.0, 123.4, 12.34, 1.234, 0.1234, 0.00001)] == [
        "0",
        "123",
        "12.3",
        "1.2",
        "0.12",
        "1.0e-05",
    ]


def test_what_rows_are_of_gets_a_panel_of_its_own():
    rows = [{"of": of, "layer": n, "kind": "q", "relative_rmse": 0.1} for of in ("Q4_0", "NF4") for n in range(2)]
    for width, places in ((WIDE, {"0 0", "460 0"}), (SLIM, {"0 0", "0 152"})):
        drawing = by_layer.draw_errors(table_of(rows), width)
        found = set(re.findall(r'<g transform="translate\(([\d ]+)\)"><text class="panel"', picture(drawing)))
        assert found == places and drawing.title == "Error by layer"
    assert by_layer.draw_errors(table_of(rows[:2]), WIDE).title == "Error by layer: Q4_0"


def test_maps_of_outliers_share_their_colours():
    maps = {"as it is": (1.0, 100.0), "rotated": (1.0, 10.0)}
    rows = [{"of": of, "layer": 0, "group": g, "peak": p} for of, peaks in maps.items() for g, p in enumerate(peaks)]
    text = picture(KINDS["outliers"].draw(table_of(rows), WIDE))
    cells = re.findall(r'class="heat"[^>]*?(?:fill-opacity="(\S+)")?><title>0, (\d): (\S+)</title>', text)
    assert cells == [("0.04", "0", "1"), ("", "1", "100"), ("0.04", "0", "1"), ("0.52", "1", "10")], "logarithmic"


def test_a_bin_that_towers_is_cut_off():
    rows = [
        {"weight": n / 10, "before": b, "after": a} for n, (b, a) in enumerate([(0.2, 0.0), (0.4, 9.0), (0.2, 0.0)])
    ]
    drawing = histogram.draw(table_of(rows), WIDE, "weight")
    text = picture(drawing)
    area = [float(p.split(",")[1]) for p in re.search('"area" points="(.*?)"', text)[1].split()]
    outline = [float(p.split(",")[1]) for p in re.search('"outline" points="(.*?)"', text)[1].split()]
    foot = max(area)
    assert (foot - min(outline)) / (foot - min(area)) == pytest.approx(0.4, abs=0.01), "at 2.5 times the highest before"


def test_every_arm_has_a_line_of_its_own():
    rows = [
        {"arm": arm, "step": s, "loss": 3.0 - s / 10, "heldout": 3.5 if s == 2 else None}
        for arm in ("a", "b")
        for s in (2, 1)
    ]
    drawing = curve.draw(table_of(rows), WIDE, "loss")
    text = picture(drawing)
    lines = re.findall(r'<polyline class="series (s\d)" points="(\S+) (\S+)"', text)
    assert [kind for kind, *_ in lines] == ["s0", "s1"] and text.count("<circle") == 2 and "held out" in drawing.caption
    for _, first, last in lines:
        assert float(first.split(",")[0]) < float(last.split(",")[0]), "steps rise"
    assert curve.draw(table_of(rows[:1]), WIDE, "loss") is None


def test_a_roof_is_what_the_machine_can_do():
    rows = [{"name": "slow", "flops": 1e9, "bytes": 1e9, "seconds": 0.1, "peak_flops": 1e11, "peak_bytes": 2e10}]
    (one,) = roofline.measured(table_of(rows))
    assert (one.intensity, one.rate, one.roof) == (1.0, 1e10, 2e10)
    assert "slow: 1 flop/B, 10 Gflop/s, 50 % of the roof" in picture(roofline.draw(table_of(rows), WIDE))


def test_a_sum_of_parts_stands_against_what_was_measured():
    rows = [{"name": str(n), "predicted": p, "kl": 2 * p} for n, p in enumerate((0.1, 0.2, 0.4))]
    drawing = scatter.draw(table_of([*rows, {"name": "not promised", "predicted": None, "kl": 1.0}]), WIDE)
    assert "3 models" in drawing.caption and "1.000" in drawing.caption
    assert "1: 0.2 promised, 0.4" in picture(drawing)
    assert scatter.draw(table_of(rows[:2]), WIDE) is None
