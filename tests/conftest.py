"""Strict numerics in every test: no silent dtype or rank promotion; shape types are checked at run time."""

import errno
import gc
import os
from collections import defaultdict
from pathlib import Path

import compiled_programs

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's spinning threads starve everything else on small machines
# Before JAX reads its environment; child processes inherit them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_programs.folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import numpy as np
import pytest

pytest_plugins = ["cost"]

gc.set_threshold(50_000, 20, 20)  # tracing makes objects by the million and hardly a cycle: a twelfth of the time

jaxtyping.install_import_hook("qjax", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # what tests mean by a product: no TF32 on a GPU


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`@pytest.mark.sampled(k)`: of a test's cases k, evenly spaced, are for every run; the others are slow tests."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            cases[item.nodeid.split("[")[0]].append(item)
    for same in cases.values():
        (k,) = same[0].get_closest_marker("sampled").args
        kept = {i * len(same) // k for i in range(k)}
        for i, item in enumerate(same):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def folders_that_do_not_sync(monkeypatch):
    """An fsync of any folder fails, as on a disk that is going."""
    real = os.fsync

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def without_type_checks():
    """As users run it: the tests' own checks of argument types would speak before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real text and weights, where it is at hand."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared test data is not on this machine")
    return path


@pytest.fixture(scope="session")
def ggml():
    """The real ggml library (`ggml_c.Ggml`), found through LLAMA_CPP_LIB_PATH."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if not folder:
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    from ggml_c import Ggml

    return Ggml(folder)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_a_file(request):
    """How hard XLA optimizes a file's programs, and that they are forgotten behind it.

    Level 0 compiles in two thirds of the time and shows structure as well. Files whose subject is exact bytes, or that
    an exported value equals the one trained with, say `pytestmark = pytest.mark.optimized` and compile as a user's
    programs do; so do the few that run for longer than they compile. Compiled programs of one file are of no use to the
    next; kept, they grow to several GB.
    """
    level = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimized") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", level)
    jax.clear_caches()
