"""Importance matrices: both of llama.cpp's forms, against gguf-py, ggml's own C and hand-made bytes."""

import ctypes
import struct

import gguf
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.io.gguf_read import read_gguf
from qjax.io.gguf_write import TensorInfo, write_gguf
from qjax.io.imatrix import Imatrix, check_imatrix, read_imatrix, write_imatrix

UP, DOWN = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"


@pytest.fixture
def imatrix():
    rng = np.random.default_rng(0)
    values = {UP: rng.lognormal(size=64).astype(np.float32), DOWN: rng.lognormal(size=96).astype(np.float32)}
    return Imatrix(values, {UP: 1536, DOWN: 1536}, ("book.txt", "naïve.txt"), 512)


def gguf_file(path, metadata=None, **tensors):
    """A GGUF importance matrix of one entry `w`, with whatever is to be wrong with it."""
    metadata = {"general.type": "imatrix", "imatrix.datasets": ["t"], "imatrix.chunk_size": 8} | (metadata or {})
    tensors = {"in_sum2": np.ones(4, np.float32), "counts": np.ones(1, np.float32)} | tensors
    tensors = {f"w.{key}": x for key, x in tensors.items() if x is not None}
    kinds = {"float32": "F32", "float16": "F16"}
    infos = [TensorInfo(name, x.shape, kinds[x.dtype.name]) for name, x in tensors.items()]
    write_gguf(path, {k: v for k, v in metadata.items() if v is not None}, infos, tensors.values())
    return path


