"""Benchmarks: the numbers belong together, the result file makes a roofline, mistakes are told."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qjax.bench import clock, products, rivals
from qjax.cli import main
from qjax.errors import UserError
from qjax.report.figures.roofline import measured
from qjax.report.result import read

SMALL = ["--shapes", "64x256", "--rows", "1", "2", "--cold-mb", "1", "--rounds", "1"]


def test_products_make_a_result_file_and_a_roofline(tmp_path, capsys):
    made = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--formats", "Q4_0", "NF4", *SMALL, "--json", str(made)]) == 0
    (table,) = read(made).tables
    assert [(r["name"], r["rows"], r["kernel"]) for r in table.rows] == [
        ("bfloat16", 1, "dense"), ("float32", 1, "dense"), ("Q4_0", 1, "lanes"), ("NF4", 1, "strips"),
        ("bfloat16", 2, "dense"), ("float32", 2, "dense"), ("Q4_0", 2, "lanes"), ("NF4", 2, "strips"),
    ]  # fmt: skip
    for row in table.rows:
        assert row["flops"] == 2 * row["rows"] * 64 * 256
        assert np.isclose(row["of_copy"], row["bytes"] / row["seconds"] / row["peak_bytes"])
        assert row["error"] < (1e-2 if row["name"] == "bfloat16" else 1e-5)
        assert np.isclose(row["gb_per_second"], row["bytes"] / row["seconds"] / 1e9)
    assert table.rows[2]["bytes"] == 64 * 256 * 18 / 32 + 4 * (256 + 64)
    assert np.isclose(table.rows[6]["over_bfloat16"], table.rows[4]["seconds"] / table.rows[6]["seconds"])
    assert len(measured(table)) == 8
    assert main(["report", str(made), "--figure", "roofline", "-o", str(tmp_path / "k.svg")]) == 0
    assert "flop/B" in (tmp_path / "k.svg").read_text()
    assert "over bfloat16" in capsys.readouterr().out


def test_all_kernels_side_by_side():
    c = products.Contest(("Q4_0",), ((64, 256),), (1,), cold_bytes=1 << 16, rounds=1, every=True)
    assert [row["kernel"] for row in products.contest(c)] == ["dense", "dense", "lanes", "sums", "strips", "first"]


def test_points_of_a_lattice_are_drawn_and_tiles_of_rows_are_whole():
    """No search for the nearest: nothing that is timed depends on it."""
    c = products.Contest(("E8P_2", "trellis2_L12_3inst"), ((64, 256),), (1,), cold_bytes=1 << 15, rounds=1)
    rows = {row["name"]: row for row in products.contest(c)}
    assert all(rows[name]["error"] < 1e-5 and rows[name]["kernel"] == "strips" for name in c.formats)
    with pytest.raises(UserError, match="holds 16 rows together, and got 40"):
        products.Contest(("trellis2_L12_3inst",), ((40, 256),), (1,))


def test_a_rival_multiplies_the_same_weights(capsys, monkeypatch):
    """torch's int4 product: in float32 as exact as ours; where it cannot run, the reason is told."""
    pytest.importorskip("torch")
    (rival,) = rivals.RIVALS
    c = products.Contest((), ((64, 256),), (2,), cold_bytes=1 << 15, rounds=1, rivals=(rival,))
    *_, row = products.contest(c)
    assert row["kernel"] == "torch int4pack" and row["error"] < 1e-5 and row["seconds"] > 0
    gone = dataclasses.replace(rival, unfit=lambda platform: f"torch is not installed on {platform}")
    monkeypatch.setattr(rivals, "RIVALS", (gone,))
    assert main(["bench", "kernels", "--formats", "Q8_0", "--rivals", *SMALL]) == 0
    assert "without torch int4pack: torch is not installed on cpu" in capsys.readouterr().err
    with pytest.raises(UserError, match="torch int4pack: torch is not installed on cpu; leave it out"):
        products.Contest((), ((64, 256),), (2,), rivals=(gone,))


def test_every_product_of_a_program_has_weights_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(products, "seconds", lambda program, x, many, rounds: seen.append(many) or 1.0)
    list(products.contest(products.Contest(("Q8_0",), ((64, 256),), (1,), cold_bytes=100_000, rounds=1)))
    stacks = [jax.tree.leaves(many)[0] for many in seen]
    assert [len(s) for s in stacks] == [4, 2, 6]
    assert all(sum(leaf.nbytes for leaf in jax.tree.leaves(many)) >= 100_000 for many in seen)
    assert all((s[0] != s[k]).any() for s in stacks for k in range(1, len(s)))


def test_a_time_is_the_median_behind_the_first_call(monkeypatch):
    times = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    calls = []
    assert clock.seconds(lambda: calls.append(0) or np.zeros(1), rounds=3) == 2.0 and len(calls) == 4


@pytest.mark.slow
def test_texts_from_decoded_and_packed_weights(tmp_path, capsys):
    packed, made = tmp_path / "small.gguf", tmp_path / "tokens.json"
    assert main(["quantize", "reference", "-o", str(packed), "--type", "Q4_0"]) == 0
    argv = ["bench", "generate", str(packed), "--tokens", "6", "--rounds", "1", "--batch", "2", "--cache", "Q8_0"]
    assert main([*argv, "--json", str(made)]) == 0
    (table,) = read(made).tables
    dense, small = table.rows
    assert [dense["name"], small["name"]] == ["float32", "packed"] and small["same_tokens"]
    assert small["weight_bytes"] < dense["weight_bytes"] / 6
    for row in table.rows:
        assert np.isclose(row["tokens_per_second"], 2 / row["seconds"]) and row["first_token_seconds"] < 5


@pytest.mark.parametrize(
    "argv, message",
    [
        (["kernels", "--shapes", "64"], "--shapes 64: expected OUTxIN"),
        (["kernels", "--shapes", "64x100", "--formats", "Q4_0"], "Q4_0 needs a multiple of 32 .* (shape 64 x 100)"),
        (["kernels", "--formats", "Q4_Q"], "did you mean"),
        (["kernels", "--formats", "FP8_E4M3_tensor"], "rows of a matrix share scales"),
        (["kernels", "--rows", "0"], "must be at least 1"),
        (["generate", "--tokens", "3"], "tokens 4"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    assert message.split(" .* ")[0] in capsys.readouterr().err


def test_no_pallas_kernel_is_told():
    with pytest.raises(UserError, match="no pallas kernel on cpu"):
        list(
            products.contest(
                products.Contest(("Q8_0",), ((64, 256),), (1,), implementation="pallas", cold_bytes=1 << 16, rounds=1)
            )
        )


def test_bench_teaches(capsys):
    assert main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert "kernels" in said and "generate" in said
    assert main(["bench", "kernels", "--json", "-", "--formats", "Q8_0", *SMALL]) == 0
    assert {r["name"] for r in json.loads(capsys.readouterr().out)["kernels"]} == {"bfloat16", "float32", "Q8_0"}
