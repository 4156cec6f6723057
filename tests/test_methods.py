"""The table of methods: float, mixes and formats side by side; a killed run goes on; what does not fit is refused."""

import json
from pathlib import Path

import pytest
from test_cli_models import make_folder

from qjax.cli import main
from qjax.cli.run import load_script
from qjax.config import read
from qjax.errors import UserError
from qjax.evaluate.cost import watch_memory
from qjax.io.text import read_texts
from qjax.models.config import DecoderConfig

PTQ = Path(__file__).parents[1] / "configs" / "smollm2" / "ptq.toml"
methods, _ = load_script(read(PTQ))


def test_a_table_of_a_tiny_model_and_the_rest_of_a_killed_run(tmp_path, capsys):
    text, calib = tmp_path / "text.txt", tmp_path / "calib.json"
    text.write_text("def main(argv):\n    return [x for x in argv if x]\n" * 20)
    calib.write_text(json.dumps([text.read_text()] * 2))
    paths = {"model": make_folder(tmp_path / "tiny"), "text": text, "calibration": calib, "out": tmp_path / "run"}
    line = ["run", str(PTQ), "--smoke", *(part for key, path in paths.items() for part in (f"--{key}", str(path)))]
    line += ["--tokens", "64", "--context", "32", "--methods", "float", "rtn:uint4_g32", "rtn:uint2_g32"]
    line += ["--rates", "3.5"]
    assert main(line) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {r["method"]: r for r in results["rows"]}
    assert rows["float"]["kl"] == 0 < rows["rtn:uint4_g32"]["kl"] < rows["rtn:uint2_g32"]["kl"]
    assert "layer_bits" not in rows["float"] and 2.5 < rows["rtn:uint2_g32"]["layer_bits"] < 2.7
    (between,) = results["equal_bits"]
    assert rows["rtn:uint4_g32"]["kl"] < between["kl"] < rows["rtn:uint2_g32"]["kl"] and between["family"] == "scalar"
    assert rows["rtn:uint2_g32"]["family"] == "scalar" and "family" not in rows["float"]
    for row in rows.values():
        assert row["tokens_per_second"] > 0 and row["kl_se_clustered"] >= 0
        assert row.get("peak_mb") is None or row["peak_mb"] > 100
    assert "tokens/s" in capsys.readouterr().out

    log = tmp_path / "run" / "metrics.jsonl"
    first, _, third = log.read_text().splitlines(keepends=True)
    kept = first.replace('"perplexity": ', '"perplexity": 7')  # which a row that is made again would not say
    log.write_text(kept + third[: len(third) // 2])
    capsys.readouterr()
    assert main(line) == 0
    said = capsys.readouterr().err
    assert "seed 0 float" not in said and "uint4_g32: KL" in said and "uint2_g32: KL" in said
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["runs"][0]["perplexity"] == json.loads(kept)["perplexity"]
    assert again["runs"][2]["kl_mean"] == pytest.approx(results["runs"][2]["kl_mean"])


NARROW = DecoderConfig(vocab=256, dim=192, hidden=256, layers=2, heads=3, kv_heads=3, head_dim=64, tied=True)


@pytest.mark.parametrize(
    "name, said",
    [
        ("gptq:uint4_g128", r"'gptq:uint4_g128': layers_0/attn/q/kernel .* no multiple of uint4_g128's block of 128"),
        ("gptq", "it names no format; write gptq:uint4_g128"),
        ("gptq:Q9_K", "Q9_K"),
        ("nothing:Q5_K_M", "nothing"),
    ],
)
def test_what_a_model_cannot_take_is_refused_by_the_entrys_name(name, said):
    with pytest.raises(UserError, match=f"methods: .*{said}"):
        methods.entry(name, "Q8_0", NARROW)


def test_a_mix_decides_for_all_weights_and_falls_back_on_narrow_rows():
    made = methods.entry("best_gguf:Q5_K_M", "keep", NARROW)
    assert made.looks and made.sensitive and {"Q5_1", "Q8_0"} <= {rule.format_name for rule in made.plan.rules}


def test_the_peak_of_memory_is_of_what_is_watched():
    peak = watch_memory()
    before = peak()
    if before is None:
        pytest.skip("this system does not forget its peak")
    big = b"x" * 200_000_000
    assert peak() > before + 150
    del big
    assert watch_memory()() < before + 150


def test_a_json_file_holds_a_list_of_texts(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text('["a", "b"]')
    assert read_texts(path) == ["a", "b"]
    for wrong in ('{"a": 1}', '["a", 1]', "[]", "["):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"texts\.json"):
            read_texts(path)
