"""The table of judged models in the terminal, and as plain rows."""

import io
import re

import pytest
from rich.console import Console

from qjax.evaluate.divergence import Divergence
from qjax.evaluate.judge import Judgement
from qjax.evaluate.perplexity import Perplexity
from qjax.evaluate.report import protocol, summary, table
from qjax.evaluate.sizes import Sizes


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
    assert "kl_mean" in summary(rows)[0] and "kl_mean" not in summary(alone)[0]


def test_the_protocol_is_said_in_a_line(rows):
    said = "llama.cpp protocol: 4 windows of 512 tokens, 1020 tokens scored; baseline perplexity 10.000."
    assert protocol(rows) == said
    assert summary(rows)[1]["kl_mean_se_clustered"] == 2e-5 and summary(rows)[1]["bytes"] == 1062
