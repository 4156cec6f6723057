"""Compiling for a TPU on a machine that has none: it wants libtpu, no device."""

import importlib.util
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}


def compiled(kind: str, fn: Any, *shapes: Any) -> tuple[Any, dict[str, int]]:
    """fn compiled for a kind of TPU, and the bundles (instructions, a cycle each) of each Pallas kernel in it.

    Skips the test where libtpu is missing, or jax was not told to leave the TPU alone.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU wants libtpu")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("compiling for a TPU wants JAX_PLATFORMS=cpu, or jax looks for the device")
    dumped, one = _loaded(), topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices[0]
    before, where = set(dumped.iterdir()), SingleDeviceSharding(one)
    made = jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s in shapes)).compile()
    bundles = {}
    for path in set(dumped.glob("*matmul_*schedule-analysis_final_bundles*")) - before:
        name = re.search(r"matmul_\w+", path.name)
        found = re.search(r"total scheduled bundles\D*(\d+)", path.read_text())
        if name and found:
            bundles[name[0]] = int(found[1])
    return made, bundles


@cache
def _loaded() -> Path:
    """The folder that libtpu writes schedules to; it reads these variables once, as it is loaded."""
    folder = Path(tempfile.mkdtemp(prefix="qjax_llo_"))
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    }
    return folder
