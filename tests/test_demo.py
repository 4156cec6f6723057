"""The quickstart, as `make demo` runs it but for a quarter of the tokens."""

import itertools
import json
import re
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax import config as configs
from qjax.cli import main
from qjax.cli.run import load_script
from qjax.evaluate.judge import baseline_of, judge
from qjax.models.stdlib_text import heldout_text

pytestmark = pytest.mark.optimized  # it judges models for longer than it compiles

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
REFERENCE = ROOT / "qjax" / "models" / "reference" / "config.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_is_valid_and_says_how_to_run_it(path):
    source = configs.read(path)
    module, _ = load_script(source)
    configs.build(module.Config, source)
    configs.build(module.Config, source, smoke=True)
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), path.open()))
    command = "sweep" if "[sweep" in path.read_text() else "run"
    assert f"qjax {command} {path.relative_to(ROOT)}" in head, "the head comment gives the exact command"
    assert "core" in head or "GPU" in head, "and the hardware"
    assert "minute" in head or "second" in head, "and the time"


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference model is not in this tree")
def test_a_sweep_and_its_report(tmp_path, capsys):
    """Nine runs of three methods at three sizes, as a new user would try it."""
    out, page = tmp_path / "sweep", tmp_path / "sweep.html"
    assert main(["sweep", str(ROOT / "configs/sweep.toml"), "--smoke", "--jobs", "2", "--out", str(out)]) == 0
    assert "9 of 9 runs done" in capsys.readouterr().out
    assert main(["report", str(out), "-o", str(page)]) == 0
    text = page.read_text()
    assert main(["report", str(out), "--figure", "kl", "-o", str(tmp_path / "kl.svg")]) == 0
    assert (tmp_path / "kl.svg").read_text().count("<circle") == 9
    assert text.count("<section") == 9 and all(name in text for name in ("gptq:uint3_g128", "best_gguf:Q2_K"))


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference model is not in this tree")
def test_quickstart(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", str(ROOT / "configs/quickstart.toml"), "--tokens", "2048", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in said and f"GGUF:   {out / 'Q4_K_M.gguf'}" in said

    config = tomllib.loads((out / "config.toml").read_text())
    rows = json.loads((out / "results.json").read_text())["rows"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {r["name"] for r in rows} == {r["name"] for r in logged} == {"float32", *config["formats"]}
    assert len(config["formats"]) >= 12
    assert all(name in said for name in config["formats"])
    kl = {r["name"]: r["kl_mean"] for r in rows}
    assert kl["float32"] == 0
    assert kl["Q8_0"] < kl["Q6_K"] < kl["Q5_K_M"] < kl["Q4_K_M"] < kl["Q3_K_M"] < kl["Q2_K"]
    for r in rows:
        if r["name"] != "float32":
            assert r["block_bits"] <= r["whole_bits"] < 9 and r["same_top_percent"] > 10
    page = (out / "report.html").read_text()
    titles = re.findall('<figure class="wide"><figcaption><strong>(.*?)[.]</strong>', page)
    inside = ["Bits by layer: Q4_K_M", "Error by layer: Q4_K_M"]
    weights = [f"Weights {how}: layers_4/mlp/up/kernel in Q4_K" for how in ("before and after", "on the grid")]
    assert titles == ["KL against bits", "Perplexity against bits", *inside, *weights, "KL by token"]
    assert "worst_tokens" in page and not list(out.glob("*.png"))
    assert json.loads((out / "manifest.json").read_text())["exit_status"] == 0

    # The file in the run directory is the model of the table.
    model = qjax.load("reference")
    text = heldout_text()
    windows = {"context": 512, "limit": config["tokens"] // 512}
    found = judge(qjax.load(out / "Q4_K_M.gguf"), baseline=baseline_of(model, text, **windows))
    assert found.divergence.kl_mean == pytest.approx(kl["Q4_K_M"], rel=1e-3)


@pytest.mark.slow
def test_grid_on_a_tiny_model(tmp_path, capsys):
    from test_cli_models import make_folder

    folder = make_folder(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("def main(argv):\n    return [x for x in argv if x]\n" * 60)
    out = tmp_path / "run"
    options = ["--model", folder, "--text", text, "--context", "32", "--tokens", "128", "--out", out]
    formats = ["--formats", "Q8_0", "pure:Q4_0", "--gguf", "Q8_0", "--shown", "pure:Q4_0"]
    assert main(["run", str(ROOT / "configs/quickstart.toml"), *map(str, options), *formats]) == 0
    rows = {r["name"]: r for r in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["float32"]["kl_mean"] == 0 < rows["Q8_0"]["kl_mean"] < rows["pure:Q4_0"]["kl_mean"]
    assert rows["float32"]["windows"] == 4
    packed = qjax.load(out / "Q8_0.gguf")
    expected = qjax.load(folder)
    for w, q in zip(jax.tree.leaves(expected.params), jax.tree.leaves(packed.dense), strict=True):
        assert float(np.abs(np.asarray(w - q)).max()) <= float(np.abs(w).max()) / 127
    assert "report:" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    worst = [row["kl"] for row in found["worst_tokens"]]
    assert {row["of"] for row in found["tensors"]} == {"pure:Q4_0"} and worst == sorted(worst, reverse=True)
    assert worst[0] == pytest.approx(rows["pure:Q4_0"]["kl_max"], rel=1e-3) and found["tokens"][-1]["kl"] <= worst[0]
    assert found["summary"][0].keys() < rows["float32"].keys() and len(found["weights"]) <= 64
    assert main(["run", str(ROOT / "configs/quickstart.toml"), "--gguf", "Q9", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "qjax: gguf: 'Q9' is not among the formats\n"
