"""Model files with damaged bytes are read or refused in one line, and stay as they are."""

import pytest
from mutations import campaign

import qjax


@pytest.mark.cases(120)
def test_gguf(tiny, tmp_path, cases):
    path = tmp_path / "m.gguf"
    qjax.save(tiny, path)
    outcomes = campaign("gguf", cases, [path], lambda: qjax.load(path))
    assert all(outcomes[end] for end in ("read", "refused"))


@pytest.mark.cases(80)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_folder(tiny, tmp_path, name, cases):
    folder = tmp_path / "m"
    qjax.save(tiny, folder)
    assert campaign(name, cases[: len(cases) // 4], [folder / name], lambda: qjax.load(folder))["refused"]


@pytest.mark.cases(60)
def test_tree(tmp_path, rng, cases):
    """A params tree with packed weights."""
    path = tmp_path / "t.safetensors"
    weight = rng.standard_normal((64, 64)).astype("f4")
    qjax.save({"a": {"kernel": qjax.quantize(weight, "Q4_0")}, "b": weight}, path)
    assert campaign("tree", cases, [path], lambda: qjax.load(path))["refused"]


@pytest.mark.cases(60)
def test_importance(tmp_path, rng, cases):
    from qjax.io.imatrix import Imatrix, read_imatrix, write_imatrix

    path = tmp_path / "i.gguf"
    write_imatrix(path, Imatrix({"blk.0.attn_q.weight": rng.random(64).astype("f4")}, {"blk.0.attn_q.weight": 9}))
    assert campaign("importance", cases, [path], lambda: read_imatrix(path))["refused"]
