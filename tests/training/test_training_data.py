"""Token files survive and complain; batches are a function of the step, and an epoch shows each window once."""

import json
import tracemalloc

import numpy as np
import pytest

from qjax.errors import UserError
from qjax.training.run.data import Batches, Tokens, description_of, open_tokens, verify, write_tokens


def documents(rng, vocab, count=20):
    return [rng.integers(0, vocab, rng.integers(1, 40)) for _ in range(count)]


def windows_of(length, context, batch, seed=0):
    return Batches(Tokens(np.arange(length, dtype=np.uint32), length, ""), context, batch, seed)


@pytest.mark.parametrize(("vocab", "dtype"), [(300, "<u2"), (65536, "<u2"), (65537, "<u4"), (2**31, "<u4")])
def test_a_file_holds_the_documents_in_order(tmp_path, rng, vocab, dtype):
    texts = [*documents(rng, vocab), [0, vocab - 1], []]
    written = write_tokens(tmp_path / "t.bin", (text for text in texts), vocab)
    expected = np.concatenate(texts).astype(dtype)
    assert (tmp_path / "t.bin").read_bytes() == expected.tobytes()
    tokens = open_tokens(tmp_path / "t.bin")
    assert tokens.vocab == vocab and tokens.values.dtype == np.dtype(dtype) and tokens == written
    assert isinstance(tokens.values, np.memmap) and np.array_equal(tokens.values, expected)
    with pytest.raises(ValueError, match="read-only"):
        tokens.values[0] = 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["t.bin", "t.bin.json"]
    verify(tokens)


def test_documents_are_taken_one_at_a_time(tmp_path):
    """A text of 64 MB from a generator: what is held in between stays far below it."""

    def chunks():
        for _ in range(64):
            yield np.zeros(2**19, np.uint16)

    tracemalloc.start()
    write_tokens(tmp_path / "t.bin", chunks(), 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "t.bin").stat().st_size == 2**26 and peak < 2**24


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ([5, 10], "chunk 1: token 10 lies outside of the vocabulary of 10"),
        ([-1], "token -1 lies outside"),
        ([0.5], "must be a row of integers"),
        ([[1, 2]], "must be a row of integers"),
        (np.array([1], bool), "must be a row of integers"),
    ],
)
def test_a_bad_chunk_leaves_the_old_file(tmp_path, chunk, message):
    write_tokens(tmp_path / "t.bin", [[1, 2, 3]], 10)
    with pytest.raises(UserError, match=message):
        write_tokens(tmp_path / "t.bin", iter([[1], chunk]), 10)
    tokens = open_tokens(tmp_path / "t.bin")
    verify(tokens)
    assert tokens.values.tolist() == [1, 2, 3] and len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="not one token"):
        write_tokens(tmp_path / "t.bin", [[], []], 10)
    for vocab in (0, 2**31 + 1):
        with pytest.raises(UserError, match="1 to 2\\^31"):
            write_tokens(tmp_path / "t.bin", [[0]], vocab)
    with pytest.raises(UserError, match="no such folder"):
        write_tokens(tmp_path / "nowhere" / "t.bin", [[0]], 10)
    assert not list(tmp_path.iterdir())


