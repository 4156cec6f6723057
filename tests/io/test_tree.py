"""A params tree of one's own: it comes back with its formats and bytes; what is damaged is said in a line."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax.errors import UserError
from qjax.tensor import QTensor

W = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
FORMATS = ("Q4_0", "Q8_0", "F16", "int4_g32", "NF4_b64_dq", "FP8_E4M3")


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_tree_comes_back(tmp_path):
    tree = {
        "layers": [{"kernel": jnp.asarray(W[0], jnp.bfloat16)}, (np.float32(3.0), None, jnp.zeros((0, 4), bool))],
        "embed": {"embedding": qjax.quantize(W[0], "Q4_0")},
        "by number": {7: jnp.arange(3), 8: jnp.int8(7)},
        "stack": jax.vmap(lambda w: qjax.quantize(w, "Q8_0", axis=0))(W),
        "": jnp.float16(1.5),
    }
    qjax.save(tree, tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    back = qjax.load(tmp_path / "x.safetensors")
    equal(back, tree)
    assert back["stack"].axis == -2 and back["embed"]["embedding"].format == qjax.format("Q4_0")
    raw = load_file(tmp_path / "x.safetensors")  # others read the arrays under their paths
    np.testing.assert_array_equal(raw["embed/embedding/blocks"], tree["embed"]["embedding"].leaves["blocks"])


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_format_comes_back(name, tmp_path):
    q = qjax.quantize(W[0], name, axis=0)
    qjax.save({"w": q}, tmp_path / "x.safetensors")
    equal(qjax.load(tmp_path / "x.safetensors"), {"w": q})


def two_of_a_name():
    return {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}


WRONG = {
    "gguf": (
        lambda: {"w": W},
        "x.gguf",
        "of a dict: a Model goes there .* of your own goes to a .safetens",
    ),
    "a folder": (lambda: {"w": W}, "x", "a params tree of your own"),
    "a number": (lambda: {"w": {"lr": 0.1}}, "x.safetensors", "w/lr: a file holds arrays and QTensors, not float"),
    "a random key": (lambda: {"k": jax.random.key(0)}, "x.safetensors", "k: a file holds arrays .* of key<fry>"),
    "a key": (lambda: {"w": {(1, 2): W}}, "x.safetensors", r"w: has the key \(1, 2\)"),
    "two of a name": (two_of_a_name, "x.safetensors", "a/b: two leaves have this path"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_file_cannot_hold(case, tmp_path):
    make, name, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        qjax.save(make(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_change_of_variables_has_no_place(tmp_path):
    q = qjax.quantize(W[0], "Q8_0")
    q = QTensor(q.leaves, q.format, q.axis, (jnp.ones(64),))
    with pytest.raises(UserError, match="w: is packed behind"):
        qjax.save({"w": q}, tmp_path / "x.safetensors")


def test_a_model_goes_elsewhere(llama_model, tmp_path):
    with pytest.raises(UserError, match=r"of a Model: that is for params alone; name it \.gguf"):
        qjax.save(llama_model, tmp_path / "x.safetensors")
    qjax.save(llama_model.params, tmp_path / "x.safetensors")
    equal(qjax.load(tmp_path / "x.safetensors"), llama_model.params)


def with_metadata(path, said):
    """The same file with other metadata."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length]) | {"__metadata__": {"qjax": said}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


TENSOR = {"tensor": "w/blocks"}
PACKED = {"format": "Q8_0", "axis": -1, "shape": [64, 64], "leaves": {"dict": [["blocks", TENSOR]]}}


@pytest.mark.parametrize("node", [
    "no JSON", [], {}, 3, {"dict": 3}, {"dict": [[1]]}, {"what": 1}, {"tensor": "gone"}, {"tensor": [1]},
    PACKED | {"format": "Q9_Z"}, PACKED | {"format": 3}, PACKED | {"axis": 7}, PACKED | {"axis": "x"},
    PACKED | {"shape": [64, 65]}, PACKED | {"format": "Q4_0"}, PACKED | {"leaves": TENSOR},
    PACKED | {"format": "int4_g32"}, {"format": "Q8_0"}, "[" * 100_000,
])  # fmt: skip
def test_damaged_metadata_is_one_line(node, tmp_path):
    path = tmp_path / "x.safetensors"
    qjax.save({"w": qjax.quantize(W[0], "Q8_0")}, path)
    with_metadata(path, node if isinstance(node, str) else json.dumps(node))
    with pytest.raises(UserError, match=r"x\.safetensors: ") as e:
        qjax.load(path)
    assert "\n" not in str(e.value)


def test_a_file_of_others_is_no_tree(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": W}, path)
    with pytest.raises(UserError, match="no params tree that qjax saved"):
        qjax.load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        qjax.load(path)
