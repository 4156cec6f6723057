"""Whole models with one value replaced by nonsense: they load or raise UserError, and nothing hangs or grows."""

import copy
import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
from small_models import LLAMA, random_params

import qjax
from qjax.errors import UserError
from qjax.io import gguf_model
from qjax.io.gguf_read import read_gguf
from qjax.models.model import Model

WEIRD = [[], ["a"], [1, 2], [[1]], "x", "", -1, 0, 1 << 40, True, 1.5, float("nan"), float("inf")]


@pytest.fixture
def model(bpe):
    config = dataclasses.replace(LLAMA, layers=1)
    return Model(config, random_params(config), bpe)


def load(path) -> bool:
    """Whether a model loads; anything but UserError fails the test."""
    try:
        qjax.load(path)
    except UserError as e:
        assert "\n" not in str(e) and path.name in str(e)
        return False
    return True


@pytest.mark.slow
def test_metadata(model, tmp_path):
    qjax.save(model, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    loaded = []
    for key in file.metadata:
        for value in WEIRD:
            changed = dataclasses.replace(file, metadata={**file.metadata, key: value})
            with mock.patch.object(gguf_model, "read_gguf", lambda _, changed=changed: changed):
                loaded.append(load(tmp_path / "m.gguf"))
    assert sum(loaded) < 0.4 * len(loaded)


@pytest.mark.slow
def test_header_bytes(model, tmp_path, rng):
    path = tmp_path / "m.gguf"
    qjax.save(model, path)
    raw = path.read_bytes()
    end = min(e.offset for e in read_gguf(path).tensors.values())
    loaded = 0
    for _ in range(150):
        changed = bytearray(raw)
        changed[int(rng.integers(0, 1500 if rng.random() < 0.5 else end))] = int(rng.integers(256))
        path.write_bytes(changed)
        loaded += load(path)
    assert 0 < loaded < 150


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json(model, tmp_path, rng, name):
    folder = tmp_path / "m"
    qjax.save(model, folder)
    file = folder / name
    spec = json.loads(file.read_text())
    loaded = []
    for path in list(places(spec)):
        values = [*WEIRD, None, {}, {"a": 1}]
        for value in [values[i] for i in rng.choice(len(values), 4, replace=False)]:
            changed = copy.deepcopy(spec)
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            file.write_text(json.dumps(changed))
            loaded.append(load(folder))
    assert name == "tokenizer_config.json" or not all(loaded)  # that one is read leniently


def places(node, path=()):
    """Paths into a JSON value; of long lists and objects the first few."""
    pairs = (
        list(node.items())[:20]
        if isinstance(node, dict)
        else list(enumerate(node))[:2]
        if isinstance(node, list)
        else []
    )
    for key, value in pairs:
        yield (*path, key)
        if "vocab" not in path:
            yield from places(value, (*path, key))


def test_loaded_weights_are_not_views_of_the_file(model, tmp_path):
    path = tmp_path / "m.gguf"
    qjax.save(model, path)
    loaded = qjax.load(path)
    raw = np.fromfile(path, np.uint8)
    np.zeros_like(raw).tofile(path)  # in place, under the same inode
    np.testing.assert_array_equal(
        loaded.params["layers_0"]["attn"]["v"]["kernel"], model.params["layers_0"]["attn"]["v"]["kernel"]
    )
