"""GGUF files: ours against gguf-py in both directions, and a reader that survives anything."""

import struct
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.io.gguf_read import read_gguf
from qjax.io.gguf_types import DENSE, TENSOR_TYPES
from qjax.io.gguf_write import TensorInfo, layout, tensor_order, write_gguf
from qjax.tensor import dequantize

META = {
    "general.architecture": "llama",
    "an.int": 7,
    "a.negative": -3,
    "a.big": 1 << 40,
    "a.float": 0.5,
    "a.bool": True,
    "a.text": "naïve ▁",
    "texts": ["a", "", "ß"],
    "ints": [1, -2, 3],
    "floats": [0.5, -1.0],
    "bools": [True, False],
    "none": [],
    "typed": np.float64(0.1),
}


def small_file(path):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 64)).astype(np.float32)
    tensors = {
        "f32": w,
        "f16": w[:3].astype(np.float16),
        "bf16": w[0].astype(ml_dtypes.bfloat16),
        "q8": gguf.quantize(w, gguf.GGMLQuantizationType.Q8_0),
    }
    kinds = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8": "Q8_0"}
    infos = [TensorInfo(n, w.shape if n == "q8" else t.shape, kinds[n]) for n, t in tensors.items()]
    write_gguf(path, META, infos, iter(tensors.values()))
    return w, tensors


def test_types_equal_gguf_py():
    assert set(gguf.GGML_QUANT_SIZES) <= {t.id for t in TENSOR_TYPES.values()}
    for number, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        t = TENSOR_TYPES[number.name]
        if t.name != "Q8_1":  # gguf-py counts float32 fields there; ggml's are fp16
            assert (t.id, t.block, t.block_bytes) == (number, block, block_bytes)
    for name, dtype in DENSE.items():
        assert dtype.itemsize == TENSOR_TYPES[name].block_bytes


def test_types_equal_ggml(ggml):
    for t in TENSOR_TYPES.values():
        assert ggml.lib.ggml_row_size(t.id, t.block) == t.block_bytes, t.name
        assert ggml.lib.ggml_blck_size(t.id) == t.block, t.name


def test_roundtrip(tmp_path):
    w, tensors = small_file(tmp_path / "a.gguf")
    f = read_gguf(tmp_path / "a.gguf")
    assert f.metadata == META
    for name in ("f32", "f16", "bf16"):
        np.testing.assert_array_equal(f.array(name), tensors[name])
        assert f.array(name).dtype == tensors[name].dtype
        assert f.array(name).base is not None  # a view, not a copy
    q = f.qtensor("q8")
    assert q.shape == (4, 64) and f.tensors["q8"].shape == (4, 64)
    np.testing.assert_array_equal(dequantize(q), gguf.dequantize(tensors["q8"], gguf.GGMLQuantizationType.Q8_0))
    assert np.abs(dequantize(q) - w).max() < 0.02
    for error, call in [("no tensor", f.raw), ("packed", f.array)]:
        with pytest.raises(UserError, match=error):
            call("absent" if error == "no tensor" else "q8")


