"""Model files with damaged bytes are read or refused in one line, and stay as they are."""

import pytest
from mutations import campaign

import qjax
from qjax.pipeline.export import export_model


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


@pytest.mark.sampled(2)
@pytest.mark.cases(20)
@pytest.mark.parametrize(
    ("to", "name"),
    [("compressed-tensors", "uint4_g32"), ("gptq", "uint3_g32"), ("awq", "int4_g32"), ("bitsandbytes", "NF4_b32_dq"),
     ("mlx", "uint4_g32_m")],
)  # fmt: skip
def test_packed_folder(model, tmp_path, to, name, cases):
    """The checkpoint of another library: its header and codes, and what its config says of them."""
    folder = tmp_path / "m"
    export_model(model, folder, to, name)
    for file in ("model.safetensors", "config.json"):
        assert campaign(to + file, cases[: len(cases) // 2], [folder / file], lambda: qjax.load(folder))["refused"]


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