def test_new_tokens_never_stand_beside_an_old_description(tmp_path, monkeypatch):
    """A kill between the two renames: same size, other bytes; it must not pass for the old text."""
    write_tokens(tmp_path / "t.bin", [[1, 2, 3]], 10)
    monkeypatch.setattr("qjax.training.run.data.write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "t.bin", [[4, 5, 6]], 10)
    with pytest.raises(UserError, match="no description"):
        open_tokens(tmp_path / "t.bin")


def test_damaged_files_are_refused(tmp_path):
    path, facts = tmp_path / "t.bin", description_of(tmp_path / "t.bin")
    with pytest.raises(UserError, match="there is no token file"):
        open_tokens(path)
    write_tokens(path, [range(100)], 100)
    whole, description = path.read_bytes(), json.loads(facts.read_text())

    for size in (0, 1, 100, 199, 201):
        path.write_bytes((whole + b"\0")[:size])
        with pytest.raises(UserError, match=rf"{size} bytes, but t.bin.json says 100 tokens of 2 bytes"):
            open_tokens(path)
    path.write_bytes(whole)

    changes = [{"count": 99}, {"count": "100"}, {"count": 0}, {"dtype": "float32"}, {"vocab": None}, {"sha256": 1}]
    for change in changes:
        facts.write_text(json.dumps(description | change))
        with pytest.raises(UserError, match=r"t\.bin"):
            open_tokens(path)
    for text in ("", "[]", "{"):
        facts.write_text(text)
        with pytest.raises(UserError, match=r"t\.bin\.json"):
            open_tokens(path)
    facts.unlink()
    with pytest.raises(UserError, match="no description"):
        open_tokens(path)

    facts.write_text(json.dumps(description))
    path.write_bytes(b"\1" + whole[1:])  # of the right size, so that only its bytes tell
    with pytest.raises(UserError, match="sha256"):
        verify(open_tokens(path))


@pytest.mark.parametrize(("length", "context", "batch"), [(65, 8, 4), (64, 8, 3), (50, 7, 16), (9, 8, 4), (101, 1, 7)])
def test_each_window_once_an_epoch(length, context, batch):
    """Rows in order of the steps, cut where the epochs end: each part is a permutation of all windows."""
    windows = windows_of(length, context, batch)
    n = len(range(0, length - context, context))  # by brute force: every start that leaves a whole window
    assert windows.count == n
    rows = np.concatenate([windows.index(s) for s in range(4 * n)])
    epochs = rows[: len(rows) // n * n].reshape(-1, n)
    assert rows.dtype == np.int64 and len(epochs) >= 4
    assert all(sorted(epoch) == list(range(0, length - context, context)) for epoch in epochs.tolist())
    if n > 7:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_an_epoch_predicts_each_token_once():
    windows = windows_of(8 * 12 + 1, 8, 4)
    targets = np.concatenate([windows.batch_at(s)[:, 1:].ravel() for s in range(3)])
    assert sorted(targets.tolist()) == list(range(1, 97))


def test_order_is_the_seeded_permutation():
    windows = windows_of(101, 10, 4, seed=7)
    orders = [np.random.default_rng((7, epoch)).permutation(10) for epoch in range(3)]
    flat = np.concatenate(orders) * 10
    for s in (6, 0, 2, 5, 1):  # steps 2 and 5 hold the end of an epoch and the beginning of the next
        assert windows.index(s).tolist() == flat[4 * s : 4 * s + 4].tolist()


def test_batches_are_the_text_at_the_index(tmp_path, rng):
    text = np.concatenate(documents(rng, 300, 60))
    write_tokens(tmp_path / "t.bin", [text], 300)
    windows = Batches(open_tokens(tmp_path / "t.bin"), context=16, batch=5, seed=3)
    for step in (0, 7, 1000):
        batch = windows.batch_at(step)
        assert batch.dtype == np.int32 and batch.shape == (5, 17) and type(batch) is np.ndarray
        assert batch.tolist() == [text[i : i + 17].tolist() for i in windows.index(step)]


def test_resuming_needs_only_the_step(tmp_path, rng):
    write_tokens(tmp_path / "t.bin", documents(rng, 300), 300)

    def opened(seed=0):
        return Batches(open_tokens(tmp_path / "t.bin"), context=8, batch=6, seed=seed)

    through, orders = opened(), {}
    seen = [through.batch_at(s, orders=orders) for s in range(40)]
    assert 1 <= len(orders) <= 2  # epochs gone by are forgotten
    for k in (0, 13, 39):
        assert np.array_equal(opened().batch_at(k), seen[k])
    assert not np.array_equal(opened(seed=1).batch_at(0), seen[0])


def test_processes_share_the_batch():
    windows = windows_of(200, 9, 12)
    for step, processes in ((0, 1), (1, 2), (2, 3), (3, 12)):
        parts = [windows.batch_at(step, p, processes) for p in range(processes)]
        assert all(len(part) == 12 // processes for part in parts)
        assert np.array_equal(np.concatenate(parts), windows.batch_at(step))


def test_what_cannot_be_batched():
    with pytest.raises(UserError, match=r"8 tokens make no window of 9; .* at most 7"):
        windows_of(8, 8, 1)
    for bad in ({"context": 0}, {"batch": 0}, {"seed": -1}):
        with pytest.raises(UserError, match=f"{next(iter(bad))} must be at least"):
            windows_of(**({"length": 100, "context": 8, "batch": 4} | bad))
    windows = windows_of(100, 8, 4)
    with pytest.raises(UserError, match="4 windows does not divide among 3 processes"):
        windows.batch_at(0, 0, 3)
    for process, processes in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match="no process"):
            windows.batch_at(0, process, processes)
    with pytest.raises(UserError, match="count from 0"):
        windows.batch_at(-1)


@pytest.mark.parametrize("values", [np.full(20, 10, np.uint16), np.full(20, -1, np.int32)])
def test_tokens_of_another_vocabulary(values):
    with pytest.raises(UserError, match=r"step 0: token (10|-1) lies outside of the vocabulary of 10"):
        Batches(Tokens(values, 10, ""), 4, 2).batch_at(0)