def test_gguf_py_reads_ours(tmp_path):
    _, tensors = small_file(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value in META.items():
        if key != "none":
            got = reader.fields[key].contents()
            np.testing.assert_equal(got, value)
    assert [t.name for t in reader.tensors] == list(tensors)
    for t in reader.tensors:
        assert t.data_offset % 32 == 0
        assert t.data.tobytes() == tensors[t.name].tobytes()
    types = {k: reader.fields[k].types[-1].name for k in ("an.int", "a.negative", "a.big", "a.float", "ints", "typed")}
    assert list(types.values()) == ["UINT32", "INT32", "UINT64", "FLOAT32", "INT32", "FLOAT64"]


def test_ours_reads_gguf_py(tmp_path):
    path = tmp_path / "a.gguf"
    w = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint64("u64", 1 << 50)
    writer.add_int8("i8", -5)
    writer.add_array("tokens", ["x", "▁y"])
    writer.add_custom_alignment(64)
    writer.add_tensor("w", w)
    writer.add_tensor("q", gguf.quantize(w, gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    f = read_gguf(path)
    assert f.metadata["u64"] == 1 << 50 and f.metadata["i8"] == -5 and f.metadata["tokens"] == ["x", "▁y"]
    assert f.metadata["general.alignment"] == 64
    np.testing.assert_array_equal(f.array("w"), w)
    assert f.tensors["q"].shape == (2, 64) and f.tensors["q"].type == "Q4_0" and f.tensors["q"].nbytes == 2 * 2 * 18


def test_layout_gives_every_place(tmp_path):
    infos = [TensorInfo("a", (3, 5), "F32"), TensorInfo("b", (2, 32), "Q8_0")]
    plan = layout({"k": 1}, infos)
    write_gguf(tmp_path / "a.gguf", {"k": 1}, infos, [bytes(60), bytes(68)])
    f = read_gguf(tmp_path / "a.gguf")
    assert plan.size == (tmp_path / "a.gguf").stat().st_size
    assert {n: e.offset for n, e in f.tensors.items()} == plan.offsets


def test_tensors_are_asked_for_one_at_a_time(tmp_path):
    n = 1 << 20

    def stream():
        for i in range(8):
            yield np.full(n, i, np.float32)

    tracemalloc.start()
    write_gguf(tmp_path / "a.gguf", {}, [TensorInfo(f"t{i}", (n,), "F32") for i in range(8)], stream())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * n
    assert read_gguf(tmp_path / "a.gguf").array("t7")[-1] == 7


def test_order_is_llama_quantizes():
    names = [
        "blk.10.attn_q.weight",
        "output.weight",
        "blk.2.ffn_up.weight",
        "blk.2.attn_q.weight",
        "output_norm.weight",
    ]
    assert sorted(names, key=tensor_order) == [names[1], names[4], names[3], names[2], names[0]]


@pytest.mark.parametrize(
    ("infos", "tensors", "error"),
    [
        ([TensorInfo("a", (2, 33), "Q8_0")], [], "multiple of 32 weights, got 33"),
        ([TensorInfo("a", (2,), "F32")], [bytes(7)], "takes 8 bytes, got 7"),
        ([TensorInfo("a", (2,), "F32")], [], "takes 8 bytes, got 0"),
        ([TensorInfo("a", (2,), "F33")], [], "F33 is not a GGUF type"),
        ([TensorInfo("a" * 64, (2,), "F32")], [], "at most 63 bytes"),
        ([TensorInfo("a", (1,) * 5, "F32")], [], "1 to 4 dims"),
        ([TensorInfo("a", (2,), "F32")] * 2, [bytes(8)] * 2, "appears twice"),
    ],
)
def test_writer_refuses(tmp_path, infos, tensors, error):
    with pytest.raises(UserError, match=error):
        write_gguf(tmp_path / "a.gguf", {}, infos, tensors)
    assert list(tmp_path.iterdir()) == []


def kv(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def info(name=b"t", dims=(32,), kind=0, offset=0):
    return struct.pack(f"<Q{len(name)}sI{len(dims)}QIQ", len(name), name, len(dims), *dims, kind, offset)


def file(kvs=(), infos=(), n_kv=None, n_tensors=None, data=bytes(256), version=3, magic=b"GGUF"):
    n_kv, n_tensors = len(kvs) if n_kv is None else n_kv, len(infos) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join(kvs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


BAD = {
    "empty": (b"", "0 bytes are too few"),
    "magic": (file(magic=b"GGML"), "does not begin with 'GGUF'"),
    "v1": (file(version=1), "version 1"),
    "big-endian": (file(version=3 << 24), "big-endian"),
    "kv count": (file(n_kv=1 << 60), "number of keys is 1152921504606846976"),
    "tensor count": (file(n_tensors=1 << 63), "number of tensors"),
    "key length": (file([struct.pack("<Q", 1 << 62) + b"k" * 60]), "at most 65535"),
    "string length": (file([kv(b"k", 8, struct.pack("<Q", (1 << 64) - 1))]), "needs 18446744073709551615 bytes"),
    "kv type": (file([kv(b"k", 13, bytes(8))]), "unknown type 13"),
    "array count": (file([kv(b"k", 9, struct.pack("<IQ", 10, 1 << 61))]), "more than the file has room for"),
    "string array": (file([kv(b"k", 9, struct.pack("<IQ", 8, 1 << 40))]), "more than the file has room for"),
    "nesting": (file([kv(b"k", 9, struct.pack("<IQ", 9, 1) * 20)]), "nests arrays"),
    "bool": (file([kv(b"k", 7, b"\2")]), "neither 0 nor 1"),
    "utf-8": (file([kv(b"k", 8, struct.pack("<Q", 1) + b"\xff")]), "not UTF-8"),
    "same key": (file([kv(b"k", 0, b"\0")] * 2), "'k' appears twice"),
    "alignment": (file([kv(b"general.alignment", 4, struct.pack("<I", 24))]), "24', not a power of two"),
    "alignment 0": (file([kv(b"general.alignment", 4, bytes(4))]), "not a power of two"),
    "alignment text": (file([kv(b"general.alignment", 8, struct.pack("<Q", 1) + b"x")]), "'x', not a power of two"),
    "dims": (file(infos=[info(dims=(1,) * 5)]), "5 dims"),
    "zero dim": (file(infos=[info(dims=(0, 1 << 60))]), "0 among its dims"),
    "overflow": (file(infos=[info(dims=(1 << 32, 1 << 32))]), "truncated: tensor 't'"),
    "type": (file(infos=[info(kind=4)]), "tensor 't' has the unknown type 4"),
    "row": (file(infos=[info(dims=(33,), kind=8)]), "rows of 33 weights, no multiple of Q8_0's 32"),
    "unaligned": (file(infos=[info(offset=8)]), "no multiple of the alignment"),
    "far offset": (file(infos=[info(offset=(1 << 64) - 32)]), "truncated"),
    "overlap": (file(infos=[info(), info(b"u", offset=96)]), "'u' overlaps"),
    "order": (file(infos=[info(offset=128), info(b"u", offset=0)]), "'u' overlaps"),
    "same name": (file(infos=[info(), info(offset=128)]), "'t' appears twice"),
    "truncated": (file(infos=[info()], data=bytes(127)), "ends at byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_reader_refuses(tmp_path, case):
    raw, error = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(UserError) as e:
        read_gguf(path)
    assert error in str(e.value) and "bad.gguf" in str(e.value) and "\n" not in str(e.value)


def test_reader_names_what_it_cannot_open(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_gguf(path)


def test_version_2(tmp_path):
    (tmp_path / "a").write_bytes(file([kv(b"k", 0, b"\5")], [info()], version=2))
    assert read_gguf(tmp_path / "a").metadata == {"k": 5}


def mutations(raw: bytes, rng, count: int):
    """Flips, overwrites with extreme numbers, cuts, insertions and deletions, mostly in the header."""
    extreme = [0, 1, 8, 9, 255, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1]
    header = raw.index(b"q8") + 60
    for _ in range(count):
        out = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, min(header if rng.random() < 0.9 else len(raw), len(out)) or 1))
            match int(rng.integers(0, 5)):
                case 0:
                    out[at : at + 1] = bytes([int(rng.integers(256))])
                case 1:
                    out[at : at + 8] = struct.pack("<Q", extreme[int(rng.integers(len(extreme)))])
                case 2:
                    del out[at:]
                case 3:
                    out[at:at] = rng.bytes(int(rng.integers(1, 20)))
                case 4:
                    del out[at : at + int(rng.integers(1, 20))]
        yield bytes(out)


@pytest.mark.slow
def test_mutated_files_parse_or_raise_user_error(tmp_path):
    path = tmp_path / "a.gguf"
    small_file(path)
    raw = path.read_bytes()
    outcomes = {True: 0, False: 0}
    tracemalloc.start()
    for mutated in mutations(raw, np.random.default_rng(0), 400):
        path.write_bytes(mutated)
        try:
            f = read_gguf(path)
            for name, e in f.tensors.items():
                assert f.raw(name).size == e.nbytes
                f.array(name) if e.type in DENSE else None
            outcomes[True] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert min(outcomes.values()) > 20, outcomes
