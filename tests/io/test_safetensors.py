"""safetensors files: the package's own writer and reader as judges, and a reader that survives anything."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.errors import UserError
from qjax.io.safetensors import open_file, open_folder, write_file

MAPS = Path("/proc/self/maps")
RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.standard_normal((3, 5)).astype(np.float32),
    "b": RNG.standard_normal(7).astype(np.float16),
    "c": RNG.standard_normal((2, 2, 2)),
    "d": RNG.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
}


def test_reads_the_packages_files(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors")
    f = open_file(tmp_path / "m.safetensors")
    assert f.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        got = f.array(name)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_the_package_reads_ours(tmp_path):
    infos = [
        (n, {"f2": "F16", "f4": "F32", "f8": "F64", "V2": "BF16"}[t.dtype.str[1:]], t.shape) for n, t in TENSORS.items()
    ]
    write_file(tmp_path / "m.safetensors", infos, iter(TENSORS.values()))
    for name, got in load_file(tmp_path / "m.safetensors").items():
        np.testing.assert_array_equal(got, TENSORS[name])
    for name, expected in TENSORS.items():  # F16 of odd length leaves what follows unaligned
        np.testing.assert_array_equal(open_file(tmp_path / "m.safetensors").array(name), expected)


def test_wrong_tensor_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'x': expected F32\[2\], got float16\[2\]"):
        write_file(tmp_path / "m", [("x", "F32", (2,))], [np.zeros(2, np.float16)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not MAPS.exists(), reason="needs the /proc of Linux")
def test_a_tensors_pages_go_with_its_array(tmp_path):
    """Else an export holds all of the file that it has read."""
    save_file(TENSORS, tmp_path / "held.safetensors")
    f = open_file(tmp_path / "held.safetensors")
    a = f.array("a")
    assert "held.safetensors" in MAPS.read_text()
    del a
    assert "held.safetensors" not in MAPS.read_text()


def test_other_types_are_named(tmp_path):
    save_file({"ids": np.arange(3)}, tmp_path / "m.safetensors")
    f = open_file(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="'ids' has type I64"):
        f.array("ids")
    with pytest.raises(UserError, match="no tensor 'absent'"):
        f.array("absent")


def shards(folder):
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "two.safetensors"}


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path):
    index(tmp_path, shards(tmp_path))
    f = open_folder(tmp_path)
    np.testing.assert_array_equal(f.array("a"), TENSORS["a"])
    np.testing.assert_array_equal(f.array("b"), TENSORS["b"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"c": "three.safetensors"}, r"shard 'three\.safetensors', .* is missing"),
        ({"c": "two.safetensors"}, "no tensor 'c'"),
        ({"c": "../secret.safetensors"}, "must lie in the same folder"),
        ({"c": "/etc/passwd"}, "must lie in the same folder"),
        ({"c": ".."}, "must lie in the same folder"),
        ({"c": 3}, "weight_map"),
    ],
)
def test_bad_index(tmp_path, change, error):
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"c": TENSORS["a"]}, tmp_path / "secret.safetensors")
    index(folder, shards(folder) | change)
    with pytest.raises(UserError, match=error):
        open_folder(folder)


def test_index_that_is_no_json(tmp_path):
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json"):
            open_folder(tmp_path)


def test_neither_file(tmp_path):
    with pytest.raises(UserError, match="has neither"):
        open_folder(tmp_path)


def test_mutated_files_open_or_raise_user_error(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    failed = 0
    for _ in range(500):
        mutated = bytearray(raw)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, min(head, len(mutated)) or 1))
            match int(rng.integers(0, 5)):
                case 0:
                    mutated[at : at + 1] = rng.bytes(1)
                case 1:
                    mutated[at : at + 1] = rng.choice(list(b'0123456789{}[]",:-')).tobytes()[:1]
                case 2:
                    del mutated[at:]
                case 3:
                    mutated[at:at] = rng.bytes(3)
                case 4:
                    del mutated[at : at + 5]
        path.write_bytes(mutated)
        try:
            f = open_file(path)
            for name, t in f.tensors.items():
                if t.dtype in ("F32", "F16", "F64", "BF16"):
                    f.array(name)
        except UserError as e:
            assert "m.safetensors" in str(e) and "\n" not in str(e)
            failed += 1
    assert failed > 100
