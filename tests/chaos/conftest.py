"""A small model with a tokenizer, to damage; QJAX_CHAOS=N runs N times as many cases."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "io"))

import qjax
from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.models.model import Model


def pytest_generate_tests(metafunc):
    """A test that takes `cases` says how many by the mark: `@pytest.mark.cases(20)`."""
    if "cases" in metafunc.fixturenames:
        (count,) = metafunc.definition.get_closest_marker("cases").args
        times = int(os.environ.get("QJAX_CHAOS", "1"))
        metafunc.parametrize("cases", [range(count * times)], ids=[f"{count * times} cases"])


@pytest.fixture(scope="session")
def tiny():
    from small_models import LLAMA, columns, random_params

    config = dataclasses.replace(LLAMA, layers=1, vocab=320)
    return Model(config, random_params(config), bpe_tokenizer(*columns(320), "gpt-2", bos=0, eos=1, add_bos=True))


@pytest.fixture(scope="session")
def model(tiny, tmp_path_factory):
    """Its file."""
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    qjax.save(tiny, path)
    return path