def dat(*entries, end=b""):
    """A .dat file of (name, calls, numbers)."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, x in entries:
        parts.append(struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(x)}f", calls, len(x), *x))
    return b"".join(parts) + end


@pytest.mark.parametrize("legacy", [False, True])
def test_round_trip(legacy, imatrix, tmp_path):
    write_imatrix(tmp_path / "im", imatrix, legacy)
    found = read_imatrix(tmp_path / "im")
    assert (found.counts, found.chunk_size, found.chunks) == (imatrix.counts, 512, 3)
    assert found.datasets == (imatrix.datasets[-1:] if legacy else imatrix.datasets)
    assert list(found.values) == sorted(imatrix.values)
    for name, x in imatrix.values.items():
        assert found.values[name].dtype == np.float32
        np.testing.assert_allclose(found.values[name], x, rtol=1.2e-7)  # one rounding on the way
    write_imatrix(tmp_path / "again", found, legacy)
    assert (tmp_path / "again").stat().st_size == (tmp_path / "im").stat().st_size


def test_gguf_py_reads_what_was_written(imatrix, tmp_path):
    write_imatrix(tmp_path / "im.gguf", imatrix)
    reader = gguf.GGUFReader(tmp_path / "im.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["book.txt", "naïve.txt"]
    for key, value in {"imatrix.chunk_count": 3, "imatrix.chunk_size": 512}.items():
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
        assert reader.fields[key].contents() == value
    found = {t.name: t for t in reader.tensors}
    assert list(found) == [f"{n}.{s}" for n in sorted(imatrix.values) for s in ("in_sum2", "counts")]
    for name, x in imatrix.values.items():
        sums, counts = found[f"{name}.in_sum2"], found[f"{name}.counts"]
        assert list(sums.shape) == [x.size] and list(counts.shape) == [1]
        assert sums.tensor_type == counts.tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(counts.data, np.float32([1536]))
        np.testing.assert_array_equal(sums.data / counts.data, read_imatrix(tmp_path / "im.gguf").values[name])
        np.testing.assert_array_equal(sums.data, (x.astype(np.float64) * 1536).astype(np.float32))


def test_experts(tmp_path):
    """A row of sums and a count for each; one that saw no token has no importance, which is ones."""
    x = np.random.default_rng(0).lognormal(size=(3, 64)).astype(np.float32)
    x[1] = 1
    made = Imatrix({"blk.0.ffn_down_exps.weight": x}, {"blk.0.ffn_down_exps.weight": np.array([9, 0, 5])}, ("t",), 8)
    write_imatrix(tmp_path / "im.gguf", made)
    tensors = {t.name.rsplit(".", 1)[1]: t for t in gguf.GGUFReader(tmp_path / "im.gguf").tensors}
    assert list(tensors["in_sum2"].shape) == [64, 3] and list(tensors["counts"].shape) == [1, 3]  # as llama-imatrix
    np.testing.assert_array_equal(tensors["in_sum2"].data[1], 0)
    back = read_imatrix(tmp_path / "im.gguf")
    np.testing.assert_allclose(back.values["blk.0.ffn_down_exps.weight"], x, rtol=1.2e-7)
    np.testing.assert_array_equal(back.counts["blk.0.ffn_down_exps.weight"], [9, 0, 5])
    assert back.chunks == 1
    check_imatrix(back, {"blk.0.ffn_down_exps.weight": (3, 16, 64)})
    with pytest.raises(UserError, match="192 values, the model's tensor 4 experts with rows of 64"):
        check_imatrix(back, {"blk.0.ffn_down_exps.weight": (4, 16, 64)})
    write_imatrix(tmp_path / "im.dat", made, legacy=True)
    assert read_imatrix(tmp_path / "im.dat").values["blk.0.ffn_down_exps.weight"].shape == (192,)  # it does not say


def test_header_is_what_ggml_writes(ggml, imatrix, tmp_path):
    class Params(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

    write_imatrix(tmp_path / "im.gguf", imatrix)
    ggml.lib.gguf_init_from_file.restype = ctypes.c_void_p
    file = ggml.lib.gguf_init_from_file(str(tmp_path / "im.gguf").encode(), Params(True, None))
    assert file
    ggml.lib.gguf_write_to_file.restype = ctypes.c_bool
    out = str(tmp_path / "header").encode()
    assert ggml.lib.gguf_write_to_file(ctypes.c_void_p(file), out, ctypes.c_bool(True))
    ggml.lib.gguf_free(ctypes.c_void_p(file))
    header = (tmp_path / "header").read_bytes()
    assert len(header) > 300
    assert (tmp_path / "im.gguf").read_bytes()[: len(header)] == header


def test_gguf_of_llama_imatrix(tmp_path):
    """Its two-dimensional tensors, the sums of plain inputs that newer ones add, and the mean that quantizing takes."""
    x = np.array([[2.0, 0.0, 6.0]], np.float32)
    path = gguf_file(tmp_path / "im", in_sum2=x, counts=np.full((1, 1), 4, np.float32), in_sum=x)
    found = read_imatrix(path)
    np.testing.assert_array_equal(found.values["w"], np.float32([0.5, 0, 1.5]))
    assert (found.counts, found.datasets, found.chunk_size, found.chunks) == ({"w": 4}, ("t",), 8, 0)


def test_dat_bytes(tmp_path, imatrix):
    a, b = [0.5, 2.0, 0.0], [1.0]
    end = struct.pack("<ii", 2, 4) + b"text"
    raw = dat((b"a", 2, [2 * v for v in a]), (b"b", 1, b), end=end)
    small = Imatrix({"b": np.float32(b), "a": np.float32(a)}, {"a": 9, "b": 8}, ("other", "text"), 4)
    write_imatrix(tmp_path / "im.dat", small, legacy=True)
    assert (tmp_path / "im.dat").read_bytes() == dat(
        (b"a", 3, [3 * v for v in a]), (b"b", 2, [2 * v for v in b]), end=end
    )
    for tail, datasets in {end: ("text",), struct.pack("<ii", 2, 0): (), struct.pack("<i", 2): (), b"": ()}.items():
        (tmp_path / "im.dat").write_bytes(raw.removesuffix(end) + tail)
        found = read_imatrix(tmp_path / "im.dat")
        np.testing.assert_array_equal(found.values["a"], np.float32(a))
        np.testing.assert_array_equal(found.values["b"], np.float32(b))
        assert (found.counts, found.datasets, found.chunk_size) == ({"a": 1024, "b": 512}, datasets, 512)


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "not an importance matrix"),
        (b"Once upon a time there was a text", "not an importance matrix"),
        (struct.pack("<i", -1) * 9, "not an importance matrix"),
        (struct.pack("<i", 1) + b"\xff" * 40, "the name of entry 0 has -1 bytes"),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe" + bytes(20), "the name of entry 0 is not UTF-8"),
        (dat((b"w", 1, [1.0, 2.0]))[:-1], "truncated.*entry 'w' needs 8 bytes at 17 of 24"),
        (dat((b"w", 1, [1.0, 2.0]), (b"x" * 30, 1, [1.0]))[:40], "truncated.*the name of entry 1 needs"),
        (dat((b"w", 1, [1.0, 2.0]), end=b"\1\0\0"), "truncated.*the number of chunks"),
        (dat((b"w", 1, [1.0]), end=struct.pack("<ii", 1, 9) + b"text"), "data set's name has 9 bytes|truncated"),
        (dat((b"w", 1, [1.0]), (b"w", 1, [1.0])), "entry 'w' appears twice"),
        (dat((b"w", 1, []), end=bytes(8)), "entry 'w'.* has shape"),
        (dat((b"w", 0, [1.0, 2.0])), "entry 'w'.* saw no tokens"),
        (dat((b"w", -1, [1.0, 2.0])), "entry 'w'.* saw no tokens"),
        (dat((b"w", 1, [1.0, -2.0])), "entry 'w'.* holds -2"),
        (dat((b"w", 1, [1.0, float("nan")])), "entry 'w'.* holds nan"),
    ],
)  # fmt: skip
def test_bad_dat(raw, message, tmp_path):
    (tmp_path / "im.dat").write_bytes(raw)
    with pytest.raises(UserError, match=message) as error:
        read_imatrix(tmp_path / "im.dat")
    assert str(error.value).startswith(str(tmp_path / "im.dat"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metadata": {"general.type": "model"}}, "not an importance matrix: .*'model'"),
        ({"metadata": {"general.type": None}}, "not an importance matrix"),
        ({"metadata": {"imatrix.datasets": "t"}}, "imatrix.datasets is not a list"),
        ({"metadata": {"imatrix.chunk_size": None}}, "imatrix.chunk_size is None"),
        ({"metadata": {"imatrix.chunk_size": 0}}, "chunks of 0 tokens"),
        ({"in_sum2": None}, "'w'.* needs both"),
        ({"counts": None}, "'w'.* needs both"),
        ({"in_sum2": None, "counts": None, "in_sum": np.ones(1, np.float32)}, "without entries"),
        ({"in_sum2": np.ones(4, np.float16)}, "'w.in_sum2' has type F16"),
        ({"counts": np.ones((3, 1), np.float32)}, r"'w' has sums of shape \[4\] for 3 counts"),
        ({"counts": np.zeros((2, 1), np.float32)}, "'w'.* saw no tokens"),
        ({"counts": np.zeros(1, np.float32)}, "'w'.* saw no tokens"),
        ({"counts": np.float32([np.nan])}, "'w' has the count nan"),
        ({"in_sum2": np.float32([1, -1])}, "'w'.* holds -1"),
        ({"in_sum2": np.float32([1, np.inf])}, "'w'.* holds inf"),
    ],
)
def test_bad_gguf(change, message, tmp_path):
    path = gguf_file(tmp_path / "im.gguf", **change)
    with pytest.raises(UserError, match=message) as error:
        read_imatrix(path)
    assert str(error.value).startswith(str(path))


def test_truncated_gguf(imatrix, tmp_path):
    path = tmp_path / "im.gguf"
    write_imatrix(path, imatrix)
    whole = path.read_bytes()
    for size in (8, 100, len(whole) - 200):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"im\.gguf"):
            read_imatrix(path)


def test_files_that_cannot_be(imatrix, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_imatrix(tmp_path / "missing")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_imatrix(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_imatrix(tmp_path / "missing" / "im", imatrix)
    long = Imatrix({"n" * 60: np.ones(1, np.float32)}, {"n" * 60: 1})
    with pytest.raises(UserError, match="GGUF names have at most 63 bytes"):
        write_imatrix(tmp_path / "im", long)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [[-1.0], [np.nan], [np.inf], [], [[1.0]]])
def test_values_are_checked_when_made(bad):
    with pytest.raises(UserError, match="entry 'w'"):
        Imatrix({"w": np.array(bad, np.float32)}, {"w": 1})


def test_another_model(imatrix, llama_model, tmp_path):
    import qjax

    qjax.save(llama_model, tmp_path / "model.gguf")
    shapes = {t.name: t.shape for t in read_gguf(tmp_path / "model.gguf").tensors.values()}
    up, down = shapes[UP][-1], shapes[DOWN][-1]
    good = {UP: np.ones(up, np.float32), DOWN: np.ones(down, np.float32)}
    check_imatrix(good, shapes)
    check_imatrix(Imatrix(good, {UP: 1, DOWN: 1}), shapes)
    with pytest.raises(UserError, match=f"another model: its entry '{UP}' has 7 values.* rows of {up} weights"):
        check_imatrix(good | {UP: np.ones(7, np.float32)}, shapes)
    with pytest.raises(UserError, match=r"another model: it has 'blk.99.ffn_up.weight'"):
        check_imatrix(good | {"blk.99.ffn_up.weight": np.ones(up, np.float32)}, shapes)
