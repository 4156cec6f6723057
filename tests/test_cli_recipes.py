"""`qjax recipes`, and `qjax quantize --recipe` from text to report."""

import json

import pytest
from test_cli_models import TEXT, folder, text  # noqa: F401  (fixtures)

import qjax
from qjax.cli import main
from qjax.errors import UserError
from qjax.recipes import RECIPES, recipe

CALIBRATION = {
    "first_loss", "loss", "first_heldout_loss", "heldout_loss", "damping", "tokens", "seconds", "note",
    "by_matrix", "effective_tokens", "effective_windows", "shrinkage", "cross_share", "guarded", "output_shrinkage",
}  # fmt: skip
TENSOR = {"name", "shape", "format", "nbytes", "error", "kept", "calibration", "bits_per_weight"}


def test_recipes_as_json_and_as_a_table(capsys, tmp_path):
    assert main(["recipes", "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["recipes"]
    assert [row["name"] for row in rows] == list(RECIPES)
    for row in rows:
        assert set(row) == {"name", "needs", "stages", "about"}
        assert recipe(row["stages"]) == recipe(row["name"]) and row["about"]
        assert (row["needs"] == "nothing") == (row["name"] in ("rtn", "llm_int8", "w8a8", "hqq"))
    capsys.readouterr()
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)


def test_the_model_writes_the_text_where_none_is_given(folder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "q.gguf"
    argv = ["quantize", str(folder), "-o", str(out), "--type", "Q8_0", "--recipe", "imatrix", "--calib-ctx", "16"]
    assert main([*argv, "--calib-windows", "4", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "no text was given: the model writes 64 tokens" in printed.err
    tensors = json.loads(printed.out)["tensors"]
    assert {t["calibration"]["tokens"] for t in tensors if t["calibration"] and "emb" not in t["name"]} == {48}
    said = out.read_bytes()
    assert main([*argv, "--calib-windows", "4", "--calib", "self", "--force"]) == 0
    assert out.read_bytes() == said


@pytest.mark.slow
@pytest.mark.parametrize("line, suffix", [
    pytest.param("imatrix", ".gguf", marks=pytest.mark.slow), ("imatrix", ""),
    ("nearest() >> ldlq()", ".gguf"), pytest.param("nearest() >> ldlq()", "", marks=pytest.mark.slow),
])  # fmt: skip
def test_quantize_reports_every_weight(folder, text, tmp_path, capsys, line, suffix):  # noqa: F811
    """A file and a folder, a name and a line of stages."""
    out = tmp_path / f"q{suffix}"
    argv = ["quantize", str(folder), "-o", str(out), "--type", "pure:int4_g32" if not suffix else "Q4_0"]
    argv += ["--recipe", line, "--calib", str(text), "--calib-windows", "8", "--calib-ctx", "32"]
    assert main([*argv, "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["recipe"] == line and made["type"] == argv[5]
    for t in made["tensors"]:
        assert set(t) == TENSOR
        assert (t["calibration"] is None) == (t["kept"] is not None), t["name"]
        if t["calibration"]:
            assert set(t["calibration"]) == CALIBRATION and t["calibration"]["damping"] >= 0
    kernels = [t for t in made["tensors"] if t["calibration"] and "emb" not in t["name"]]
    assert len(kernels) == 14 and all(t["calibration"]["tokens"] == 7 * 32 for t in kernels)
    if line != "imatrix":
        assert all(t["calibration"]["loss"] < t["calibration"]["first_loss"] for t in kernels)
        assert all(t["calibration"]["heldout_loss"] > 0 for t in kernels)
    assert qjax.load(out).logits([[1, 2, 3]]).shape == (1, 3, 384)
    assert [p.name for p in tmp_path.iterdir() if p.name != "text.txt"] == [out.name]


@pytest.mark.slow
def test_the_tables_show_losses_by_type_and_if_asked_by_tensor(folder, text, tmp_path, capsys):  # noqa: F811
    argv = ["quantize", str(folder), "--type", "Q4_0", "--recipe", "nearest() >> ldlq()", "--calib", str(text)]
    argv += ["--calib-windows", "8", "--calib-ctx", "32", "--verbose", "-o", str(tmp_path / "q.gguf")]
    assert main(argv) == 0
    said = capsys.readouterr()
    by_tensor, by_type = said.out.split("rel. error")[1:]
    assert "held out" in by_tensor and "damping" in by_tensor and "->" in by_tensor and "blk.1.ffn_up" in by_tensor
    by_type, ledger = by_type.split("bits per weight: ")
    assert "held out" in by_type and "->" in by_type and "blk." not in by_type
    assert "of the whole" in ledger and "kept: output_norm.weight" in ledger
    assert [line.split()[0] for line in by_type.splitlines()[2:6]] == ["Q4_0", "Q8_0", "F32", "all"]
    assert "Q4_0: 1 of 15 tensors have rows of 64 weights" in said.err  # its embedding is no Q6_K


@pytest.mark.slow
def test_the_reference_model_by_best_gguf(tmp_path, capsys):
    """The flagship line of the README."""
    (tmp_path / "calib.txt").write_text(TEXT * 4)
    out, argv = tmp_path / "ref.gguf", ["quantize", "reference", "--type", "Q3_K_M", "--recipe", "best_gguf"]
    argv += ["-o", str(out), "--calib", str(tmp_path / "calib.txt"), "--calib-windows", "4", "--calib-ctx", "64"]
    assert main([*argv, "--json", str(tmp_path / "j.json")]) == 0
    made = json.loads((tmp_path / "j.json").read_text())
    assert set(made) == {
        "model", "out", "type", "recipe", "seconds", "written", "bits_per_weight", "nbytes", "formats", "notes",
        "tensors", "ledger",
    }  # fmt: skip
    assert (made["model"], made["type"], made["recipe"]) == ("reference", "Q3_K_M", "best_gguf")
    assert made["ledger"]["tokens"] == [192, 256] and made["ledger"]["damping"][0] >= 0.05
    assert any("fewer than its" in note for note in made["ledger"]["notes"])
    for t in made["tensors"]:
        assert set(t) == TENSOR and (t["calibration"] is None) == (t["kept"] is not None)
        line = t["calibration"]
        if line:
            assert set(line) == CALIBRATION
            seen, n = 3 * 64 if "embd" in t["name"] else 4 * 64, t["shape"][-1]  # what is shrunk uses all windows
            assert line["tokens"] == seen and line["damping"] >= 0.05 and 0 < line["loss"] < 0.5
            assert line["note"] == (f"saw {seen} tokens, fewer than its {n} inputs" if seen < n else "")
    plain = tmp_path / "plain.gguf"
    assert (
        main(["quantize", "reference", "-o", str(plain), "--type", "Q3_K_M", "--json", str(tmp_path / "p.json")]) == 0
    )
    assert abs(plain.stat().st_size - out.stat().st_size) < 4096
    assert qjax.load(out).logits([[1, 2, 3]]).shape[1] == 3


@pytest.mark.parametrize("recipe_, out, message", [
    ("awq", "m.gguf", "no place for awq_scale"), ("w8a8", "m.gguf", "no place for act"),
    ("w8a8", "folder", "cannot say that inputs are rounded"), ("hqq", "m.gguf", "has no offset to fit"),
])  # fmt: skip
def test_what_a_file_cannot_hold_is_said_before_any_work(folder, tmp_path, capsys, recipe_, out, message):  # noqa: F811
    assert main(["quantize", str(folder), "-o", str(tmp_path / out), "--type", "Q4_1", "--recipe", recipe_]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("line, known", [("rtn", False), ("imatrix", True)])
def test_into_a_folder_a_mix_knows_of_the_imatrix_too(folder, text, tmp_path, monkeypatch, capsys, line, known):  # noqa: F811
    def plan_named(name, config, has_imatrix):
        raise UserError(f"imatrix known: {has_imatrix}")

    monkeypatch.setattr("qjax.plan.named.plan_named", plan_named)
    argv = ["quantize", str(folder), "-o", str(tmp_path / "q"), "--type", "Q4_0", "--recipe", line]
    assert main([*argv, *(["--calib", str(text)] if known else [])]) == 2
    assert f"imatrix known: {known}" in capsys.readouterr().err
